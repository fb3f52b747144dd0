"""Networks of the paper, as NNX modules behind a plain-pytree interface (`build`)."""

from dmosnet_jax.models.build import Model, build, names

__all__ = ["Model", "build", "names"]
