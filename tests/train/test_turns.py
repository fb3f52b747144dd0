"""A step in turns is the step at once, in less memory; a block of OSNet has what images meet in, batch norms."""

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from dmosnet_jax import models
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import make_mesh, to_devices
from dmosnet_jax.memory import cluster, hybrid
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train import steps
from dmosnet_jax.train.turns import AT_ONCE, Turns
from tests.recipes import small

small.register()

GROUP, ROWS, CLASSES, SIZE = 4, 40, 9, (64, 32)
CONFIG = ConfigDict(
    {
        "augment": {"flip": 0.5, "pad": 4, "erase": 0.5, "erasing": "spcl"},
        "pixel_mean": (0.485, 0.456, 0.406),
        "pixel_std": (0.229, 0.224, 0.225),
    }
)
KINDS = {"spcl": hybrid, "cluster": cluster, "spcl_uda": hybrid}


def start(rng, model, optimiser, kind, mesh):
    state = train_state.create(*model.init(jax.random.key(0)), optimiser, seed=0, mesh=mesh)
    features = rng.standard_normal((ROWS, model.feature_dim), np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    # A source's classes are one row each, and come first.
    labels = np.concatenate([np.arange(CLASSES), rng.integers(0, CLASSES, ROWS - CLASSES)])
    options = {"hardest": True} if kind == "cluster" else {}
    memory = KINDS[kind].init(features, labels, momentum=0.2, temperature=0.05, mesh=mesh, **options)
    if kind == "spcl_uda":
        state = train_state.with_source(state, optimiser)
    return state.replace(memory=memory)


def make_batch(rng, count):
    return {
        "image": rng.integers(0, 256, (count, *SIZE, 3), np.uint8),
        # Some rows more than once: their order is part of what must not change.
        "pid": rng.integers(0, ROWS, count).astype(np.int32),
        "index": rng.integers(0, ROWS, count).astype(np.int32),
    }


def compiled(model, optimiser, kind, state, batch, mesh, turns):
    if kind == "spcl_uda":
        step = steps.spcl_uda_step(model, optimiser, CONFIG, turns=turns)
    else:
        step = steps.spcl_step(model, optimiser, CONFIG, memory=KINDS[kind], turns=turns)
    return steps.compile_step(step, state, mesh).lower(state, batch).compile()


@pytest.mark.parametrize(
    ("kind", "devices", "at_once", "count"),
    [
        ("spcl", 1, 1, 4),
        ("spcl", 2, 1, 2),
        ("cluster", 1, 2, 2),
        ("spcl_uda", 1, 1, 4),
        ("spcl_uda", 2, 1, 2),
    ],
)
def test_turns_are_the_whole_batch_at_once(rng, kind, devices, at_once, count):
    mesh = make_mesh(jax.devices()[:devices])
    model = models.build(small.NAME, neck="bnneck", num_classes=0, image_size=SIZE, bn_group_size=GROUP)
    # The gradient itself is compared: an optimiser that scales it would hide a wrong factor.
    optimiser = optax.sgd(0.1)
    images, domains = 4 * GROUP, 2 if kind == "spcl_uda" else 1
    turns = Turns.of(at_once, GROUP, images, mesh)
    assert turns == Turns(count, devices)
    state, batch = start(rng, model, optimiser, kind, mesh), to_devices(make_batch(rng, domains * images), mesh)
    before, outcomes, scratch = jax.tree.map(np.array, train_state.trained(state)), [], []
    for chosen in (AT_ONCE, turns):
        program = compiled(model, optimiser, kind, state, batch, mesh, chosen)
        scratch.append(program.memory_analysis().temp_size_in_bytes)
        outcomes.append(program(jax.tree.map(lambda leaf: leaf.copy(), state), batch))
    (whole, metrics), (parts, found) = outcomes
    for one, other in zip(jax.tree.leaves(metrics), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3)
    moved = [jax.tree.map(np.subtract, train_state.trained(after), before) for after in (whole, parts)]
    difference = optax.global_norm(jax.tree.map(np.subtract, *moved))
    # Rounding only: networks of fresh weights have steep losses.
    assert difference < 5e-3 * optax.global_norm(moved[0])
    kept = [(after.stats, after.memory, after.source and after.source["stats"]) for after in (whole, parts)]
    for one, other in zip(*map(jax.tree.leaves, kept), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4)
    assert scratch[1] < (0.4 if count == 4 else 0.65) * scratch[0]


@pytest.mark.parametrize(
    ("groups_at_once", "group", "images", "devices", "text"),
    [
        (1, None, 64, 1, r"spcl\.groups_at_once=1 needs groups, and all 64 images share .*model\.bn_group_size.*leave"),
        (2, 64, 64, 1, r"spcl\.groups_at_once=2 needs groups"),
        (1, 16, 64, 8, r"each of 8 devices has 8 images, which are no whole groups of 16: leave it out, or use fewer"),
        (3, 16, 64, 1, r"spcl\.groups_at_once=3: each device has 4 groups: use a divisor of that"),
    ],
)
def test_turns_that_do_not_fit_say_so(groups_at_once, group, images, devices, text):
    with pytest.raises(ConfigError, match=text):
        Turns.of(groups_at_once, group, images, make_mesh(jax.devices()[:devices]))


@pytest.mark.parametrize(("groups_at_once", "count"), [(None, 1), (1, 4), (2, 2), (4, 1), (9, 1)])
def test_turns_of_64_images(groups_at_once, count):
    assert Turns.of(groups_at_once, 16, 64, make_mesh(jax.devices()[:1])).count == count
