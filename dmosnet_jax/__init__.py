"""DM-OSNet person re-identification in JAX: training, evaluation and export."""

__version__ = "0.1.0"
