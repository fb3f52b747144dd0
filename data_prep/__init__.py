"""Conversion of raw re-identification data sets into TFRecord: one TensorFlow Datasets builder each, and `convert`.

Only this package needs TensorFlow; what it writes, `dmosnet_jax.data` reads without.
"""
