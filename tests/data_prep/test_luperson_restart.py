"""LUPerson: conversions that were stopped or killed, that are there already, or are behind a URL."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import uuid

import pytest

from data_prep import convert
from data_prep.write import pool, shards
from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data.splits import load_split
from tests.data_prep import raw_copies
from tests.data_prep.luperson_case import ROOT, SCENE, SMALL, jpegs, rows, run, snapshot


def test_a_stopped_conversion_goes_on_without_redoing_shards(raw, tmp_path, monkeypatch):
    source, labels = raw()
    run(source, tmp_path / "whole")
    original, calls = shards._write, []

    def failing(stage, plan, number, progress):
        calls.append(number)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return original(stage, plan, number, progress)

    monkeypatch.setattr(shards, "_write", failing)
    with pytest.raises(DataError, match=r"cannot write to .*No space left on device.*finished shards are kept"):
        run(source, tmp_path / "data")
    stage = tmp_path / "data" / ".luperson.incomplete"
    finished = {p.name for p in (stage / "done").iterdir()}
    assert len(finished) >= 3
    files = {p.name: p.stat().st_ino for p in (stage / "dataset").iterdir() if p.name.split("-")[2] in finished}
    # One of them is lost, and something that a killed process left.
    lost = sorted(finished)[0]
    next((stage / "dataset").glob(f"*-{lost}-of-?????")).write_bytes(b"short")
    (stage / "dataset" / "luperson-train.tfrecord-00004-of-00006.abc.part").write_bytes(b"half")
    before = len(calls)
    summary, warnings = run(source, tmp_path / "data")
    assert not {int(name) for name in finished - {lost}} & set(calls[before:])
    assert int(lost) in calls[before:]
    assert any(text.startswith("goes on with a conversion that was stopped") for text in warnings)
    assert "were converted before" in str(summary)
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "whole")
    folder = tmp_path / "data" / "luperson" / "1.0.0"
    kept = [name for name in files if name.split("-")[2] != lost]
    assert all((folder / name).stat().st_ino == files[name] for name in kept)
    assert len(rows(tmp_path / "data")) == len(labels)


def test_without_a_terminal_progress_is_told_in_lines(pictures, tmp_path, monkeypatch, capsys):
    source = pictures(tmp_path / "raw", 600)
    run(source, tmp_path / "one")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(pool, "_REPORT", 0.0)
    run(source, tmp_path / "two")
    lines = capsys.readouterr().err.splitlines()
    form = re.compile(r"converted (\d+) of 600 images, [\d,]+ images/s, \d\d:\d\d left")
    counts = [int(form.fullmatch(line)[1]) for line in lines]
    assert counts == sorted(counts)
    assert 0 < counts[-1] <= 600


def test_another_source_or_size_begins_anew(pictures, tmp_path, monkeypatch):
    source = pictures(tmp_path / "raw", 300)
    original = shards._write

    def failing(stage, plan, number, progress):
        if number == 2:
            raise OSError(5, "Input/output error")
        return original(stage, plan, number, progress)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", failing)
        for options in ({}, {"names": "numbers"}, {}):
            with pytest.raises(DataError, match="Input/output error"):
                run(source, tmp_path / "data", **options)
    place = source / "c0" / "city" / "v0"
    (place / "more.jpg").write_bytes((place / "000000.jpg").read_bytes())
    summary, warnings = run(source, tmp_path / "data")
    assert not any("goes on" in text for text in warnings)
    assert summary.splits["train"][0] == 301
    assert summary.notes == ()


def test_existing_set_is_kept_unless_overwritten(raw, tmp_path):
    source, _ = raw()
    run(source, tmp_path)
    before = snapshot(tmp_path)
    assert run(source, tmp_path) == (None, [])
    assert snapshot(tmp_path) == before
    options = SMALL | {"names": "numbers"}
    convert.convert("luperson", tmp_path, source=source, options=options, overwrite=True)
    assert rows(tmp_path)[0].filename == "00_00_0000_00000000.jpg"
    assert [p.name for p in tmp_path.iterdir()] == ["luperson"]


def test_remote_data_dir_holds_what_a_local_one_does(raw, tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setenv("DMOSNET_CACHE", str(tmp_path / "cache"))
    source, _ = raw()
    root = f"memory://{uuid.uuid4().hex}/data"
    run(source, tmp_path / "data")
    summary, _ = run(source, root)
    assert summary.folder == f"{root}/luperson/1.0.0"
    local = {str(path): content for path, content in snapshot(tmp_path / "data" / "luperson" / "1.0.0").items()}
    assert {e.name: files.read(files.join(summary.folder, e.name)) for e in files.entries(summary.folder)} == local
    assert [e.name for e in files.entries(root)] == ["luperson"]
    assert rows(root) == rows(tmp_path / "data")
    assert run(source, root) == (None, [])
    # A source behind a URL too.
    for path in jpegs(source):
        files.copy(path, f"{root}/raw/{path.relative_to(source).as_posix()}")
    convert.convert("luperson", root, source=f"{root}/raw", options=SMALL, overwrite=True)
    assert rows(root) == rows(tmp_path / "data")


def test_other_data_sets_can_be_remote_too(tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setenv("DMOSNET_CACHE", str(tmp_path / "cache"))
    raw_copies.write("market1501", tmp_path / "raw", SCENE)
    root = f"memory://{uuid.uuid4().hex}"
    summary = convert.convert("market1501", root, source=tmp_path / "raw")
    assert str(summary).startswith(f"written to {root}/market1501/1.0.0\n")
    convert.convert("market1501", tmp_path / "data", source=tmp_path / "raw")
    for name in ("train", "query", "gallery"):
        here, there = (load_split(place, "market1501", name) for place in (tmp_path / "data", root))
        assert [here.record(i) for i in range(len(here))] == [there.record(i) for i in range(len(there))]
    assert convert.convert("market1501", root, source=tmp_path / "raw") is None


@pytest.mark.slow
def test_killed_half_way_it_goes_on_to_the_same_files(pictures, tmp_path):
    source = pictures(tmp_path / "raw", 12_000)
    data_dir, stage = tmp_path / "data", tmp_path / "data" / ".luperson.incomplete"
    options = ["--shard_mib=0.25", f"--source={source}"]
    command = [sys.executable, "-m", "data_prep.convert", "--dataset=luperson", f"--data_dir={data_dir}", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (stage / "done").exists() or len(list((stage / "done").iterdir())) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = _children(process.pid)
    assert workers
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _wait_for_the_end_of(workers)
    with pytest.raises(DataError, match="no data set luperson"):
        load_split(data_dir, "luperson", "train")
    total = len(json.loads((stage / "plan.json").read_text())["images"])
    finished = {p.name for p in (stage / "done").iterdir()}
    assert 3 <= len(finished) < total
    inodes = {p.name: p.stat().st_ino for p in (stage / "dataset").iterdir() if p.name.split("-")[2] in finished}
    # Stopped politely in the middle of it, with one line and no process left.
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (len(list((stage / "done").iterdir())) > len(finished)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert lines == ["interrupted; finished shards are kept, the same command goes on"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    assert [line for line in done.stderr.splitlines() if not line.startswith("warning: ")] == []
    assert "were converted before" in done.stdout
    folder = data_dir / "luperson" / "1.0.0"
    assert all((folder / name).stat().st_ino == inode for name, inode in inodes.items())
    assert [p.name for p in data_dir.iterdir()] == ["luperson"]
    convert.convert("luperson", tmp_path / "whole", source=source, options=SMALL | {"shard_mib": 0.25})
    assert snapshot(data_dir) == snapshot(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_at_once(pictures, tmp_path):
    source = pictures(tmp_path / "raw", 12_000)
    data_dir, stage = tmp_path / "data", tmp_path / "data" / ".luperson.incomplete"
    options = ["--shard_mib=0.25", "--workers=2", f"--source={source}"]
    command = [sys.executable, "-m", "data_prep.convert", "--dataset=luperson", f"--data_dir={data_dir}", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((stage / "done").glob("[0-9]" * 5)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    workers = _children(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    begin = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert (process.returncode, out) == (1, "")
    [line] = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: one of 2 worker processes was killed, perhaps for want of memory")
    assert "finished shards are kept, the same command goes on" in line
    _wait_for_the_end_of(workers)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    assert "were converted before" in done.stdout
    convert.convert("luperson", tmp_path / "whole", source=source, options=SMALL | {"shard_mib": 0.25})
    assert snapshot(data_dir) == snapshot(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "message"),
    [("sdk_worker_main", "a worker of Beam was killed"), ("spawn_main", "the pipeline's process was killed")],
)
def test_a_killed_process_of_beam_ends_the_run_at_once(pictures, tmp_path, killed, message):
    source = pictures(tmp_path / "raw", 2_000)
    data_dir, stage = tmp_path / "data", tmp_path / "data" / ".luperson.incomplete"
    beam = "--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2"
    options = ["--shard_mib=0.03", f"--source={source}", f"--beam_options={beam}"]
    command = [sys.executable, "-m", "data_prep.convert", "--dataset=luperson", f"--data_dir={data_dir}", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # The folder is there before the first result in it is whole.
    while not list((stage / "done").glob("[0-9]" * 5)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    [pipeline] = _children(process.pid)
    workers = _children(pipeline, "sdk_worker_main")
    os.kill(workers[0] if killed == "sdk_worker_main" else pipeline, signal.SIGKILL)
    begin = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"error: shards were not written: {message}")
    assert err.splitlines()[-1].endswith("finished shards are kept, the same command goes on")
    assert "Traceback" not in err
    _wait_for_the_end_of([pipeline, *workers])
    assert not (data_dir / "luperson").exists()
    summary, warnings = run(source, data_dir, shard_mib=0.03)
    assert "goes on with a conversion that was stopped" in "".join(warnings)
    assert summary.splits["train"][0] == 2_000


def _children(pid, name="spawn_main"):
    """Worker processes; the one that looks after semaphores is none."""
    # Without -ww, lines end at the terminal's width, before the name where the interpreter's path is long.
    command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if name in line]


def _wait_for_the_end_of(workers):
    deadline = time.monotonic() + 20
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        return b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
