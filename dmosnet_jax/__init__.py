"""DM-OSNet person re-identification in JAX: training, evaluation and export.

`dmosnet_jax.load(path)` gives an extractor of features: see `dmosnet_jax.export.serve`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmosnet_jax.export.serve import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `import dmosnet_jax` must stay cheap for tools that only convert data.
    if name == "load":
        from dmosnet_jax.export.serve import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
