"""Domain-specific norms: which parameters they are, and that a network runs with another domain's."""

import jax
import numpy as np
import pytest

from dmosnet_jax import models
from dmosnet_jax.core.trees import named_leaves
from dmosnet_jax.models.domains import norms_of, with_norms


@pytest.mark.parametrize("name", ["osnet_ibn_x0_25", "osnet_ain_x0_25", "dmosnet_x0_25", "resnet50_ibn_a"])
def test_norms_are_those_with_statistics(name):
    model = models.build(name, num_classes=4, image_size=(64, 32))
    params, stats = model.shapes()
    found = dict(named_leaves(norms_of(params, stats)))
    modules = {leaf.rpartition(".")[0] for leaf, _ in named_leaves(stats)}
    assert found.keys() == {f"{module}.{leaf}" for module in modules for leaf in ("scale", "bias")}
    every = dict(named_leaves(params))
    assert all(every[leaf] is value for leaf, value in found.items())
    # Instance norms are shared.
    assert any(leaf.endswith(".scale") for leaf in every.keys() - found.keys()) == ("dm" not in name)


def test_norms_of_another_domain_take_their_places():
    model = models.build("dmosnet_x0_25", image_size=(64, 32))
    params, stats = model.init(jax.random.key(0))
    norms = norms_of(params, stats)
    assert dict(named_leaves(with_norms(params, norms))).keys() == dict(named_leaves(params)).keys()
    other = jax.tree.map(lambda leaf: leaf + 1.0, norms)
    changed = dict(named_leaves(with_norms(params, other)))
    for leaf, value in named_leaves(params):
        np.testing.assert_array_equal(changed[leaf], value + (leaf in dict(named_leaves(norms))))
