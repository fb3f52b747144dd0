"""A training set alone, and a test set alone: converted with a warning, trained on, evaluated."""

import json
import re
import shutil

import pytest

from data_prep import convert, lint
from data_prep.synthetic.pedestrians import Scene
from dmosnet_jax.data.splits import split_names
from tests.data_prep import raw_copies

SCENE = Scene(train_ids=4, test_ids=4, cameras=3, images=3, distractors=2, junk=2, image_size=(48, 24))
COPIES = {
    "market1501": ("", "bounding_box_train", ("query", "bounding_box_test"), {}),
    "dukemtmc": ("", "bounding_box_train", ("query", "bounding_box_test"), {}),
    "cuhk03_detected": ("detected", "bounding_box_train", ("query", "bounding_box_test"), {"form": "folders"}),
    "msmt17": ("", "bounding_box_train", ("query", "bounding_box_test"), {"version": "boxes"}),
    "folder": ("", "train", ("query", "gallery"), {}),
}
NO_TEST = "there is no query and no gallery: nothing to evaluate on"
NO_TRAIN = "there is no train: nothing to train on"


@pytest.fixture(scope="module", params=COPIES)
def whole(request, tmp_path_factory):
    """Name of a data set, and a raw copy of all of it."""
    folder = tmp_path_factory.mktemp("whole") / "raw"
    raw_copies.write(request.param, folder, SCENE, **COPIES[request.param][3])
    return request.param, folder


@pytest.fixture
def copy(whole, tmp_path):
    """Name of a data set, its raw copy, and in it the folder of the training set and those of the test set."""
    dataset, folder = whole
    below, train, test, _ = COPIES[dataset]
    root = shutil.copytree(folder, tmp_path / "raw") / below
    return dataset, tmp_path / "raw", root / train, [root / name for name in test]


def run(command, capsys, dataset, *arguments):
    status = command.main(["x", f"--dataset={dataset}", *arguments])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def told_by_both(capsys, dataset, raw):
    """Status, and what is said of the splits, by conversion and by lint before and after it, which agree."""
    data_dir = raw.parent / "data"
    status, _, err = run(convert, capsys, dataset, f"--source={raw}", f"--data_dir={data_dir}")
    said = [line for line in err if "published" not in line]
    found = run(lint, capsys, dataset, f"--source={raw}")
    assert [found[0], *(line for line in found[1] if line.startswith("warning: there"))] == [status, *said]
    after = run(lint, capsys, dataset, f"--data_dir={data_dir}")
    assert [after[0], *(line for line in after[1] if line.startswith("warning: there"))] == [status, *said]
    return status, said


def test_a_training_set_alone(copy, capsys):
    dataset, raw, _, test = copy
    for folder in test:
        shutil.rmtree(folder)
    assert told_by_both(capsys, dataset, raw) == (0, [f"warning: {NO_TEST}"])
    assert split_names(raw.parent / "data", dataset) == ["trainval" if dataset == "msmt17" else "train"]


def test_a_test_set_alone(copy, capsys):
    dataset, raw, train, _ = copy
    shutil.rmtree(train)
    assert told_by_both(capsys, dataset, raw) == (0, [f"warning: {NO_TRAIN}"])
    assert split_names(raw.parent / "data", dataset) == ["gallery", "query"]


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("alone", [False, True])
def test_half_a_test_set_is_refused_by_name(copy, capsys, missing, alone):
    dataset, raw, train, test = copy
    shutil.rmtree(test[missing])
    if alone:
        shutil.rmtree(train)
    names = ("query", "gallery")
    text = f"there is {names[1 - missing]} without {names[missing]}: an evaluation needs both"
    status, out, err = run(convert, capsys, dataset, f"--source={raw}", f"--data_dir={raw.parent / 'data'}")
    assert (status, out, len(err)) == (1, [], 1)
    assert err[0].startswith("error: source ")
    assert text in err[0]
    assert not (raw.parent / "data").exists()
    status, out, err = run(lint, capsys, dataset, f"--source={raw}")
    assert (status, err) == (1, [])
    assert [line for line in out if line.startswith(f"error: {text}")]


def test_a_source_with_neither_is_refused_in_one_line(copy, capsys):
    dataset, raw, train, test = copy
    for folder in (train, *test):
        shutil.rmtree(folder)
        folder.mkdir()
    if dataset == "cuhk03_detected":
        shutil.rmtree(raw / "labeled")
    for command, more in ((convert, [f"--data_dir={raw.parent / 'data'}"]), (lint, [])):
        status, out, err = run(command, capsys, dataset, f"--source={raw}", *more)
        assert (status, out, len(err)) == (1, [], 1)
        assert re.match("error: source .*(has no image to train or to evaluate on|there are no images)", err[0])
    for folder in (train, *test):
        folder.rmdir()
    status, _, err = run(lint, capsys, dataset, f"--source={raw}")
    assert (status, len(err)) == (1, 1)


def test_junk_alone_is_no_test_set(tmp_path, capsys):
    raw_copies.write("market1501", tmp_path / "raw", SCENE)
    shutil.rmtree(tmp_path / "raw" / "query")
    for path in (tmp_path / "raw" / "bounding_box_test").iterdir():
        if not path.name.startswith("-1"):
            path.unlink()
    assert told_by_both(capsys, "market1501", tmp_path / "raw") == (0, [f"warning: {NO_TEST}"])


@pytest.mark.slow
def test_a_training_set_alone_is_trained_on_and_a_test_set_alone_is_evaluated(cli, tiny_flags, tmp_path):
    """The weights of a run without a score are then scored on the other half."""
    scene = Scene(train_ids=8, test_ids=4, cameras=2, images=3, distractors=0, junk=0, image_size=(64, 32))
    for dataset, gone in (("market1501", ("query", "bounding_box_test")), ("dukemtmc", ("bounding_box_train",))):
        raw_copies.write(dataset, tmp_path / dataset, scene)
        for name in gone:
            shutil.rmtree(tmp_path / dataset / name)
        convert.convert(dataset, tmp_path / "data", source=tmp_path / dataset)
    train = tiny_flags("finetune", dataset="market1501", data_dir=tmp_path / "data", **{"train.epochs": 1})
    finished = cli.forked(*train, f"--workdir={tmp_path / 'run'}")
    assert finished.status == 0, finished.err
    assert finished.errors == []
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert not any("mAP" in name for row in rows for name in row)
    assert not (tmp_path / "run" / "results.json").exists()
    test = tiny_flags("evaluate", dataset="dukemtmc", data_dir=tmp_path / "data", checkpoint=tmp_path / "run")
    finished = cli.forked(*test, f"--workdir={tmp_path / 'scores'}")
    assert finished.status == 0, finished.err
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["num_valid_query"] == results["num_query"] == 8
    # Asked for what is not there, each says so in one line.
    line = tiny_flags("evaluate", dataset="market1501", data_dir=tmp_path / "data", checkpoint=tmp_path / "run")
    finished = cli.forked(*line, f"--workdir={tmp_path / 'none'}")
    assert (finished.status, len(finished.errors)) == (1, 1)
    assert "there is no split 'query', there are train" in finished.errors[0]
    line = tiny_flags("finetune", dataset="dukemtmc", data_dir=tmp_path / "data")
    finished = cli.forked(*line, f"--workdir={tmp_path / 'none'}")
    assert (finished.status, len(finished.errors)) == (1, 1)
    assert "there is no split 'train', there are gallery, query" in finished.errors[0]
