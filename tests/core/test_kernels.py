import pytest

from dmosnet_jax.core import kernels


def test_jit_works_where_nothing_can_be_cached():
    # Numba finds no place to cache code that no file holds, as it finds none for a read-only installation.
    space = {}
    exec("def double(x):\n    return 2 * x", space)
    import numba

    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(space["double"])
    assert kernels.jit()(space["double"])(21) == 42


@pytest.mark.parametrize("threads", [1, 3])
def test_map_rows_covers_all_rows_in_order(threads):
    seen = []
    spans = kernels.map_rows(lambda a, b: (a, b), 10, threads=threads, task_rows=4, progress=seen.append)
    assert spans == [(0, 4), (4, 8), (8, 10)]
    assert seen[-1] == 1.0
    assert kernels.map_rows(lambda a, b: (a, b), 0) == []


def test_map_rows_passes_errors_on():
    def fail(start, stop):
        raise KeyError(start)

    with pytest.raises(KeyError):
        kernels.map_rows(fail, 5)
