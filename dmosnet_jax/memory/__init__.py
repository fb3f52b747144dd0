"""Hybrid memory (on the devices) and the clustering that gives its labels (sparse, linear in the number of images)."""
