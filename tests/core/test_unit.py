"""One rule for unit length, in JAX and in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from dmosnet_jax.core.unit import EPSILON, unit_rows, unit_rows_np


def test_both_libraries_scale_rows_alike_and_keep_zero_rows(rng):
    rows = rng.normal(size=(5, 8)).astype(np.float32)
    rows[2] = 0
    rows[3] *= 1e6
    expected = rows / np.maximum(np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True), EPSILON)
    for found in (unit_rows(jnp.asarray(rows)), unit_rows_np(rows), unit_rows(jnp.asarray(rows.T), 0).T):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(unit_rows_np(rows)[2], 0)


def test_shorter_than_epsilon_is_divided_by_epsilon():
    tiny = np.array([[3e-14, 4e-14]], np.float32)
    for found in (unit_rows(jnp.asarray(tiny)), unit_rows_np(tiny)):
        np.testing.assert_allclose(found, [[0.03, 0.04]], rtol=1e-5)


def test_a_zero_row_has_a_finite_gradient_and_spoils_no_other(rng):
    rows = jnp.asarray(rng.normal(size=(3, 4)).astype(np.float32)).at[1].set(0)
    weights = jnp.asarray(rng.normal(size=(3, 4)).astype(np.float32))
    gradient = jax.grad(lambda x: (unit_rows(x) * weights).sum())(rows)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose((gradient * rows).sum(axis=1)[np.array([0, 2])], 0, atol=1e-5)
