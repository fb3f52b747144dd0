import pytest
from ml_collections import ConfigDict

from configs import common
from dmosnet_jax.core import config as configs
from dmosnet_jax.core.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("market1501", ("market1501",)),
        ("market1501+msmt17", ("market1501", "msmt17")),
        (("market1501", "msmt17"), ("market1501", "msmt17")),
        (["msmt17", "market1501"], ("msmt17", "market1501")),
        ('("market1501", "msmt17")', ("market1501", "msmt17")),
        ("['a', 'b', 'c']", ("a", "b", "c")),
        ("a + b", ("a", "b")),
    ],
)
def test_names_in_every_form(value, names):
    assert configs.dataset_names(value) == names
    assert configs.dataset_names(configs.joined(names)) == names


@pytest.mark.parametrize("value", ["", "+", "a+", "a++b", (), ("a", ""), ("a", 1), 1501, None, "(a, b", "(1, 2)"])
def test_what_is_no_name_is_refused(value):
    with pytest.raises(ConfigError, match=r"dataset=.* (is not a name|must name each data set once)") as error:
        configs.dataset_names(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["a+a", ("a", "b", "a")])
def test_a_data_set_is_named_once(value):
    with pytest.raises(ConfigError, match="must name each data set once"):
        configs.dataset_names(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (("cfs", "scores.npz"), r"must be \(criterion, path, share\)"),
        ("cfs", r"must be \(criterion, path, share\)"),
        (("best", "scores.npz", 0.5), "criterion 'best' is not known: use cfs"),
        (("cfs", "", 0.5), "the path must be"),
        (("cfs", 3, 0.5), "the path must be"),
        *((("cfs", "a", share), "the share must be") for share in (0, -0.5, 1.5, 50, "0.5", True, None, float("nan"))),
    ],
)
def test_bad_subsets_name_the_value_and_the_fix(value, message):
    with pytest.raises(ConfigError, match=rf"data\.subset=.*{message}.*") as error:
        configs.check_subset(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, ("cfs", "scores.npz", 0.5), ["cfs", "scores.npz", 1]])
def test_good_subsets_pass(value):
    configs.check_subset(value)


def config(recipe, **fields):
    made = common.base(recipe)
    for name, value in fields.items():
        if name == "subset":
            made.data.subset = value
        else:
            made[name] = value
    return made.lock()


def test_the_field_takes_a_name_or_a_tuple():
    for value in ("msmt17", ("market1501", "msmt17"), "market1501+msmt17"):
        made = config("supervised", dataset=value)
        configs.validate(made)
        assert made.dataset == value
    assert isinstance(made, ConfigDict)


@pytest.mark.parametrize(
    ("recipe", "fields", "message"),
    [
        ("cfs", {"dataset": "a+b"}, "the cfs recipe takes one data set"),
        ("quickstart", {"dataset": ("a", "b")}, "the quickstart recipe takes one data set"),
        ("evaluate", {"subset": ("cfs", "a", 0.5)}, r"data\.subset=\('cfs', 'a', 0\.5\) selects training images"),
        ("cfs", {"subset": ("cfs", "a", 0.5)}, "which the cfs recipe has not"),
        ("spcl", {"subset": ("cfs", "a", 0.5), "dataset": ("a", "b")}, "selects from one data set"),
        ("spcl", {"subset": ("cfs", "a", 0)}, "the share must be greater than 0"),
    ],
)
def test_recipes_that_can_not_use_it_say_so(recipe, fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        configs.validate(config(recipe, **fields))
    assert "\n" not in str(error.value)
