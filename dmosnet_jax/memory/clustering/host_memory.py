"""How much memory of the host clustering needs, and how much there is."""

import os
import sys
from contextlib import suppress

from dmosnet_jax.core.errors import UserError
from dmosnet_jax.core.kernels import thread_count
from dmosnet_jax.memory.clustering.neighbours import BLOCK

# Non-zeros per row over k1, before and after query expansion, and edges per row: twice what real features showed.
_SET_PER_K1, _ROW_PER_K1, _EDGES = 2, 9, 40
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def estimate_memory(images: int, dim: int, *, k1: int = 30, threads: int | None = None) -> dict[str, int]:
    """Bytes of host memory that `cluster` needs, by part, and their sum as `total`.

    Feature and neighbour tables are exact; the sparse parts allow twice the non-zeros measured on real features.

    Args:
        images: N.
        dim: feature length.
        k1: neighbours.
        threads: worker threads, default all cores.
    """
    parts = {
        "features": 4 * images * dim,
        "neighbours": 9 * images * k1 + 4 * min(images, BLOCK) ** 2,
        "reciprocal sets": 8 * images * k1 * _SET_PER_K1,
        "weights and inverted index": 16 * images * k1 * _ROW_PER_K1,
        "graph": 24 * images * _EDGES,
        "scratch": 12 * images * thread_count(threads),
        "labels": 120 * images,
    }
    return parts | {"total": sum(parts.values())}


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's where that is less.

    A system that does not tell counts as having any amount.
    """
    limits = []
    with suppress(AttributeError, ValueError, OSError):  # not a POSIX system
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _CONTAINER_LIMITS:
        try:
            with open(path, encoding="ascii") as file:
                limits.append(int(file.read()))
        except (OSError, ValueError):  # no such control group, or no limit ("max")
            continue
    return min(limits, default=sys.maxsize)


def check_memory(images: int, dim: int, *, k1: int = 30, threads: int | None = None, limit: int | None = None) -> None:
    """Raises UserError when clustering needs more memory than `limit` bytes, by default what this process may use."""
    if limit is None:
        limit = machine_memory()
    need = estimate_memory(images, dim, k1=k1, threads=threads)["total"]
    if need > limit:
        raise UserError(
            f"clustering: {images} images of {dim} values need about {need / 2**30:.1f} GiB of memory, more than the "
            f"{limit / 2**30:.1f} GiB there are; use a machine with more memory, a lower k1 ({k1}) or fewer images"
        )
