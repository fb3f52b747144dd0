import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmosnet_jax.core import mesh as meshes
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.memory import hybrid


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def step(memory, inputs, indices):
    value, gradient = jax.value_and_grad(hybrid.loss, argnums=1)(memory, inputs, indices)
    return hybrid.update(memory, inputs, indices, loss=value), value, gradient


def direct(features, labels, inputs, indices, momentum, temperature):
    """Loss, gradient by differences and the sequential update, in float64, over all members of every class."""
    features, inputs = features.astype(np.float64), inputs.astype(np.float64)
    classes = np.unique(labels)

    def value(x):
        logits = np.stack([(x @ features[labels == c].T).mean(axis=1) for c in classes], axis=1) / temperature
        weights = np.exp(logits)
        share = weights / (weights.sum(axis=1, keepdims=True) + 1e-6)
        own = share[np.arange(len(x)), np.searchsorted(classes, labels[indices])]
        return -np.log(own + 1e-6)

    gradient = np.zeros_like(inputs)
    for d in range(inputs.shape[1]):
        shift = np.zeros(inputs.shape[1])
        shift[d] = 1e-6
        gradient[:, d] = (value(inputs + shift) - value(inputs - shift)) / 2e-6 / len(inputs)
    after = features.copy()
    for x, i in zip(inputs, indices, strict=True):
        after[i] = momentum * after[i] + (1 - momentum) * x
        after[i] /= np.linalg.norm(after[i])
    return value(inputs).mean(), gradient, after


def problem(rng, rows=90, dim=16, classes=40, batch=24, spread=1.0):
    features = unit(rng.normal(size=(rows, dim)) + spread)
    labels = rng.integers(0, classes, rows)
    indices = rng.integers(0, rows, batch).astype(np.int32)
    indices[3] = indices[0]
    indices[7] = indices[0]
    inputs = unit(features[indices] + 0.3 * rng.normal(size=(batch, dim)))
    return features, labels, inputs, indices


def test_golden_five_steps(shared):
    golden = np.load(shared("goldens/spcl_memory.npz"))
    memory = hybrid.init(
        golden["initial"], golden["labels"], momentum=float(golden["momentum"]), temperature=float(golden["temp"])
    )
    jitted = jax.jit(step, donate_argnums=0)
    rows = len(golden["labels"])
    for i in range(5):
        memory, value, gradient = jitted(
            memory, jnp.asarray(golden["inputs"][i]), jnp.asarray(golden["indexes"][i], jnp.int32)
        )
        np.testing.assert_allclose(value, golden["loss"][i], atol=1e-4)
        np.testing.assert_allclose(gradient, golden["grad"][i], atol=1e-4)
        np.testing.assert_allclose(memory.features[:rows], golden["memory_after"][i], atol=1e-4)
        sums = np.zeros_like(memory.class_sums)
        np.add.at(sums, golden["labels"], golden["memory_after"][i])
        np.testing.assert_allclose(memory.class_sums, sums, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 0.004])
def test_equals_direct_computation_with_repeated_indices(rng, temperature):
    features, labels, inputs, indices = problem(rng)
    memory = hybrid.init(features, labels, momentum=0.2, temperature=temperature)
    after, value, gradient = jax.jit(step)(memory, jnp.asarray(inputs), jnp.asarray(indices))
    expected_value, expected_gradient, expected_after = direct(features, labels, inputs, indices, 0.2, temperature)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5 / temperature)
    np.testing.assert_allclose(after.features[: len(labels)], expected_after, atol=1e-6)
    assert not np.asarray(after.features[len(labels) :]).any()


def test_blocks_of_classes_and_rows_change_nothing(rng, monkeypatch):
    features, labels, inputs, indices = problem(rng, rows=200, classes=150)
    whole = hybrid.init(features, labels, momentum=0.2, temperature=0.05)
    expected = jax.jit(step)(whole, jnp.asarray(inputs), jnp.asarray(indices))
    monkeypatch.setattr(hybrid, "BLOCK", 32)
    blocked = hybrid.init(features, labels, momentum=0.2, temperature=0.05, multiple=4)
    assert hybrid._block_count(blocked.class_sums.shape[0]) == 7
    result = jax.jit(lambda *given: step(*given))(blocked, jnp.asarray(inputs), jnp.asarray(indices))
    np.testing.assert_allclose(result[1], expected[1], rtol=1e-6)
    np.testing.assert_allclose(result[2], expected[2], atol=1e-6)
    np.testing.assert_allclose(result[0].class_sums[:150], expected[0].class_sums[:150], atol=1e-6)
    np.testing.assert_array_equal(result[0].class_counts[:150], np.bincount(labels, minlength=150))


def test_sharded_equals_unsharded_and_never_gathers_a_table(rng):
    features, labels, inputs, indices = problem(rng, rows=300, classes=120, batch=32)
    mesh = meshes.make_mesh()
    single = hybrid.init(features, labels, momentum=0.2, temperature=0.05)
    sharded = hybrid.init(features, labels, momentum=0.2, temperature=0.05, mesh=mesh)
    places = hybrid.shardings(sharded, mesh)
    batch = meshes.to_devices({"inputs": inputs, "indices": indices}, mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, meshes.replicated(mesh), meshes.by_rows(mesh)))
    compiled = jitted.lower(sharded, batch["inputs"], batch["indices"]).compile().as_text()
    rows = str(sharded.features.shape[0])
    assert re.search(r"all-(reduce|gather)", compiled)
    assert not re.search(rf"f32\[{rows},16\]\S* all-gather", compiled)
    for _ in range(3):
        single, value, gradient = step(single, jnp.asarray(inputs), jnp.asarray(indices))
        sharded, sharded_value, sharded_gradient = jitted(sharded, batch["inputs"], batch["indices"])
        np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
        np.testing.assert_allclose(sharded_gradient, gradient, atol=1e-5)
    relabelled = rng.integers(0, 70, 300)
    single, sharded = hybrid.set_labels(single, relabelled), hybrid.set_labels(sharded, relabelled)
    for name in ("features", "class_sums", "class_counts", "labels"):
        np.testing.assert_allclose(getattr(sharded, name), getattr(single, name), atol=1e-5)
        assert getattr(sharded, name).sharding == getattr(places, name)


def test_shard_places_an_unsharded_memory(rng):
    features, labels, _, _ = problem(rng)
    mesh = meshes.make_mesh()
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05)
    placed = hybrid.shard(memory, mesh)
    assert len(placed.features.addressable_shards) == 8
    assert placed.features.addressable_shards[0].data.shape[0] * 8 == memory.features.shape[0]
    np.testing.assert_array_equal(placed.class_sums, memory.class_sums)


def test_twenty_numbers_of_classes_are_one_program(rng):
    features, _, inputs, indices = problem(rng)
    mesh = meshes.make_mesh()
    memory = hybrid.init(features, np.arange(90), momentum=0.2, temperature=0.05, mesh=mesh)
    places = hybrid.shardings(memory, mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None, None))
    tables = hybrid._compiled_tables((memory.class_sums.sharding, memory.class_counts.sharding))
    before = tables._cache_size()
    for classes in (90, 1, 7, 42, *range(20, 36)):
        memory = hybrid.set_labels(memory, np.arange(90) % classes)
        memory, _, _ = jitted(memory, jnp.asarray(inputs), jnp.asarray(indices))
    assert jitted._cache_size() == 1
    assert tables._cache_size() <= max(before, 1)


def test_donated_step_works_in_place(rng):
    features, labels, inputs, indices = problem(rng, rows=4096, dim=64, classes=3000)
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05)
    jitted = jax.jit(step, donate_argnums=0)
    analysis = jitted.lower(memory, jnp.asarray(inputs), jnp.asarray(indices)).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < memory.class_sums.nbytes
    new, _, _ = jitted(memory, jnp.asarray(inputs), jnp.asarray(indices))
    assert memory.features.is_deleted()
    assert not new.features.is_deleted()


def test_increments_stay_with_the_exact_sums(rng):
    features, labels, _, _ = problem(rng, rows=200, classes=30)
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05)
    update = jax.jit(hybrid.update)
    for _ in range(100):
        indices = rng.integers(0, 200, 16).astype(np.int32)
        memory = update(memory, jnp.asarray(unit(rng.normal(size=(16, 16)))), jnp.asarray(indices))
    exact = jax.jit(hybrid.refresh)(memory)
    length = np.linalg.norm(np.asarray(memory.class_sums) - exact.class_sums, axis=1)
    drift = (length / np.maximum(np.asarray(exact.class_counts), 1)).max()
    np.testing.assert_allclose(hybrid.drift(memory), drift, rtol=0.1)
    assert 0 < drift < 1e-5
    assert hybrid.drift(hybrid.refresh(memory)) < 1e-7
    np.testing.assert_allclose(memory.class_sums, exact.class_sums, atol=2e-5)
    np.testing.assert_allclose(hybrid.refresh(memory).class_sums, exact.class_sums, atol=1e-6)
    np.testing.assert_array_equal(memory.class_counts, exact.class_counts)


def test_loss_that_is_not_finite_leaves_the_memory(rng):
    features, labels, inputs, indices = problem(rng)
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05)
    inputs[5, 2] = np.nan
    after, value, _ = jax.jit(step)(memory, jnp.asarray(inputs), jnp.asarray(indices))
    assert np.isnan(value)
    jax.tree.map(np.testing.assert_array_equal, after, memory)


def test_gradient_ignores_the_memory_and_keeps_the_inputs_dtype(rng):
    features, labels, inputs, indices = problem(rng)
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05)
    half = jnp.asarray(inputs, jnp.bfloat16)
    gradient = jax.grad(hybrid.loss, argnums=1)(memory, half, jnp.asarray(indices))
    assert gradient.dtype == jnp.bfloat16
    by_sums = jax.grad(lambda sums: hybrid.loss(memory.replace(class_sums=sums), inputs, indices))(memory.class_sums)
    assert not np.asarray(by_sums).any()


def test_other_features(rng):
    features, labels, _, _ = problem(rng)
    mesh = meshes.make_mesh()
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05, mesh=mesh)
    other = unit(rng.normal(size=features.shape))
    changed = hybrid.set_labels(hybrid.set_features(memory, other), labels)
    expected = hybrid.init(other, labels, momentum=0.2, temperature=0.05, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, changed, expected)
    assert changed.features.sharding == memory.features.sharding


def test_init_accepts_device_arrays(rng):
    features, labels, _, _ = problem(rng)
    host = hybrid.init(features, labels, momentum=0.2, temperature=0.05)
    device = hybrid.init(jnp.asarray(features), labels, momentum=0.2, temperature=0.05)
    jax.tree.map(np.testing.assert_array_equal, host, device)


@pytest.mark.parametrize(("count", "expected"), [(1, 1024), (1024, 1024), (1025, 2048), (65_537, 67_584)])
def test_padded_rows(count, expected):
    assert hybrid.padded_rows(count) == expected
    assert expected % hybrid._block_count(expected) == 0


def test_large_tables_divide_into_blocks_over_devices():
    rows = hybrid.padded_rows(2_090_122)
    blocks = hybrid._block_count(rows)
    assert rows < 2_090_122 * 1.02
    assert rows // blocks <= hybrid.BLOCK
    assert (rows // blocks) % 1024 == 0


def test_errors(rng):
    features, labels, inputs, _ = problem(rng)
    make = {"momentum": 0.2, "temperature": 0.05}
    with pytest.raises(ConfigError, match=r"momentum=1\.0"):
        hybrid.init(features, labels, momentum=1.0, temperature=0.05)
    with pytest.raises(ConfigError, match="temperature=0"):
        hybrid.init(features, labels, momentum=0.2, temperature=0)
    with pytest.raises(DataError, match=r"\(90,\)"):
        hybrid.init(features[:, 0], labels, **make)
    with pytest.raises(DataError, match="90 images"):
        hybrid.init(features, labels[:-1], **make)
    with pytest.raises(DataError, match="label -1 at row 4"):
        hybrid.init(features, np.where(np.arange(90) == 4, -1, labels), **make)
    with pytest.raises(ConfigError, match="raise `capacity`"):
        hybrid.init(features, labels + 2000, capacity=64, **make)
    with pytest.raises(ConfigError, match="do not divide over 8 devices"):
        hybrid.init(features, labels, mesh=meshes.make_mesh(), multiple=9, **make)
    memory = hybrid.init(features, labels, **make)
    with pytest.raises(ValueError, match="do not fit features of 16"):
        hybrid.loss(memory, jnp.asarray(inputs[:, :8]), jnp.zeros(24, jnp.int32))
