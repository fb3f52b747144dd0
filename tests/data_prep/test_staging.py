import os
import pathlib
import subprocess
import sys

import pytest

from data_prep.write import staging
from dmosnet_jax.core.errors import DataError


def test_stage_is_empty_then_gone(tmp_path):
    root = tmp_path / "a" / "b"
    with staging.staging(root, "market1501") as stage:
        assert stage.parent == root
        assert not list(stage.iterdir())
        (stage / "folder").mkdir()
        (stage / "folder" / "file").write_text("x")
    assert not (tmp_path / "a").exists()
    with pytest.raises(KeyboardInterrupt), staging.staging(root, "market1501"):
        raise KeyboardInterrupt
    assert not (tmp_path / "a").exists()


def test_what_is_published_stays(tmp_path):
    target = tmp_path / "data" / "set" / "1.0.0"
    for content in ("first", "second"):
        with staging.staging(tmp_path / "data", "set") as stage:
            (stage / "new").mkdir()
            (stage / "new" / content).write_text("x")
            staging.publish(stage / "new", target)
        assert [p.name for p in target.iterdir()] == [content]
        assert [p.name for p in (tmp_path / "data").iterdir()] == ["set"]


def test_a_replacement_that_was_killed_half_way_loses_nothing(tmp_path):
    """Between its two renames the old data set is aside and the new one not yet there."""
    (tmp_path / "set" / ".1.0.0.replaced").mkdir(parents=True)
    (tmp_path / "set" / ".1.0.0.replaced" / "old").write_text("x")
    with pytest.raises(KeyboardInterrupt), staging.staging(tmp_path, "set"):
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["1.0.0"]
    assert (tmp_path / "set" / "1.0.0" / "old").read_text() == "x"
    # Killed after them, the old one is still to be removed.
    (tmp_path / "set" / ".1.0.0.replaced").mkdir()
    with staging.staging(tmp_path, "set"):
        pass
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["1.0.0"]


def test_failed_publication_keeps_the_old(tmp_path):
    target = tmp_path / "set" / "1.0.0"
    target.mkdir(parents=True)
    (target / "old").write_text("x")
    with (
        staging.staging(tmp_path, "set") as stage,
        pytest.raises(DataError, match=r"cannot write .*1\.0\.0 \(No such file"),
    ):
        staging.publish(stage / "nothing", target)
    assert [p.name for p in target.iterdir()] == ["old"]
    with staging.staging(tmp_path, "other") as stage:
        (stage / "new").mkdir()
        (tmp_path / "other").write_text("a file where the folder should be")
        with pytest.raises(DataError, match="File exists"):
            staging.publish(stage / "new", tmp_path / "other" / "1.0.0")


def test_second_conversion_of_the_same_is_refused_while_the_first_runs(tmp_path):
    code = (
        "import sys, pathlib, data_prep.write.staging as s\n"
        "with s.staging(pathlib.Path(sys.argv[1]), 'set') as stage:\n"
        "    (stage / 'left').write_text('x'); print('ready', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(staging.__file__).parents[2],
    )
    try:
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(DataError, match="another conversion is writing"), staging.staging(tmp_path, "set"):
            pass
        with staging.staging(tmp_path, "other"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / ".set.incomplete" / "left").exists()
    # Its lock went with it; its rubbish goes now.
    with staging.staging(tmp_path, "set") as stage:
        assert not list(stage.iterdir())
    assert not list(tmp_path.iterdir())


def test_unusable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(DataError, match=r"cannot write to .*: give another data_dir"),
        staging.staging(tmp_path / "file", "a"),
    ):
        pass


def test_a_stage_left_behind_a_published_data_set_is_swept(tmp_path):
    """Killed between the move to its place and the removal of the stage."""
    stage = tmp_path / ".set.incomplete"
    (stage / "done").mkdir(parents=True)
    staging.sweep(tmp_path, "set", "dataset")
    assert not stage.exists()
    staging.sweep(tmp_path, "set")
    # What is still to be moved is of another conversion, which goes on.
    (stage / "dataset").mkdir(parents=True)
    staging.sweep(tmp_path, "set", "dataset")
    assert (stage / "dataset").exists()
    with staging.staging(tmp_path, "set", keep=True):
        staging.sweep(tmp_path, "set")
        assert (stage / "dataset").exists()


def test_content_is_on_the_disk_before_a_data_set_has_its_name(tmp_path, monkeypatch):
    synced, target = [], tmp_path / "data" / "set" / "1.0.0"
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, target.exists())))
    with staging.staging(tmp_path / "data", "set") as stage:
        (stage / "new").mkdir()
        (stage / "new" / "shard").write_text("x")
        number = (stage / "new" / "shard").stat().st_ino
        staging.publish(stage / "new", target)
    assert (number, False) in synced
