"""Pseudo-labels by clustering: neighbours, Jaccard distance, DBSCAN, self-paced criterion; linear in the images."""

from dmosnet_jax.memory.clustering.k_distance import TooFewClusteredError
from dmosnet_jax.memory.clustering.stages import STAGES, Clustering, cluster

__all__ = ["STAGES", "Clustering", "TooFewClusteredError", "cluster"]
