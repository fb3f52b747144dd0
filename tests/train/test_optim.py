"""Schedules at their key steps, and the optimisers against PyTorch's update rules written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.train import optim

BASE = {
    "name": "adam",
    "learning_rate": 3.5e-4,
    "weight_decay": 5e-4,
    "momentum": 0.9,
    "clip_norm": 0.0,
    "schedule": "step",
    "decay_epochs": (50, 100),
    "decay_factor": 0.1,
    "final_factor": 2e-3,
    "count_after_warmup": False,
    "warmup_steps": 2000,
    "warmup_factor": 0.1,
}


def rate_at(step, *, steps_per_epoch=200, total_steps=24_000, batch_size=None, **fields):
    lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps, "batch_size": batch_size}
    schedule = optim.learning_rate(ConfigDict(BASE | fields), **lengths)
    rate = schedule(jnp.int32(step))
    assert rate.dtype == jnp.float32
    return float(rate)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 3.5e-5),
        (1000, 3.5e-4 * 0.55),
        (1999, 3.5e-4 * (0.1 + 0.9 * 1999 / 2000)),
        (2000, 3.5e-4),
        (9_999, 3.5e-4),
        (10_000, 3.5e-5),
        (19_999, 3.5e-5),
        (20_000, 3.5e-6),
        (23_999, 3.5e-6),
    ],
)
def test_the_papers_fine_tuning_schedule(step, rate):
    assert rate_at(step) == pytest.approx(rate, rel=1e-5)


def test_rates_grow_with_the_batch_after_a_warm_up():
    plain = {"decay_epochs": (20,), "warmup_steps": None, "steps_per_epoch": 100, "total_steps": 3000}
    scaled = plain | {"base_batch_size": 64, "batch_size": 256}
    found = [rate_at(step, **scaled) for step in (0, 50, 100, 1999, 2000)]
    np.testing.assert_allclose(found, 3.5e-4 * np.array([1, 2.5, 4, 4, 0.4]), rtol=1e-5)
    # A warm-up that is given stays, as do smaller batches without one.
    given = scaled | {"warmup_steps": 200, "warmup_factor": 0.5}
    np.testing.assert_allclose([rate_at(step, **given) for step in (0, 100, 200)], [7e-4, 1.05e-3, 1.4e-3], rtol=1e-5)
    assert rate_at(0, **scaled | {"batch_size": 32}) == pytest.approx(1.75e-4, rel=1e-5)
    for step in (0, 1500, 2500):
        assert rate_at(step, **plain | {"base_batch_size": 64, "batch_size": 64}) == rate_at(step, **plain)


def test_spcl_falls_by_ten_every_twenty_epochs():
    fields = {"decay_epochs": (20, 40), "warmup_steps": None, "steps_per_epoch": 400, "total_steps": 20_000}
    steps = [0, 7_999, 8_000, 15_999, 16_000]
    rates = [rate_at(step, **fields) for step in steps]
    np.testing.assert_allclose(rates, [3.5e-4, 3.5e-4, 3.5e-5, 3.5e-5, 3.5e-6], rtol=1e-5)


def test_cosine_holds_then_falls_to_its_final_factor():
    fields = {"schedule": "cosine", "decay_epochs": (30,), "steps_per_epoch": 100, "total_steps": 6000}
    rates = [rate_at(step, **fields) for step in (2000, 3000, 3099, 4500, 4599, 6000, 7000)]
    middle = 2e-3 + (1 - 2e-3) / 2
    np.testing.assert_allclose(rates, 3.5e-4 * np.array([1, 1, 1, middle, middle, 2e-3, 2e-3]), rtol=1e-4)


def fastreid_rates(sched, *, steps_per_epoch, epochs, warmup, delay=0, milestones=(), gamma=0.1, eta_min=7e-7):
    """The rate of every step as fast-reid comes to it: its hooks (`engine/hooks.py`) and torch's two schedulers."""
    base, rate, rates, calls = 3.5e-4, 3.5e-5, [], 0
    longest = epochs - max(-(-warmup // steps_per_epoch), delay)
    for step in range(epochs * steps_per_epoch):
        rates.append(rate)
        following = step + 1
        if following <= warmup:
            alpha = following / warmup
            rate = base * (0.1 * (1 - alpha) + alpha) if following < warmup else base
        epoch, last = divmod(following, steps_per_epoch)
        if last == 0 and following > warmup and epoch > delay:
            calls += 1
            if sched == "MultiStepLR":
                rate *= gamma if calls in milestones else 1
            else:
                rate = eta_min + (base - eta_min) * (1 + np.cos(np.pi * calls / longest)) / 2
    return rates


@pytest.mark.parametrize(
    ("recipe", "steps_per_epoch"),
    [("market1501", 202), ("cuhk03", 76), ("market1501", 50), ("market1501", 60), ("cuhk03", 200)],
)
def test_released_schedules_are_those_of_fast_reids_hooks(recipe, steps_per_epoch):
    """Also where the warm-up ends with an epoch, and where it lasts longer than the cosine's delay (50, 60 steps)."""
    if recipe == "cuhk03":
        fields = {"decay_epochs": (40, 90)}
        epochs, theirs = 120, {"sched": "MultiStepLR", "milestones": (40, 90)}
    else:
        fields = {"schedule": "cosine", "decay_epochs": (30,)}
        epochs, theirs = 60, {"sched": "CosineAnnealingLR", "delay": 30}
    schedule = optim.learning_rate(
        ConfigDict(BASE | fields | {"count_after_warmup": True}),
        steps_per_epoch=steps_per_epoch,
        total_steps=epochs * steps_per_epoch,
    )
    ours = jax.vmap(schedule)(jnp.arange(epochs * steps_per_epoch))
    wanted = fastreid_rates(steps_per_epoch=steps_per_epoch, epochs=epochs, warmup=2000, **theirs)
    np.testing.assert_allclose(ours, wanted, rtol=2e-4)
    drops = np.flatnonzero(np.diff(wanted[2000:]) < 0) + 2001
    if (recipe, steps_per_epoch) == ("cuhk03", 76):
        assert (drops // 76).tolist() == [66, 116]
    if (recipe, steps_per_epoch) == ("market1501", 202):
        assert drops[0] == 31 * 202
        np.testing.assert_allclose(wanted[-1], 1.66e-6, rtol=0.01)
    if (recipe, steps_per_epoch) == ("market1501", 60):
        # The warm-up ends amid epoch 33: the last epoch has the final rate.
        np.testing.assert_allclose(ours[-60:], 7e-7, rtol=1e-4)
        assert ours[-61] > 1e-6


def test_cosine_without_a_hold_starts_at_once():
    fields = {"schedule": "cosine", "decay_epochs": (), "warmup_steps": None, "final_factor": 0.0}
    rates = [rate_at(step, steps_per_epoch=5, total_steps=500, **fields) for step in (0, 250, 375, 500)]
    np.testing.assert_allclose(rates, 3.5e-4 * np.array([1, 0.5, (1 + np.cos(0.75 * np.pi)) / 2, 0]), atol=1e-9)


def test_constant_only_warms_up():
    rates = [rate_at(step, schedule="constant", warmup_steps=10, warmup_factor=0.0) for step in (0, 5, 10, 23_999)]
    np.testing.assert_allclose(rates, 3.5e-4 * np.array([0, 0.5, 1, 1]), rtol=1e-6)


def test_warm_up_in_epochs():
    fields = {"warmup_steps": None, "warmup_epochs": 2.0}
    assert rate_at(200, **fields) == pytest.approx(3.5e-4 * 0.55, rel=1e-5)
    assert rate_at(400, **fields) == pytest.approx(3.5e-4, rel=1e-5)


def run(config, params, gradients):
    transform = optim.make_optimiser(ConfigDict(BASE | config), lambda step: 0.1 / (1 + step.astype(jnp.float32)))
    state = transform.init(params)
    update = jax.jit(lambda gradient, state, params: transform.update(gradient, state, params))
    # Optax itself mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
    return params


def draw(rng, steps=7):
    shapes = {"kernel": (4, 5), "scale": (5,), "bias": (5,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return params, [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(steps)
    ]


def test_adam_is_pytorchs_with_decay_in_the_gradient_of_every_parameter(rng):
    params, gradients = draw(rng)
    found = run({}, params, gradients)
    # torch.optim.Adam: g += decay * p; m, v; p -= rate * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    for name, start in params.items():
        p, m, v = start.astype(np.float64), 0.0, 0.0
        for t, gradient in enumerate(gradients, 1):
            g = gradient[name] + 5e-4 * p
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p - 0.1 / t * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(found[name], p, rtol=2e-5, atol=1e-6)


def test_sgd_is_pytorchs_with_momentum(rng):
    params, gradients = draw(rng)
    found = run({"name": "sgd"}, params, gradients)
    # torch.optim.SGD: g += decay * p; b = momentum * b + g; p -= rate * b
    for name, start in params.items():
        p, b = start.astype(np.float64), 0.0
        for t, gradient in enumerate(gradients, 1):
            b = 0.9 * b + gradient[name] + 5e-4 * p
            p = p - 0.1 / t * b
        np.testing.assert_allclose(found[name], p, rtol=2e-5, atol=1e-6)


def test_gradients_are_clipped_by_their_common_norm(rng):
    params, gradients = draw(rng, steps=1)
    options = {"name": "sgd", "weight_decay": 0.0}
    free = run(options, params, gradients)
    clipped = run({**options, "clip_norm": 0.5}, params, gradients)
    norm = np.sqrt(sum(float((g**2).sum()) for g in gradients[0].values()))
    assert norm > 0.5
    for name, start in params.items():
        np.testing.assert_allclose(clipped[name] - start, (free[name] - start) * 0.5 / norm, rtol=1e-4, atol=1e-6)


def test_unknown_optimiser():
    with pytest.raises(ConfigError, match=r"optim\.name='lamb' is not known: use adam or sgd"):
        optim.make_optimiser(ConfigDict(BASE | {"name": "lamb"}), lambda step: step)


def test_bias_of_the_neck_is_never_trained():
    leaf = jnp.ones((3,), jnp.float32)
    params = {"bottleneck": {"scale": leaf, "bias": leaf}, "conv1": {"bn": {"bias": leaf}}}
    transform = optim.make_optimiser(ConfigDict(BASE), lambda _: jnp.float32(0.1))
    with jax.numpy_dtype_promotion("standard"):
        # Optax counts its steps in integers.
        updates, _ = transform.update(jax.tree.map(jnp.ones_like, params), transform.init(params), params)
    moved = jax.tree.map(lambda update: bool(jnp.all(update != 0)), updates)
    assert moved == {"bottleneck": {"scale": True, "bias": False}, "conv1": {"bn": {"bias": True}}}
