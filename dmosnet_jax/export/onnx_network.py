"""Our networks as ONNX operators, NCHW, written from the names and shapes of their trees.

XLA's forms of a network are not those that other runtimes have kernels for: traced, a depthwise convolution would be
nine slices and sums. Here every convolution is one `Conv`, and a batch norm is gone into the convolution before it (in
attention, behind it), but for the two that have none beside them: the one after a residual sum in attention, and a
BNNeck.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmosnet_jax.core.unit import EPSILON
from dmosnet_jax.export.onnx_graph import Graph
from dmosnet_jax.models import Model
from dmosnet_jax.models.attention import GRID, head_count
from dmosnet_jax.models.fused import NORM_EPSILON
from dmosnet_jax.models.resnet import VARIANTS

Tree = dict[str, Any]
# y = x * factor + offset for each channel, float64 [C].
Affine = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A module's place in the trees of parameters and statistics; `name` is its path, as in torchreid."""

    name: str
    params: Tree
    stats: Tree

    def __getitem__(self, key: str) -> "_Part":
        return _Part(f"{self.name}.{key}".lstrip("."), self.params[key], self.stats.get(key, {}))

    def __contains__(self, key: str) -> bool:
        return key in self.params

    def items(self) -> Sequence["_Part"]:
        """The modules of a list."""
        return [self[key] for key in sorted(self.params, key=int)]

    @property
    def is_batch_norm(self) -> bool:
        """An instance norm has no statistics."""
        return "mean" in self.stats

    @property
    def affine(self) -> Affine:
        """What a batch norm does outside of training."""
        scale, bias = (np.asarray(self.params[leaf], np.float64) for leaf in ("scale", "bias"))
        mean, var = (np.asarray(self.stats[leaf], np.float64) for leaf in ("mean", "var"))
        factor = scale / np.sqrt(var + NORM_EPSILON)
        return factor, bias - mean * factor


def add_features(graph: Graph, images: str, model: Model, params: Tree, stats: Tree) -> str:
    """Adds a network's operators.

    Args:
        graph: where to.
        images: normalised images [batch, 3, H, W].
        model: the network.
        params: its parameters.
        stats: its batch statistics.

    Returns:
        The test-time feature [batch, E], not of unit length.
    """
    root = _Part("", params, stats)
    if "layer1" in root:
        last = _resnet(graph, images, root, model.variant)
    else:
        last = _osnet(graph, images, root, model.image_size)
    return _head(graph, last, root, model.neck)


def affine(graph: Graph, x: str, name: str, how: Affine, rank: int = 4) -> str:
    """Adds `x * factor + offset` for each channel of an array of some rank; nothing where that changes nothing."""
    for operator, leaf, values, neutral in (("Mul", "factor", how[0], 1), ("Add", "offset", how[1], 0)):
        if np.any(values != neutral):
            constant = graph.constant(f"{name}.{leaf}", values.reshape(1, -1, *(1,) * (rank - 2)))
            x = graph.add(operator, x, constant)
    return x


def unit_length(graph: Graph, x: str) -> str:
    """Adds the scaling of [batch, E] to rows of unit length, as `core.unit` does it."""
    length = graph.add("ReduceL2", x, axes=(1,), keepdims=1)
    return graph.add("Div", x, graph.add("Max", length, graph.constant("unit.epsilon", np.asarray([EPSILON]))))


def _reshape(graph: Graph, x: str, *shape: int) -> str:
    return graph.add("Reshape", x, graph.constant(f"shape.{'_'.join(map(str, shape))}", np.asarray(shape)))


def _conv(
    graph: Graph, x: str, part: _Part, *, stride: int = 1, before: Affine | None = None, after: Affine | None = None
) -> str:
    """A convolution with the batch norm behind it, or of a 1x1 convolution the one before it, in its weights."""
    kernel = np.asarray(part.params["kernel"], np.float64).transpose(3, 2, 0, 1)
    outputs, inputs, size, _ = kernel.shape
    bias = np.asarray(part.params.get("bias", np.zeros(outputs)), np.float64)
    if before is not None:
        # Only without padding, whose zeros would not have gone through the norm.
        assert size == 1
        bias = bias + kernel[:, :, 0, 0] @ before[1]
        kernel = kernel * before[0].reshape(1, -1, 1, 1)
    if after is not None:
        kernel, bias = kernel * after[0].reshape(-1, 1, 1, 1), bias * after[0] + after[1]
    arguments = [x, graph.constant(f"{part.name}.weight", kernel)]
    if "bias" in part or before is not None or after is not None:
        arguments.append(graph.constant(f"{part.name}.bias", bias))
    # A gate may have a hidden layer of one channel; of the 3x3 convolutions those with one input are depthwise.
    depthwise = inputs == 1 and size == 3
    return graph.add(
        "Conv",
        *arguments,
        kernel_shape=(size, size),
        strides=(stride, stride),
        pads=((size - 1) // 2,) * 4,
        group=outputs if depthwise else 1,
    )


def _instance_norm(graph: Graph, x: str, part: _Part) -> str:
    constants = [graph.constant(f"{part.name}.{leaf}", np.asarray(part.params[leaf])) for leaf in ("scale", "bias")]
    return graph.add("InstanceNormalization", x, *constants, epsilon=NORM_EPSILON)


def _conv_unit(graph: Graph, x: str, part: _Part, *, stride: int = 1) -> str:
    """OSNet's convolution and norm, without the ReLU."""
    if "bn" not in part:
        return _conv(graph, x, part["conv"], stride=stride)
    norm = part["bn"]
    if norm.is_batch_norm:
        return _conv(graph, x, part["conv"], stride=stride, after=norm.affine)
    return _instance_norm(graph, _conv(graph, x, part["conv"], stride=stride), norm)


def _relu(graph: Graph, x: str) -> str:
    return graph.add("Relu", x)


def _osnet(graph: Graph, x: str, root: _Part, image_size: tuple[int, int]) -> str:
    """OSNet, OSNet-AIN and DM-OSNet up to conv5."""
    x = _relu(graph, _conv_unit(graph, x, root["conv1"], stride=2))
    x = graph.add("MaxPool", x, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
    height, width = image_size
    for stage, below in (("2", 4), ("3", 8), ("4", 16)):
        layers = root[f"conv{stage}"].items()
        # OSNet-AIN keeps the transitions beside the stages.
        if f"pool{stage}" in root:
            layers = [*layers, root[f"pool{stage}"]]
        for layer in layers:
            if "gate" in layer:
                x = _osnet_block(graph, x, layer, (height // below, width // below))
            else:
                x = _relu(graph, _conv_unit(graph, x, layer["0"]))
                x = graph.add("AveragePool", x, kernel_shape=(2, 2), strides=(2, 2))
    return _relu(graph, _conv_unit(graph, x, root["conv5"]))


def _osnet_block(graph: Graph, x: str, block: _Part, size: tuple[int, int]) -> str:
    """An omni-scale block on maps of a size (height, width)."""
    first = _relu(graph, _conv_unit(graph, x, block["conv1"]))
    if "conv2" in block:
        streams = [stream["layers"].items() for stream in block["conv2"].items()]
    else:
        streams = [[block["conv2a"]], *(block[name].items() for name in ("conv2b", "conv2c", "conv2d"))]
    total = ""
    for stream in streams:
        y = first
        for layer in stream:
            if "attn2" in layer:
                y = _relu(graph, _attention_stream(graph, y, layer, size))
            else:
                y = _relu(graph, _light_conv(graph, y, layer))
        y = _gate(graph, y, block["gate"])
        total = graph.add("Add", total, y) if total else y
    identity = _conv_unit(graph, x, block["downsample"]) if "downsample" in block else x
    y = _conv_unit(graph, total, block["conv3"])
    if "IN" not in block:
        return _relu(graph, graph.add("Add", y, identity))
    if "bn" in block["conv3"]:
        # OSNet-IBN normalises the sum, OSNet-AIN the residual branch.
        return _relu(graph, _instance_norm(graph, graph.add("Add", y, identity), block["IN"]))
    return _relu(graph, graph.add("Add", _instance_norm(graph, y, block["IN"]), identity))


def _light_conv(graph: Graph, x: str, part: _Part) -> str:
    return _conv(graph, _conv(graph, x, part["conv1"]), part["conv2"], after=part["bn"].affine)


def _gate(graph: Graph, x: str, part: _Part) -> str:
    hidden = _relu(graph, _conv(graph, graph.add("GlobalAveragePool", x), part["fc1"]))
    return graph.add("Mul", x, graph.add("Sigmoid", _conv(graph, hidden, part["fc2"])))


def _attention_stream(graph: Graph, x: str, part: _Part, size: tuple[int, int]) -> str:
    """1x1 convolution, DL-MHSA and norm, without the ReLU: see `models.attention`."""
    attention, x = part["attn2"], _conv(graph, x, part["conv1"])
    channels = attention.params["proj"]["bias"].shape[0]
    heads, (height, width) = head_count(channels), size
    depth, rows, columns = channels // heads, height // GRID, width // GRID
    # The products of queries and keys are scaled in the convolution that makes the queries.
    scale = np.full(channels, depth**-0.5)
    scales = np.append(scale, np.ones(2 * channels))

    # Inside of windows: [batch, 3 heads * depth, H, W] -> [batch * windows, heads, places, depth], three times.
    qkv = _conv(graph, x, attention["qkv"], before=attention["norm"].affine, after=(scales, np.zeros(3 * channels)))
    tiles = _reshape(graph, qkv, 0, 3 * heads, depth, rows, GRID, columns, GRID)
    tiles = graph.add("Transpose", tiles, perm=(0, 3, 5, 1, 4, 6, 2))
    q, k, v = graph.split("Split", _reshape(graph, tiles, -1, 3 * heads, GRID * GRID, depth), outputs=3, axis=1)
    local = _attend(graph, q, graph.add("Transpose", k, perm=(0, 1, 3, 2)), v)
    tiles = _reshape(graph, local, -1, rows, columns, heads, GRID, GRID, depth)
    tiles = graph.add("Transpose", tiles, perm=(0, 3, 6, 1, 4, 2, 5))
    local = graph.add("Add", x, _reshape(graph, tiles, -1, channels, height, width))
    local = affine(graph, local, attention["grid_norm"].name, attention["grid_norm"].affine)

    # From every place to the pooled map: [batch, heads, places, depth] and, of the keys, [batch, heads, depth, pooled].
    q = _conv(graph, local, attention["q"], after=(scale, np.zeros(channels)))
    q = graph.add("Transpose", _reshape(graph, q, 0, heads, depth, height * width), perm=(0, 1, 3, 2))
    pooled = graph.add("AveragePool", local, kernel_shape=(GRID, GRID), strides=(GRID, GRID))
    kv = _conv(graph, pooled, attention["kv"], before=attention["ds_norm"].affine)
    k, v = graph.split("Split", _reshape(graph, kv, 0, 2 * heads, depth, rows * columns), outputs=2, axis=1)
    spread = _attend(graph, q, k, graph.add("Transpose", v, perm=(0, 1, 3, 2)))
    spread = _reshape(graph, graph.add("Transpose", spread, perm=(0, 1, 3, 2)), 0, channels, height, width)
    return _conv(graph, graph.add("Add", spread, local), attention["proj"], after=part["bn"].affine)


def _attend(graph: Graph, q: str, k: str, v: str) -> str:
    weights = graph.add("Softmax", graph.add("MatMul", q, k), axis=-1)
    return graph.add("MatMul", weights, v)


def _resnet(graph: Graph, x: str, root: _Part, variant: str) -> str:
    """ResNet50 up to layer4."""
    settings = VARIANTS[variant]
    x = _relu(graph, _conv(graph, x, root["conv1"], stride=2, after=root["bn1"].affine))
    pads = (1, 1, 1, 1) if settings.padded_pool else (0, 0, 1, 1)
    x = graph.add("MaxPool", x, kernel_shape=(3, 3), strides=(2, 2), pads=pads)
    for number, stride in (("1", 1), ("2", 2), ("3", 2), ("4", settings.last_stride)):
        for index, block in enumerate(root[f"layer{number}"].items()):
            x = _bottleneck(graph, x, block, stride if index == 0 else 1)
    return x


def _bottleneck(graph: Graph, x: str, block: _Part, stride: int) -> str:
    y = _relu(graph, _half_instance_norm(graph, x, block))
    y = _relu(graph, _conv(graph, y, block["conv2"], stride=stride, after=block["bn2"].affine))
    if "downsample" in block:
        conv, norm = block["downsample"].items()
        x = _conv(graph, x, conv, stride=stride, after=norm.affine)
    y = _conv(graph, y, block["conv3"], after=block["bn3"].affine)
    return _relu(graph, graph.add("Add", y, x))


def _half_instance_norm(graph: Graph, x: str, block: _Part) -> str:
    """A bottleneck's first convolution and norm; in IBN-a the first half of the channels is instance-normalised."""
    norm = block["bn1"]
    if "IN" not in norm:
        return _conv(graph, x, block["conv1"], after=norm.affine)
    factor, offset = norm["BN"].affine
    half = norm["IN"].params["scale"].shape[0]
    y = _conv(graph, x, block["conv1"], after=(np.append(np.ones(half), factor), np.append(np.zeros(half), offset)))
    sizes = graph.constant(f"{norm.name}.sizes", np.asarray([half, len(factor)]))
    first, second = graph.split("Split", y, sizes, outputs=2, axis=1)
    return graph.add("Concat", _instance_norm(graph, first, norm["IN"]), second, axis=1)


def _head(graph: Graph, x: str, root: _Part, neck: str) -> str:
    """Pooling and neck: see `models.heads.Head`."""
    if "pool" in root:
        exponent = np.asarray(root.params["pool"]["p"], np.float64)
        x = graph.add("Max", x, graph.constant("pool.least", np.asarray([1e-6])))
        x = graph.add("GlobalAveragePool", graph.add("Pow", x, graph.constant("pool.p", exponent)))
        x = graph.add("Pow", x, graph.constant("pool.root", 1 / exponent))
    else:
        x = graph.add("GlobalAveragePool", x)
    x = graph.add("Flatten", x, axis=1)
    if neck == "bnneck":
        return affine(graph, x, "bottleneck", root["bottleneck"].affine, rank=2)
    if neck == "none":
        return x
    linear, norm = root["fc"].items()
    factor, offset = norm.affine
    kernel, bias = (np.asarray(linear.params[leaf], np.float64) for leaf in ("kernel", "bias"))
    weight = graph.constant("fc.weight", kernel * factor[None, :])
    return _relu(graph, graph.add("Gemm", x, weight, graph.constant("fc.bias", bias * factor + offset)))
