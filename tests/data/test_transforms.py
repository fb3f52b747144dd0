import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import transforms


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def photo(rng):
    """Smooth colours with some texture, as pixels of a photograph have."""
    coarse = Image.fromarray(rng.integers(0, 256, (9, 5, 3), dtype=np.uint8)).resize(
        (64, 128), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-9, 10, (128, 64, 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_modes(photo, mode):
    data = encode(photo.convert(mode), "JPEG", quality=95)
    got = transforms.decode(data)
    assert got.dtype == np.uint8
    assert got.shape == (128, 64, 3)
    np.testing.assert_array_equal(got, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(got.astype(int) - np.asarray(photo.convert(mode).convert("RGB"))).mean() < 6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_modes_are_lossless(photo, mode):
    image = photo.convert("L").convert("LA") if mode == "LA" else photo.convert(mode)
    np.testing.assert_array_equal(transforms.decode(encode(image, "PNG")), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_without_a_warning(photo):
    palette = photo.quantize(16)
    data = encode(palette, "PNG", transparency=bytes(range(0, 160, 10)))
    np.testing.assert_array_equal(transforms.decode(data), np.asarray(palette.convert("RGB")))
    see_through = photo.copy()
    see_through.putalpha(Image.new("L", photo.size, 3))
    np.testing.assert_array_equal(transforms.decode(encode(see_through, "PNG")), np.asarray(photo))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_as_their_orientation_says(photo, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encode(photo, kind, exif=exif.tobytes(), **options)
    with Image.open(io.BytesIO(data)) as opened:
        wanted = ImageOps.exif_transpose(opened).convert("RGB")
    got = transforms.decode(data)
    np.testing.assert_array_equal(got, np.asarray(wanted))
    assert got.shape == ((128, 64, 3) if orientation < 5 else (64, 128, 3))
    np.testing.assert_array_equal(transforms.load(data, (32, 16)), transforms.resize(got, (32, 16)))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_upright(photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(transforms.decode(encode(photo, "PNG", exif=exif.tobytes())), np.asarray(photo))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("keep", [7, 10, 16, 22])
def test_a_damaged_exif_block_costs_the_orientation_alone(photo, keep):
    exif = Image.Exif()
    exif[0x0112] = 6
    damaged = exif.tobytes()[:keep] + b"\xff" * 9
    data = encode(photo, "JPEG", quality=95, exif=damaged)
    assert transforms.decode(data).shape in ((128, 64, 3), (64, 128, 3))


def test_sixteen_bit_grey_is_scaled():
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 17
    got = transforms.decode(encode(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(got, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(256, 128), (64, 32), (128, 64), (37, 101), (1, 1)])
def test_resize_and_load_equal_pillow(photo, size, interpolation):
    expected = np.asarray(photo.resize((size[1], size[0]), Image.Resampling[interpolation.upper()]))
    assert expected.shape == (*size, 3)
    np.testing.assert_array_equal(transforms.resize(np.asarray(photo), size, interpolation), expected)
    np.testing.assert_array_equal(transforms.load(encode(photo, "PNG"), size, interpolation), expected)
    jpeg = encode(photo, "JPEG")
    decoded = transforms.decode(jpeg)
    np.testing.assert_array_equal(
        transforms.load(jpeg, size, interpolation), transforms.resize(decoded, size, interpolation)
    )


def test_bicubic_is_the_default(photo):
    array = np.asarray(photo)
    np.testing.assert_array_equal(transforms.resize(array, (64, 32)), transforms.resize(array, (64, 32), "bicubic"))
    assert np.any(transforms.resize(array, (64, 32)) != transforms.resize(array, (64, 32), "bilinear"))


def broken_inputs():
    image = Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint8).reshape(64, 48, 3))
    jpeg, png = encode(image, "JPEG"), encode(image, "PNG")
    bomb = struct.pack(">II", 60_000, 60_000) + bytes([8, 2, 0, 0, 0])
    chunk = b"IHDR" + bomb
    header = png[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return {
        "empty": b"",
        "text": b"not an image at all",
        "jpeg-header-only": jpeg[:20],
        "jpeg-cut": jpeg[: len(jpeg) // 2],
        "png-cut": png[: len(png) // 2],
        "png-flipped-crc": png[:40] + bytes([png[40] ^ 255]) + png[41:],
        "png-empty-body": png[:33],
        "gif": encode(image.convert("P"), "GIF"),
        "enormous": header + png[33:],
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", broken_inputs())
def test_damaged_bytes_are_a_data_error_in_one_line(name):
    data = broken_inputs()[name]
    for call in (transforms.decode, lambda x: transforms.load(x, (8, 4))):
        with pytest.raises(DataError) as caught:
            call(data)
        message = str(caught.value)
        assert "\n" not in message
        assert "0x" not in message
        assert f"{len(data)} bytes" in message


def test_every_truncation_raises_a_data_error_and_nothing_else(photo):
    data = encode(photo, "JPEG")
    for length in range(0, len(data) - 2, 23):
        with pytest.raises(DataError):
            transforms.decode(data[:length])


def test_random_damage_never_escapes_as_another_error(photo, rng):
    for kind in ("JPEG", "PNG"):
        data = bytearray(encode(photo, kind))
        for _ in range(200):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 4):
                damaged[position] = rng.integers(0, 256)
            with contextlib.suppress(DataError):
                assert transforms.decode(bytes(damaged)).ndim == 3


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)])
@pytest.mark.usefixtures("no_array_checks")
def test_resize_checks_its_input(image):
    with pytest.raises(ValueError, match="image must be uint8"):
        transforms.resize(image, (8, 8))
