"""Runnable measurements: `python -m dmosnet_jax.benchmarks.<name>` prints a table and writes it as CSV."""
