"""The steps with a network small enough to follow, and with a real one in bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from dmosnet_jax import models
from dmosnet_jax.core.parallel import make_mesh, to_devices
from dmosnet_jax.core.unit import unit_rows
from dmosnet_jax.data import augment
from dmosnet_jax.losses import identity, triplet
from dmosnet_jax.memory import hybrid
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train import steps

CONFIG = {
    "augment": {"flip": 0.5, "pad": 2, "erase": 0.5, "erasing": "fastreid"},
    "pixel_mean": (0.5, 0.4, 0.3),
    "pixel_std": (0.2, 0.2, 0.25),
    "loss": {
        "label_smoothing": 0.1,
        "triplet": "hinge",
        "triplet_margin": 0.3,
        "triplet_weight": 0.5,
        "triplet_on": "embedding",
        "circle_scale": 8.0,
        "circle_margin": 0.25,
    },
}
CLASSES = 4


class Linear:
    """A network of two matrices; its statistics count the images it has seen in training."""

    def __init__(self, classifier="linear"):
        self.classifier = classifier

    def apply(self, params, stats, images, *, train):
        rows = images.reshape(images.shape[0], -1)
        embedding = jnp.matmul(rows, params["embed"], precision="highest")
        logits = jnp.matmul(embedding, params["classifier"], precision="highest")
        seen = {"seen": stats["seen"] + rows.shape[0]} if train else stats
        if self.classifier == "circle":
            logits = jnp.tanh(logits)
        return {"embedding": embedding, "feature": 2.0 * embedding, "logits": logits}, seen


def linear_weights(rng):
    shapes = {"embed": (8 * 4 * 3, 5), "classifier": (5, CLASSES)}
    params = {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return params, {"seen": np.float32(0)}


def make_batch(rng, count=16):
    return {
        "image": rng.integers(0, 256, (count, 8, 4, 3), np.uint8),
        "pid": np.repeat(np.arange(CLASSES), count // CLASSES).astype(np.int32),
        "camid": np.ones(count, np.int32),
        "index": rng.permutation(40)[:count].astype(np.int32),
        "mask": np.ones(count, bool),
    }


def run(step, state, batch, mesh):
    with jax.numpy_dtype_promotion("standard"):
        return steps.compile_step(step, state, mesh)(jax.tree.map(jnp.copy, state), to_devices(batch, mesh))


def augmented(state, batch):
    options = {**CONFIG["augment"], "mean": CONFIG["pixel_mean"], "std": CONFIG["pixel_std"]}
    return augment.augment(train_state.step_key(state), jnp.asarray(batch["image"]), **options)


@pytest.mark.parametrize("kind", ["hinge", "soft", "none"])
def test_supervised_step_descends_its_losses(rng, kind):
    mesh = make_mesh(jax.devices()[:1])
    params, stats = linear_weights(rng)
    batch = make_batch(rng)
    config = ConfigDict(CONFIG)
    config.loss.triplet = kind
    optimiser = optax.sgd(0.25)
    state = train_state.create(params, stats, optimiser, seed=3, mesh=mesh)

    def losses(params):
        outputs, _ = Linear().apply(params, stats, augmented(state, batch), train=True)
        first = identity.cross_entropy(outputs["logits"], jnp.asarray(batch["pid"]), epsilon=0.1)
        if kind == "none":
            return first, (first, None)
        margin = 0.3 if kind == "hinge" else None
        second = triplet.batch_hard(outputs["embedding"], jnp.asarray(batch["pid"]), margin=margin)
        return first + jnp.float32(0.5) * second, (first, second)

    (loss, parts), gradient = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
    after, metrics = run(steps.supervised_step(Linear(), optimiser, config), state, batch, mesh)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_id"], parts[0], rtol=1e-5)
    assert ("loss_triplet" in metrics) == (kind != "none")
    if kind != "none":
        np.testing.assert_allclose(metrics["loss_triplet"], parts[1], rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.global_norm(gradient), rtol=1e-5)
    assert 0 <= float(metrics["accuracy"]) <= 1
    for name, start in params.items():
        np.testing.assert_allclose(after.params[name], start - 0.25 * gradient[name], rtol=1e-5, atol=1e-6)
    assert (int(after.step), float(after.stats["seen"])) == (1, 16.0)
    np.testing.assert_array_equal(after.key, state.key)


def test_released_losses(rng):
    mesh = make_mesh(jax.devices()[:1])
    params, stats = linear_weights(rng)
    batch = make_batch(rng)
    config = ConfigDict(CONFIG)
    config.loss.triplet, config.loss.triplet_on = "soft", "feature"
    state = train_state.create(params, stats, optax.sgd(0.25), seed=3, mesh=mesh)
    _, metrics = run(steps.supervised_step(Linear("circle"), optax.sgd(0.25), config), state, batch, mesh)
    outputs, _ = Linear("circle").apply(params, stats, augmented(state, batch), train=True)
    pids = jnp.asarray(batch["pid"])
    logits = identity.circle_logits(outputs["logits"], pids, scale=8.0, margin=0.25)
    np.testing.assert_allclose(metrics["loss_id"], identity.cross_entropy(logits, pids, epsilon=0.1), rtol=1e-5)
    expected = triplet.batch_hard(outputs["feature"], pids, margin=None)
    np.testing.assert_allclose(metrics["loss_triplet"], expected, rtol=1e-5)
    # The margin hides the label's cosine from the loss, not from the accuracy.
    np.testing.assert_allclose(metrics["accuracy"], identity.accuracy(outputs["logits"], pids), rtol=1e-6)


def with_memory(state, rng, mesh):
    features = rng.standard_normal((40, 5), np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = rng.integers(0, 9, 40)
    return state.replace(memory=hybrid.init(features, labels, momentum=0.2, temperature=0.05, mesh=mesh))


def on(state, mesh):
    """The state, whose memory knows the devices that its tables are split over, for another mesh."""
    return state if state.memory is None else state.replace(memory=state.memory.replace(mesh=mesh))


def test_spcl_step_contrasts_with_the_memory_from_before_it_moves(rng):
    mesh = make_mesh(jax.devices()[:1])
    params, stats = linear_weights(rng)
    batch = make_batch(rng)
    optimiser = optax.sgd(0.25)
    state = with_memory(train_state.create(params, stats, optimiser, seed=3, mesh=mesh), rng, mesh)
    indices = jnp.asarray(batch["index"])

    def loss_of(params):
        outputs, _ = Linear().apply(params, stats, augmented(state, batch), train=True)
        features = unit_rows(outputs["feature"])
        return hybrid.loss(state.memory, features, indices), features

    (loss, features), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    after, metrics = run(steps.spcl_step(Linear(), optimiser, ConfigDict(CONFIG)), state, batch, mesh)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(after.params["embed"], params["embed"] - 0.25 * gradient["embed"], rtol=1e-4, atol=1e-6)
    moved = hybrid.update(state.memory, features, indices)
    np.testing.assert_allclose(after.memory.features, moved.features, atol=1e-6)
    np.testing.assert_allclose(after.memory.class_sums, moved.class_sums, atol=1e-5)
    assert not np.allclose(after.memory.features, state.memory.features)


FIXED = 10


class Normed:
    """A network of two matrices, each with a batch norm and tanh behind it."""

    def apply(self, params, stats, images, *, train):
        assert train
        x, moved = images.reshape(images.shape[0], -1), {}
        for name in ("first", "second"):
            x = jnp.matmul(x, params[name]["kernel"], precision="highest")
            mean, var = x.mean(axis=0), x.var(axis=0)
            norm = params[name]["norm"]
            x = jnp.tanh((x - mean[None]) * jax.lax.rsqrt(var + 1e-5)[None] * norm["scale"][None] + norm["bias"][None])
            old = stats[name]["norm"]
            moved[name] = {"norm": {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}}
        return {"feature": x}, moved


def normed_weights(rng):
    params, stats = {}, {}
    for name, shape in (("first", (8 * 4 * 3, 12)), ("second", (12, 5))):
        scale, bias = rng.uniform(0.5, 1.5, shape[1:]), rng.normal(0, 0.3, shape[1:])
        params[name] = {"kernel": 0.1 * rng.standard_normal(shape), "norm": {"scale": scale, "bias": bias}}
        stats[name] = {"norm": {"mean": np.zeros(shape[1:]), "var": np.ones(shape[1:])}}
    return jax.tree.map(np.float32, (params, stats))


def uda_state(rng, optimiser, mesh):
    """Norms of the source are not the target's, as after some steps; classes of the source come first."""
    state = train_state.create(*normed_weights(rng), optimiser, seed=3, mesh=mesh)
    state = train_state.with_source(state, optimiser)
    other = jax.tree.map(lambda leaf: leaf * 1.1 + 0.05, state.source)
    features = unit_rows(jnp.asarray(rng.standard_normal((40, 5), np.float32)))
    labels = np.concatenate([np.arange(FIXED), FIXED + rng.integers(0, 9, 40 - FIXED)])
    memory = hybrid.init(np.asarray(features), labels, momentum=0.2, temperature=0.05, mesh=mesh)
    return state.replace(source=other, memory=memory)


def uda_batch(rng, count=32):
    """Rows of the memory, turn about of the source's classes and of the target's images; some more than once."""
    batch = make_batch(rng, count)
    rows = [rng.integers(0, FIXED, count // 2), FIXED + rng.integers(0, 40 - FIXED, count // 2)]
    return batch | {"pid": np.stack(rows, axis=1).ravel().astype(np.int32)}


def norm_of(weights, domain, layer, x):
    """A layer with the norm of one domain; the running statistics that it would have."""
    own = weights["norms"][domain][layer]
    x = jnp.matmul(x, weights["kernels"][layer], precision="highest")
    mean, var = x.mean(axis=0), x.var(axis=0)
    x = (x - mean[None]) / jnp.sqrt(var + 1e-5)[None]
    return jnp.tanh(x * own["scale"][None] + own["bias"][None]), mean, var


def test_spcl_uda_step_equals_the_direct_computation(rng):
    """Loss, gradient and memory of SpCL with a source: norms by domain, the softmax over all rows, rows one by one."""
    mesh = make_mesh(jax.devices()[:1])
    optimiser = optax.sgd(0.25)
    state, batch = uda_state(rng, optimiser, mesh), uda_batch(rng)
    images, rows = augmented(state, batch), batch["pid"]
    memory = np.asarray(state.memory.features)[:40].astype(np.float32)
    labels = np.asarray(state.memory.labels)[:40]
    layers = ("first", "second")
    weights = {
        "kernels": {layer: state.params[layer]["kernel"] for layer in layers},
        "norms": [{layer: tree[layer]["norm"] for layer in layers} for tree in (state.source["params"], state.params)],
    }

    def loss_of(weights):
        parts, features, moments = [], [], []
        for domain in (0, 1):
            x = images[domain::2].reshape(16, -1)
            for layer in layers:
                x, mean, var = norm_of(weights, domain, layer, x)
                moments.append((mean, var))
            x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
            similarity = jnp.matmul(x, jnp.asarray(memory).T, precision="highest") / 0.05
            member = jnp.asarray(np.arange(FIXED + 9)[:, None] == labels[None, :], jnp.float32)
            count = member.sum(axis=1)
            logits = jnp.matmul(similarity, member.T, precision="highest") / jnp.maximum(count, 1.0)[None]
            shares = jnp.where((count > 0)[None], jnp.exp(logits), 0.0)
            shares = shares / (shares.sum(axis=1, keepdims=True) + 1e-6)
            own = shares[np.arange(16), labels[rows[domain::2]]]
            parts.append(-jnp.log(own + 1e-6).mean())
            features.append(x)
        return parts[0] + parts[1], (parts, features, moments)

    (loss, (parts, features, moments)), gradient = jax.value_and_grad(loss_of, has_aux=True)(weights)
    after, metrics = run(steps.spcl_uda_step(Normed(), optimiser, ConfigDict(CONFIG)), state, batch, mesh)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose([metrics["loss_source"], metrics["loss_target"]], parts, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.global_norm(gradient), rtol=1e-4)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for layer in layers:
        moved = weights["kernels"][layer] - 0.25 * gradient["kernels"][layer]
        np.testing.assert_allclose(after.params[layer]["kernel"], moved, **close)
        for domain, tree in enumerate((after.source["params"], after.params)):
            for name, value in weights["norms"][domain][layer].items():
                moved = value - 0.25 * gradient["norms"][domain][layer][name]
                assert np.abs(moved - value).max() > 1e-4
                np.testing.assert_allclose(tree[layer]["norm"][name], moved, **close)
    for number, (mean, var) in enumerate(moments):
        layer, before, then = layers[number % 2], *((state, after) if number > 1 else (state.source, after.source))
        old, new = ((tree.stats if number > 1 else tree["stats"])[layer]["norm"] for tree in (before, then))
        np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * mean, **close)
        np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * var, **close)
    for domain in (0, 1):
        for row, x in zip(rows[domain::2], np.asarray(features[domain]), strict=True):
            memory[row] = 0.2 * memory[row] + 0.8 * x
            memory[row] /= np.linalg.norm(memory[row])
    np.testing.assert_allclose(np.asarray(after.memory.features)[:40], memory, atol=1e-5)
    np.testing.assert_array_equal(after.memory.labels, state.memory.labels)
    for label in np.unique(labels):
        np.testing.assert_allclose(after.memory.class_sums[label], memory[labels == label].sum(axis=0), atol=1e-4)


def test_a_sources_norms_start_as_the_targets_and_have_an_optimiser(rng):
    optimiser = optax.adam(0.1)
    params, stats = normed_weights(rng)
    state = train_state.with_source(train_state.create(params, stats, optimiser, seed=3, mesh=make_mesh()), optimiser)
    for layer in ("first", "second"):
        jax.tree.map(np.testing.assert_array_equal, state.source["params"][layer], {"norm": params[layer]["norm"]})
    jax.tree.map(np.testing.assert_array_equal, state.source["stats"], stats)
    shapes = train_state.with_source(train_state.shapes(params, stats, optimiser), optimiser)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    # Two moments and a counter.
    assert len(jax.tree.leaves(state.opt_state)) == 1 + 2 * (6 + 4)


@pytest.mark.parametrize("recipe", ["supervised", "spcl", "spcl_uda"])
def test_device_counts_agree(rng, recipe):
    """Each step from the same state: no rounding grows from one to the next."""
    optimiser = optax.sgd(0.05)
    make_step = getattr(steps, f"{recipe}_step")
    meshes = [make_mesh(jax.devices()[:count]) for count in (1, 2, 8)]
    if recipe == "spcl_uda":
        state = uda_state(rng, optimiser, meshes[0])
    else:
        state = train_state.create(*linear_weights(rng), optimiser, seed=3, mesh=meshes[0])
    if recipe == "spcl":
        state = with_memory(state, np.random.default_rng(1), meshes[0])
    step = make_step(Normed() if recipe == "spcl_uda" else Linear(), optimiser, ConfigDict(CONFIG))
    compiled = [steps.compile_step(step, on(state, mesh), mesh) for mesh in meshes]
    draw = uda_batch if recipe == "spcl_uda" else make_batch
    for seed in range(5):
        batch, start = draw(np.random.default_rng(seed)), jax.tree.map(np.array, state)
        outcomes = []
        for run_step, mesh in zip(compiled, meshes, strict=True):
            places = train_state.shardings(on(state, mesh), mesh)
            after, metrics = run_step(jax.device_put(on(start, mesh), places), to_devices(batch, mesh))
            for leaf, place in zip(jax.tree.leaves(after), jax.tree.leaves(places), strict=True):
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
            outcomes.append((after, metrics))
        for other in outcomes[1:]:
            for found, one in zip(jax.tree.leaves(other), jax.tree.leaves(outcomes[0]), strict=True):
                np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-6)
        state = outcomes[0][0]


def test_every_step_draws_anew_and_a_resumed_one_the_same(rng):
    mesh = make_mesh(jax.devices()[:1])
    state = train_state.create(*linear_weights(rng), optax.sgd(0.1), seed=3, mesh=mesh)
    other = train_state.create(*linear_weights(rng), optax.sgd(0.1), seed=4, mesh=mesh)
    keys = [
        np.asarray(jax.random.key_data(train_state.step_key(s.replace(step=jnp.int32(number)))))
        for s in (state, state, other)
        for number in (0, 1)
    ]
    np.testing.assert_array_equal(keys[:2], keys[2:4])
    assert len({tuple(key) for key in keys}) == 4


def test_shapes_are_those_of_create(rng):
    mesh = make_mesh()
    params, stats = linear_weights(rng)
    state = train_state.create(params, stats, optax.adam(0.1), seed=3, mesh=mesh)
    shapes = train_state.shapes(params, stats, optax.adam(0.1))
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.slow
def test_bfloat16_computes_and_float32_remembers(rng):
    mesh = make_mesh(jax.devices()[:1])
    model = models.build("osnet_x0_25", num_classes=CLASSES, image_size=(64, 32), bn_group_size=8, dtype="bfloat16")
    batch = {**make_batch(rng, 8), "image": rng.integers(0, 256, (8, 64, 32, 3), np.uint8)}
    optimiser = optax.sgd(1e-3)
    state = train_state.create(*model.init(jax.random.key(0)), optimiser, seed=0, mesh=mesh)
    kinds = jax.tree.map(lambda leaf: leaf.dtype, state)
    step = steps.supervised_step(model, optimiser, ConfigDict(CONFIG))
    lowered = steps.compile_step(step, state, mesh).lower(state, to_devices(batch, mesh))
    assert "bf16" in lowered.as_text()
    compiled = lowered.compile()
    before = jax.tree.map(np.asarray, state.stats)
    for _ in range(3):
        state, metrics = compiled(state, to_devices(batch, mesh))
        assert np.isfinite(float(metrics["loss"]))
        assert metrics["loss"].dtype == jnp.float32
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == kinds
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.stats))} == {jnp.dtype("float32")}
    # A step that forgot to return the statistics would freeze them without a sign.
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.stats), strict=True):
        assert not np.array_equal(old, new)
    assert dataclasses.replace(model, dtype="float32").shapes() == model.shapes()
