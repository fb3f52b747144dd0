"""One host batch: rows of a split read, decoded and resized, from records or from the cache."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Self

import numpy as np
from jaxtyping import Bool, Integer
from PIL import Image

from dmosnet_jax.core.errors import ConfigError, DataError, UserError
from dmosnet_jax.data import transforms
from dmosnet_jax.data.autoaugment import AutoAugment
from dmosnet_jax.data.records import Record
from dmosnet_jax.data.splits import Rows

# What to do about an image that cannot be decoded, where the split does not say.
_FIX = "replace the file and convert again"

HostBatch = dict[str, np.ndarray]


class ImageCache:
    """Decoded and resized images of one split, kept in host memory from the first time each is needed.

    Worth it where decoding competes with training for few cores. All users of a cache must resize with the same filter.

    Attributes:
      images: uint8 [N, H, W, 3].
      filled: bool [N], True where `images` holds the image.
    """

    def __init__(self, count: int, image_size: tuple[int, int]):
        self.images = np.empty((count, *image_size, 3), np.uint8)
        self.filled = np.zeros(count, bool)

    @classmethod
    def within(cls, split: Rows, image_size: tuple[int, int], budget_bytes: int) -> Self | None:
        """A cache for the whole split, or None when its N * H * W * 3 bytes exceed the budget."""
        needed = len(split) * image_size[0] * image_size[1] * 3
        return cls(len(split), image_size) if needed <= budget_bytes else None


@dataclasses.dataclass(frozen=True)
class Failure:
    """A user's error on its way from a worker; Grain would wrap or re-create a raised one."""

    error: UserError


class BatchLoader:
    """Makes this process's part of the batch of one step; picklable, and called from many threads at once."""

    def __init__(
        self,
        split: Rows,
        plan: Integer[np.ndarray, "steps batch"],
        *,
        image_size: tuple[int, int],
        interpolation: str = transforms.DEFAULT_FILTER,
        mask: Bool[np.ndarray, "steps batch"] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        labels: Integer[np.ndarray, " n"] | None = None,
        cache: ImageCache | None = None,
        policy: AutoAugment | None = None,
    ):
        """Prepares to read batches.

        Args:
          split: the images.
          plan: rows of the split in each global batch.
          image_size: (H, W) in pixels.
          interpolation: filter that resizes, a key of `transforms.FILTERS`.
          mask: False where a row is padding.
          process_index: of this JAX process.
          process_count: number of JAX processes; must divide the batch.
          labels: given as `pid` instead of the split's (pseudo-labels, or identities renumbered).
          cache: decoded images to share with other loaders.
          policy: changes images before they are resized.

        Raises:
          ConfigError: an option is out of range.
          ValueError: plan, labels or cache do not belong to this split.
        """
        self._policy, self._interpolation = policy, interpolation
        self._split, self._plan, self._mask, self._cache = split, plan, mask, cache
        count = len(split)
        self._size = (int(image_size[0]), int(image_size[1]))
        if min(self._size) < 1:
            raise ConfigError(f"image_size={tuple(image_size)} must be (height, width), both positive")
        self._pids = np.asarray(split.pids if labels is None else labels, np.int32)
        self._camids = np.asarray(split.camids, np.int32)
        if self._pids.shape != (count,) or self._camids.shape != (count,):
            raise ValueError(f"labels {self._pids.shape} and camids {self._camids.shape} must be [{count}]")
        if cache is not None and cache.images.shape != (count, *self._size, 3):
            raise ValueError(f"the cache holds {cache.images.shape}, the split needs {(count, *self._size, 3)}")
        if plan.size and (plan.min() < 0 or plan.max() >= count):
            raise ValueError(f"the plan's rows {plan.min()}..{plan.max()} are outside the split's {count} images")
        if not 0 <= process_index < process_count:
            raise ConfigError(f"process_index={process_index} is outside 0..{process_count - 1}")
        self._process_index, self._process_count = process_index, process_count
        if len(plan):
            self._local(plan[0])

    def __call__(self, step: int) -> HostBatch | Failure:
        """Batch `step` of the plan, or the error in the user's data that prevents it."""
        try:
            return self._load(step)
        except UserError as error:
            return Failure(error)

    def _load(self, step: int) -> HostBatch:
        batch = self._plan[step].astype(np.int32)
        rows = self._local(batch)
        changes = self._augmented(step, len(batch))
        mask = np.ones(len(rows), bool) if self._mask is None else self._local(self._mask[step])
        images = np.zeros((len(rows), *self._size, 3), np.uint8)
        positions = [int(position) for position in np.flatnonzero(mask)]
        cached = self._cache.filled[rows] if self._cache is not None else np.zeros(len(rows), bool)
        missing = list(dict.fromkeys(int(rows[p]) for p in positions if p in changes or not cached[p]))
        # Read before they are decoded: of a remote storage all of them wait for their answers together.
        read = dict(zip(missing, self._split.read_many(missing), strict=True))
        for position in positions:
            images[position] = self._image(int(rows[position]), changes.get(position), read)
        minus_one = np.int32(-1)
        return {
            "image": images,
            "pid": np.where(mask, self._pids[rows], minus_one),
            "camid": np.where(mask, self._camids[rows], minus_one),
            "index": np.where(mask, rows, minus_one),
            "mask": mask,
        }

    def _augmented(self, step: int, batch_size: int) -> dict[int, Callable[[Image.Image], Image.Image]]:
        """What the policy does before the resize, by position in this process's part of the batch."""
        if self._policy is None:
            return {}
        chosen, positions = self._policy.chosen(step, batch_size), self._local(np.arange(batch_size))
        return {
            local: functools.partial(self._policy, step=step, position=int(position))
            for local, position in enumerate(positions)
            if chosen[position]
        }

    def _image(
        self, row: int, change: Callable[[Image.Image], Image.Image] | None, read: dict[int, Record]
    ) -> np.ndarray:
        # What the policy changed must not be cached.
        cache = self._cache if change is None else None
        if cache is not None and cache.filled[row]:
            return cache.images[row]
        record = read[row]
        try:
            image = transforms.load(record.image, self._size, self._interpolation, change)
        except DataError as error:
            where = f"{self._split.name} image {row} ({record.filename})"
            raise DataError(f"{where}: {error}; {getattr(self._split, 'fix', _FIX)}") from error
        if cache is not None:
            # Two threads may fill the same row with the same pixels; the flag goes up after the pixels are there.
            cache.images[row] = image
            cache.filled[row] = True
        return image

    def _local(self, batch: np.ndarray) -> np.ndarray:
        """This process's slice of a global batch."""
        size, remainder = divmod(len(batch), self._process_count)
        if remainder:
            raise ConfigError(
                f"batch_size={len(batch)} is not a multiple of the {self._process_count} processes: "
                f"use {max(size, 1) * self._process_count}"
            )
        return batch[self._process_index * size : (self._process_index + 1) * size]
