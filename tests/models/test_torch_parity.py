"""Every network against PyTorch on the same random weights: features in evaluation, gradients in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmosnet_jax.export import torch_import
from dmosnet_jax.export.identify import describe
from dmosnet_jax.models import build, names
from dmosnet_jax.models.attention import head_count
from dmosnet_jax.models.osnet import CHANNELS
from tests.models.drawn import draw

torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
from tests.models import torch_peers as peers  # noqa: E402

SIZE = (64, 32)


def _drawn(module):
    """The module with weights drawn by name, and its state dict as NumPy arrays."""
    state = {name: draw(name, tuple(value.shape)) for name, value in module.state_dict().items()}
    module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return module, state


def _peer(name):
    """A torch network for a registry name, and the options of ours that fit it."""
    family, _, width = name.partition("_x")
    if family.startswith("resnet50"):
        ibn = family.endswith("ibn_a")
        return peers.Baseline(peers.ResNet50("fastreid", ibn), 2048, gem=True), {"pool": "gem", "variant": "fastreid"}
    channels = CHANNELS[f"x{width}"]
    if family == "osnet_ain":
        return getattr(peers.torchreid("osnet_ain"), name)(5, pretrained=False), {"neck": "fc"}
    mask = (1, 0, 0) if family.startswith("dm") else (0, 0, 0)
    model = peers.osnet(channels, ibn=family.endswith("ibn"), attention=mask, heads=head_count)
    if family.startswith("dm"):
        return peers.Baseline(peers.backbone_only(model), channels[-1]), {}
    return model, {"neck": "fc"}


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _assert_same_features(module, model, state, rng):
    images = rng.normal(size=(3, *model.image_size, 3)).astype(np.float32)
    params, stats = torch_import.convert(state, model)
    outputs, _ = jax.jit(lambda p, s, x: model.apply(p, s, x, train=False))(params, stats, images)
    module.eval()
    with torch.no_grad():
        wanted = module(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    wanted = wanted["feature"] if isinstance(wanted, dict) else wanted
    np.testing.assert_allclose(_unit(outputs["feature"]), _unit(wanted.numpy()), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_every_name_gives_the_features_of_pytorch(rng, name):
    peer, options = _peer(name)
    module, state = _drawn(peer)
    _assert_same_features(module, build(name, image_size=SIZE, **options), state, rng)


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "image_size"), [((0, 1, 0), (128, 64)), ((1, 1, 1), (128, 128))])
def test_masks_give_the_features_of_pytorch(rng, mask, image_size):
    model = peers.osnet(CHANNELS["x0_75"], ibn=False, attention=mask, heads=head_count)
    module, state = _drawn(peers.Baseline(peers.backbone_only(model), 384))
    _assert_same_features(module, build("dmosnet_x0_75", attention=mask, image_size=image_size), state, rng)


@pytest.mark.slow
@pytest.mark.parametrize("ibn", [False, True])
def test_torchreid_resnets_have_last_stride_two(rng, ibn):
    module = (
        peers.torchreid("resnet_ibn_a").resnet50_ibn_a(5)
        if ibn
        else peers.torchreid("resnet").resnet50(5, pretrained=False)
    )
    module, state = _drawn(module)
    found = describe(state)
    model = build(found["name"], image_size=SIZE, neck=found["neck"], variant=found["variant"])
    assert (model.variant, model.neck) == ("torchreid", "none")
    _assert_same_features(module, model, state, rng)


@pytest.mark.slow
def test_spcl_resnet_has_padded_pool_and_last_stride_one(rng):
    module, state = _drawn(peers.spcl(peers.ResNet50("spcl", ibn=False)))
    found = describe(state)
    model = build(found["name"], image_size=SIZE, neck=found["neck"], variant=found["variant"], num_classes=5)
    assert (model.variant, model.neck) == ("spcl", "bnneck")
    _assert_same_features(module, model, state, rng)


def _our_gradient(name, state, images, labels, dtype):
    """Gradient and moved statistics of cross-entropy and a quadratic term, so that every branch of the head counts."""
    model = build(name, image_size=SIZE, num_classes=5, dtype=dtype)

    def loss(params, stats, images):
        outputs, moved = model.apply(params, stats, images, train=True)
        picked = jax.nn.log_softmax(outputs["logits"])[jnp.arange(len(labels)), labels]
        return jnp.mean(jnp.square(outputs["embedding"])) - jnp.mean(picked), moved

    with jax.enable_x64(dtype == "float64"):
        arguments = (*torch_import.convert(state, model), images)
        gradients, moved = jax.jit(jax.grad(loss, has_aux=True))(*arguments)
        return jax.tree.map(np.asarray, (gradients, moved))


def _torch_gradient(module, state, images, labels, dtype):
    module = module.to(dtype).train()
    module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    module.zero_grad()
    outputs = module(torch.from_numpy(images.transpose(0, 3, 1, 2)).to(dtype))
    loss = torch.nn.functional.cross_entropy(outputs["logits"], torch.from_numpy(labels))
    (loss + outputs["embedding"].square().mean()).backward()
    arrays = {key: value.grad.numpy() for key, value in module.named_parameters()}
    return arrays | {key: value.numpy() for key, value in module.named_buffers()}


def _distances(got, wanted):
    """Each leaf's relative distance; what cancels to rounding (a bias before a norm) counts against the largest."""
    top = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(wanted))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return np.array([np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3 * top) for a, b in pairs])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmosnet_x1_0", "dmosnet_ibn_x1_0"])
def test_training_gradient_is_that_of_pytorch(rng, name):
    """In float64 to rounding; in float32, where both are noisy, ours is not the noisier one."""
    module, state = _drawn(_peer(name)[0])
    images = rng.normal(size=(8, *SIZE, 3)).astype(np.float32)
    labels = rng.integers(0, 5, size=8)
    model = build(name, image_size=SIZE, num_classes=5)
    exact, exact_stats = torch_import.convert(_torch_gradient(module, state, images, labels, torch.float64), model)
    rounded, _ = torch_import.convert(_torch_gradient(module, state, images, labels, torch.float32), model)

    gradients, moved = _our_gradient(name, state, images, labels, "float64")
    assert _distances(gradients, exact).max() < 1e-5
    assert _distances(moved, exact_stats).max() < 1e-5
    noisy, _ = _our_gradient(name, state, images, labels, "float32")
    assert np.median(_distances(noisy, exact)) < 4 * np.median(_distances(rounded, exact))
