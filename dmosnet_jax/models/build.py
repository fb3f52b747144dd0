"""Model registry: a name and a few options give pure functions."""

import contextlib
import dataclasses
import functools
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmosnet_jax.core import arguments
from dmosnet_jax.core.errors import ArgumentError, ConfigError
from dmosnet_jax.models.draws import Draws
from dmosnet_jax.models.functional import Functional, Tree
from dmosnet_jax.models.heads import Head, HeadSettings
from dmosnet_jax.models.osnet import CHANNELS, OSNetSettings
from dmosnet_jax.models.osnet_ain import AINSettings
from dmosnet_jax.models.precision import full_precision
from dmosnet_jax.models.resnet import VARIANTS, ResNetSettings

NECKS = ("bnneck", "fc", "none")
POOLS = ("avg", "gem")
CLASSIFIERS = ("linear", "circle")
DTYPES = ("float32", "bfloat16", "float64")

# Every kind has `width`, `unit` and `create(rngs)`.
BackboneSettings = OSNetSettings | AINSettings | ResNetSettings


def _registry() -> dict[str, BackboneSettings]:
    models: dict[str, BackboneSettings] = {"resnet50": ResNetSettings(), "resnet50_ibn_a": ResNetSettings(ibn=True)}
    for width, channels in CHANNELS.items():
        models[f"osnet_{width}"] = OSNetSettings(channels)
        models[f"osnet_ibn_{width}"] = OSNetSettings(channels, ibn=True)
        models[f"osnet_ain_{width}"] = AINSettings(channels)
        models[f"dmosnet_{width}"] = OSNetSettings(channels, attention=(1, 0, 0))
        models[f"dmosnet_ibn_{width}"] = OSNetSettings(channels, ibn=True, attention=(1, 0, 0))
    return models


_MODELS = _registry()


def names() -> list[str]:
    """All model names that `build` knows."""
    return sorted(_MODELS)


class _Network(nnx.Module):
    """Backbone and head; the reference keeps both in one namespace, so they are attributes of one module there too."""

    def __init__(self, backbone: BackboneSettings, head: HeadSettings, dtype: str, rngs: Draws):
        self.backbone: Any = backbone.create(rngs)
        self.head = Head(backbone.width, head, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: jax.Array, *, train: bool, stages: bool = False) -> dict[str, Any]:
        features, maps = self.backbone(images.astype(jnp.dtype(self.dtype)), train=train)
        outputs = self.head(features, train=train)
        return {**outputs, "stages": maps} if stages else outputs


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as pure functions, and what a caller must know of it.

    Attributes:
        name: registry name.
        attention: DL-MHSA mask over conv2, conv3, conv4.
        neck: "fc", "bnneck" or "none".
        pool: "avg" or "gem".
        classifier: "linear" or "circle".
        variant: whose ResNet, a key of `resnet.VARIANTS`; "" for other networks.
        num_classes: classifier size, 0 for none.
        bn_group_size: images that share batch statistics.
        dtype: compute dtype; parameters and statistics stay float32.
        image_size: (height, width) in pixels.
    """

    name: str
    attention: tuple[int, int, int]
    neck: str
    pool: str
    classifier: str
    variant: str
    num_classes: int
    bn_group_size: int | None
    dtype: str
    image_size: tuple[int, int]

    @functools.cached_property
    def _functional(self) -> Functional:
        backbone = dataclasses.replace(
            _backbone(self.name, self.attention, self.variant), bn_group_size=self.bn_group_size
        )
        return Functional(lambda rngs: _Network(backbone, self._head, self.dtype, rngs))

    @property
    def _head(self) -> HeadSettings:
        return HeadSettings(self.neck, self.pool, self.classifier, self.num_classes, self.bn_group_size)

    @property
    def feature_dim(self) -> int:
        """Size E of the test-time feature."""
        return self._head.feature_dim(_MODELS[self.name].width)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh float32 `(params, stats)`, nested dicts named as in the reference implementations."""
        params, stats = self._functional.init(key)
        return _join(params), _join(stats)

    def shapes(self) -> tuple[Tree, Tree]:
        """`init` as `jax.ShapeDtypeStruct` leaves."""
        params, stats = self._functional.shapes()
        return _join(params), _join(stats)

    def apply(
        self, params: Tree, stats: Tree, images: jax.Array, *, train: bool, stages: bool = False
    ) -> tuple[dict[str, Any], Tree]:
        """Runs the network; without `train`, its products are as precise as its dtype on every kind of device.

        Args:
            params: parameter tree.
            stats: batch statistics tree.
            images: normalised `[B, H, W, 3]`, float.
            train: use batch statistics and move the running ones.
            stages: also return the map after each backbone stage, by name, under "stages".

        Returns:
            `(outputs, stats)`: see `Head.__call__`; `stats` is unchanged without `train`.

        Raises:
            ConfigError: images of another shape or dtype.
        """
        shape = getattr(images, "shape", None)
        if shape is None or len(shape) != 4 or shape[3] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ArgumentError(
                f"{self.name}: images are {getattr(images, 'dtype', type(images).__name__)}{list(shape or ())}; give "
                "normalised floats [images, height, width, 3]"
            )
        with contextlib.nullcontext() if train else full_precision():
            outputs, moved = self._functional.apply(_part(params), _part(stats), images, train=train, stages=stages)
        return outputs, _join(moved)


_HEAD_PARTS = ("pool", "fc", "bottleneck", "classifier")


def _join(tree: Tree) -> Tree:
    """Backbone and head side by side, as torchreid names them."""
    return {**tree.get("backbone", {}), **tree.get("head", {})}


def _part(tree: Tree) -> Tree:
    head = {key: value for key, value in tree.items() if key in _HEAD_PARTS}
    return {"backbone": {key: value for key, value in tree.items() if key not in _HEAD_PARTS}, "head": head}


def _one_of(field: str, value: Any, known: Sequence[Any]) -> Any:
    if value not in known:
        raise ConfigError(f"model.{field}={value!r} is not known: use one of {', '.join(map(str, known))}")
    return value


def _backbone(name: str, attention: Sequence[int] | None, variant: str | None) -> BackboneSettings:
    """The registry's settings with a mask and a variant, where the family has such.

    Raises:
        ConfigError: the family has not.
    """
    base = _MODELS[name]
    flags = attention if isinstance(attention, Iterable) and not isinstance(attention, str | Mapping) else ()
    mask = None if attention is None else tuple(int(bool(flag)) for flag in flags)
    if mask is not None and len(mask) != 3:
        raise ConfigError(f"model.attention={attention!r} must be three flags for conv2, conv3, conv4, e.g. (1, 0, 0)")
    if variant and not isinstance(base, ResNetSettings):
        raise ConfigError(f"model.variant={variant!r} is for resnet50 and resnet50_ibn_a: leave it out for {name}")
    if isinstance(base, OSNetSettings):
        return base if mask is None else dataclasses.replace(base, attention=mask)
    if mask is not None and any(mask):
        raise ConfigError(f"model.attention={attention!r} is for osnet_* and dmosnet_*: leave it out for {name}")
    if isinstance(base, ResNetSettings) and variant:
        return dataclasses.replace(base, variant=_one_of("variant", variant, tuple(VARIANTS)))
    return base


def _check_image_size(image_size: Sequence[int], unit: int) -> tuple[int, int]:
    """Validates an input size.

    The stem and the transitions halve the map four times; a stage with attention needs a map of whole 8x8 windows.

    Raises:
        ConfigError: the size is not a multiple of what the network needs; names the nearest sizes that are.
    """
    sides = tuple(image_size) if isinstance(image_size, Iterable) and not isinstance(image_size, str | Mapping) else ()
    if len(sides) != 2 or not all(isinstance(side, int | np.integer) for side in sides):
        raise ConfigError(f"image_size={reprlib.repr(image_size)} must be (height, width) in pixels, e.g. (256, 128)")
    height, width = map(int, sides)
    wrong = [(name, side) for name, side in (("height", height), ("width", width)) if side < unit or side % unit]
    if wrong:
        name, side = wrong[0]
        below, above = max(side // unit, 1) * unit, max(side // unit + 1, 1) * unit
        near = f"{below}" if below == above else f"{below} or {above}"
        raise ConfigError(
            f"image_size={(height, width)}: the {name} must be a multiple of {unit} for this network: "
            f"the nearest that work are {near}"
        )
    return height, width


def build(
    name: str,
    *,
    attention: Sequence[int] | None = None,
    neck: str | None = None,
    pool: str = "avg",
    classifier: str = "linear",
    variant: str | None = None,
    num_classes: int = 0,
    bn_group_size: int | None = None,
    dtype: str = "float32",
    image_size: Sequence[int] = (256, 128),
) -> Model:
    """Builds a model by name.

    Args:
        name: one of `names()`.
        attention: DL-MHSA mask over conv2, conv3, conv4; the default is the paper's (1, 0, 0) for `dmosnet_*` and none
            for `osnet_*`.
        neck: "fc" (torchreid's 512-d embedding), "bnneck" or "none"; default "bnneck".
        pool: "avg" or "gem".
        classifier: "linear" or "circle".
        variant: for ResNets, whose: "spcl" (also OpenUnReID; last stride 1, the default), "fastreid" (as that, with
            another max pool) or "torchreid" (last stride 2).
        num_classes: classifier size, 0 for none.
        bn_group_size: images that share batch statistics in training, None for the whole batch.
        dtype: compute dtype, "float32", "bfloat16" or, to compare implementations, "float64" (with `jax_enable_x64`).
        image_size: (height, width).

    Raises:
        ConfigError: an unknown name or option, or an input size that the network can't take.
    """
    backbone = _backbone(_one_of("name", name, names()), attention, variant)
    arguments.count("model.num_classes", num_classes, least=0)
    if bn_group_size is not None:
        arguments.count("model.bn_group_size", bn_group_size, least=2)
    return Model(
        name=name,
        attention=backbone.attention if isinstance(backbone, OSNetSettings) else (0, 0, 0),
        neck=_one_of("neck", neck or "bnneck", NECKS),
        pool=_one_of("pool", pool, POOLS),
        classifier=_one_of("classifier", classifier, CLASSIFIERS),
        variant=backbone.variant if isinstance(backbone, ResNetSettings) else "",
        num_classes=int(num_classes),
        bn_group_size=bn_group_size,
        dtype=_one_of("dtype", dtype, DTYPES),
        image_size=_check_image_size(image_size, backbone.unit),
    )
