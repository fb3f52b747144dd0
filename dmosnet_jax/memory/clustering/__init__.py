"""Pseudo-labels by clustering: neighbours, Jaccard distance, DBSCAN, self-paced criterion; linear in the images."""

from dmosnet_jax.memory.clustering.k_distance import TooFewClusteredError
from dmosnet_jax.memory.clustering.stages import Clustering, cluster

__all__ = ["Clustering", "TooFewClusteredError", "cluster"]
