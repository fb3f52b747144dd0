"""One file, one reproducible experiment."""
