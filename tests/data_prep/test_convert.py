import io
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_prep import convert, lint
from data_prep.synthetic import pedestrians
from data_prep.synthetic.pedestrians import Scene
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data.splits import load_split

ROOT = pathlib.Path(convert.__file__).resolve().parent.parent
SCENE = Scene(train_ids=4, test_ids=3, cameras=3, images=3, distractors=4, junk=3, image_size=(64, 32))


@pytest.fixture(scope="module")
def raw_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "raw"
    pedestrians.render(folder, SCENE)
    (folder / "query" / "Thumbs.db").write_bytes(b"x")
    (folder / "bounding_box_test" / "._0001_c1s1_000001_00.jpg").write_bytes(b"x")
    return folder


@pytest.fixture
def raw(raw_set, tmp_path):
    return pathlib.Path(shutil.copytree(raw_set, tmp_path / "raw"))


def zipped(folder, path, root="Market-1501-v15.09.15/"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, root + file.relative_to(folder).as_posix())
        archive.writestr(f"__MACOSX/{root}query/._0001_c1s1_000001_00.jpg", b"x")
    return path


def converted(data_dir, dataset="market1501"):
    """Every record of a data set."""
    splits = [load_split(data_dir, dataset, name) for name in ("train", "query", "gallery")]
    return {split.split: [split.record(row) for row in range(len(split))] for split in splits}


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["folder", "parent", "zip"])
def test_bytes_labels_and_order_are_those_of_the_source(raw, tmp_path, kind):
    sources = {"folder": raw, "parent": raw.parent, "zip": zipped(raw, tmp_path / "m.zip") if kind == "zip" else None}
    differences = []
    summary = convert.convert("market1501", tmp_path / "data", source=sources[kind], warn=differences.append)
    records = converted(tmp_path / "data")
    folders = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    for split, folder in folders.items():
        expected = [p for p in sorted((raw / folder).iterdir()) if p.name[0] not in "-.T"]
        assert [r.filename for r in records[split]] == [f"{folder}/{p.name}" for p in expected]
        assert [r.image for r in records[split]] == [p.read_bytes() for p in expected]
        assert [(r.pid, r.camid) for r in records[split]] == [(int(p.name[:4]), int(p.name[6])) for p in expected]
        assert summary.splits[split][0] == len(expected)
    assert (summary.junk, summary.distractors) == (3, 4)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["market1501"]
    assert differences[0] == f"train has {len(records['train'])} images, the published data set 12,936"
    assert len(differences) == 6


def test_tensorflow_datasets_opens_and_decodes_it(raw, tmp_path):
    convert.convert("market1501", tmp_path / "data", source=raw)
    import tensorflow_datasets as tfds

    folder = tmp_path / "data" / "market1501" / "1.0.0"
    builder = tfds.builder_from_directory(folder)
    records = converted(tmp_path / "data")
    assert {name: info.num_examples for name, info in builder.info.splits.items()} == {
        name: len(rows) for name, rows in records.items()
    }
    examples = builder.as_dataset(split="gallery").as_numpy_iterator()
    for record, example in zip(records["gallery"], examples, strict=True):
        want = (record.pid, record.camid, record.filename.encode())
        assert (example["pid"], example["camid"], example["filename"]) == want
        with Image.open(io.BytesIO(record.image)) as image:
            assert np.abs(np.asarray(image, int) - example["image"]).mean() < 2  # two JPEG decoders


def test_no_temporary_files_are_left(raw, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    convert.convert("market1501", tmp_path / "data", source=raw)
    assert not list((tmp_path / "temporary").iterdir())


def test_indices_are_there_and_fit(raw, tmp_path):
    convert.convert("market1501", tmp_path / "data", source=raw)
    before = snapshot(tmp_path / "data")
    assert sum(path.name.endswith(".index.npz") for path in before) == 3
    converted(tmp_path / "data")
    assert snapshot(tmp_path / "data") == before


def test_every_unreadable_image_is_listed_and_nothing_is_left(raw, tmp_path, capsys):
    train, query = (sorted((raw / folder).glob("0*.jpg")) for folder in ("bounding_box_train", "query"))
    train[3].write_bytes(train[3].read_bytes()[:300])
    train[7].write_bytes(b"")
    query[0].write_bytes(b"GIF89a" + bytes(100))
    for source in (raw, zipped(raw, tmp_path / "m.zip")):
        argv = ["convert", "--dataset=market1501", f"--source={source}", f"--data_dir={tmp_path / 'data'}"]
        assert convert.main(argv) == 1
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
        assert len(errors) == 1
        assert errors[0].startswith("error: 3 of ")
        for bad in (train[3], train[7], query[0]):
            assert f"{bad.parent.name}/{bad.name}" in errors[0]
        assert captured.out == ""
        assert not (tmp_path / "data").exists()


def test_existing_set_is_kept_unless_overwritten(raw, tmp_path, capsys):
    argv = ["convert", "--dataset=market1501", f"--source={raw}", f"--data_dir={tmp_path / 'data'}"]
    assert convert.main(argv) == 0
    assert "written to" in capsys.readouterr().out
    before = snapshot(tmp_path / "data")
    gone = sorted((raw / "bounding_box_train").iterdir())[0]
    gone.rename(tmp_path / "kept.jpg")
    assert convert.main(argv) == 0
    assert "is in" in capsys.readouterr().out
    assert snapshot(tmp_path / "data") == before
    # A failing conversion leaves the old one, a good one replaces it.
    gone.write_bytes(b"not an image")
    assert convert.main([*argv, "--overwrite"]) == 1
    assert snapshot(tmp_path / "data") == before
    gone.unlink()
    assert convert.main([*argv, "--overwrite"]) == 0
    names = load_split(tmp_path / "data", "market1501", "train").filenames()
    assert f"bounding_box_train/{gone.name}" not in names
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["market1501"]


def test_summary_names_numbers_and_place(raw, tmp_path, capsys):
    argv = ["convert", "--dataset=market1501", f"--source={raw}", f"--data_dir={tmp_path / 'data'}"]
    assert convert.main(argv) == 0
    captured = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in captured.out.splitlines()}
    records = converted(tmp_path / "data")
    for split, items in records.items():
        ids, cameras = {r.pid for r in items} - {0}, {r.camid for r in items}
        assert rows[split] == [str(len(items)), str(len(ids)), str(len(cameras))]
    assert str(tmp_path / "data" / "market1501" / "1.0.0") in captured.out
    assert "3 junk images (identity -1) left out, 4 distractors" in captured.out
    assert "images/s" in captured.out
    assert captured.err.count("warning: ") == len(captured.err.splitlines()) == 6


def test_synthetic_is_rendered_and_converted(tmp_path, capsys):
    options = [f"--{name}={value}" for name, value in vars(SCENE).items() if name != "image_size"]
    argv = ["convert", "--dataset=synthetic", f"--data_dir={tmp_path / 'data'}", "--image_size=64,32", *options]
    assert convert.main([*argv, f"--source={tmp_path / 'kept'}"]) == 0
    assert (
        convert.main(
            ["convert", "--dataset=synthetic", f"--data_dir={tmp_path / 'two'}", f"--source={tmp_path / 'kept'}"]
        )
        == 0
    )
    # With options, a folder rendered before would not be what was asked for.
    assert convert.main([*argv, f"--source={tmp_path / 'kept'}", "--overwrite"]) == 2
    assert "was rendered before" in capsys.readouterr().err
    shutil.move(tmp_path / "data", tmp_path / "first")
    assert convert.main(argv) == 0
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["synthetic"]
    assert converted(tmp_path / "data", "synthetic") == converted(tmp_path / "first", "synthetic")
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "first") == snapshot(tmp_path / "two")
    with Image.open(io.BytesIO(load_split(tmp_path / "data", "synthetic", "train").record(0).image)) as image:
        assert image.size == (32, 64)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["--dataset=nothing", "--data_dir=d", "--source=s"],
            2,
            "dataset=nothing is unknown: use one of market1501, dukemtmc",
        ),
        (["--data_dir=d", "--source=s"], 2, "--dataset is missing"),
        (["--dataset=market1501", "--source=s"], 2, "--data_dir is missing"),
        (["--dataset=market1501", "--data_dir=d"], 2, "needs source=PATH"),
        (["--dataset=market1501", "--data_dir=d", "--source="], 2, "needs source=PATH"),
        (["--dataset=market1501", "--data_dir=d", "--source=s", "--seed=3"], 2, "is not rendered: leave out"),
        (["--dataset=market1501", "--data_dir=d", "--source=s", "--wat=3"], 2, "wat"),
        (["--dataset=market1501", "--data_dir=d", "--source=s", "extra"], 2, "unexpected argument 'extra'"),
        (["--dataset=synthetic", "--data_dir=d", "--seed=x"], 2, "seed"),
        (["--dataset=synthetic", "--data_dir=d", "--cameras=1"], 2, "cameras=1 is too small"),
        (["--dataset=synthetic", "--data_dir=d", "--image_size=64"], 2, "image_size=(64,)"),
        (["--dataset=synthetic", "--data_dir=d", "--image_size=a,b"], 2, "image_size=a,b must be height,width"),
        (["--dataset=market1501", "--data_dir=d", "--source=nowhere"], 1, "nowhere does not exist"),
    ],
)
def test_bad_commands_end_in_one_line(arguments, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert convert.main(["convert", *arguments]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_help_names_every_flag(capsys):
    assert convert.main(["convert", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("dataset", "source", "data_dir", "overwrite", *vars(SCENE)):
        assert f"--{'[no]' if name == 'overwrite' else ''}{name}" in out


def test_unwritable_place_is_one_line(raw, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    argv = ["convert", "--dataset=market1501", f"--source={raw}", f"--data_dir={tmp_path / 'file'}"]
    assert convert.main(argv) == 1
    assert "cannot write to" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "market1501").write_text("x")
    with pytest.raises(DataError, match="File exists"):
        convert.convert("market1501", tmp_path / "data", source=raw)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["market1501"]


@pytest.mark.parametrize("dataset", ["market1501", "cuhk03_detected", "luperson", "folder"])
def test_what_the_system_refuses_is_one_line(dataset, tmp_path, capsys):
    """Names so long stand for folders that may not be read."""
    source = ["x", f"--dataset={dataset}", f"--source={tmp_path / ('s' * 300)}"]
    for run, place in ((convert, [f"--data_dir={tmp_path / 'data'}"]), (lint, [])):
        assert run.main([*source, *place]) == 1
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1
        assert "File name too long" in told[0]


def test_missing_tensorflow_says_how_to_install(raw, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'dmosnet_jax\[convert\]'"):
        convert.convert("market1501", tmp_path / "data", source=raw)


@pytest.mark.parametrize("dataset", ["market1501", "luperson"])
def test_missing_tensorflow_datasets_says_how_to_install(raw, tmp_path, monkeypatch, dataset):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'dmosnet_jax\[convert\]'"):
        convert.convert(dataset, tmp_path / "data", source=raw)


def test_write_failure_is_one_line_and_leaves_nothing(raw, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.shards, "load_index", full)
    with pytest.raises(DataError, match=r"No space left on device.*: free space"):
        convert.convert("market1501", tmp_path / "data", source=raw)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ended_conversion_is_no_data_set(tmp_path, how, raw):
    data_dir = tmp_path / "data"
    command = [sys.executable, "-m", "data_prep.convert", "--dataset=synthetic", f"--data_dir={data_dir}"]
    # So many images that it is still busy when it is stopped.
    process = subprocess.Popen([*command, "--train_ids=2000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    rendering = data_dir / ".synthetic.incomplete" / ".raw.incomplete" / "bounding_box_train"
    while not (rendering.exists() and len(list(rendering.iterdir())) > 20):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    out, err = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    assert b"Traceback" not in err
    assert out == b""
    with pytest.raises(DataError, match="no data set synthetic"):
        load_split(data_dir, "synthetic", "train")
    assert data_dir.exists() == (how == signal.SIGKILL)
    if how == signal.SIGKILL:
        convert.convert("synthetic", data_dir, source=raw)
        assert [p.name for p in data_dir.iterdir()] == ["synthetic"]


def test_command_is_quiet_and_repeats_bit_for_bit(raw, tmp_path):
    command = [sys.executable, "-m", "data_prep.convert", "--dataset=synthetic", f"--source={raw}"]
    done = subprocess.run([*command, f"--data_dir={tmp_path / 'data'}"], cwd=ROOT, capture_output=True, check=True)
    assert done.stderr == b""
    assert len(done.stdout.splitlines()) == 7
    # In another process protobuf would order the features of a record in another way.
    convert.convert("synthetic", tmp_path / "again", source=raw)
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "again")


def test_reading_needs_no_tensorflow(raw, tmp_path):
    convert.convert("market1501", tmp_path / "data", source=raw)
    code = """if True:
        import sys
        for name in ("tensorflow", "tensorflow_datasets", "apache_beam", "torch", "jax"):
            sys.modules[name] = None
        from dmosnet_jax.data.splits import load_split
        split = load_split(sys.argv[1], "market1501", "gallery")
        print(len(split), split.record(0).filename)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    records = converted(tmp_path / "data")["gallery"]
    assert done.stdout.split() == [str(len(records)), records[0].filename]


@pytest.mark.slow
def test_real_images_are_recorded_byte_for_byte(shared, tmp_path):
    path = shared("data/Market-1501-qq.zip")
    warnings = []
    summary = convert.convert("market1501", tmp_path, source=path, warn=warnings.append)
    assert summary.splits == {"train": (12_936, 751, 6), "query": (2_467, 550, 6), "gallery": (2_467, 550, 6)}
    assert "query has 2,467 images, the published data set 3,368" in warnings
    assert not [text for text in warnings if text.startswith("train")]
    with zipfile.ZipFile(path) as archive:
        wanted = {name for name in archive.namelist() if name.endswith(".jpg")}
        for items in converted(tmp_path).values():
            for record in items:
                name = "Market-1501-v15.09.15/" + record.filename
                assert record.image == archive.read(name)
                wanted.remove(name)
    assert not wanted
