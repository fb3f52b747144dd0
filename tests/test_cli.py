"""Bad commands and bad data, given to the command line: one line each, the right exit status, nothing left behind."""

import io
import os
import pathlib
import pickle
import shutil

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from dmosnet_jax import models
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent


def refused(finished, status, *parts):
    """Asserts that a command ended in one line that has all parts, in order."""
    assert finished.status == status, finished.err
    assert len(finished.errors) == 1, finished.err
    line = finished.errors[0]
    assert line.startswith("error: ")
    place = 0
    for part in parts:
        assert part in line[place:], line
        place += line[place:].index(part) + len(part)


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A workdir with a checkpoint of osnet_x0_25, as a run leaves it."""
    workdir = tmp_path_factory.mktemp("trained")
    model = models.build("osnet_x0_25", image_size=(64, 32))
    mesh = make_mesh(jax.devices()[:1])
    state = train_state.create(*model.init(jax.random.key(0)), optax.identity(), seed=0, mesh=mesh)
    store = Checkpoints(workdir)
    settings = {"name": model.name, "attention": list(model.attention), "neck": model.neck, "pool": model.pool}
    store.save(state, {"model": settings, "config": {}, "loop": {}})
    store.close()
    return workdir


@pytest.fixture
def data(tiny_data, tmp_path):
    """A copy of the tiny data set to damage: its folder and the flag that points to it."""
    shutil.copytree(tiny_data, tmp_path / "data")
    return tmp_path / "data" / "tiny" / "1.0.0", f"--config.data_dir={tmp_path / 'data'}"


CONFIG = f"--config={ROOT}/configs"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--config is not set", "configs/quickstart.py"]),
        ([f"{CONFIG}/nowhere.py"], ["configs/nowhere.py: no such file"]),
        ([f"{CONFIG}/finetune.py", "--config.nonsense=1"], ["nonsense"]),
        ([f"{CONFIG}/finetune.py", "--config.optim.nonsense=1"], ["nonsense"]),
        ([f"{CONFIG}/finetune.py", "--nonsense=1"], ["nonsense"]),
        ([f"{CONFIG}/finetune.py", "nonsense"], ["'nonsense' is not understood"]),
        ([f"{CONFIG}/finetune.py", "--config.batch_size=many"], ["batch_size", "many"]),
        ([f"{CONFIG}/finetune.py", "--config.image_size=large"], ["image_size", "large"]),
        ([f"{CONFIG}/finetune.py:colour=3"], ["config argument 'colour=3' is not known: use dataset=..."]),
        ([f"{CONFIG}/finetune.py:epochs=many"], ["config argument epochs='many' must be of type int"]),
        ([f"{CONFIG}/finetune.py", "--config.batch_size=0"], ["batch_size=0 must be greater than 0"]),
        (
            [f"{CONFIG}/finetune.py", "--config.batch_size=65"],
            ["batch_size=65 is not a multiple of sampler.instances=4"],
        ),
        ([f"{CONFIG}/finetune.py", "--config.optim.schedule=linear"], ["optim.schedule='linear'", "use one of step"]),
        ([f"{CONFIG}/finetune.py", "--config.optim.name=lamb"], ["optim.name='lamb' is not known: use one of adam"]),
        (
            [f"{CONFIG}/spcl_market1501.py", "--config.spcl.eps_gap=0.7"],
            ["spcl.eps=0.6 with spcl.eps_gap=0.7", "must lie between 0 and 1"],
        ),
        ([f"{CONFIG}/evaluate.py"], ["checkpoint is not set: give --config.checkpoint=PATH (a run's workdir, an"]),
        ([f"{CONFIG}/extract.py"], ["images is not set: give --config.images=PATH"]),
    ],
)
def test_bad_commands(cli, tmp_path, arguments, parts):
    refused(cli.forked(*arguments, f"--workdir={tmp_path / 'run'}"), 2, *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("def get_config(:", ["invalid syntax"]),
        ("import nowhere", ["No module named 'nowhere'"]),
        ("x = 1", ["get_config"]),
        ("def get_config():\n    return 1 / 0", ["division by zero"]),
    ],
)
def test_broken_config_files(cli, tmp_path, content, parts):
    (tmp_path / "own.py").write_text(content)
    refused(cli.forked(f"--config={tmp_path / 'own.py'}"), 2, *parts)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"model.name": "osnet_x9"}, ["model.name='osnet_x9' is not known: use one of", "osnet_x0_25"]),
        ({"model.neck": "long"}, ["model.neck='long' is not known"]),
        ({"model.dtype": "float8"}, ["model.dtype='float8' is not known"]),
        ({"image_size": "(60, 32)"}, ["image_size=(60, 32): the height must be a multiple of 16", "48 or 64"]),
        ({"loss.triplet": "cube"}, ["loss.triplet='cube' is not known: use one of hinge, soft, none"]),
        ({"dataset": "../tiny"}, ["dataset='../tiny' is not a name"]),
        (
            {"batch_size": 64, "model.bn_group_size": 0, "sampler.instances": 2},
            ["needs 32 identities per batch", "has 8"],
        ),
    ],
)
def test_settings_that_do_not_fit_model_or_data(cli, tiny_flags, tmp_path, fields, parts):
    refused(cli.forked(*tiny_flags("finetune", **fields), f"--workdir={tmp_path / 'run'}"), 2, *parts)
    assert [name for name in files_in(tmp_path) if "config.json" not in name] == []


def test_a_batch_that_the_devices_can_not_share(cli, tiny_flags, tmp_path):
    flags = tiny_flags("finetune", batch_size=20, **{"model.bn_group_size": 0})
    finished = cli.forked(*flags, f"--workdir={tmp_path / 'run'}", devices=8)
    refused(finished, 2, "batch_size=20 can't be split over 8 devices", "e.g. 24")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["finetune", "spcl_market1501", "evaluate"])
def test_missing_data_gives_the_conversion_command(cli, tiny_flags, checkpoint, tmp_path, recipe):
    fields = {"checkpoint": checkpoint} if recipe == "evaluate" else {}
    where = tmp_path / "nowhere"
    finished = cli.forked(*tiny_flags(recipe, data_dir=where, **fields), f"--workdir={tmp_path / 'run'}")
    command = f"python -m data_prep.convert --dataset=tiny --source=PATH --data_dir={where}"
    refused(finished, 1, "no data set tiny", command)
    assert list(tmp_path.iterdir()) == []


def shards(folder, split):
    return sorted(p for p in folder.glob(f"tiny-{split}.tfrecord-*") if p.name[-1].isdigit())


def test_a_workdir_at_a_url_is_refused(cli, tiny_flags):
    refused(cli.forked(*tiny_flags("finetune"), "--workdir=gs://bucket/run"), 2, "gs://bucket/run", "not a URL")
    assert not list(cli.folder.glob("gs:*"))


def test_a_workdir_in_the_home_folder(cli, tiny_flags, checkpoint, tmp_path):
    finished = cli(*tiny_flags("evaluate", checkpoint=checkpoint), "--workdir=~/run", HOME=str(tmp_path))
    assert finished.status == 0, finished.err
    assert (tmp_path / "run" / "results.json").is_file()
    assert not list(cli.folder.glob("~*"))


@pytest.mark.parametrize(("recipe", "split"), [("finetune", "train"), ("evaluate", "gallery")])
def test_a_truncated_shard(cli, tiny_flags, checkpoint, data, tmp_path, recipe, split):
    folder, flag = data
    fields = {"checkpoint": checkpoint} if recipe == "evaluate" else {}
    shard = shards(folder, split)[1]
    os.truncate(shard, shard.stat().st_size - 100)
    finished = cli.forked(*tiny_flags(recipe, **fields), flag, f"--workdir={tmp_path / 'run'}")
    refused(finished, 1, str(shard), "is cut short")
    assert files_in(tmp_path / "run") == []


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(("recipe", "split"), [("spcl_market1501", "train"), ("evaluate", "query")])
def test_a_flipped_byte_is_found_and_named(cli, tiny_flags, checkpoint, data, tmp_path, recipe, split, indexed):
    folder, flag = data
    fields = {"checkpoint": checkpoint} if recipe == "evaluate" else {}
    for index in folder.glob("*.index.npz"):
        if not indexed:
            index.unlink()
    shard = shards(folder, split)[0]
    content = bytearray(shard.read_bytes())
    # In the middle, where a checksum of the file's ends does not see it.
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    finished = cli.forked(*tiny_flags(recipe, **fields), flag, f"--workdir={tmp_path / 'run'}")
    refused(finished, 1, str(shard), "record ", "at byte ", "is corrupt")
    assert not [name for name in files_in(tmp_path / "run") if "checkpoints" in name or "results" in name]


def test_damaged_jpeg_in_a_sound_record(cli, tiny_flags, tiny_writer, tmp_path):
    tiny_writer(tmp_path / "data", picture=lambda *unused: b"\xff\xd8\xff not an image")
    flags = tiny_flags("finetune", data_dir=tmp_path / "data")
    finished = cli.forked(*flags, f"--workdir={tmp_path / 'run'}")
    refused(finished, 1, "tiny image ", "train/", "replace the file and convert again")


def test_a_checkpoint_of_another_model(cli, tiny_flags, checkpoint, tmp_path):
    flags = [*tiny_flags("evaluate", checkpoint=checkpoint, **{"model.name": "osnet_x0_5"}), f"--workdir={tmp_path}"]
    refused(cli.forked(*flags), 1, str(checkpoint), "holds name='osnet_x0_25', but config.model.name='osnet_x0_5'")
    assert list(tmp_path.iterdir()) == []


def torch_file(path, shapes):
    """A state dict in the container that torch.save has written since 1.6, without torch."""
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)


def test_a_foreign_file_of_another_model(cli, tiny_flags, tmp_path):
    weights = tmp_path / "other.safetensors"
    torch_file(weights, {"conv1.conv.weight": (64, 3, 7, 7), "conv1.bn.weight": (64,), "fc.0.weight": (512, 512)})
    flags = [*tiny_flags("evaluate", checkpoint=weights), f"--workdir={tmp_path / 'run'}"]
    refused(cli.forked(*flags), 1, str(weights), "osnet_x0_25")
    assert files_in(tmp_path) == ["other.safetensors"]


@pytest.mark.parametrize("field", ["checkpoint", "pretrained"])
def test_missing_weights(cli, tiny_flags, tmp_path, field):
    recipe = "evaluate" if field == "checkpoint" else "finetune"
    for name in ("nowhere.pth", "nowhere/best"):
        flags = [*tiny_flags(recipe, **{field: tmp_path / name}), f"--workdir={tmp_path / 'run'}"]
        refused(cli.forked(*flags), 1, str(tmp_path / name))
    (tmp_path / "empty").mkdir()
    flags = [*tiny_flags(recipe, **{field: tmp_path / "empty"}), f"--workdir={tmp_path / 'run'}"]
    refused(cli.forked(*flags), 1, str(tmp_path / "empty"), "no checkpoint here: give a run's workdir")
    assert files_in(tmp_path) == []


class Payload:
    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self._marker}",)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pth.tar", "weights.pt"])
def test_a_malicious_pickle_is_not_run(cli, tiny_flags, tmp_path, name):
    marker, weights = tmp_path / "marker", tmp_path / name
    buffer = io.BytesIO()
    pickle.dump({"state_dict": {"conv1.conv.weight": Payload(marker)}}, buffer, protocol=2)
    weights.write_bytes(buffer.getvalue())
    flags = [*tiny_flags("evaluate", checkpoint=weights), f"--workdir={tmp_path / 'run'}"]
    refused(cli.forked(*flags), 1, str(weights))
    assert files_in(tmp_path) == [name]
    pickle.loads(buffer.getvalue())
    assert marker.exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04" + b"\0" * 40])
def test_a_file_that_holds_no_weights(cli, tiny_flags, tmp_path, content):
    weights = tmp_path / "weights.pth"
    weights.write_bytes(content)
    refused(cli.forked(*tiny_flags("evaluate", checkpoint=weights), f"--workdir={tmp_path / 'run'}"), 1, str(weights))


@pytest.mark.parametrize("name", ["model/_METADATA", "model/manifest.ocdbt", "meta/metadata"])
def test_a_damaged_checkpoint_folder(cli, tiny_flags, checkpoint, tmp_path, name):
    shutil.copytree(checkpoint, tmp_path / "trained")
    folder = tmp_path / "trained" / "checkpoints" / "0"
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    flags = tiny_flags("evaluate", checkpoint=tmp_path / "trained")
    refused(cli.forked(*flags, f"--workdir={tmp_path / 'run'}"), 1, str(folder), "damaged", name, "remove this folder")


def test_a_workdir_of_another_run(cli, tiny_flags, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    before = files_in(tmp_path)
    finished = cli.forked(*tiny_flags("finetune"), f"--workdir={tmp_path / 'run'}")
    refused(finished, 1, "its checkpoint at step 0 is of another run", "give another --workdir")
    assert files_in(tmp_path) == before


def test_a_workdir_that_can_not_be_made(cli, tiny_flags, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    for flags in (tiny_flags("finetune"), tiny_flags("evaluate", checkpoint=checkpoint)):
        refused(cli.forked(*flags, f"--workdir={tmp_path / 'file'}"), 1, str(tmp_path / "file"))
    assert files_in(tmp_path) == ["file"]


def test_spcl_without_a_single_cluster(cli, tiny_flags, tmp_path):
    flags = tiny_flags("spcl_market1501", **{"spcl.eps": 0.001, "spcl.eps_gap": 0.0005, "spcl.min_samples": 40})
    finished = cli.forked(*flags, f"--workdir={tmp_path / 'run'}")
    refused(finished, 1, "not one cluster among 48 images at eps=0.001, min_samples=40")
    assert not [name for name in files_in(tmp_path) if "checkpoints/" in name]


@pytest.mark.parametrize("kind", ["nowhere", "empty", "text"])
def test_images_that_are_not_there(cli, tiny_flags, checkpoint, tmp_path, kind):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jpg").write_text("text")
    output = tmp_path / "features.npz"
    flags = tiny_flags("extract", images=tmp_path / kind, checkpoint=checkpoint, output=output)
    refused(cli.forked(*flags), 1, str(tmp_path / kind) if kind != "text" else "a.jpg")
    assert files_in(tmp_path) == ["text/a.jpg"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([f"{CONFIG}/finetune.py", "--config.batchsize=8"], ["--config.batchsize: ", "did you mean batch_size"]),
        ([f"{CONFIG}/finetune.py", "--config.lr=1"], ["--config.lr: this config has no such field"]),
        ([f"{CONFIG}/finetune.py", f"--config.seed={10**24}"], ["seed=1000000000000000000000000 must be at most"]),
        ([f"{CONFIG}/finetune.py", "--config.image_size=(100000, 100000)"], ["no side may have more than 4096 pixels"]),
        (
            [f"{CONFIG}/extract.py:images=a,checkpoint=b.pth,output=f.csv"],
            ["output='f.csv': features are written as .npz"],
        ),
        (
            [f"{CONFIG}/export.py:checkpoint=a.pth,output=b.h5"],
            ["b.h5: .h5 is no form that is written: use one of .safetensors"],
        ),
    ],
)
def test_odd_commands(cli, tmp_path, arguments, parts):
    refused(cli.forked(*arguments, f"--workdir={tmp_path / 'run'}"), 2, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_below_what_is_no_folder(cli, tiny_flags, checkpoint):
    finished = cli.forked(*tiny_flags("evaluate", checkpoint=checkpoint), "--workdir=/proc/nope/x")
    refused(finished, 1, "/proc/nope/x", "can't be made")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("b.jpg", 40), ("a.jfif", 90), ("c.png", 200)):
        Image.new("RGB", (20, 50), (colour, 9, 90)).save(folder / name, "png" if name == "c.png" else "jpeg")
    return folder


def test_extraction_counts_what_it_leaves_out(cli, tiny_flags, checkpoint, photos, tmp_path):
    for name in ("d.gif", "e.heic", ".hidden.jpg", "broken.jpg", "notes.txt"):
        (photos / name).write_bytes(b"GIF89a")
    (photos / "linked").symlink_to(tmp_path)
    output = tmp_path / "f.npz"
    flags = tiny_flags("extract", images=photos, checkpoint=checkpoint, output=output)
    refused(cli.forked(*flags), 1, "broken.jpg", "replace or remove the file, or set --config.skip_broken=True")
    assert not output.exists()
    finished = cli.forked(*flags, "--config.skip_broken=True")
    assert finished.status == 0, finished.err
    assert "left out: 4 files are no images by name: 1 .gif, 1 .heic, 1 no suffix, 1 .txt, e.g. d.gif" in finished.out
    assert "left out: 1 of 4 images can't be read: broken.jpg (not an image" in finished.out
    with np.load(output) as arrays:
        assert arrays["files"].tolist() == ["a.jfif", "b.jpg", "c.png"]
        assert len(arrays["features"]) == 3


def test_results_are_not_overwritten_without_being_told(cli, tiny_flags, checkpoint, photos, tmp_path):
    output = tmp_path / "f.npz"
    output.write_bytes(b"mine")
    flags = tiny_flags("extract", images=photos, checkpoint=checkpoint, output=output)
    refused(cli.forked(*flags), 1, "f.npz: exists already", "--config.overwrite=True")
    assert output.read_bytes() == b"mine"
    assert cli.forked(*flags, "--config.overwrite=True").status == 0
    assert np.load(output)["features"].shape[0] == 3
    exported = tmp_path / "w.pth"
    exported.write_bytes(b"mine")
    flags = [f"{CONFIG}/export.py", f"--config.checkpoint={checkpoint}", f"--config.output={exported}"]
    refused(cli.forked(*flags), 1, "w.pth: exists already")
    assert cli.forked(*flags, "--config.overwrite=True").status == 0
    assert exported.stat().st_size > 1000


@pytest.mark.parametrize("recipe", ["extract", "export"])
def test_devices_are_not_replaced(cli, tiny_flags, checkpoint, photos, tmp_path, recipe):
    for name in ("pipe.npz", "pipe.pth", "pipe"):
        os.mkfifo(tmp_path / name)
    name = "pipe.npz" if recipe == "extract" else "pipe.pth"
    flags = [f"{CONFIG}/{recipe}.py", f"--config.checkpoint={checkpoint}", "--config.overwrite=True"]
    flags += [f"--config.images={photos}", "--config.image_size=(64, 32)"] if recipe == "extract" else []
    refused(cli.forked(*flags, f"--config.output={tmp_path / name}"), 1, name, "something else than an earlier result")
    assert (tmp_path / name).is_fifo()


def test_home_means_home_in_every_path(cli, tiny_flags, checkpoint, photos, tmp_path):
    flags = tiny_flags("extract", images="~/photos", checkpoint="~/trained", output="~/new/f.npz")
    shutil.copytree(checkpoint, tmp_path / "trained")
    finished = cli(*flags, HOME=str(tmp_path))
    assert finished.status == 0, finished.err
    assert (tmp_path / "new" / "f.npz").is_file()
    assert not list(cli.folder.glob("~*"))


def test_resuming_with_another_optimiser_names_the_field(cli, tiny_flags, tmp_path):
    flags = [*tiny_flags("finetune", **{"model.name": "small", "train.steps_per_epoch": 2}), f"--workdir={tmp_path}"]
    assert cli.forked(*flags, "--config.train.epochs=1").status == 0
    refused(cli.forked(*flags, "--config.optim.name=sgd"), 1, "of another run: optim.name='sgd' (was 'adam')")


def test_a_full_disk_is_one_line_and_the_last_one(cli, tiny_flags, tmp_path):
    flags = [*tiny_flags("finetune", **{"train.steps_per_epoch": 6}), f"--workdir={tmp_path}"]
    script = "import runpy, resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    script += "import jax\njax.config.update('jax_enable_compilation_cache', False)\n"
    script += "runpy.run_module('dmosnet_jax.main', run_name='__main__', alter_sys=True)\n"
    finished = cli.forked(*flags, script=script)
    assert finished.status == 1
    assert finished.errors[-1].startswith("error: ")
    assert "checkpoint can't be written" in finished.errors[-1]
    assert [line for line in finished.errors[:-1] if "Warning" not in line and "warn" not in line] == []
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()] == []
