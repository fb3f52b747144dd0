"""DM-OSNet person re-identification in JAX: training, evaluation and export.

`dmosnet_jax.load(path)` gives an extractor of features, see `dmosnet_jax.export.serve`; `dmosnet_jax.Gallery` keeps and
searches them, see `dmosnet_jax.evaluation.gallery`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmosnet_jax.evaluation.gallery import Gallery
    from dmosnet_jax.export.serve import load

__version__ = "0.1.0"
__all__ = ["Gallery", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `import dmosnet_jax` must stay cheap for tools that only convert data.
    if name == "load":
        from dmosnet_jax.export.serve import load

        return load
    if name == "Gallery":
        from dmosnet_jax.evaluation.gallery import Gallery

        return Gallery
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
