"""The score of every image: against a direct computation, killed and continued, and used for training."""

import json
import shutil
import signal

import jax
import numpy as np
import optax
import pytest

from configs import cfs_luperson
from dmosnet_jax import models
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.data import rankings
from dmosnet_jax.data.splits import load_split
from dmosnet_jax.evaluation.extract import Extractor
from dmosnet_jax.export.weights import open_weights
from dmosnet_jax.recipes import cfs, chunks
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints
from tests.recipes import small

FILES = ["contact_sheet.png", "names.txt", "results.json", "run.json", "scores.npz"]

# Runs the command line, and kills the process when chunk argv[1] has been written.
KILLED = """
import os, runpy, signal, sys
from dmosnet_jax.recipes.chunks import Chunks

last = int(sys.argv.pop(1))
original = Chunks.write

def killing(self, number, *rest):
    original(self, number, *rest)
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)

Chunks.write = killing
from tests.recipes import small

small.register()
runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)
"""


def trained(workdir, seed, **options):
    """A workdir with a checkpoint, as a run leaves it."""
    small.register()
    model = models.build(small.NAME, **{"image_size": (64, 32), **options})
    mesh = make_mesh(jax.devices()[:1])
    state = train_state.create(*model.init(jax.random.key(seed)), optax.identity(), seed=0, mesh=mesh)
    store = Checkpoints(workdir)
    settings = {"name": model.name, "neck": model.neck, "image_size": list(model.image_size)}
    store.save(state, {"model": settings, "config": {}, "loop": {}})
    store.close()
    return workdir


@pytest.fixture(scope="module")
def proxies(tmp_path_factory):
    """Workdirs of two networks."""
    folder = tmp_path_factory.mktemp("proxies")
    return [trained(folder / f"{seed}", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def config_of(tiny_data, proxies):
    """The function `config_of(**fields)`: scores the tiny data set in three chunks of 16."""

    def make(**fields):
        config = cfs_luperson.get_config("tiny")
        config.data_dir = str(tiny_data)
        config.checkpoint_pretrained, config.checkpoint_finetuned = map(str, proxies)
        config.eval.batch_size, config.cfs.chunk_images, config.data.threads = 16, 16, 1
        config.update_from_flattened_dict(fields)
        return config.lock()

    return make


@pytest.fixture(scope="module")
def whole(config_of, tmp_path_factory):
    """Workdir and results of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, cfs.run(config_of(), workdir)


@pytest.fixture
def split(tiny_data):
    return load_split(tiny_data, "tiny", "train")


def files_in(folder):
    return sorted(p.name for p in folder.iterdir())


def content_of(workdir):
    return {name: (workdir / name).read_bytes() for name in ("names.txt", "contact_sheet.png", "results.json")} | {
        "scores": np.load(workdir / "scores.npz")["scores"].tobytes()
    }


def test_scores_are_the_cosine_of_the_two_embeddings(whole, proxies, split):
    workdir, results = whole
    assert files_in(workdir) == FILES
    features = []
    for folder in proxies:
        opened = open_weights(folder)
        model = opened.model()
        extractor = Extractor(model, make_mesh(), batch_size=48, threads=0)
        features.append(extractor(*opened.arrays(model), split).astype(np.float64))
    first, second = features
    expected = (first * second).sum(1) / np.sqrt((first**2).sum(1) * (second**2).sum(1))
    scores = rankings.read_scores(workdir / "scores.npz", split)
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert np.ptp(scores) > 1e-3
    # Best first, and what is best is kept.
    names = (workdir / "names.txt").read_text().splitlines()
    assert names == split.filenames(np.argsort(-scores, kind="stable"))
    assert json.loads((workdir / "results.json").read_text()) == results
    assert results["scores"]["0%"] == scores.max()
    assert results["scores"]["100%"] == scores.min()
    assert (results["images"], results["better_half"]) == (48, 24)


def test_an_interrupted_run_goes_on_and_ends_the_same(config_of, whole, tmp_path, monkeypatch, capsys):
    original = chunks.Chunks.write
    written = []

    def interrupted(self, number, *rest):
        original(self, number, *rest)
        written.append(number)
        if number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chunks.Chunks, "write", interrupted)
    workdir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        cfs.run(config_of(), workdir)
    assert files_in(workdir) == ["chunks", "run.json"]
    # A chunk cut short and what a killed process leaves in the middle of one are no obstacles.
    first = workdir / "chunks" / "000000.npz"
    first.write_bytes(first.read_bytes()[:-40])
    (workdir / "chunks" / "000002.npz.0123.part").write_bytes(b"half")
    written.clear()
    monkeypatch.setattr(chunks.Chunks, "write", lambda *args: (original(*args), written.append(args[1])))
    capsys.readouterr()
    cfs.run(config_of(), workdir)
    assert f"goes on in {workdir}: 16 of 48 images are scored" in capsys.readouterr().out
    assert written == [0, 2]
    assert files_in(workdir) == FILES
    assert content_of(workdir) == content_of(whole[0])
    # A run that is over scores nothing again, and puts back what is missing.
    written.clear()
    for name in ("contact_sheet.png", "names.txt"):
        (workdir / name).unlink()
    cfs.run(config_of(), workdir)
    assert written == []
    assert content_of(workdir) == content_of(whole[0])


@pytest.mark.slow
def test_killed_on_the_command_line(cli, tiny_flags, proxies, whole, tmp_path, split):
    fields = {"checkpoint_pretrained": proxies[0], "checkpoint_finetuned": proxies[1], "cfs.chunk_images": 16}
    flags = [flag for flag in tiny_flags("cfs_luperson", **fields) if ".model." not in flag]
    command = [*flags, f"--workdir={tmp_path / 'run'}"]
    finished = cli.forked("0", *command, script=KILLED)
    assert finished.status == -signal.SIGKILL
    assert files_in(tmp_path / "run") == ["chunks", "run.json"]
    finished = cli.forked(*command)
    assert finished.status == 0, finished.err
    assert finished.errors == []
    assert f"goes on in {tmp_path / 'run'}: 16 of 48 images are scored" in finished.out
    assert files_in(tmp_path / "run") == FILES
    # One device here, eight there.
    one, eight = (rankings.read_scores(folder / "scores.npz", split) for folder in (tmp_path / "run", whole[0]))
    np.testing.assert_allclose(one, eight, atol=1e-5)


def test_a_workdir_of_another_run_is_refused(config_of, whole, proxies, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    before = content_of(workdir)
    for fields, changed in (
        ({"checkpoint_finetuned": str(proxies[0])}, "checkpoint_finetuned"),
        ({"split": "gallery"}, "split, data"),
        ({"cfs.chunk_images": 8}, "chunk_images"),
        ({"pixel_mean": (0.5, 0.5, 0.5)}, "checkpoint_pretrained, checkpoint_finetuned"),
    ):
        with pytest.raises(DataError, match=rf"holds the scores of a run with another {changed}: give"):
            cfs.run(config_of(**fields), workdir)
    assert content_of(workdir) == before
    # The same checkpoints may have moved, and batches may have another size.
    moved = [shutil.copytree(folder, tmp_path / folder.name) for folder in proxies]
    fields = {"checkpoint_pretrained": str(moved[0]), "checkpoint_finetuned": str(moved[1]), "eval.batch_size": 8}
    cfs.run(config_of(**fields), workdir)


def test_proxies_that_do_not_go_together_are_refused(config_of, proxies, tmp_path):
    other = trained(tmp_path / "other", 0, image_size=(32, 16))
    with pytest.raises(ConfigError, match=r"image_size: checkpoint_pretrained has \(64, 32\), checkpoint_f"):
        cfs.run(config_of(checkpoint_finetuned=str(other)), tmp_path / "run")
    longer = trained(tmp_path / "longer", 0, neck="fc")
    with pytest.raises(DataError, match=r"gives embeddings of 64 values and .*longer of 512: their cosine needs"):
        cfs.run(config_of(checkpoint_finetuned=str(longer)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"checkpoint_pretrained": ""},
            ConfigError,
            "checkpoint_pretrained is not set: give --config",
        ),
        ({"checkpoint_finetuned": "nowhere.pth"}, DataError, r"nowhere\.pth"),
        ({"split": "val"}, DataError, "there is no split 'val'"),
        ({"dataset": "duke"}, DataError, r"no data set duke .*python -m data_prep\.convert --dataset=duke"),
    ],
)
def test_bad_commands(config_of, tmp_path, fields, error, message):
    with pytest.raises(error, match=message) as caught:
        cfs.run(config_of(**fields), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_on_the_better_half(cli, tiny_flags, whole, proxies, tmp_path):
    path = whole[0] / "scores.npz"

    def train(share):
        fields = {
            "model.name": small.NAME,
            "train.epochs": 1,
            "train.steps_per_epoch": 3,
            "data.subset": f'("cfs", "{path}", {share})',
        }
        flags = tiny_flags("spcl_market1501", pretrained=proxies[0], **{"model.neck": "bnneck"} | fields)
        return cli.forked(*flags, f"--workdir={tmp_path / 'run'}")

    finished = train(0.5)
    assert finished.status == 0, finished.err
    assert finished.errors == []
    assert f"tiny train: 24 of 48 images, the best by {path}" in finished.out
    assert "24 images, 1 epochs of 3 steps" in finished.out
    # The same half after a restart; another share is another run.
    finished = train(0.5)
    assert finished.status == 0, finished.err
    assert "goes on from step 3 of 3" in finished.out
    finished = train(0.25)
    assert finished.status == 1
    assert "is of another run: images=12 (was 24); subset=" in finished.err


def test_a_list_that_does_not_fit_ends_in_one_line(cli, tiny_flags, tmp_path):
    (tmp_path / "list.txt").write_text("elsewhere/1.png\n")
    for path, status, part in (
        (tmp_path / "list.txt", 1, "none of its 1 names"),
        (tmp_path / "nowhere.pkl", 1, "can't be read"),
    ):
        flags = tiny_flags("spcl_market1501", **{"data.subset": f'("cfs", "{path}", 0.5)'})
        finished = cli.forked(*flags, f"--workdir={tmp_path / 'run'}")
        assert (finished.status, len(finished.errors)) == (status, 1), finished.err
        assert finished.errors[0].startswith(f"error: {path}: {part}")
    flags = tiny_flags("spcl_market1501", **{"data.subset": '("cfs", "list.txt", 50)'})
    finished = cli.forked(*flags, f"--workdir={tmp_path / 'run'}")
    assert finished.status == 2
    assert finished.errors == [
        "error: data.subset=('cfs', 'list.txt', 50): the share must be greater than 0 and at most 1, e.g. "
        '("cfs", "runs/cfs/scores.npz", 0.5)'
    ]
    assert not (tmp_path / "run").exists()
