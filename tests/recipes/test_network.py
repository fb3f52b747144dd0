"""From configs and weights of any kind to models."""

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from configs import common
from dmosnet_jax import models
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.core.trees import named_leaves
from dmosnet_jax.export.weights import open_weights
from dmosnet_jax.recipes import network
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints

SIZE = (64, 32)


def config(**fields):
    made = common.base("supervised")
    made.image_size = SIZE
    made.model.update(fields)
    return made


def save(workdir, model, *, seed=1, **values):
    """A checkpoint of random weights and what it was made of."""
    params, stats = model.init(jax.random.key(seed))
    state = train_state.create(params, stats, optax.identity(), seed=0, mesh=make_mesh(jax.devices()[:1]))
    store = Checkpoints(workdir)
    store.save(state, {"model": network.settings_of(model), "config": values, "loop": {}})
    store.close()
    return params, stats


def assert_same(found, expected, but=()):
    found, expected = dict(named_leaves(found)), dict(named_leaves(expected))
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        if name.split(".")[0] in but:
            assert found[name].shape == leaf.shape
        else:
            np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_without_weights_the_config_decides():
    model = network.build_model(config(name="osnet_x0_25", bn_group_size=0), num_classes=7)
    assert (model.name, model.num_classes, model.bn_group_size, model.image_size) == ("osnet_x0_25", 7, None, SIZE)
    assert (model.neck, model.pool, model.attention) == ("bnneck", "avg", (0, 0, 0))
    assert network.build_model(config(name="dmosnet_x0_25")).attention == (1, 0, 0)
    assert network.build_model(config(name="dmosnet_x0_25", attention=(False, 0, False))).attention == (0, 0, 0)
    with pytest.raises(ConfigError, match=r"model\.name is not set and the weights do not say it"):
        network.build_model(config())


def test_a_checkpoint_tells_its_network(tmp_path):
    made = models.build(
        "dmosnet_x0_25", attention=(1, 1, 0), neck="fc", pool="gem", num_classes=9, image_size=(128, 64)
    )
    params, stats = save(tmp_path, made, pixel_mean=[0.5, 0.5, 0.5], pixel_std=[0.25, 0.25, 0.25])
    opened = open_weights(tmp_path)
    asked = config()
    with asked.unlocked():
        asked.image_size = asked.pixel_mean = asked.pixel_std = None
    filled = network.fill_input(asked, opened)
    assert tuple(filled.image_size) == (128, 64)
    assert (tuple(filled.pixel_mean), tuple(filled.pixel_std)) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = network.build_model(filled, opened)
    assert (model.name, model.attention, model.neck, model.pool) == ("dmosnet_x0_25", (1, 1, 0), "fc", "gem")
    found_params, found_stats = opened.arrays(model)
    # The classifier stays behind: nobody evaluates with it.
    assert_same(found_params, {name: part for name, part in params.items() if name != "classifier"})
    assert_same(found_stats, stats)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "osnet_x0_5"}, "holds name='osnet_x0_25', but config.model.name='osnet_x0_5'"),
        ({"attention": (1, 0, 0)}, r"holds attention=\(0, 0, 0\), but config.model.attention=\(1, 0, 0\)"),
        ({"neck": "fc"}, "holds neck='bnneck', but config.model.neck='fc'"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint(tmp_path, asked, message):
    save(tmp_path, models.build("osnet_x0_25", image_size=SIZE))
    with pytest.raises(DataError, match=message) as error:
        network.build_model(config(**asked), open_weights(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_training_starts_from_the_backbone_and_draws_another_head(tmp_path):
    params, stats = save(tmp_path, models.build("osnet_x0_25", neck="fc", num_classes=5, image_size=SIZE))
    opened = open_weights(tmp_path)
    # The same head, another number of classes.
    model = network.build_model(config(), opened, num_classes=9, may_differ=network.HEAD)
    assert model.neck == "fc"
    found_params, found_stats, drawn = opened.start(model, jax.random.key(0))
    assert drawn == ["classifier"]
    assert found_params["classifier"]["kernel"].shape == (512, 9)
    assert_same(
        {k: v for k, v in found_params.items() if k != "classifier"},
        {k: v for k, v in params.items() if k != "classifier"},
    )
    assert_same(found_stats, stats)
    # Another neck.
    model = network.build_model(config(neck="bnneck"), opened, num_classes=5, may_differ=network.HEAD)
    found_params, found_stats, drawn = opened.start(model, jax.random.key(0))
    assert drawn == ["bottleneck", "classifier"]
    backbone = {name: part for name, part in params.items() if name not in ("fc", "classifier")}
    assert_same({name: found_params[name] for name in backbone}, backbone)
    assert found_params.keys() == model.shapes()[0].keys()
    assert found_stats.keys() == model.shapes()[1].keys()


def test_a_network_of_another_kind_starts_nothing(tmp_path):
    save(tmp_path, models.build("osnet_x0_25", image_size=SIZE))
    opened = open_weights(tmp_path)
    other = models.build("dmosnet_x0_25", image_size=SIZE)
    with pytest.raises(DataError, match=r"checkpoint does not fit model dmosnet_x0_25: .*missing conv2") as error:
        opened.start(other, jax.random.key(0))
    assert "\n" not in str(error.value)


def torchreid_file(path, *, classes):
    """A file in torchreid's layout with random weights of osnet_x0_25, and those weights as ours."""
    model = models.build("osnet_x0_25", neck="fc", num_classes=classes, image_size=SIZE)
    params, stats = model.init(jax.random.key(2))
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var", "kernel": "weight"}
    arrays = {}
    for name, leaf in [*named_leaves(params), *named_leaves(stats)]:
        module, _, last = name.rpartition(".")
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}[np.ndim(leaf)] if last == "kernel" else None
        arrays[f"{module}.{names[last]}"] = np.ascontiguousarray(np.asarray(leaf).transpose(axes) if axes else leaf)
    save_file(arrays, path)
    return params, stats


def test_training_starts_from_a_pytorch_file(tmp_path):
    params, stats = torchreid_file(tmp_path / "weights.safetensors", classes=5)
    opened = open_weights(tmp_path / "weights.safetensors")
    model = network.build_model(config(name="osnet_x0_25"), opened, num_classes=5, may_differ=network.HEAD)
    assert model.neck == "fc"
    found_params, found_stats, drawn = opened.start(model, jax.random.key(0))
    assert drawn == []
    assert_same(found_params, params)
    assert_same(found_stats, stats)
    model = network.build_model(config(name="osnet_x0_25"), opened, num_classes=8, may_differ=network.HEAD)
    found_params, _, drawn = opened.start(model, jax.random.key(0))
    assert drawn == ["classifier"]
    assert_same(found_params, params | {"classifier": model.init(jax.random.key(0))[0]["classifier"]})
    with pytest.raises(DataError, match=r"weights\.safetensors: "):
        opened.start(models.build("osnet_x0_5", image_size=SIZE), jax.random.key(0))


def test_settings_make_the_same_model_again(tmp_path):
    model = models.build("dmosnet_ibn_x0_25", pool="gem", num_classes=3, bn_group_size=8, image_size=SIZE)
    settings = network.settings_of(model)
    assert settings.pop("feature_dim") == model.feature_dim
    assert models.build(**settings) == model
    assert ConfigDict(settings).to_json()


@pytest.mark.parametrize(("dtype", "lines"), [("float32", 0), ("bfloat16", 1)])
def test_bfloat16_on_cpus_is_advised_against(capsys, dtype, lines):
    assert network.build_model(config(name="osnet_x0_25", dtype=dtype)).dtype == dtype
    assert capsys.readouterr().out.count("takes about twice as long as float32 on CPUs") == lines
