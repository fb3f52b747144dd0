"""Hostile files: nothing in them is ever run, memory stays bounded, and the answer is one line."""

import io
import os
import pathlib
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save as save_safetensors

from dmosnet_jax.core import safe_pickle
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.export import torch_import


def _payloads(writer, marker: pathlib.Path) -> dict[str, tuple[bytes, str]]:
    """Opcodes that create `marker` where a pickle is executed, and the global to be named in the refusal."""
    command = writer.text(f"touch {marker}")
    python = writer.text(f"open({str(marker)!r}, 'w').close()")
    system, evaluate = writer.name("posix", "system"), writer.name("builtins", "eval")
    popen = writer.name("subprocess", "Popen")
    arguments = b"](" + writer.text("touch") + writer.text(str(marker)) + b"e"
    return {
        "reduce": (writer.call(system, command), "posix.system"),
        "eval": (writer.call(evaluate, python), "builtins.eval"),
        "exec": (writer.call(writer.name("builtins", "exec"), python), "builtins.exec"),
        "popen": (writer.call(popen, arguments), "subprocess.Popen"),
        "stack global": (writer.text("posix") + writer.text("system") + b"\x93" + command + b"\x85R", "posix.system"),
        "inst": (b"(" + command + b"iposix\nsystem\n", "posix.system"),
        "obj": (b"(" + system + command + b"o", "posix.system"),
        "newobj": (popen + arguments + b"\x85\x81", "subprocess.Popen"),
        "newobj with keywords": (popen + arguments + b"\x85}\x92", "subprocess.Popen"),
        "nested": (writer.call(writer.call(writer.name("builtins", "getattr"), system, command), command), "getattr"),
        "python 2": (writer.call(writer.name("__builtin__", "eval"), python), "__builtin__.eval"),
        "partial": (writer.call(writer.name("functools", "partial"), system, command), "functools.partial"),
        "torch loads": (writer.call(writer.name("torch.serialization", "load"), command), "torch.serialization.load"),
        "type that looks right": (writer.call(writer.name("torch", "FloatStorage.eval"), command), "FloatStorage.eval"),
        "dotted": (
            writer.text("collections") + writer.text("abc.sys.modules") + b"\x93",
            "collections.abc.sys.modules",
        ),
    }


def _hiding_places(writer, payload: bytes) -> dict[str, bytes]:
    weights = {"w": np.ones(4, np.float32)}
    body, storages = writer.state(weights)
    beside = writer.mapping({"state_dict": body, "hook": payload})
    namespace = writer.call(writer.name("argparse", "Namespace")) + payload + b"b"
    storage = writer.stored("FloatStorage", "0", 4)
    argument = writer.mapping({"w": writer.strided(storage, 0, (4,), (1,))[:-2] + payload + b"tR"})
    return {
        "alone": writer.zipped(payload, {}),
        "beside": writer.zipped(beside, storages),
        "beside, legacy": writer.legacy(beside, storages),
        "system info": writer.legacy(body, storages, system=payload),
        "state of a namespace": writer.zipped(writer.mapping({"state_dict": body, "args": namespace}), storages),
        "tensor argument": writer.zipped(argument, storages),
        "dict key": writer.zipped(b"}(" + payload + writer.integer(1) + b"u", {}),
        "storage identifier": writer.zipped(writer.mapping({"w": payload + b"Q"}), {}),
        "popped": writer.zipped(payload + b"0" + body, storages),
        "plain pickle": writer.framed(payload),
    }


def test_the_payloads_would_work(writer, tmp_path):
    marker = tmp_path / "ran"
    for kind in ("reduce", "eval", "stack global", "inst", "obj"):
        pickle.loads(writer.framed(_payloads(writer, marker)[kind][0]))
        assert marker.exists(), kind
        marker.unlink()


def test_calls_are_refused_by_name_and_never_run(writer, put, tmp_path):
    marker = tmp_path / "ran"
    for kind, (payload, global_name) in _payloads(writer, marker).items():
        for place, data in _hiding_places(writer, payload).items():
            with pytest.raises(DataError) as caught:
                torch_import.load(put(data))
            message = str(caught.value)
            assert global_name in message, (kind, place, message)
            assert "nothing was run" in message, (kind, place)
            assert "\n" not in message, (kind, place)
            assert not marker.exists(), (kind, place)


def test_names_in_messages_are_one_printable_line(writer, put):
    hostile = writer.text("evil\n\x1b[31m") + writer.text("x" * 10_000) + b"\x93"
    with pytest.raises(DataError) as caught:
        torch_import.load(put(writer.zipped(hostile, {})))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def _deep(opcode: bytes, depth: int) -> bytes:
    return b")" + opcode * depth


def _bombs(writer) -> dict[str, bytes]:
    tensor = writer.strided(writer.stored("FloatStorage", "0", 2**40), 0, (2**40,), (1,))
    doubling = (
        b"]" + b"q\x00" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60))
    )
    key = _deep(b"\x85", 50_000)
    return {
        "memo index": writer.framed(b"Nr" + struct.pack("<I", 2**31 - 1) + b"0}"),
        "declared text": b"\x80\x02X" + struct.pack("<I", 2**31) + b"a.",
        "declared bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
        "declared bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.",
        "long digits": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
        "long integer": b"\x80\x02\x8b" + struct.pack("<i", 500_000) + b"\x7f" * 500_000 + b".",
        "doubling lists": writer.zipped(doubling, {}),
        "deep tuple as a key": writer.zipped(b"}" + key + b"Ns", {}),
        "deep lists": writer.zipped(b"]" * 60_000 + b"a" * 59_999, {}),
        "deep dicts": writer.zipped((b"}" + writer.text("model")) * 20_000 + b"}" + b"s" * 20_000, {}),
        "marks": writer.zipped(b"(" * 50_000, {}),
        "declared storage": writer.zipped(writer.mapping({"w": tensor}), {"0": np.ones(4, np.float32)}),
        "declared storage, legacy": writer.legacy(writer.mapping({"w": tensor}), {"0": np.ones(4, np.float32)}),
        "safetensors header": struct.pack("<Q", 2**62) + b"{}",
        "safetensors shape": save_safetensors({"w": np.zeros(4, np.float32)}).replace(b"[4]", b"[9]"),
    }


def _overlapping_zip(size: int, count: int) -> bytes:
    """A zip whose directory lists one stored entry many times under other names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data/0", b"\0" * size)
        first = archive.infolist()[0]
        for index in range(1, count):
            twin = zipfile.ZipInfo(f"archive/data/{index}")
            twin.header_offset, twin.CRC = first.header_offset, first.CRC
            twin.compress_size = twin.file_size = size
            archive.filelist.append(twin)
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    return buffer.getvalue()


def _peak(path: pathlib.Path) -> tuple[str, int]:
    """The refusal's text and the peak of memory beyond what was there before, in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            torch_import.load(path)
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_bombs_are_refused_within_bounded_memory(writer, put):
    for bomb, data in _bombs(writer).items():
        message, peak = _peak(put(data))
        assert "\n" not in message, bomb
        # Nested containers cost about a hundred bytes per opcode; a bomb would cost a thousand times more.
        assert peak < 300 * len(data) + 2_000_000, bomb


def test_overlapping_zip_entries_are_refused(put):
    message, peak = _peak(put(_overlapping_zip(200_000, 200)))
    assert "zip" in message
    assert peak < 2_000_000


def test_too_many_opcodes(writer, put, monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_OPCODES", 1_000)
    with pytest.raises(DataError, match="more than 1,000 opcodes"):
        torch_import.load(put(writer.framed(b"N0" * 1_000)))


def _mutants(rng: np.random.Generator, base: bytes, count: int):
    for _ in range(count):
        data = bytearray(base)
        kind = rng.integers(5)
        at = int(rng.integers(len(data)))
        if kind == 0:
            del data[at:]
        elif kind == 1:
            for position in rng.integers(len(data), size=int(rng.integers(1, 12))):
                data[position] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 40)))
        else:
            start = int(rng.integers(len(data)))
            data[at:at] = data[start : start + int(rng.integers(1, 200))]
        yield bytes(data)


def _mutated_pickles(rng: np.random.Generator, writer, body: bytes, storages, count: int):
    """Damage within the pickle of a sound zip, where no checksum notices it."""
    for mutant in _mutants(rng, body, count):
        yield writer.zipped(mutant, storages)


def _renamed_and_reshaped(rng: np.random.Generator, writer, weights, count: int):
    names = list(weights)
    for _ in range(count):
        changed = dict(weights)
        name = names[int(rng.integers(len(names)))]
        array = changed.pop(name)
        if rng.integers(2):
            changed[name] = rng.normal(size=rng.integers(0, 4, size=int(rng.integers(0, 6)))).astype(np.float32)
        elif rng.integers(2):
            changed["".join(map(chr, rng.integers(1, 0x300, size=12)))] = array
        yield (writer.zipped if rng.integers(2) else writer.legacy)(*writer.state(changed))


def _mutated_payloads(rng: np.random.Generator, writer, marker: pathlib.Path):
    """One damaged version of every hostile file."""
    for payload, _ in _payloads(writer, marker).values():
        for data in _hiding_places(writer, payload).values():
            yield from _mutants(rng, data, 1)


def test_mutated_files_end_in_weights_or_one_line(writer, put, small_weights, small_model, tmp_path_factory):
    """More than 1,000 damaged files: one line of ours, or weights of the model's shapes; never anything else."""
    marker = tmp_path_factory.mktemp("elsewhere") / "ran"
    rng = np.random.default_rng(11)
    weights, model = small_weights(), small_model()
    body, storages = writer.state(weights)
    sound = [writer.zipped(body, storages), writer.legacy(body, storages), save_safetensors(weights)]
    files = [mutant for base in sound for mutant in _mutants(rng, base, 180)]
    files += _mutated_pickles(rng, writer, body, storages, 250)
    files += _renamed_and_reshaped(rng, writer, weights, 150)
    files += _mutated_payloads(rng, writer, marker)
    assert len(files) > 1000
    accepted = refused = 0
    tracemalloc.start()
    try:
        for data in files:
            path = put(data)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            problem = None
            try:
                params, _ = torch_import.convert(torch_import.load(path), model)
            except DataError as error:
                problem = str(error)
            if problem is None:
                assert params["conv1"]["conv"]["kernel"].shape == (3, 3, 3, 4)
                accepted += 1
            else:
                assert problem.isprintable()
                refused += 1
            assert tracemalloc.get_traced_memory()[1] - before < 20_000_000
            assert not marker.exists()
    finally:
        tracemalloc.stop()
    assert refused > 500
    assert accepted > 20
    assert not [name for name in os.listdir(path.parent) if name != path.name]
