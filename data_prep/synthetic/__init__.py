"""The renderer of synthetic pedestrians."""
