"""Array annotations of the checked packages are checked while tests run."""

import numpy as np
import pytest
from jaxtyping import Int, TypeCheckError

from dmosnet_jax.data import splits
from tests.array_types import check_arrays


def test_a_wrong_shape_is_an_error():
    with pytest.raises(TypeCheckError, match="pids"):
        splits.relabel(np.zeros((2, 2), np.int32))


def test_only_array_annotations_are_checked():
    def function(rows: Int[np.ndarray, " n"], name: str) -> Int[np.ndarray, " n"]:
        return rows[::-1] if name else rows[1:]

    checked = check_arrays(function)
    assert list(checked(np.arange(3), 4)) == [2, 1, 0]
    with pytest.raises(Exception, match="rows"):
        checked(np.zeros(3), "name")
