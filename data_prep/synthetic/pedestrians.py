"""Renders a re-identification data set in the raw layout of Market-1501, from a seed.

An identity fixes body, hair, clothes and bag (`wardrobe`); a camera fixes viewpoint, distance, background, light and
colours (`street`); an image adds pose, position, blur and occlusion. The cameras differ in their colours, and people
share a few clothes colours, so that comparing colours is not enough.

The same seed gives the same pixels: random numbers come from `numpy.random.RandomState`, whose streams are frozen, and
every image has its own. Between platforms a sine may differ in its last bit, and with it a single pixel; the bytes of
the files also depend on the JPEG library in Pillow. File names and labels depend on nothing but the options.
"""

import dataclasses
import os
import pathlib
import shutil
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from data_prep.synthetic.figure import Figure, Pose
from data_prep.synthetic.street import develop, obstruct, place_cameras
from data_prep.synthetic.wardrobe import draw_person
from dmosnet_jax.core.errors import ConfigError, DataError

# Images are drawn so many times larger and reduced, for smooth edges.
_OVERSAMPLE = 2
_MISSING = 0.15


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Scene:
    """What to render. Each person is seen by most cameras, at least by two."""

    train_ids: int = _option(96, "people in the training set")
    test_ids: int = _option(48, "other people in query and gallery")
    cameras: int = _option(4, "cameras")
    images: int = _option(3, "images of a person in a camera; in the test set the first is the query")
    distractors: int = _option(32, "gallery images of nobody in particular (identity 0)")
    junk: int = _option(8, "bad boxes in the gallery (identity -1)")
    seed: int = _option(0, "of everything")
    image_size: tuple[int, int] = _option((128, 64), "height,width in pixels")

    def __post_init__(self) -> None:
        least = {"train_ids": 1, "test_ids": 1, "cameras": 2, "images": 2, "distractors": 0, "junk": 0, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name}={getattr(self, name)} is too small: use at least {bound}")
        if len(self.image_size) != 2 or min(self.image_size) < 16 or max(self.image_size) > 2048:
            raise ConfigError(f"image_size={self.image_size} must be (height, width), both from 16 to 2048")


class Shot(NamedTuple):
    """One image: its path in the raw layout, who is on it, the camera (from 1), and its number there."""

    path: str
    pid: int
    camid: int
    take: int


def plan(scene: Scene) -> list[Shot]:
    """Every image of the data set, in the order of rendering."""
    shots = []
    for pid in range(1, scene.train_ids + scene.test_ids + 1):
        seen = _stream(scene, f"cameras of {pid}").random_sample(scene.cameras) >= _MISSING
        # Nobody can be recognised who was seen by one camera only.
        seen[_stream(scene, f"first cameras of {pid}").permutation(scene.cameras)[:2]] = True
        for camera in np.flatnonzero(seen):
            for take in range(scene.images):
                test_folder = "query" if take == 0 else "bounding_box_test"
                folder = "bounding_box_train" if pid <= scene.train_ids else test_folder
                shots.append(_shot(folder, pid, int(camera) + 1, take))
    for pid, count in ((0, scene.distractors), (-1, scene.junk)):
        shots += [_shot("bounding_box_test", pid, 1 + take % scene.cameras, take) for take in range(count)]
    return shots


def _shot(folder: str, pid: int, camid: int, take: int) -> Shot:
    number = f"{pid:04d}" if pid >= 0 else "-1"
    return Shot(f"{folder}/{number}_c{camid}s1_{25 * take + 1:06d}_00.jpg", pid, camid, take)


class Studio:
    """Renders the images of a scene, in any order."""

    def __init__(self, scene: Scene):
        self._scene = scene
        height, width = scene.image_size
        self._canvas = width * _OVERSAMPLE, height * _OVERSAMPLE
        self._cameras = place_cameras(_stream(scene, "cameras"), scene.cameras, self._canvas)
        # Every image takes its noise from one block: new normal numbers would take as long as the rendering.
        self._grain = _stream(scene, "grain").standard_normal((height + 64, width + 64, 3)).astype(np.float32)

    def photograph(self, shot: Shot) -> Image.Image:
        """The image of a shot, RGB of the scene's image size."""
        scene, camera = self._scene, self._cameras[shot.camid - 1]
        rng = _stream(scene, f"shot {shot.pid} {shot.camid} {shot.take}")
        # People walk past a camera in one direction; its images of them resemble each other.
        walk = _stream(scene, f"walk {shot.pid} {shot.camid} {shot.take if shot.pid < 1 else 0}")
        heading = camera.heading + 0.35 * walk.standard_normal() + (np.pi if walk.randint(8) == 0 else 0.0)
        position, stride = walk.random_sample(), walk.uniform(0.1, 0.55) * (walk.randint(6) > 0)
        telephone = bool(walk.randint(10) == 0)
        wide, high = self._canvas
        room = camera.background.width - wide
        left = round(min(max(position + rng.uniform(-0.1, 0.1), 0.0), 1.0) * room)
        canvas = camera.background.crop((left, 0, left + wide, high))
        person = draw_person(_stream(scene, self._name(shot)))
        pose = Pose(
            heading=heading + 0.12 * rng.standard_normal(),
            pitch=camera.pitch,
            stride=stride,
            phase=rng.uniform(0, 2 * np.pi),
            elbow=rng.uniform(0.15, 0.7),
            telephone=telephone,
        )
        tall = camera.scale * rng.uniform(0.94, 1.05) * high
        foot = wide * (0.5 + 0.05 * rng.standard_normal()), high * (0.955 + 0.02 * rng.standard_normal())
        if shot.pid < 1:
            # A box that misses most of a person, as those of detectors do.
            tall *= rng.uniform(1.0, 1.9)
            foot = foot[0] + wide * rng.choice([-1, 1]) * rng.uniform(0.2, 0.6), foot[1] + high * rng.uniform(-0.3, 0.7)
        Figure(canvas, person, pose, foot, tall, camera.light).draw()
        if rng.randint(7) == 0:
            obstruct(canvas, rng)
        if rng.randint(5) == 0:
            canvas = canvas.filter(ImageFilter.BoxBlur((rng.uniform(0.5, 2.0) * high / 256, 0)))
        size = wide // _OVERSAMPLE, high // _OVERSAMPLE
        down, right = rng.randint(65), rng.randint(65)
        grain = self._grain[down : down + size[1], right : right + size[0]]
        return develop(canvas, camera, rng.uniform(0.88, 1.12), size, grain)

    def quality(self, shot: Shot) -> int:
        """JPEG quality of the camera's files."""
        return self._cameras[shot.camid - 1].quality

    def _name(self, shot: Shot) -> str:
        """Who is on an image."""
        if shot.pid == 0:
            return f"passer-by {shot.take}"
        if shot.pid == -1:
            return f"person {self._scene.train_ids + 1 + shot.take % self._scene.test_ids}"
        return f"person {shot.pid}"


def render(folder: str | os.PathLike[str], scene: Scene) -> int:
    """Writes the raw data set (`bounding_box_train`, `query`, `bounding_box_test`) to a new folder, all or nothing.

    Returns:
      The number of images.

    Raises:
      DataError: the folder is there already, or cannot be written.
    """
    folder = pathlib.Path(folder).expanduser()
    if folder.exists():
        raise DataError(f"{folder} exists already: give a folder that does not, or remove it")
    unfinished = folder.with_name(f".{folder.name}.incomplete")
    shots, studio = plan(scene), Studio(scene)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in ("bounding_box_train", "query", "bounding_box_test"):
            (unfinished / name).mkdir(parents=True)
        for shot in tqdm(shots, desc="rendering", unit=" images", disable=None, leave=False):
            studio.photograph(shot).save(unfinished / shot.path, quality=studio.quality(shot))
        os.rename(unfinished, folder)
    except OSError as error:
        raise DataError(
            f"cannot write images to {folder} ({error.strerror}): free space, or give another one"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(shots)


def _stream(scene: Scene, purpose: str) -> np.random.RandomState:
    """Random numbers for one purpose, independent of how many were drawn for others."""
    return np.random.RandomState(zlib.crc32(f"{scene.seed} {purpose}".encode()))
