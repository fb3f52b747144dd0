import numpy as np

from dmosnet_jax.core import trees


def tree():
    return {"conv": {"0": {"kernel": np.zeros((3, 3)), "bias": np.zeros(3)}}, "scale": np.zeros(2)}


def test_leaves_come_by_dotted_name_in_order():
    names = [name for name, _ in trees.named_leaves(tree())]
    assert names == ["conv.0.kernel", "conv.0.bias", "scale"]
    assert dict(trees.named_leaves(tree()))["conv.0.bias"].shape == (3,)
    assert list(trees.named_leaves({})) == []


def test_equal_shapes_do_not_differ():
    assert trees.differences(tree(), tree()) == []


def test_every_difference_is_listed():
    found = tree()
    del found["scale"]
    found["conv"]["0"]["kernel"] = np.zeros((3, 4))
    found["conv"]["1"] = {"bias": np.zeros(1)}
    assert trees.differences(tree(), found) == [
        "missing scale",
        "unexpected conv.1.bias",
        "conv.0.kernel has shape (3, 4), not (3, 3)",
    ]
