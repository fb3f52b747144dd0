"""Pooling, embedding neck and classifier on top of a backbone's last map."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmosnet_jax.core.unit import unit_rows
from dmosnet_jax.models.draws import Draws
from dmosnet_jax.models.layers import Linear
from dmosnet_jax.models.norms import BatchNorm
from dmosnet_jax.models.precision import widened

EMBEDDING = 512


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """What distinguishes the heads.

    Attributes:
        neck: "fc" (torchreid's OSNet: linear to 512, norm, ReLU), "bnneck" (fast-reid, SpCL: norm of the pooled map)
            or "none" (torchreid's and torchvision's ResNet: the pooled map itself).
        pool: "avg" or "gem" (generalised mean with a learned exponent, Radenovic et al. 2018).
        classifier: "linear", or "circle": its logits are cosines, for `losses.identity.circle_logits`.
        num_classes: classes of the classifier, 0 for none.
        bn_group_size: images that share batch statistics, None for the whole batch.
    """

    neck: str = "bnneck"
    pool: str = "avg"
    classifier: str = "linear"
    num_classes: int = 0
    bn_group_size: int | None = None

    def feature_dim(self, width: int) -> int:
        """Size of the test-time feature over a backbone of `width` channels."""
        return EMBEDDING if self.neck == "fc" else width


class GeneralizedMean(nnx.Module):
    """GeM pooling, `mean(max(x, 1e-6) ** p) ** (1 / p)` with a learned scalar p, 3 at the start."""

    def __init__(self):
        self.p = nnx.Param(np.full((1,), 3.0, np.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        clipped = jnp.maximum(widened(x), 1e-6)
        p = self.p[...].astype(clipped.dtype)
        return jnp.mean(clipped ** p[None, None, None, :], axis=(1, 2)) ** (1.0 / p[None, :])


class Head(nnx.Module):
    """Maps `[B, H, W, C]` to the outputs that losses and evaluation use."""

    def __init__(self, width: int, settings: HeadSettings, *, rngs: Draws):
        self.settings = settings
        if settings.pool == "gem":
            self.pool = GeneralizedMean()
        if settings.neck == "fc":
            norm = BatchNorm(EMBEDDING, group_size=settings.bn_group_size)
            self.fc = nnx.List([Linear(width, EMBEDDING, rngs=rngs), norm])
        elif settings.neck == "bnneck":
            self.bottleneck = BatchNorm(width, group_size=settings.bn_group_size)
        if settings.num_classes:
            # torchreid's classifier has a bias, a BNNeck's must not (Luo et al., "Bag of Tricks"), and cosines can't.
            bias = settings.neck != "bnneck" and settings.classifier == "linear"
            self.classifier = Linear(settings.feature_dim(width), settings.num_classes, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Head outputs, all float32 (float64 with that compute dtype).

        Args:
            x: backbone map `[B, H, W, C]`.
            train: use and move batch statistics.

        Returns:
            `pooled` [B, C]; `embedding` [B, E], what the triplet loss sees; `feature` [B, E], what the test and SpCL
            see (not L2-normalised); with a classifier, `logits` [B, num_classes], which are cosines where it is
            "circle".
        """
        if self.settings.pool == "gem":
            pooled = self.pool(x)
        else:
            pooled = jnp.mean(widened(x), axis=(1, 2))
        embedding = feature = pooled
        if self.settings.neck == "fc":
            embedding = feature = jax.nn.relu(self.fc[1](self.fc[0](pooled), train=train))
        elif self.settings.neck == "bnneck":
            feature = self.bottleneck(pooled, train=train)
        outputs = {"pooled": pooled, "embedding": embedding, "feature": feature}
        if self.settings.num_classes and self.settings.classifier == "circle":
            outputs["logits"] = cosines(feature, self.classifier.kernel[...].astype(feature.dtype))
        elif self.settings.num_classes:
            outputs["logits"] = self.classifier(feature)
        return outputs


def cosines(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """Cosine of every feature with every column.

    Args:
        features: float32 `[B, E]`.
        kernel: float32 `[E, C]`, one class a column.

    Returns:
        float32 `[B, C]` in [-1, 1]; 0 for zero vectors.
    """
    return jnp.matmul(unit_rows(features, 1), unit_rows(kernel, 0), precision=jax.lax.Precision.HIGHEST)
