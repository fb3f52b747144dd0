"""What the names in a PyTorch checkpoint mean, as data: storages and tensors by reference.

A tensor in a checkpoint is a call of `torch._utils._rebuild_tensor_v2` on a storage that lives outside the pickle. Here
the call becomes a `TensorRef`; nothing is read until a tensor is wanted, and then only within its storage's bytes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dmosnet_jax.core.errors import DataError, printable
from dmosnet_jax.core.safe_pickle import Global, Opaque

_MAX_DIMENSIONS = 16
# Elements; keeps every product of checked sizes within NumPy's 63 bits.
_MAX_SIZE = 2**48

# Element types as NumPy codes without byte order; bfloat16 is spelled out because NumPy has none.
_STORAGE_TYPES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "bool",
    "UntypedStorage": "u1",
}
_DTYPES = {
    "float32": "f4",
    "float": "f4",
    "float64": "f8",
    "double": "f8",
    "float16": "f2",
    "half": "f2",
    "bfloat16": "bfloat16",
    "int64": "i8",
    "int32": "i4",
    "int16": "i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "bool",
}
_MODULES_OF_STORAGES = ("torch.", "torch.cuda.", "torch.storage.")

# Classes that trainers save beside the weights. All of them become `Opaque`, so the list is a matter of telling an odd
# checkpoint from an attack, not of trust: what is not listed is refused with its name.
_INERT = frozenset(
    f"{module}.{name}"
    for module, names in {
        "argparse": "Namespace",
        "builtins": "set frozenset complex bytearray object list dict tuple int float str bool bytes slice range",
        "__builtin__": "set frozenset complex bytearray object list dict tuple int long float str unicode bool bytes",
        "collections": "defaultdict Counter deque",
        "copyreg": "_reconstructor __newobj__",
        "copy_reg": "_reconstructor __newobj__",
        "_codecs": "encode",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "easydict": "EasyDict",
        "addict.addict": "Dict",
        "fastreid.config.config": "CfgNode",
        "fvcore.common.config": "CfgNode",
        "yacs.config": "CfgNode",
        "mmcv.utils.config": "Config ConfigDict",
        "mmengine.config.config": "Config ConfigDict",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.base": "ContainerMetadata Metadata",
        "omegaconf.nodes": "AnyNode",
        "numpy": "dtype ndarray bool_ int32 int64 float32 float64",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "numpy.core.numeric": "_frombuffer",
        "numpy._core.numeric": "_frombuffer",
        "numpy.dtypes": "Float32DType Float64DType Int32DType Int64DType BoolDType",
        "pathlib": "Path PurePath PosixPath PurePosixPath WindowsPath PureWindowsPath",
        "torch": "device Size Generator",
        "torch._utils": "_rebuild_sparse_tensor _rebuild_qtensor _rebuild_device_tensor_from_numpy",
        "torch.optim.adam": "Adam",
        "torch.optim.sgd": "SGD",
    }.items()
    for name in names.split()
)
_ORDERED_DICT = "collections.OrderedDict"


@dataclasses.dataclass(frozen=True, slots=True)
class StorageRef:
    """A run of elements outside the pickle: container key, element type, and the slice of the container's elements."""

    key: str
    kind: str
    offset: int
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRef:
    """A strided view of a storage, all in elements; unchecked until `view` reads it."""

    storage: StorageRef
    kind: str
    offset: Any
    shape: Any
    strides: Any


def item_size(kind: str) -> int:
    """Bytes per element of a storage type."""
    return 2 if kind == "bfloat16" else np.dtype(kind).itemsize


def decode(data: bytes | bytearray | memoryview, kind: str, byte_order: str = "<") -> np.ndarray:
    """Storage bytes as a one-dimensional native array; bfloat16 comes out as float32, which holds it exactly."""
    if kind == "bfloat16":
        words = np.frombuffer(data, byte_order + "u2").astype(np.uint32)
        return (words << np.uint32(16)).view(np.float32)
    if kind == "bool":
        return np.frombuffer(data, np.uint8) != 0
    array = np.frombuffer(data, np.dtype(byte_order + kind))
    return array.astype(array.dtype.newbyteorder("native"), copy=False)


def view(ref: TensorRef, elements: np.ndarray, name: str) -> np.ndarray:
    """The tensor as a view of its storage.

    Args:
        ref: the tensor.
        elements: the storage's elements, one-dimensional.
        name: file and key, for messages.

    Raises:
        DataError: the tensor's sizes are no sizes, reach outside the storage, or claim more elements than it holds.
    """
    numbers = [ref.shape, ref.strides]
    if not all(isinstance(entry, (tuple, list)) and len(entry) <= _MAX_DIMENSIONS for entry in numbers):
        raise DataError(f"{name}: the tensor has no usable shape; the file is damaged")
    shape, strides = tuple(ref.shape), tuple(ref.strides)
    if len(shape) != len(strides) or not all(_is_size(number) for number in (*shape, *strides, ref.offset)):
        raise DataError(f"{name}: the tensor's shape, strides or offset are not sizes; the file is damaged")
    count = math.prod(shape)
    if count == 0:
        # Nothing is stored, but NumPy multiplies the other sizes out.
        if math.prod(size for size in shape if size) >= _MAX_SIZE:
            raise DataError(f"{name}: an empty tensor of shape {shape}; the file is damaged")
        return np.empty(shape, elements.dtype)
    last = ref.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= elements.size or count > elements.size:
        raise DataError(
            f"{name}: shape {shape}, strides {strides} and offset {ref.offset} do not fit into the stored "
            f"{elements.size} elements; the file is damaged"
        )
    steps = tuple(stride * elements.itemsize for stride in strides)
    return np.ndarray(shape, elements.dtype, elements, ref.offset * elements.itemsize, steps)


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < _MAX_SIZE


class TorchVocabulary:
    """Globals, calls and persistent identifiers of PyTorch checkpoints.

    Attributes:
        storages: every storage that the pickle mentions, by container key.
    """

    def __init__(self, where: str):
        self.where = where
        self.storages: dict[str, StorageRef] = {}

    def resolve(self, name: str) -> Global:
        """Accepts what a weights file needs and refuses every other name."""
        if name in _CALLS or name in _INERT or _storage_kind(name) or _dtype(name):
            return Global(name)
        hint = "a state_dict: torch.save(model.state_dict(), path)"
        if name.startswith("__torch__"):
            problem = "is a TorchScript program"
        else:
            problem = f"refers to '{printable(name)}', which has no place among weights"
        raise DataError(f"{self.where}: refused, nothing was run: the file {problem}; save {hint}")

    def call(self, function: Global, arguments: Sequence[Any]) -> Any:
        """Turns the rebuilding of a tensor into a reference, and every other call into a mark."""
        handler = _CALLS.get(function.name)
        return Opaque(function.name) if handler is None else handler(self, tuple(arguments))

    def persistent(self, identifier: Any) -> StorageRef:
        """Returns the storage of `("storage", type, key, location, count[, view])`."""
        if not isinstance(identifier, tuple) or len(identifier) not in (5, 6) or identifier[0] != "storage":
            raise self.damaged("a persistent identifier is not a storage")
        _, storage_type, key, _, count, *parent = identifier
        kind = _storage_kind(storage_type.name) if isinstance(storage_type, Global) else None
        if kind is None or not isinstance(key, str) or not _is_size(count):
            raise self.damaged("a storage without type, key or size")
        whole = StorageRef(key, kind, 0, count)
        if self.storages.setdefault(key, whole) != whole:
            raise self.damaged(f"storage {printable(key)} has two descriptions")
        if not parent or parent[0] is None:
            return whole
        # Torch before 0.4 could save a storage that is a window of another one.
        window = parent[0]
        if not isinstance(window, tuple) or len(window) != 3 or not all(map(_is_size, window[1:])):
            raise self.damaged("a storage window without offset and size")
        return StorageRef(key, kind, window[1], window[2])

    def damaged(self, problem: str) -> DataError:
        """The error for a pickle that is well formed but makes no sense."""
        return DataError(f"{self.where}: damaged checkpoint ({problem}); copy or download the file again")


def _storage_kind(name: str) -> str | None:
    module, _, short = name.rpartition(".")
    return _STORAGE_TYPES.get(short) if f"{module}." in _MODULES_OF_STORAGES else None


def _dtype(name: str) -> str | None:
    module, _, short = name.rpartition(".")
    return _DTYPES.get(short) if module == "torch" else None


def _tensor(vocabulary: TorchVocabulary, arguments: tuple[Any, ...]) -> TensorRef:
    if len(arguments) < 4 or not isinstance(arguments[0], StorageRef):
        raise vocabulary.damaged("a tensor without storage, offset, shape and strides")
    storage, offset, shape, strides = arguments[:4]
    return TensorRef(storage, storage.kind, offset, shape, strides)


def _typed_tensor(vocabulary: TorchVocabulary, arguments: tuple[Any, ...]) -> TensorRef:
    """`_rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype)` over an untyped storage."""
    tensor = _tensor(vocabulary, arguments)
    kind = _dtype(arguments[6].name) if len(arguments) > 6 and isinstance(arguments[6], Global) else None
    if kind is None:
        raise vocabulary.damaged("a tensor of an unknown element type")
    return dataclasses.replace(tensor, kind=kind)


def _parameter(vocabulary: TorchVocabulary, arguments: tuple[Any, ...]) -> Any:
    if not arguments or not isinstance(arguments[0], (TensorRef, Opaque)):
        raise vocabulary.damaged("a parameter without a tensor")
    return arguments[0]


def _subclass(vocabulary: TorchVocabulary, arguments: tuple[Any, ...]) -> Any:
    """`_rebuild_from_type_v2(function, type, arguments, state)`: a tensor that carries Python attributes."""
    if len(arguments) < 3 or not isinstance(arguments[0], Global) or not isinstance(arguments[2], tuple):
        raise vocabulary.damaged("a tensor subclass without a tensor")
    if arguments[0].name not in _PLAIN_TENSORS:
        raise vocabulary.damaged(f"a tensor rebuilt by {printable(arguments[0].name)}")
    return vocabulary.call(arguments[0], arguments[2])


def _ordered_dict(vocabulary: TorchVocabulary, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """`OrderedDict()`, or `OrderedDict([[key, value], ...])` as Python 2 wrote it."""
    pairs = arguments[0] if arguments else ()
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    ):
        raise vocabulary.damaged("an ordered dict without pairs")
    return {key: value for key, value in pairs if isinstance(key, str)}


def _type_marker(vocabulary: TorchVocabulary, _: tuple[Any, ...]) -> Any:
    raise vocabulary.damaged("a tensor type is called")


_PLAIN_TENSORS: dict[str, Callable[[TorchVocabulary, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
}
_CALLS: dict[str, Callable[[TorchVocabulary, tuple[Any, ...]], Any]] = {
    **_PLAIN_TENSORS,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    # Named as the type of a rebuilt tensor, never called by torch.
    "torch.Tensor": _type_marker,
    "torch.nn.parameter.Parameter": _type_marker,
    _ORDERED_DICT: _ordered_dict,
}
