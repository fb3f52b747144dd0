"""Every kind of weights to every other, and back to the same bits."""

import jax
import numpy as np
import optax
import pytest

from dmosnet_jax import models
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.export import folder, layouts, torch_export, torch_import
from dmosnet_jax.export.weights import MODEL_OPTIONS, open_weights
from dmosnet_jax.recipes.export import convert
from dmosnet_jax.train import checkpoints
from dmosnet_jax.train import state as train_state
from tests.models.drawn import draw_tree


def _identical(got, wanted):
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("weights", ["market1501", "msmt17"])
def test_real_file_to_folder_and_back(shared, tmp_path, weights):
    original = shared(f"weights/osnet_x0_25_{weights}.pth")
    model = convert(original, tmp_path / "model", licence="MIT")
    assert (model.name, model.neck) == ("osnet_x0_25", "fc")
    *_, card = folder.load(tmp_path / "model")
    assert (card.source, card.licence) == (str(original), "MIT")
    convert(tmp_path / "model", tmp_path / "again.pth")
    wanted = {k: v for k, v in torch_import.load(original).items() if not k.endswith("num_batches_tracked")}
    got = {k: v for k, v in torch_import.load(tmp_path / "again.pth").items() if not k.endswith("num_batches_tracked")}
    _identical(got, wanted)


def test_real_file_to_safetensors_is_bit_identical(shared, tmp_path):
    original = shared("weights/osnet_x0_25_market1501.pth")
    convert(original, tmp_path / "x.safetensors")
    _identical(torch_import.load(tmp_path / "x.safetensors"), torch_import.load(original))


@pytest.fixture
def run(tmp_path, rng):
    """A run's checkpoint with a BNNeck and a classifier, and its weights."""
    model = models.build("dmosnet_x0_25", image_size=(64, 32), pool="gem", num_classes=3)
    params, stats = (draw_tree(tree, rng) for tree in model.shapes())
    state = train_state.create(params, stats, optax.sgd(0.1), seed=0, mesh=make_mesh(jax.devices()[:1]))
    store = checkpoints.Checkpoints(tmp_path / "run")
    described = {name: getattr(model, name) for name in (*MODEL_OPTIONS, "image_size")}
    store.save(state, {"model": described, "config": {"pixel_mean": (0.5, 0.5, 0.5)}, "loop": {}})
    store.close()
    return tmp_path / "run", model, params, stats


def test_a_run_becomes_a_fastreid_file_and_a_folder(run, tmp_path):
    path, model, params, stats = run
    convert(path, tmp_path / "x.pth")
    state_dict = torch_import.load(tmp_path / "x.pth")
    assert layouts.recognise(state_dict).name == "fastreid"
    got = torch_import.convert(state_dict, model)
    jax.tree.map(np.testing.assert_array_equal, got, (params, stats))

    convert(path, tmp_path / "model", keep_classifier=False)
    got_params, got_stats, card = folder.load(tmp_path / "model")
    del params["classifier"]
    jax.tree.map(np.testing.assert_array_equal, (got_params, got_stats), (params, stats))
    assert (card.model.num_classes, card.model.image_size, card.mean) == (0, (64, 32), (0.5, 0.5, 0.5))
    assert card.model.attention == (1, 0, 0)


def test_a_file_exported_into_a_workdir_does_not_make_it_a_folder(run, tmp_path):
    path, model, *_ = run
    convert(path, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    assert open_weights(path).with_val is False
    convert(path, tmp_path / "model")
    assert open_weights(tmp_path / "model").num_classes == model.num_classes


def test_what_can_not_be_written_is_refused_before_anything_is(run, tmp_path, rng):
    path, *_ = run
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"layout='torchreid' has no GeM pooling .*: use layout=fastreid"):
        convert(path, tmp_path / "x.pth", layout="torchreid")
    with pytest.raises(ConfigError, match="layout='fastreid' is for a file"):
        convert(path, tmp_path / "model", layout="fastreid")
    with pytest.raises(DataError, match="does not fit model osnet_x0_25"):
        convert(path, tmp_path / "x.pth", name="osnet_x0_25", attention=(0, 0, 0))
    assert sorted(tmp_path.iterdir()) == before
    model = models.build("resnet50", neck="fc", pool="gem")
    folder.save(
        tmp_path / "odd",
        *(draw_tree(tree, rng) for tree in model.shapes()),
        folder.Card(model, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    )
    with pytest.raises(ConfigError, match="resnet50 fits no PyTorch code base: export it as a folder"):
        convert(tmp_path / "odd", tmp_path / "x.pth")
    assert set(torch_export.EXPORTS) == {"torchreid", "fastreid", "openunreid", "spcl"}
