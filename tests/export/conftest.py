"""Writes PyTorch checkpoint files without torch, opcode by opcode, so that tests can also write hostile ones."""

import dataclasses
import io
import pathlib
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + b"R"


def mapping(items: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def stored(storage_type: str, key: str, count: int) -> bytes:
    return group(text("storage"), name("torch", storage_type), text(key), text("cpu"), integer(count)) + b"Q"


def strided(storage: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    sizes, steps = (group(*map(integer, numbers)) for numbers in (shape, strides))
    hooks = call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage, integer(offset), sizes, steps, b"\x89", hooks)


TYPES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


def dense(key: str, array: np.ndarray) -> bytes:
    """The opcodes of a contiguous tensor over a storage of its own."""
    strides = tuple(step // array.itemsize for step in array.strides)
    return strided(stored(TYPES[str(array.dtype)], key, array.size), 0, array.shape, strides)


def state(arrays: dict[str, np.ndarray]) -> tuple[bytes, dict[str, np.ndarray]]:
    """The opcodes of a state dict, and its storages."""
    storages = {str(index): array for index, array in enumerate(arrays.values())}
    body = mapping({key: dense(str(index), array) for index, (key, array) in enumerate(arrays.items())})
    return body, storages


def framed(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zipped(
    body: bytes, storages: dict[str, np.ndarray], *, compression: int = zipfile.ZIP_STORED, order: str | None = "little"
) -> bytes:
    """A file as torch >= 1.6 writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", framed(body))
        if order is not None:
            archive.writestr("archive/byteorder", order)
        for key, array in storages.items():
            swapped = array.astype(array.dtype.newbyteorder(">")) if order == "big" else array
            archive.writestr(f"archive/data/{key}", swapped.tobytes())
    return buffer.getvalue()


def legacy(body: bytes, storages: dict[str, np.ndarray], *, system: bytes | None = None) -> bytes:
    """A file as torch < 1.6 writes it."""
    system = mapping({"protocol_version": integer(1001), "little_endian": b"\x88"}) if system is None else system
    keys = b"](" + b"".join(map(text, storages)) + b"e"
    parts = [framed(part) for part in (integer(0x1950A86A20F9469CFC6C), integer(1001), system, body, keys)]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in storages.values()]
    return b"".join(parts)


class Writer:
    """The functions above, for tests."""

    text, integer, name, group, call, mapping = map(staticmethod, (text, integer, name, group, call, mapping))
    stored, strided, dense, state = map(staticmethod, (stored, strided, dense, state))
    framed, zipped, legacy = map(staticmethod, (framed, zipped, legacy))


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """A convolution, its norm, a BNNeck and a classifier, named as in the reference implementations."""

    name: str = "small"
    num_classes: int = 5

    def init(self, key: jax.Array):
        params = {
            "conv1": {
                "conv": {"kernel": jax.random.normal(key, (3, 3, 3, 4))},
                "bn": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
            },
            "bottleneck": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        }
        if self.num_classes:
            params["classifier"] = {"kernel": jnp.zeros((4, self.num_classes))}
        norm = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
        return params, {"conv1": {"bn": norm}, "bottleneck": norm}

    def shapes(self):
        return jax.eval_shape(self.init, jax.random.key(0))


def small_state(prefix: str = "backbone.", head: str = "heads.bottleneck.0.", classifier: str = "heads.weight"):
    """Weights for `SmallModel` in fast-reid's names, or others."""
    rng = np.random.default_rng(7)
    shapes = {f"{prefix}conv1.conv.weight": (4, 3, 3, 3), classifier: (5, 4)}
    for module in (f"{prefix}conv1.bn.", head):
        shapes |= {f"{module}{leaf}": (4,) for leaf in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{module}num_batches_tracked"] = ()
    arrays = {key: rng.uniform(0.5, 1.5, shape).astype(np.float32) for key, shape in shapes.items()}
    return {key: np.zeros((), np.int64) if key.endswith("tracked") else value for key, value in arrays.items()}


@pytest.fixture
def writer() -> type[Writer]:
    return Writer


@pytest.fixture
def small_model() -> type[SmallModel]:
    return SmallModel


@pytest.fixture
def small_weights():
    return small_state


@pytest.fixture
def put(tmp_path: pathlib.Path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes, filename: str = "weights.pth") -> pathlib.Path:
        path = tmp_path / filename
        path.write_bytes(data)
        return path

    return write
