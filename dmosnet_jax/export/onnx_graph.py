"""A graph of ONNX operators and the message that a file of it holds.

ONNX files are protobuf messages (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). The part of that definition
that is written stands here, so that an export needs no other package than protobuf.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmosnet_jax.core.protobuf import message_class

# Operator set 17 came with version 8 of the format.
OPSET, _IR_VERSION = 17, 8
_FLOAT, _INT64 = 1, 7  # TensorProto.DataType
_ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_INTS = 1, 2, 7  # AttributeProto.AttributeType

_STRING, _BYTES, _FLOAT32, _INT32, _INTEGER = (
    f"TYPE_{kind}" for kind in ("STRING", "BYTES", "FLOAT", "INT32", "INT64")
)
# Message: field, number, type (of messages their name), whether it is repeated.
_MESSAGES: Mapping[str, Sequence[tuple[str, int, str, bool]]] = {
    "Model": (
        ("ir_version", 1, _INTEGER, False),
        ("producer_name", 2, _STRING, False),
        ("producer_version", 3, _STRING, False),
        ("doc_string", 6, _STRING, False),
        ("graph", 7, "Graph", False),
        ("opset_import", 8, "OperatorSet", True),
        ("metadata_props", 14, "Entry", True),
    ),
    "Entry": (("key", 1, _STRING, False), ("value", 2, _STRING, False)),
    "OperatorSet": (("domain", 1, _STRING, False), ("version", 2, _INTEGER, False)),
    "Graph": (
        ("node", 1, "Node", True),
        ("name", 2, _STRING, False),
        ("initializer", 5, "Tensor", True),
        ("input", 11, "Value", True),
        ("output", 12, "Value", True),
    ),
    "Node": (
        ("input", 1, _STRING, True),
        ("output", 2, _STRING, True),
        ("name", 3, _STRING, False),
        ("op_type", 4, _STRING, False),
        ("attribute", 5, "Attribute", True),
    ),
    "Attribute": (
        ("name", 1, _STRING, False),
        ("f", 2, _FLOAT32, False),
        ("i", 3, _INTEGER, False),
        ("ints", 8, _INTEGER, True),
        ("type", 20, _INT32, False),
    ),
    "Tensor": (
        ("dims", 1, _INTEGER, True),
        ("data_type", 2, _INT32, False),
        ("name", 8, _STRING, False),
        ("raw_data", 9, _BYTES, False),
    ),
    "Value": (("name", 1, _STRING, False), ("type", 2, "Type", False)),
    "Type": (("tensor_type", 1, "TensorType", False),),
    "TensorType": (("elem_type", 1, _INT32, False), ("shape", 2, "Shape", False)),
    "Shape": (("dim", 1, "Dimension", True),),
    "Dimension": (("dim_value", 1, _INTEGER, False), ("dim_param", 2, _STRING, False)),
}


def _definition() -> str:
    """`_MESSAGES` as a `FileDescriptorProto` in text format."""
    lines = ['name: "onnx.proto" package: "dmosnet_onnx" syntax: "proto2"']
    for message, fields in _MESSAGES.items():
        lines.append(f'message_type {{ name: "{message}"')
        for name, number, kind, repeated in fields:
            label = "LABEL_REPEATED" if repeated else "LABEL_OPTIONAL"
            known = f"type: {kind}"
            if kind in _MESSAGES:
                known = f'type: TYPE_MESSAGE type_name: ".dmosnet_onnx.{kind}"'
            lines.append(f'  field {{ name: "{name}" number: {number} label: {label} {known} }}')
        lines.append("}")
    return "\n".join(lines)


Shape = Sequence[int | str]


def parse(data: bytes) -> Any:
    """What is written here of an ONNX file's message; the rest of it is skipped."""
    message = message_class(_definition(), "dmosnet_onnx.Model")()
    message.ParseFromString(data)
    return message


class Graph:
    """Operators in the order in which they run, and their constants.

    A value is known by its name. Names of constants are those that the caller gives, others are made.

    """

    def __init__(self) -> None:
        self._message: Any = message_class(_definition(), "dmosnet_onnx.Model")()
        self._message.ir_version = _IR_VERSION
        self._message.opset_import.add(domain="", version=OPSET)
        self._constants: set[str] = set()

    @property
    def nodes(self) -> Sequence[Any]:
        """The operators so far."""
        return self._message.graph.node

    def input(self, name: str, shape: Shape) -> str:
        """A float32 input; a dimension that is a name is free."""
        return _describe(self._message.graph.input.add(), name, shape)

    def output(self, value: str, name: str, shape: Shape) -> None:
        """Makes the value of the last operator an output, as float32, under a name of its own."""
        (last,) = self.nodes[-1].output
        if last != value:
            raise ValueError(f"{value} is not what the last operator computes, which is {last}")
        self.nodes[-1].output[0] = name
        _describe(self._message.graph.output.add(), name, shape)

    def constant(self, name: str, array: np.ndarray) -> str:
        """An array of float32, or of int64 where it holds integers; the same name twice is the same constant."""
        if name in self._constants:
            return name
        self._constants.add(name)
        integers = np.issubdtype(array.dtype, np.integer)
        self._message.graph.initializer.add(
            name=name,
            dims=array.shape,
            data_type=_INT64 if integers else _FLOAT,
            raw_data=np.ascontiguousarray(array, "<i8" if integers else "<f4").tobytes(),
        )
        return name

    def add(self, operator: str, *inputs: str, **attributes: int | float | Sequence[int]) -> str:
        """Adds an operator with one output, and returns the name of that."""
        return self.split(operator, *inputs, outputs=1, **attributes)[0]

    def split(
        self, operator: str, *inputs: str, outputs: int, **attributes: int | float | Sequence[int]
    ) -> tuple[str, ...]:
        """Adds an operator with several outputs, and returns their names."""
        name = f"{operator}_{len(self.nodes)}"
        made = (name,) if outputs == 1 else tuple(f"{name}_{part}" for part in range(outputs))
        node = self._message.graph.node.add(op_type=operator, name=name, input=inputs, output=made)
        for key, value in attributes.items():
            if isinstance(value, float):
                node.attribute.add(name=key, type=_ATTRIBUTE_FLOAT, f=value)
            elif isinstance(value, int):
                node.attribute.add(name=key, type=_ATTRIBUTE_INT, i=value)
            else:
                node.attribute.add(name=key, type=_ATTRIBUTE_INTS, ints=value)
        return made

    def serialise(self, name: str, *, version: str, about: str, properties: Mapping[str, str]) -> bytes:
        """The file's bytes.

        Args:
            name: of the graph.
            version: of this package.
            about: one sentence for whoever opens the file in a viewer.
            properties: facts for programs.
        """
        message = self._message
        message.graph.name, message.doc_string = name, about
        message.producer_name, message.producer_version = "dmosnet_jax", version
        del message.metadata_props[:]
        for key, value in properties.items():
            message.metadata_props.add(key=key, value=value)
        return message.SerializeToString(deterministic=True)


def _describe(value: Any, name: str, shape: Shape) -> str:
    value.name = name
    value.type.tensor_type.elem_type = _FLOAT
    for size in shape:
        dimension = value.type.tensor_type.shape.dim.add()
        if isinstance(size, str):
            dimension.dim_param = size
        else:
            dimension.dim_value = size
    return name
