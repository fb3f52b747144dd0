"""A change that should not change the programs of the networks does not: `python tests/golden/make_programs.py`."""

import json

import jax
import jax.numpy as jnp
import pytest

from dmosnet_jax import models
from tests.golden import make_programs
from tests.recipes import small

GOLDEN = json.loads(make_programs.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", make_programs.NETWORKS)
def test_steps_are_the_programs_that_were_written_down(name):
    here = make_programs.made_with()
    if here != GOLDEN["made_with"]:
        pytest.skip(f"the digests were made with {GOLDEN['made_with']}, here is {here}")
    assert make_programs.digests(name) == GOLDEN["programs"][name]


def test_every_family_is_written_down():
    widths = ("x1_0", "x0_75", "x0_5")
    # Other tests of this process may have added a network of their own.
    families = [name for name in models.names() if not name.endswith(widths) and name != small.NAME]
    assert list(make_programs.NETWORKS) == families
    assert set(GOLDEN["programs"]) == set(make_programs.NETWORKS)


def test_a_digest_is_of_the_program_alone():
    def digest(function):
        return make_programs.digest(jax.jit(lambda x: {function.__name__: function(x)}).lower(jnp.zeros(3)))

    @jax.jit
    def double(x):
        return x * 2.0

    @jax.jit
    def twice(value):
        return value * 2.0

    @jax.jit
    def thrice(x):
        return x * 3.0

    assert digest(double) == digest(twice) != digest(thrice)
