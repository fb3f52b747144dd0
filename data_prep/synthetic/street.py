"""What a camera fixes: the direction people are seen from, its distance, background, light, colours, sharpness."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageDraw, ImageFilter

from data_prep.synthetic.wardrobe import Colour, shade

# Width of a background in images: people pass at different positions of it.
_PANORAMA = 3
_HEADINGS = (0.0, math.pi, math.pi / 2, -math.pi / 2, math.pi / 4, -3 * math.pi / 4, -math.pi / 4, 3 * math.pi / 4)
_WALLS: tuple[Colour, ...] = (
    (150, 140, 128),
    (104, 112, 120),
    (134, 98, 82),
    (96, 112, 88),
    (176, 172, 164),
    (84, 84, 92),
)
_GROUNDS: tuple[Colour, ...] = ((132, 130, 126), (104, 104, 106), (146, 138, 126), (116, 122, 114), (158, 156, 152))


@dataclasses.dataclass(frozen=True)
class Camera:
    """A camera's viewpoint, light, colours and sharpness.

    Attributes:
      heading: in which most people walk, radians, see `figure.Pose`.
      pitch: looking down, radians.
      scale: height of an average person in image heights.
      light: where it comes from, from -1 (left) to 1 (right).
      mixing: 12 numbers, colour matrix with offsets as `PIL.Image.convert` takes it.
      gains: of red, green and blue.
      gamma: of all three.
      blur: radius in pixels at an image height of 128.
      noise: standard deviation in levels.
      quality: of the JPEG files.
      background: RGB, of the height of the canvas and several times its width.
    """

    heading: float
    pitch: float
    scale: float
    light: float
    mixing: tuple[float, ...]
    gains: tuple[float, float, float]
    gamma: float
    blur: float
    noise: float
    quality: int
    background: Image.Image


def place_cameras(rng: np.random.RandomState, count: int, canvas: tuple[int, int]) -> list[Camera]:
    """Cameras that differ: each property is spread evenly over them, in an order of its own.

    `canvas` is the (width, height) of the canvas that people are drawn on, in pixels.
    """

    def spread(low: float, high: float) -> list[float]:
        steps = (rng.permutation(count) + rng.uniform(0.3, 0.7, count)) / count
        return (low + (high - low) * steps).tolist()

    headings = [_HEADINGS[i % len(_HEADINGS)] for i in rng.permutation(count)]
    pitches, scales, lights = spread(0.05, 0.35), spread(0.9, 0.98), spread(-1, 1)
    exposures, hues, casts = spread(-0.12, 0.1), spread(0, 2 * math.pi), spread(0.015, 0.06)
    gammas, saturations = spread(0.92, 1.1), spread(0.8, 1.05)
    blurs, noises, qualities = spread(0.0, 0.9), spread(1.5, 4.5), spread(78, 95)
    cameras = []
    for i in range(count):
        gains = [math.exp(exposures[i]) * (1 + casts[i] * math.cos(hues[i] - 2 * math.pi * c / 3)) for c in range(3)]
        cameras.append(
            Camera(
                heading=headings[i],
                pitch=pitches[i],
                scale=scales[i],
                light=lights[i],
                mixing=_mixing(saturations[i]),
                gains=(gains[0], gains[1], gains[2]),
                gamma=gammas[i],
                blur=blurs[i],
                noise=noises[i],
                quality=round(qualities[i]),
                background=_background(rng, canvas),
            )
        )
    return cameras


def develop(
    canvas: Image.Image,
    camera: Camera,
    exposure: float,
    size: tuple[int, int],
    grain: Float32[np.ndarray, "height width 3"],
) -> Image.Image:
    """The image that a camera takes of an RGB drawing: its size, blur, exposure, colours and noise.

    `size` is (width, height) in pixels, and `grain` normal noise of deviation 1.
    """
    image = canvas.resize(size, Image.Resampling.BOX)
    if camera.blur > 0.2:
        image = image.filter(ImageFilter.GaussianBlur(camera.blur * size[1] / 128))
    levels = np.arange(256) / 255
    table = [exposure * gain * 255 * levels**camera.gamma for gain in camera.gains]
    image = image.convert("RGB", camera.mixing).point(
        np.clip(np.rint(np.concatenate(table)), 0, 255).astype(int).tolist()
    )
    noisy = np.asarray(image) + grain * np.float32(camera.noise)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def obstruct(canvas: Image.Image, rng: np.random.RandomState) -> None:
    """Puts something of the street before the person."""
    pen = ImageDraw.Draw(canvas)
    wide, high = canvas.size
    colour = shade(_GROUNDS[rng.randint(len(_GROUNDS))], rng.uniform(0.3, 1.1))
    if rng.randint(3) == 0:  # a post
        x, half = rng.uniform(0.15, 0.85) * wide, rng.uniform(0.03, 0.08) * wide
        pen.rectangle((x - half, 0, x + half, high), fill=shade(colour, 0.7))
        pen.rectangle((x - half, 0, x - 0.2 * half, high), fill=colour)
        return
    # A bench, a car, a bicycle: something low, from one side or across.
    top = rng.uniform(0.62, 0.85) * high
    left, right = sorted(rng.uniform(-0.3, 1.3, 2) * wide)
    right = max(right, left + 0.4 * wide)
    pen.rounded_rectangle((left, top, right, 1.2 * high), 0.06 * high, fill=shade(colour, 0.8))
    pen.rectangle((left + 0.05 * wide, top + 0.03 * high, right - 0.05 * wide, top + 0.08 * high), fill=colour)


def _mixing(saturation: float) -> tuple[float, ...]:
    """Pulls colours towards their luma (ITU-R BT.601)."""
    luma = (0.299, 0.587, 0.114)
    rows = [
        [(1 - saturation) * weight + (saturation if i == c else 0) for i, weight in enumerate(luma)] for c in range(3)
    ]
    return tuple(value for row in rows for value in (*row, 0.0))


def _background(rng: np.random.RandomState, canvas: tuple[int, int]) -> Image.Image:
    """A street front: several buildings on one pavement, with things before them."""
    wide, high = canvas[0] * _PANORAMA, canvas[1]
    edge = round(rng.uniform(0.3, 0.75) * high)
    image = Image.new("RGB", (wide, high))
    pen = ImageDraw.Draw(image)
    left = 0
    while left < wide:
        right = left + round(rng.uniform(0.4, 1.4) * canvas[0])
        _build_wall(pen, rng, (left, right), edge)
        left = right
    _pave(pen, rng, (wide, high), edge)
    for _ in range(rng.randint(3, 9)):
        x, half, top = rng.uniform(0, wide), rng.uniform(0.01, 0.1) * high, rng.uniform(0, 0.7) * edge
        thing = shade(_WALLS[rng.randint(len(_WALLS))], rng.uniform(0.3, 1.4))
        pen.rectangle((x - half, top, x + half, edge + rng.uniform(0, 0.1) * high), fill=thing)
    return _stain(image, rng)


def _build_wall(pen: ImageDraw.ImageDraw, rng: np.random.RandomState, sides: tuple[int, int], edge: int) -> None:
    """Courses of bricks, panels or windows, by the size of the joints."""
    wall = shade(_WALLS[rng.randint(len(_WALLS))], rng.uniform(0.5, 1.2))
    left, right = sides
    pen.rectangle((left, 0, right, edge), fill=wall)
    course, length = max(3, round(rng.uniform(0.04, 0.3) * edge)), max(4, round(rng.uniform(0.15, 0.5) * edge))
    joint = shade(wall, rng.uniform(0.7, 1.2))
    glass = rng.randint(2) == 0
    for row, y in enumerate(range(0, edge, course)):
        pen.line((left, y, right, y), fill=joint, width=2)
        bottom = min(y + course, edge)
        for x in range(left + (row % 2) * length // 2, right, length):
            pen.line((x, y, x, bottom), fill=joint, width=2)
            if glass and rng.randint(4) == 0 and length > 10 and bottom - y > 8:
                pane = (x + 3, y + 3, x + length - 3, bottom - 3)
                pen.rectangle(pane, fill=shade(wall, rng.uniform(0.4, 1.3)))


def _pave(pen: ImageDraw.ImageDraw, rng: np.random.RandomState, size: tuple[int, int], edge: int) -> None:
    """A pavement with its joints in perspective."""
    wide, high = size
    ground = _GROUNDS[rng.randint(len(_GROUNDS))]
    pen.rectangle((0, edge, wide, high), fill=ground)
    joint = shade(ground, rng.uniform(0.75, 1.2))
    slant = rng.uniform(0.5, 1.5)
    gap = max(6, round(rng.uniform(0.05, 0.25) * wide))
    for x in range(-wide, 2 * wide, gap):
        pen.line((x, edge, wide / 2 + (x - wide / 2) * (1 + slant), high), fill=joint, width=2)
    y, step = float(edge), 0.02 * high
    while y < high:
        pen.line((0, y, wide, y), fill=joint, width=2)
        y, step = y + step, step * 1.5


def _stain(image: Image.Image, rng: np.random.RandomState) -> Image.Image:
    """Uneven light: dark and light patches of several sizes."""
    patches = np.zeros((image.height, image.width), np.float32)
    for cell, strength in ((64, 14.0), (16, 9.0), (4, 5.0)):
        coarse = rng.standard_normal((image.height // cell + 2, image.width // cell + 2)).astype(np.float32) * strength
        smooth = Image.fromarray(coarse).resize(image.size, Image.Resampling.BICUBIC)
        patches += np.asarray(smooth)
    return Image.fromarray(np.clip(np.asarray(image) + patches[:, :, None], 0, 255).astype(np.uint8))
