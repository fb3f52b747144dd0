"""Training reads from an S3 server on the loopback, through s3fs, with latency and failures."""

import subprocess
import sys
import time

import numpy as np
import pytest

from dmosnet_jax.core import files
from dmosnet_jax.data import splits

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

# argv: seconds that a read of a shard takes, and the share of them that fail.
SERVER = """
import random, sys, threading, time
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

seconds, failing = map(float, sys.argv[1:])
app, rng, lock = DomainDispatcherApplication(create_backend_app), random.Random(0), threading.Lock()

def distant(environment, start):
    if environment["REQUEST_METHOD"] == "GET" and "tfrecord" in environment["PATH_INFO"]:
        time.sleep(seconds)
        with lock:
            fails = rng.random() < failing
        if fails:
            # A gateway's answer, and one that no client asks for again by itself.
            start("503 Slow Down" if rng.random() < 0.5 else "400 Bad Request", [])
            return [b""]
    return app(environment, start)

class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"
    def log(self, *unused): pass

server = make_server("127.0.0.1", 0, distant, threaded=True, request_handler=Quiet)
print(server.port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The function `store(local, seconds, failing)`: URL of a copy of a folder on such a server."""
    monkeypatch.setenv("DMOSNET_CACHE", str(tmp_path / "cache"))
    started = []

    def start(local, seconds, failing):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER, str(seconds), str(failing)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        options = {"endpoint_url": f"http://127.0.0.1:{int(process.stdout.readline())}", "key": "k", "secret": "s"}
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
        for path in local.rglob("*"):
            if path.is_file():
                files.copy(path, f"s3://bucket/data/{path.relative_to(local).as_posix()}")
        return "s3://bucket/data"

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("failing", [0.0, 0.05])
def test_an_epoch_from_s3(store, tiny_data, monkeypatch, failing):
    monkeypatch.setattr(files, "_FIRST_WAIT", 0.01)
    here, there = (splits.load_split(root, "tiny", "train") for root in (tiny_data, store(tiny_data, 0.03, failing)))
    rows = np.random.default_rng(0).integers(0, len(here), 320)
    there.read_many(rows[:32])
    since = time.perf_counter()
    assert there.read_many(rows) == here.read_many(rows)
    together = (time.perf_counter() - since) / len(rows)
    since = time.perf_counter()
    for row in rows[:32]:
        there.record(int(row))
    alone = (time.perf_counter() - since) / 32
    print(f"{1 / together:.0f} records/s together, {1 / alone:.0f} one after the other")
    # The server and the client share this machine's processors, which bound it before the latency does.
    assert failing or together < alone / 2
