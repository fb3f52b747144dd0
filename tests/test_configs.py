"""Every experiment file: it loads, passes the checks, is strict about its arguments and says how it is run."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest

from configs import common
from dmosnet_jax import models
from dmosnet_jax.core import config as settings
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.train import optim
from tests.golden import make_configs

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "common"))


def load(path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_and_passes_the_checks(path):
    config = load(path).get_config()
    config.lock()
    settings.validate(config)
    name = config.model.name or config.get("default_model")
    if name is not None:
        models.build(name, neck=config.model.neck, dtype=config.model.dtype, image_size=config.image_size)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("arg", ["nonsense=1", "market1501,nonsense=1", "a,b"])
def test_unknown_arguments_are_refused(path, arg):
    with pytest.raises(ConfigError, match=r"config argument '(nonsense=1|b)' is not known: use \w+=\.\.\."):
        load(path).get_config(arg)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_says_the_command_that_runs_it(path):
    text = load(path).__doc__
    assert re.search(rf"python -m dmosnet_jax\.main --config=configs/{path.stem}\.py", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_commands_in_the_docstring_use_fields_that_exist(path):
    module = load(path)
    for flag in re.findall(r"--config\.([\w.]+)=", module.__doc__):
        *above, last = flag.split(".")
        node = module.get_config()
        for part in above:
            node = node[part]
        assert last in node, flag


def test_first_option_goes_without_its_name():
    options = common.parse_arg("duke,epochs=60", dataset="market1501", epochs=120, rate=0.5)
    assert options == {"dataset": "duke", "epochs": 60, "rate": 0.5}
    assert common.parse_arg(None, dataset="a") == common.parse_arg("", dataset="a") == {"dataset": "a"}
    assert common.parse_arg("rate=2", dataset="a", rate=0.5) == {"dataset": "a", "rate": 2.0}
    assert common.parse_arg("pretrained=runs/a=b", dataset="a", pretrained="")["pretrained"] == "runs/a=b"


@pytest.mark.parametrize("text", ["many", "1.5", "True", "[3]", ""])
def test_values_have_the_type_of_the_default(text):
    with pytest.raises(ConfigError, match=r"config argument epochs='.*' must be of type int, like 120"):
        common.parse_arg(f"epochs={text}", dataset="market1501", epochs=120)


def test_finetune_is_the_papers():
    config = load(ROOT / "configs" / "finetune.py").get_config("dukemtmc,pretrained=runs/x")
    assert (config.dataset, config.pretrained, config.train.epochs) == ("dukemtmc", "runs/x", 120)
    assert (config.batch_size, config.sampler.instances) == (64, 4)
    assert (config.optim.learning_rate, config.optim.weight_decay) == (3.5e-4, 5e-4)
    assert (config.optim.warmup_steps, tuple(config.optim.decay_epochs)) == (2000, (50, 100))
    loss = config.loss
    assert (loss.label_smoothing, loss.triplet, loss.triplet_margin, loss.triplet_weight) == (0.1, "hinge", 0.3, 1.0)
    # One GPU, so one set of batch statistics.
    assert config.model.bn_group_size == 0
    assert (loss.triplet_on, config.augment.autoaugment, config.default_model) == ("embedding", 0.0, "dmosnet_x1_0")


def test_finetune_is_as_released():
    module = load(ROOT / "configs" / "finetune.py")
    config = module.get_config("msmt17,recipe=released")
    assert (config.default_model, config.model.pool, config.model.classifier) == ("dmosnet_ibn_x1_0", "gem", "circle")
    assert (config.batch_size, config.sampler.instances, config.augment.autoaugment) == (64, 16, 0.1)
    assert (config.loss.triplet, config.loss.triplet_on, config.loss.label_smoothing) == ("soft", "feature", 0.1)
    assert (config.loss.circle_scale, config.loss.circle_margin) == (64.0, 0.35)
    assert (config.train.epochs, config.optim.schedule, config.optim.decay_epochs) == (60, "cosine", (30,))
    assert (config.model.bn_group_size, config.augment.erasing) == (0, "fastreid")
    rate = optim.learning_rate(config.optim, steps_per_epoch=100, total_steps=6000)
    np.testing.assert_allclose([rate(0), rate(2000), rate(3099), rate(6000)], [3.5e-5, 3.5e-4, 3.5e-4, 7e-7], rtol=1e-5)

    config = module.get_config("cuhk03_detected,recipe=released,epochs=3")
    assert (config.default_model, config.model.pool, config.model.classifier) == ("dmosnet_ibn_x1_0", None, None)
    assert (config.batch_size, config.loss.triplet, config.loss.triplet_margin) == (96, "hinge", 0.3)
    assert (config.train.epochs, config.optim.decay_epochs, config.sampler.instances) == (3, (40, 90), 1)
    assert config.optim.count_after_warmup
    assert module.get_config("cuhk03_labeled,recipe=released").train.epochs == 120
    with pytest.raises(ConfigError, match=r"recipe='best' is not known: use paper or released"):
        module.get_config("recipe=best")


@pytest.mark.parametrize("name", ["spcl_luperson", "spcl_market1501"])
def test_spcl_is_the_references(name):
    config = load(ROOT / "configs" / f"{name}.py").get_config()
    theirs = {
        "temperature": 0.05,
        "momentum": 0.2,
        "k1": 30,
        "k2": 6,
        "eps": 0.6,
        "eps_gap": 0.02,
        "min_samples": 4,
    }
    assert {name: config.spcl[name] for name in theirs} == theirs
    # What goes beyond SpCL is off.
    assert (config.spcl.memory, config.spcl.reextract, config.spcl.search) == ("image", False, "exact")
    assert config.spcl.eps_end is None
    assert config.spcl.max_classes is None
    assert (config.batch_size, config.sampler.instances, config.optim.learning_rate) == (64, 4, 3.5e-4)
    assert config.augment.erasing == "spcl"
    # People reappear under other cameras in Market-1501; in LUPerson each is in one video.
    assert config.sampler.cameras == (name == "spcl_market1501")
    assert config.model.bn_group_size == {"spcl_market1501": 0, "spcl_luperson": 16}[name]


def test_cluster_contrast_is_its_authors():
    """Of `examples/cluster_contrast_train_usl.py` and `run_code.sh`, at Market-1501."""
    module = load(ROOT / "configs" / "spcl_market1501.py")
    config = module.get_config("recipe=cluster_contrast")
    spcl = config.spcl
    assert (spcl.memory, spcl.momentum, spcl.temperature) == ("cluster", 0.1, 0.05)
    assert (spcl.eps, spcl.eps_end, spcl.k1, spcl.k2, spcl.min_samples) == (0.6, None, 30, 6, 4)
    assert (config.model.name, config.model.pool, config.model.neck) == ("resnet50", "gem", "bnneck")
    # Four GPUs.
    assert (config.batch_size, config.model.bn_group_size) == (256, 64)
    assert (config.sampler.instances, config.sampler.cameras) == (16, True)
    assert (config.train.epochs, config.train.steps_per_epoch, config.train.eval_every_epochs) == (50, 200, 10)
    assert (config.optim.learning_rate, config.optim.weight_decay) == (3.5e-4, 5e-4)
    assert (config.augment.erasing, config.data.interpolation) == ("spcl", "bicubic")
    rate = optim.learning_rate(config.optim, steps_per_epoch=200, total_steps=10_000)
    found = [rate(step) for step in (0, 3999, 4000, 9999)]
    np.testing.assert_allclose(found, [3.5e-4, 3.5e-4, 3.5e-5, 3.5e-6], rtol=1e-5)
    other = module.get_config("osnet_x0_25,epochs=3,recipe=cluster_contrast")
    assert (other.model.name, other.train.epochs, other.model.pool) == ("osnet_x0_25", 3, "gem")
    with pytest.raises(ConfigError, match=r"recipe='best' is not known: use spcl or cluster_contrast"):
        module.get_config("recipe=best")


def test_adaptation_is_spcls():
    """Of `examples/spcl_train_uda.py`: 64 images of each domain on four GPUs."""
    module = load(ROOT / "configs" / "spcl_uda.py")
    config = module.get_config("dukemtmc+msmt17+market1501")
    assert (config.recipe, config.source, config.dataset) == ("spcl_uda", "dukemtmc+msmt17", "market1501")
    assert (config.batch_size, config.model.bn_group_size, config.sampler.instances) == (128, 16, 4)
    assert (config.spcl.memory, config.spcl.momentum, config.spcl.temperature, config.spcl.eps) == (
        "image",
        0.2,
        0.05,
        0.6,
    )
    assert (config.model.name, config.model.neck, config.augment.erasing) == ("resnet50", "bnneck", "spcl")
    assert (config.train.epochs, config.train.steps_per_epoch, config.optim.decay_epochs) == (50, 400, (20, 40))
    assert module.get_config("msmt17+market1501,with_val=True").with_val
    with pytest.raises(ConfigError, match=r"domains='market1501' must be source\+target"):
        module.get_config("market1501")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("source", "market1501", r"market1501 cannot be source and target"),
        ("source", "", r"source='' is not a name"),
        ("batch_size", 63, r"batch_size=63 is shared by source and target: use 64"),
        ("batch_size", 36, r"half of the batch_size=18 is not a multiple of sampler\.instances=4"),
        ("batch_size", 8, r"half of the batch_size=4 with sampler\.instances=4"),
        ("spcl.memory", "cluster", r"spcl\.memory='cluster': .* use image"),
        ("data.subset", ("cfs", "x.npz", 0.5), r"data\.subset=.* selects from one data set"),
    ],
)
def test_settings_that_two_domains_cannot_have(field, value, message):
    config = load(ROOT / "configs" / "spcl_uda.py").get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        settings.validate(config)


GOLDEN = ROOT / "tests" / "golden" / "configs"


@pytest.mark.parametrize("name", sorted(make_configs.CASES))
def test_every_field_is_as_it_was_written_down(name):
    """A changed default shows here, and in the diff after `python tests/golden/make_configs.py`."""
    assert make_configs.text(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_every_config_is_written_down():
    written = {case.partition(":")[0] for case in make_configs.CASES.values()}
    assert written == {path.stem for path in FILES}
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(make_configs.CASES)


def test_every_field_that_is_checked_exists(monkeypatch):
    """`config.read` gives None for a part that a recipe has not, and would hide a misspelt name."""
    checked, read = set(), settings.read
    monkeypatch.setattr(settings, "read", lambda config, field: checked.add(field) or read(config, field))
    for path in FILES:
        settings.validate(load(path).get_config())
    fields = {line.partition(" = ")[0] for path in GOLDEN.glob("*.txt") for line in path.read_text().splitlines()}
    assert len(checked) > 40
    assert checked <= fields
