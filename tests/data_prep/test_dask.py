"""Conversion by many machines: Beam on a Dask cluster of worker processes, of which one may be killed."""

import contextlib
import subprocess
import sys
import time

import pytest

from tests.data_prep.luperson_case import ROOT, run, snapshot

pytest.importorskip("distributed", reason="Dask is not installed (extra `test`)")

SCHEDULER = """
import asyncio, distributed

async def main():
    async with distributed.Scheduler(port=0, host="127.0.0.1", dashboard_address=None) as scheduler:
        print(scheduler.address, flush=True)
        await scheduler.finished()

asyncio.run(main())
"""
# Writing takes so long that a worker can be killed in the middle.
WORKER = """
import asyncio, sys, time, distributed
from data_prep.write import shards

write_shard = shards.write_shard

def slowly(stage, number):
    open(f"{sys.argv[2]}/{number}", "a").write(f"{sys.argv[3]}\\n")
    time.sleep(0.3)
    return write_shard(stage, number)

shards.write_shard = slowly

async def main():
    async with distributed.Worker(sys.argv[1], nthreads=1, dashboard_address=None) as worker:
        print("ready", flush=True)
        await worker.finished()

asyncio.run(main())
"""


@pytest.fixture
def cluster(tmp_path):
    """Address of the scheduler, two worker processes, and a folder that tells who began which shard."""
    begun = tmp_path / "begun"
    begun.mkdir()
    with contextlib.ExitStack() as stack:

        def start(code, *args):
            command = [sys.executable, "-c", code, *args]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process, process.stdout.readline().strip()

        _, address = start(SCHEDULER)
        workers = [start(WORKER, address, str(begun), str(number))[0] for number in range(2)]
        yield address, workers, begun


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_two_workers_write_the_bytes_of_one_machine(pictures, tmp_path, cluster, killed):
    address, workers, begun = cluster
    source = pictures(tmp_path / "raw", 200)
    run(source, tmp_path / "here", shard_mib=0.01)
    words = ["--dataset=luperson", f"--source={source}", f"--data_dir={tmp_path / 'there'}", "--shard_mib=0.01"]
    words += [f"--beam_options=--runner=DaskRunner --dask_client_address={address}"]
    command = [sys.executable, "-m", "data_prep.convert", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while len(list(begun.iterdir())) < 5 and process.poll() is None:
            time.sleep(0.02)
        for worker in workers[:killed]:
            worker.kill()
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert snapshot(tmp_path / "there") == snapshot(tmp_path / "here")
    writers = [path.read_text().split() for path in begun.iterdir()]
    assert {name for names in writers for name in names} == {"0", "1"}
    # What the killed one had begun, the other one did.
    assert all(names[-1] == "1" for names in writers if len(names) > 1)
