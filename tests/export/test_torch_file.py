"""Every container, element type and place of the state dict, and files that are none of them."""

import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save as save_safetensors

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.export import torch_import
from dmosnet_jax.export.torch_pickle import decode

KINDS = ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def _arrays(rng):
    return {f"w.{kind}": (rng.normal(0, 50, (3, 2, 4)).astype(kind)) for kind in KINDS} | {
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 5), np.float32),
    }


def _same(got, wanted):
    assert list(got) == list(wanted)
    for key, array in wanted.items():
        assert got[key].dtype == array.dtype
        np.testing.assert_array_equal(got[key], array)
        assert got[key].flags.c_contiguous
        assert got[key].flags.writeable


@pytest.mark.parametrize("order", ["little", "big", None])
def test_zip_gives_every_element_type_exactly(rng, writer, put, order):
    arrays = _arrays(rng)
    _same(torch_import.load(put(writer.zipped(*writer.state(arrays), order=order))), arrays)


def test_legacy_gives_every_element_type_exactly(rng, writer, put):
    arrays = _arrays(rng)
    _same(torch_import.load(put(writer.legacy(*writer.state(arrays)))), arrays)


def test_safetensors_gives_every_element_type_exactly(rng, put):
    arrays = dict(sorted(_arrays(rng).items()))
    _same(torch_import.load(put(save_safetensors(arrays), "w.safetensors")), arrays)


def test_bfloat16_becomes_the_same_float32(rng):
    exact = (rng.normal(size=64).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    words = (exact.view(np.uint32) >> np.uint32(16)).astype("<u2")
    np.testing.assert_array_equal(decode(words.tobytes(), "bfloat16"), exact)


def test_strided_and_shared_storages(writer, put):
    values = np.arange(12, dtype=np.float32)
    storage = writer.stored("FloatStorage", "0", 12)
    body = writer.mapping(
        {"transposed": writer.strided(storage, 0, (3, 4), (1, 3)), "tail": writer.strided(storage, 6, (2, 3), (3, 1))}
    )
    for data in (writer.zipped(body, {"0": values}), writer.legacy(body, {"0": values})):
        got = torch_import.load(put(data))
        np.testing.assert_array_equal(got["transposed"], values.reshape(4, 3).T)
        np.testing.assert_array_equal(got["tail"], values[6:].reshape(2, 3))


def test_untyped_storage_and_parameters(writer, put):
    values = np.arange(6, dtype=np.float32)
    untyped = writer.group(
        writer.text("storage"), writer.name("torch.storage", "UntypedStorage"), *map(writer.text, ("0", "cpu"))
    )
    untyped = untyped[:-1] + writer.integer(24) + b"tQ"
    sizes, steps = writer.group(writer.integer(6)), writer.group(writer.integer(1))
    version3 = writer.call(
        writer.name("torch._utils", "_rebuild_tensor_v3"),
        *(untyped, writer.integer(0), sizes, steps, b"\x89", b"}", writer.name("torch", "float32")),
    )
    parameter = writer.call(writer.name("torch._utils", "_rebuild_parameter"), version3, b"\x88", b"}")
    got = torch_import.load(put(writer.zipped(writer.mapping({"w": parameter}), {"0": values})))
    np.testing.assert_array_equal(got["w"], values)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_finds_the_state_dict_beside_other_entries(rng, writer, put, wrapper):
    arrays = {"module.a.weight": rng.normal(size=(2, 3)).astype(np.float32)}
    body, storages = writer.state(arrays)
    namespace = writer.call(writer.name("argparse", "Namespace")) + writer.mapping({"lr": writer.integer(1)}) + b"b"
    optimiser = writer.mapping({"exp_avg": writer.dense("0", arrays["module.a.weight"])})
    root = {"epoch": writer.integer(3), "args": namespace, "optimizer": optimiser, wrapper: body}
    got = torch_import.load(put(writer.zipped(writer.mapping(root), storages), "run.pth.tar"))
    _same(got, {"a.weight": arrays["module.a.weight"]})


def test_prefix_that_only_some_names_have_is_kept(writer, put):
    arrays = {"module.a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    assert list(torch_import.load(put(writer.zipped(*writer.state(arrays))))) == ["module.a", "b"]


def test_a_dict_that_contains_itself_is_searched_once(writer, put):
    body = b"}q\x00" + writer.text("model") + b"h\x00s"
    with pytest.raises(DataError, match="no state dict"):
        torch_import.load(put(writer.zipped(body, {})))


OUTSIDE = {
    "beyond its storage": (0, (5,), (1,)),
    "offset beyond": (4, (1,), (1,)),
    "stride beyond": (0, (2, 2), (3, 1)),
    "expanded": (0, (1000,), (0,)),
    "huge": (0, (2**40, 2**40), (0, 0)),
    "too long for 64 bits": (0, (2**70,), (1,)),
    "negative": (0, (-1,), (1,)),
    "negative offset": (-1, (1,), (1,)),
    "huge and empty": (0, (0, 2**47, 2**47), (0, 0, 0)),
    "ranks differ": (0, (2, 2), (1,)),
    "many dimensions": (0, (1,) * 40, (1,) * 40),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_tensor_outside_its_storage_is_refused(writer, put, case):
    body = writer.mapping({"conv.weight": writer.strided(writer.stored("FloatStorage", "0", 4), *OUTSIDE[case])})
    for data in (
        writer.zipped(body, {"0": np.ones(4, np.float32)}),
        writer.legacy(body, {"0": np.ones(4, np.float32)}),
    ):
        with pytest.raises(DataError, match=r"weights\.pth: conv\.weight: .*damaged"):
            torch_import.load(put(data))


def test_many_tensors_over_one_storage_are_refused(writer, put):
    big = np.ones(100_000, np.float32)
    tensor = writer.strided(writer.stored("FloatStorage", "0", big.size), 0, (big.size,), (1,))
    body = writer.mapping({f"w{index}": tensor for index in range(50)})
    with pytest.raises(DataError, match="many times the file's size"):
        torch_import.load(put(writer.zipped(body, {"0": big})))


def test_compressed_entries_are_refused(writer, put):
    arrays = {"w": np.zeros(1_000_000, np.float32)}
    data = writer.zipped(*writer.state(arrays), compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 20_000
    with pytest.raises(DataError, match="is compressed"):
        torch_import.load(put(data))


def test_truncated_legacy_storage_is_refused(writer, put):
    data = writer.legacy(*writer.state({"w": np.ones(100, np.float32)}))
    with pytest.raises(DataError, match="truncated"):
        torch_import.load(put(data[:-1]))


def test_legacy_count_that_differs_is_refused(writer, put):
    data = writer.legacy(*writer.state({"w": np.ones(4, np.float32)}))
    wrong = data[: -4 * 4 - 8] + struct.pack("<q", 2**60) + data[-4 * 4 :]
    with pytest.raises(DataError, match="has not its 4 elements"):
        torch_import.load(put(wrong))


def test_flipped_bit_in_a_zip_storage_is_noticed(writer, put):
    data = bytearray(writer.zipped(*writer.state({"w": np.ones(64, np.float32)})))
    data[data.index(np.ones(64, np.float32).tobytes()) + 10] ^= 1
    with pytest.raises(DataError, match="CRC"):
        torch_import.load(put(bytes(data)))


NOT_CHECKPOINTS = {
    b"": "is empty",
    b"hello": "neither a PyTorch checkpoint nor a safetensors",
    b"\x80\x02}.": "torch.save did not write",
    b"\x80": "damaged pickle",
    b"PK\x03\x04": "damaged zip",
    b"\x08\0\0\0\0\0\0\0{}": "damaged safetensors",
    b"\0" * 257 + b"ustar" + b"\0" * 250: "tar archive",
}


@pytest.mark.parametrize("data", NOT_CHECKPOINTS, ids=NOT_CHECKPOINTS.get)
def test_other_files_get_one_line(put, data):
    with pytest.raises(DataError, match=NOT_CHECKPOINTS[data]) as caught:
        torch_import.load(put(data))
    assert "\n" not in str(caught.value)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        torch_import.load(tmp_path / "absent.pth")
    with pytest.raises(DataError, match="is a directory"):
        torch_import.load(tmp_path)


@pytest.mark.parametrize("body", ["dict", "number"])
def test_no_tensors(writer, put, body):
    data = writer.zipped(writer.mapping({"epoch": writer.integer(1)}) if body == "dict" else writer.integer(1), {})
    with pytest.raises(DataError, match="no state dict with named tensors"):
        torch_import.load(put(data))


def test_safetensors_without_tensors_and_with_a_foreign_type(put):
    with pytest.raises(DataError, match="holds no tensors"):
        torch_import.load(put(save_safetensors({})))
    data = save_safetensors({"w": np.zeros(4, np.uint32)})
    with pytest.raises(DataError, match="element type U32"):
        torch_import.load(put(data))
