"""Two hosts on one machine: network namespaces with a virtual link, file systems of their own, one shared folder."""

import json
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.recipes import small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"),
        reason="makes network namespaces, which takes Linux, iproute2 and root",
    ),
]

# The command line with a network of one block; a lost process is told after a few seconds instead of sixty.
SCRIPT = """
import runpy
from dmosnet_jax.core import processes
from tests.recipes import small

processes.SILENCE_SECONDS = 15
small.register()
runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)
"""

ADDRESSES = ("10.231.7.1", "10.231.7.2")


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """Two network namespaces, each with a hostname, and with a disk of its own at one place."""

    def __init__(self, folder: pathlib.Path):
        self.names = [f"dmosnet-{secrets.token_hex(3)}-{number}" for number in range(2)]
        self.own = folder / "own"
        self.own.mkdir()
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESSES[n]} host{n}\n" for n in range(2)))
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "veth0",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "veth1",
            "netns",
            self.names[1],
        )
        for number, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"veth{number}")
            for device in ("lo", f"veth{number}"):
                ip("-n", name, "link", "set", device, "up")

    def before(self, number: int) -> tuple[str, ...]:
        """What starts a command on a host."""
        prepare = (
            f'hostname host{number}; mount --bind {self.hosts} /etc/hosts; mount -t tmpfs own {self.own}; exec "$@"'
        )
        return ("ip", "netns", "exec", self.names[number], "unshare", "--mount", "--uts", "sh", "-c", prepare, "sh")

    def cut(self) -> None:
        """Packets are lost from now on, both ways."""
        ip("-n", self.names[1], "link", "set", "veth1", "down")

    def mend(self) -> None:
        """The link is as it was."""
        ip("-n", self.names[1], "link", "set", "veth1", "up")

    def close(self) -> None:
        """Removes everything."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def hosts(tmp_path):
    try:
        found = Hosts(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    yield found
    found.close()


@pytest.fixture
def flags(tiny_flags):
    """The function `flags(recipe)`."""
    fields = {"model.name": small.NAME, "model.neck": "bnneck", "train.checkpoint_every_steps": 5}
    return lambda recipe: tiny_flags(recipe, **fields)


@pytest.fixture
def on_both(cli, hosts):
    """The function `on_both(flags, workdir)`: starts a command on both hosts."""
    started = []

    def start(flags, workdir, port):
        job = ["--distributed", f"--coordinator={ADDRESSES[0]}:{port}", "--num_processes=2", f"--workdir={workdir}"]
        ours = [cli.start(*flags, *job, f"--process_id={n}", script=SCRIPT, before=hosts.before(n)) for n in range(2)]
        started.extend(ours)
        return ours

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            process.communicate()


def ends(started, seconds):
    """Status, printed text and error lines of both."""
    until, found = time.monotonic() + seconds, []
    for process in started:
        out, err = process.communicate(timeout=max(0.1, until - time.monotonic()))
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith(("error", "Traceback"))]
        found.append((process.returncode, out, lines))
    return found


def steps(workdir):
    """Steps that are in the log, and their losses."""
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def arrays(workdir, step):
    folder, found = workdir / "checkpoints" / str(step), {}
    with ocp.StandardCheckpointer() as reader:
        for item in ("model", "train"):
            known = reader.metadata(folder / item).item_metadata
            target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), getattr(known, "tree", known))
            found[item] = reader.restore(folder / item, target)
    found["memory"] = {path.name: np.fromfile(path, np.float32) for path in folder.glob("memory/*.bin")}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def test_workdirs_that_are_not_shared_are_refused_on_both_within_half_a_minute(hosts, on_both, flags):
    since = time.monotonic()
    found = ends(on_both(flags("finetune"), hosts.own / "run", 29701), 120)
    print(f"{time.monotonic() - since:.0f} s")
    assert [status for status, _, _ in found] == [2, 2], found
    assert (
        found[0][2]
        == found[1][2]
        == [
            f"error: --workdir={hosts.own}/run: process 1 on host1 does not see what process 0 on host0 writes there: "
            "give a folder that all hosts share (NFS, Lustre, Filestore, ...)"
        ]
    )


@pytest.mark.parametrize("recipe", ["spcl_market1501", "finetune"])
def test_a_link_that_is_cut_ends_both_and_the_same_command_goes_on(hosts, on_both, cli, flags, tmp_path, recipe):
    one, whole, cut = (tmp_path / name for name in ("one", "whole", "cut"))
    alone = cli(*flags(recipe), f"--workdir={one}", script=SCRIPT)
    assert alone.status == 0, alone.err
    found = ends(on_both(flags(recipe), whole, 29702), 900)
    assert [status for status, _, _ in found] == [0, 0], found
    assert "process 1 of 2 on host1: 1 of 2 devices" in found[1][1]
    expected = steps(one)
    np.testing.assert_allclose(steps(whole)[1], expected[1], rtol=1e-5)

    started = on_both(flags(recipe), cut, 29703)
    while max(steps(cut), default=0) < 7:
        assert all(process.poll() is None for process in started), ends(started, 60)
        time.sleep(0.05)
    hosts.cut()
    since = time.monotonic()
    found = ends(started, 120)
    print(f"{time.monotonic() - since:.0f} s", found)
    # A fast machine may have finished before.
    assert [status for status, _, _ in found] == [75, 75], found
    for number, (_, _, lines) in enumerate(found):
        assert len(lines) == 1, lines
        assert f"process {1 - number} on host{1 - number}" in lines[0]
        assert lines[0].endswith("the same command on all hosts goes on from the last checkpoint")

    hosts.mend()
    found = ends(on_both(flags(recipe), cut, 29704), 900)
    assert [status for status, _, _ in found] == [0, 0], found
    assert "goes on from step 5 of 20" in found[0][1]
    assert steps(cut) == steps(whole)
    wanted, got = arrays(whole, 20), arrays(cut, 20)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name, strict=True)
