import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmosnet_jax.core import parallel
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.memory import contrast, hybrid, tables


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


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("block", [7, 32, 1024])
def test_blocks_of_classes_change_nothing(rng, monkeypatch, devices, block):
    features, labels, inputs, indices = problem(rng, rows=200, classes=150)
    expected = direct(features, labels, inputs, indices, 0.2, 0.05)
    monkeypatch.setattr(contrast, "BLOCK_ON_CPU", block)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05, mesh=mesh)
    result = jax.jit(step)(memory, jnp.asarray(inputs), jnp.asarray(indices))
    np.testing.assert_allclose(result[1], expected[0], rtol=1e-5)
    np.testing.assert_allclose(result[2], expected[1], atol=1e-4)
    np.testing.assert_allclose(result[0].features[:200], expected[2], atol=1e-6)


@pytest.mark.parametrize("limit", [1024, 4096, 2**28])
def test_class_sums_by_columns_are_those_of_all_images(rng, monkeypatch, limit):
    features, labels, _, _ = problem(rng, rows=3000, classes=150)
    expected = np.zeros((1024, 16))
    np.add.at(expected, labels, features)
    monkeypatch.setattr(tables, "PARTIAL_SUMS", limit)
    tables.class_sums.clear_cache()
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05, capacity=150, mesh=parallel.make_mesh())
    tables.class_sums.clear_cache()
    np.testing.assert_allclose(memory.class_sums, expected, atol=1e-5)
    np.testing.assert_array_equal(memory.class_counts, np.bincount(labels, minlength=1024))


def test_sharded_equals_unsharded(rng):
    features, labels, inputs, indices = problem(rng, rows=300, classes=120, batch=32)
    mesh = parallel.make_mesh()
    single = hybrid.init(features, labels, momentum=0.2, temperature=0.05)
    sharded = hybrid.init(features, labels, momentum=0.2, temperature=0.05, mesh=mesh)
    places = tables.shardings(sharded, mesh)
    batch = parallel.to_devices({"inputs": inputs, "indices": indices}, mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, parallel.replicated(mesh), parallel.by_rows(mesh)))
    for _ in range(3):
        single, value, gradient = jax.jit(step)(single, jnp.asarray(inputs), jnp.asarray(indices))
        sharded, sharded_value, sharded_gradient = jitted(sharded, batch["inputs"], batch["indices"])
        np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
        np.testing.assert_allclose(sharded_gradient, gradient, atol=1e-5)
    relabelled = rng.integers(0, 70, 300)
    single, sharded = hybrid.set_labels(single, relabelled), hybrid.set_labels(sharded, relabelled)
    for name in ("features", "class_sums", "class_counts", "labels"):
        np.testing.assert_allclose(getattr(sharded, name), getattr(single, name), atol=1e-5)
        assert getattr(sharded, name).sharding == getattr(places, name)


def collectives(compiled):
    """Kind, values that go over the wire, and operation of every collective in a partitioned program."""
    text = compiled.as_text()
    found = []
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if not match:
            continue
        shapes = re.findall(r"\w\d+\[([\d,]*)\]", match[1])
        size = sum(np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes)
        reducer = re.search(r"to_apply=(%[\w.\-]+)", line)
        operation = ""
        if reducer:
            body = text[text.index(f"\n{reducer[1]} (") :]
            operation = re.search(r"ROOT .*? (\w+)\(", body)[1]
        found.append((match[2], int(size), operation))
    return found


def test_devices_exchange_one_maximum_and_sums_of_the_batch(rng):
    features, labels, inputs, indices = problem(rng, rows=20_000, classes=9000, batch=32)
    mesh = parallel.make_mesh()
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05, mesh=mesh)
    places, everywhere, rows = tables.shardings(memory, mesh), parallel.replicated(mesh), parallel.by_rows(mesh)
    assert memory.class_sums.shape[0] // 8 > 2 * contrast.BLOCK_ON_CPU, "the test sees a loop"
    inputs, indices = jnp.asarray(inputs), jnp.asarray(indices)
    value = jax.jit(jax.value_and_grad(hybrid.loss, argnums=1), in_shardings=(places, everywhere, everywhere))
    found = collectives(value.lower(memory, inputs, indices).compile())
    assert sorted(found) == [("all-reduce", 32, "maximum"), ("all-reduce", 32 * (1 + 2 * 16), "add")]
    # With the update and a batch that is split: its inputs are gathered, and the old rows are summed up.
    jitted = jax.jit(step, in_shardings=(places, rows, rows), out_shardings=(places, everywhere, rows))
    found = collectives(jitted.lower(memory, inputs, indices).compile())
    operations = [operation for kind, _, operation in found if kind == "all-reduce"]
    assert operations.count("maximum") == 1
    # XLA may send the two sums together.
    assert operations.count("add") in (1, 2)
    assert len(operations) == 1 + operations.count("add")
    assert max(size for _, size, _ in found) <= 32 * (1 + 4 * 16), "no table travels"


def test_a_refresh_sends_each_sum_once(rng):
    features, labels, _, _ = problem(rng, rows=20_000, classes=3000)
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05, capacity=3000, mesh=parallel.make_mesh())
    found = collectives(jax.jit(hybrid.refresh).lower(memory).compile())
    assert {kind for kind, _, _ in found} <= {"reduce-scatter", "all-reduce"}
    assert sum(size for _, size, _ in found) <= 3072 * 17


def test_a_memory_is_shapes_until_it_is_filled(rng):
    features, labels, _, _ = problem(rng)
    mesh = parallel.make_mesh()
    options = {"momentum": 0.2, "temperature": 0.05, "capacity": 50, "mesh": mesh}
    shapes = hybrid.shapes(*features.shape, **options)
    memory = hybrid.init(features, labels, **options)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), memory)
    jax.tree.map(np.testing.assert_array_equal, hybrid.set_labels(shapes, labels, features=features), memory)


def test_twenty_numbers_of_classes_are_one_program(rng):
    features, _, inputs, indices = problem(rng)
    mesh = parallel.make_mesh()
    memory = hybrid.init(features, np.arange(90), momentum=0.2, temperature=0.05, mesh=mesh)
    places = tables.shardings(memory, mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None, None))
    before = tables.class_sums._cache_size()
    for classes in (90, 1, 7, 42, *range(20, 36)):
        memory = hybrid.set_labels(memory, np.arange(90) % classes)
        memory, _, _ = jitted(memory, jnp.asarray(inputs), jnp.asarray(indices))
    assert jitted._cache_size() == 1
    assert tables.class_sums._cache_size() == before


@pytest.mark.parametrize("devices", [1, 8])
def test_donated_step_works_in_place(rng, devices):
    features, labels, inputs, indices = problem(rng, rows=4096, dim=64, classes=3000)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05, mesh=mesh)
    jitted = jax.jit(step, donate_argnums=0)
    analysis = jitted.lower(memory, jnp.asarray(inputs), jnp.asarray(indices)).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < memory.class_sums.nbytes / 2
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
    mesh = parallel.make_mesh()
    memory = hybrid.init(features, labels, momentum=0.2, temperature=0.05, mesh=mesh)
    other = unit(rng.normal(size=features.shape))
    changed = hybrid.set_labels(memory, labels, features=other)
    expected = hybrid.init(other, labels, momentum=0.2, temperature=0.05, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, changed, expected)
    assert changed.features.sharding == memory.features.sharding


def test_init_accepts_device_arrays(rng):
    features, labels, _, _ = problem(rng)
    host = hybrid.init(features, labels, momentum=0.2, temperature=0.05)
    device = hybrid.init(jnp.asarray(features), labels, momentum=0.2, temperature=0.05)
    jax.tree.map(np.testing.assert_array_equal, host, device)


@pytest.mark.parametrize(
    ("count", "devices", "expected"), [(1, 1, 1024), (1024, 8, 1024), (1025, 8, 2048), (65_537, 3, 67_584)]
)
def test_tables_are_padded_to_what_the_devices_share(count, devices, expected):
    assert tables.padded(count, parallel.make_mesh(jax.devices()[:devices])) == expected
    assert expected % devices == 0


@pytest.mark.usefixtures("no_array_checks")
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
    memory = hybrid.init(features, labels, **make)
    with pytest.raises(DataError, match="features of 89 images; the memory holds 90"):
        hybrid.set_labels(memory, labels, features=features[1:])
    with pytest.raises(ValueError, match="do not fit features of 16"):
        hybrid.loss(memory, jnp.asarray(inputs[:, :8]), jnp.zeros(24, jnp.int32))
