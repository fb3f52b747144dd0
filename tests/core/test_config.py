import math

import pytest
from ml_collections import ConfigDict

from dmosnet_jax.core import config as settings
from dmosnet_jax.core.errors import ConfigError


def config(**fields):
    """A valid config with some dotted fields changed."""
    base = {
        "recipe": "spcl",
        "seed": 0,
        "batch_size": 64,
        "image_size": (256, 128),
        "model": {"bn_group_size": 16},
        "eval": {"batch_size": 128},
        "data": {"threads": 4, "workers": 0},
        "sampler": {"instances": 4},
        "augment": {"flip": 0.5, "pad": 10, "erase": 0.5},
        "optim": {"learning_rate": 1e-3, "weight_decay": 0.0, "schedule": "step", "warmup_factor": 0.1},
        "train": {"epochs": 1, "steps_per_epoch": None, "log_every_steps": 1, "checkpoint_every_steps": 1, "keep": 1},
        "spcl": {"temperature": 0.05, "momentum": 0.2, "k1": 30, "k2": 6, "eps": 0.6, "eps_gap": 0.02},
        "loss": {"label_smoothing": 0.1, "triplet": "hinge", "triplet_margin": 0.3},
    }
    for field, value in fields.items():
        node = base
        *path, last = field.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return ConfigDict(base)


def test_good_settings_pass():
    settings.validate(config())
    settings.validate(ConfigDict({"recipe": "evaluate"}))
    settings.validate(config(model__bn_group_size=0))
    # A group as large as the batch or larger is the whole batch.
    settings.validate(config(batch_size=16, model__bn_group_size=64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"recipe": "sppcl"},
            "recipe='sppcl' is not known: use one of quickstart, spcl, .*export",
        ),
        ({"recipe": None}, "recipe=None is not known"),
        ({"batch_size": 0}, "batch_size=0 must be greater than 0"),
        ({"train__epochs": -1}, r"train\.epochs=-1 must be greater than 0"),
        ({"train__steps_per_epoch": 0}, r"train\.steps_per_epoch=0 must be greater than 0"),
        ({"train__keep": 0}, r"train\.keep=0 must be greater than 0"),
        ({"optim__learning_rate": 0.0}, r"optim\.learning_rate=0\.0 must be greater than 0"),
        ({"optim__learning_rate": math.nan}, r"optim\.learning_rate=nan must be greater than 0"),
        ({"optim__weight_decay": -1e-4}, r"optim\.weight_decay=-0\.0001 must not be negative"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"data__workers": -2}, r"data\.workers=-2 must not be negative"),
        ({"augment__flip": 1.5}, r"augment\.flip=1\.5 must lie between 0 and 1"),
        ({"spcl__momentum": -0.1}, r"spcl\.momentum=-0\.1 must be at least 0 and less than 1"),
        ({"spcl__momentum": 1.0}, r"spcl\.momentum=1\.0 must be at least 0 and less than 1"),
        ({"loss__label_smoothing": 1.0}, r"loss\.label_smoothing=1\.0 must be at least 0 and less than 1"),
        ({"loss__triplet_margin": 0.0}, r"loss\.triplet_margin=0\.0 must be greater than 0"),
        ({"loss__triplet": "cube"}, r"loss\.triplet='cube' is not known: use one of hinge, soft, none"),
        ({"loss__triplet_on": "logits"}, r"loss\.triplet_on='logits' is not known: use one of embedding, feature"),
        ({"pixel_std": (0.2, 0.0, 0.2)}, r"pixel_std=\(0\.2, 0\.0, 0\.2\) must be greater than 0"),
        ({"eval__rank_lists": -1}, r"eval\.rank_lists=-1 must not be negative"),
        ({"optim__warmup_epochs": -0.5}, r"optim\.warmup_epochs=-0\.5 must not be negative"),
        ({"optim__name": "lamb"}, r"optim\.name='lamb' is not known: use one of adam, sgd"),
        ({"optim__clip_norm": -1.0}, r"optim\.clip_norm=-1\.0 must not be negative"),
        ({"loss__triplet_weight": -1.0}, r"loss\.triplet_weight=-1\.0 must not be negative"),
        ({"optim__decay_factor": 10.0}, r"optim\.decay_factor=10\.0 must lie between 0 and 1"),
        ({"augment__autoaugment": 2.0}, r"augment\.autoaugment=2\.0 must lie between 0 and 1"),
        ({"spcl__eps": 0.99}, r"spcl\.eps=0\.99 with spcl\.eps_gap=0\.02: the radii"),
        ({"sampler__instances": 5}, r"batch_size=64 is not a multiple of sampler\.instances=5: use 60 or change"),
        ({"sampler__instances": 80}, r"batch_size=64 is not a multiple of sampler\.instances=80: use 80 or change"),
        ({"model__bn_group_size": 24}, r"batch_size=64 is not a multiple of model\.bn_group_size=24: use a divisor"),
        ({"optim__schedule": "linear"}, r"optim\.schedule='linear' is not known: use one of step, cosine, constant"),
        ({"image_size": ("large",)}, r"image_size=\('large',\) must be \(height, width\)"),
        ({"image_size": ("a", "b")}, r"image_size=\('a', 'b'\) must be \(height, width\)"),
        ({"image_size": (256, 0)}, r"image_size=\(256, 0\) must be \(height, width\)"),
        ({"spcl__eps_gap": 0.6}, r"spcl\.eps=0\.6 with spcl\.eps_gap=0\.6: the radii"),
        ({"spcl__eps_end": 0.99}, r"spcl\.eps_end=0\.99 with spcl\.eps_gap=0\.02: the radii eps_end - eps_gap"),
        ({"spcl__memory": "both"}, r"spcl\.memory='both' is not known: use one of image, cluster, cluster_hardest"),
        ({"spcl__search": "float8"}, r"spcl\.search='float8' is not known: use one of exact, bfloat16"),
        ({"spcl__max_classes": 0}, r"spcl\.max_classes=0 must be greater than 0"),
        ({"spcl__refresh_every_steps": -1}, r"spcl\.refresh_every_steps=-1 must not be negative"),
        ({"spcl__min_clustered": 1.5}, r"spcl\.min_clustered=1\.5 must lie between 0 and 1"),
        (
            {"data__interpolation": "nearest"},
            r"data\.interpolation='nearest' is not known: use one of bilinear, bicubic",
        ),
        ({"augment__erasing": "none"}, r"augment\.erasing='none' is not known: use one of fastreid, spcl"),
        (
            {"recipe": "supervised", "sampler__instances": 16},
            r"model\.bn_group_size=16 with sampler\.instances=16: images that share batch statistics would all be of "
            "one identity.*use more than 16, or 0 for the whole batch",
        ),
        ({"model__bn_group_size": 4}, r"model\.bn_group_size=4 with sampler\.instances=4: .* use more than 4"),
        (
            {"model__bn_group_size": 0, "sampler__instances": 64},
            r"batch_size=64 with sampler\.instances=64: .* raise batch_size",
        ),
        ({"spcl__eps_gap": -0.01}, r"spcl\.eps=0\.6 with spcl\.eps_gap=-0\.01: the radii"),
    ],
)
def test_bad_settings_name_field_value_and_fix(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        settings.validate(config(**fields))
    assert "\n" not in str(error.value)


def test_changes_of_a_run_are_free_told_or_refused():
    before = {
        "seed": 0,
        "data_dir": "a",
        "batch_size": 64,
        "pretrained": "x.pth",
        "data": {"threads": 4, "subset": None, "interpolation": "bicubic"},
        "augment": {"flip": 0.5},
        "sampler": {"instances": 4},
        "optim": {"decay_epochs": [10, 20]},
        "spcl": {"eps": 0.6, "memory": "image"},
        "train": {"epochs": 2, "steps_per_epoch": None},
        "model": {"name": None},
    }
    assert settings.changes(before, before) == {"told": [], "refused": []}
    now = {
        "seed": 1,
        "data_dir": "b",
        "batch_size": 32,
        "pretrained": "",
        "data": {"threads": 1, "subset": ["cfs", "x", 0.5], "interpolation": "bilinear"},
        "augment": {"flip": 0.0, "erasing": "spcl"},
        "sampler": {"instances": 8},
        "optim": {"decay_epochs": [20]},
        "spcl": {"eps": 0.5, "memory": "cluster"},
        "train": {"epochs": 3, "steps_per_epoch": 9},
        "model": {"name": "osnet_x1_0"},
    }
    found = settings.changes(before, now)
    assert found["refused"] == [
        "seed=1 (was 0)",
        "batch_size=32 (was 64)",
        "data.interpolation='bilinear' (was 'bicubic')",
        "spcl.memory='cluster' (was 'image')",
    ]
    assert found["told"] == [
        "pretrained='' (was 'x.pth')",
        "augment.flip=0.0 (was 0.5)",
        "sampler.instances=8 (was 4)",
        "optim.decay_epochs=[20] (was [10, 20])",
        "spcl.eps=0.5 (was 0.6)",
        "train.epochs=3 (was 2)",
    ]


def test_read_follows_dots_and_ends_where_the_path_does():
    node = ConfigDict({"a": {"b": {"c": 3}}, "n": None})
    assert settings.read(node, "a.b.c") == 3
    assert settings.read(node, "a.x.c") is None
    assert settings.read(node, "n.c") is None


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"warmup_steps": 2000}, 2000),
        ({"warmup_epochs": 1.5}, 150),
        ({"warmup_epochs": 0.0}, 0),
        ({"warmup_steps": None, "warmup_epochs": 2}, 200),
        ({}, None),
    ],
)
def test_durations_in_steps(fields, steps):
    found = settings.duration_steps(ConfigDict(fields), "warmup", steps_per_epoch=100)
    assert found == steps
    assert found is None or type(found) is int


def test_a_duration_is_given_once():
    node = ConfigDict({"warmup_steps": 5, "warmup_epochs": 1})
    with pytest.raises(ConfigError, match="warmup_steps=5, warmup_epochs=1: give one of them"):
        settings.duration_steps(node, "warmup", steps_per_epoch=100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 10**25}, "seed=10000000000000000000000000 must be at most 9223372036854775807"),
        ({"batch_size": 2**31}, "batch_size=2147483648 must be at most 2147483647"),
        ({"train__epochs": 10**5000}, r"train\.epochs=\(a number of 16610 bits\) must be at most"),
        ({"spcl__k1": 10**30}, r"spcl\.k1=.* must be at most"),
        ({"optim__weight_decay": math.inf}, r"optim\.weight_decay=inf must be a finite number"),
        ({"image_size": (100_000, 100_000)}, r"image_size=\(100000, 100000\): no side may have more than 4096"),
        ({"image_size": (10**30, 128)}, r"image_size=.* must be at most"),
        ({"data__threads": 10**6}, r"data\.threads=1000000 must be at most 1024"),
        ({"data__workers": 1025}, r"data\.workers=1025 must be at most 1024"),
    ],
)
def test_odd_numbers_are_refused_before_anything_overflows(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        settings.validate(config(**fields))
    assert len(str(error.value)) < 300


def test_large_seeds_are_seeds():
    for seed in (2**31, 2**32, 2**63 - 1):
        settings.validate(config(seed=seed))


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("batchsize", "did you mean batch_size"),
        ("batch-size", "did you mean batch_size"),
        ("epochs", "did you mean train.epochs"),
        ("optim.lr_rate", "did you mean"),
        ("optim.learningrate", "did you mean optim.learning_rate"),
        ("learning_rate", "did you mean optim.learning_rate"),
        ("seed.value", "no such field"),
        ("qqqqqq", "its fields are augment, batch_size, data,"),
    ],
)
def test_an_unknown_field_names_the_nearest(field, hint):
    found = settings.unknown_field(config(), field)
    assert found is not None
    assert f"--config.{field}: this config has no such field" in found
    assert hint in found
    assert settings.unknown_field(config(), "optim.learning_rate") is None


def test_another_optimiser_is_another_run():
    found = settings.changes({"optim": {"name": "adam"}}, {"optim": {"name": "sgd"}})
    assert found[settings.REFUSED] == ["optim.name='sgd' (was 'adam')"]
