"""Strict numerics, eight CPU devices and the shared reference files for every test."""

import os

# Must be set before jax starts its backends: sharded code is tested on eight devices wherever the tests run.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pathlib

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = pathlib.Path(os.environ.get("DMOSNET_SHARED", ROOT.parent / "shared"))

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compilation dominates the suite on CPU; the cache is safe because its keys hold the program and the compiler version.
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def shared_file(relative: str) -> pathlib.Path:
    """Path of a reference file, or skips the calling test with the reason."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"reference file {relative} not found (set DMOSNET_SHARED to the folder that holds it)")
    return path


@pytest.fixture
def shared():
    """The function `shared(relative_path)`: skips with a reason where the reference files are absent."""
    return shared_file


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator, the same for every test."""
    return np.random.default_rng(0)
