"""Pooling, embedding neck and classifier on top of a backbone's last map."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dmosnet_jax.models.layers import Linear
from dmosnet_jax.models.norms import BatchNorm

EMBEDDING = 512


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """What distinguishes the heads.

    Attributes:
        neck: "fc" (torchreid: linear to 512, norm, ReLU) or "bnneck" (fast-reid, SpCL: norm of the pooled map).
        pool: "avg" or "gem" (generalised mean with a learned exponent, Radenovic et al. 2018).
        num_classes: classes of the classifier, 0 for none.
        bn_group_size: images that share batch statistics, None for the whole batch.
    """

    neck: str = "bnneck"
    pool: str = "avg"
    num_classes: int = 0
    bn_group_size: int | None = None


class GeneralizedMean(nnx.Module):
    """GeM pooling, `mean(max(x, 1e-6) ** p) ** (1 / p)` with a learned scalar p, 3 at the start."""

    def __init__(self):
        self.p = nnx.Param(jnp.full((1,), 3.0, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        p = self.p[...][None, None, None, :]
        powered = jnp.maximum(x.astype(jnp.float32), 1e-6) ** p
        return jnp.mean(powered, axis=(1, 2)) ** (1.0 / self.p[...][None, :])


class Head(nnx.Module):
    """Maps `[B, H, W, C]` to the outputs that losses and evaluation use."""

    def __init__(self, width: int, settings: HeadSettings, *, rngs: nnx.Rngs):
        self.settings = settings
        if settings.pool == "gem":
            self.pool = GeneralizedMean()
        if settings.neck == "fc":
            norm = BatchNorm(EMBEDDING, group_size=settings.bn_group_size)
            self.fc = nnx.List([Linear(width, EMBEDDING, rngs=rngs), norm])
        else:
            self.bottleneck = BatchNorm(width, group_size=settings.bn_group_size)
        self.feature_dim = EMBEDDING if settings.neck == "fc" else width
        if settings.num_classes:
            # torchreid's classifier has a bias, a BNNeck's must not (Luo et al., "Bag of Tricks").
            bias, std = (True, 0.01) if settings.neck == "fc" else (False, 0.001)
            self.classifier = Linear(self.feature_dim, settings.num_classes, bias=bias, std=std, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Head outputs, all float32.

        Args:
            x: backbone map `[B, H, W, C]`.
            train: use and move batch statistics.

        Returns:
            `pooled` [B, C]; `embedding` [B, E], what the triplet loss sees; `feature` [B, E], what the test and SpCL
            see (not L2-normalised); with a classifier, `logits` [B, num_classes].
        """
        if self.settings.pool == "gem":
            pooled = self.pool(x)
        else:
            pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        if self.settings.neck == "fc":
            feature = jax.nn.relu(self.fc[1](self.fc[0](pooled), train=train))
            embedding = feature
        else:
            feature, embedding = self.bottleneck(pooled, train=train), pooled
        outputs = {"pooled": pooled, "embedding": embedding, "feature": feature}
        if self.settings.num_classes:
            outputs["logits"] = self.classifier(feature)
        return outputs
