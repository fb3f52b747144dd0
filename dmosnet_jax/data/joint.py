"""Several splits as one: a split of several data sets, or two splits of one data set."""

import bisect
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from dmosnet_jax.core.selection import joined
from dmosnet_jax.data import records
from dmosnet_jax.data.subset import Rows


@dataclasses.dataclass(frozen=True)
class JointSplit:
    """Splits after each other, seen as a split; pickles for worker processes.

    Of several data sets, identities and cameras never meet: they are numbered from 0 without gaps, those of each data
    set after those of the ones before it. Negative ones (not known) stay -1.

    Attributes:
      parts: the splits, in order.
      same: they are of one data set, whose identities and cameras stay as they are.
      pids: identities, int32 [N].
      camids: cameras, int32 [N].
    """

    parts: tuple[Rows, ...]
    same: bool = False
    pids: np.ndarray = dataclasses.field(init=False)
    camids: np.ndarray = dataclasses.field(init=False)
    _firsts: tuple[int, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        ends = np.cumsum([len(part) for part in self.parts]).tolist()
        object.__setattr__(self, "_firsts", (0, *ends))
        together = np.concatenate if self.same else _numbered
        object.__setattr__(self, "pids", together([part.pids for part in self.parts]))
        object.__setattr__(self, "camids", together([part.camids for part in self.parts]))

    @property
    def name(self) -> str:
        """Names of the data sets, joined by `+`."""
        if self.same:
            return self.parts[0].name
        return joined([part.name for part in self.parts])

    @property
    def split(self) -> str:
        """Of the data sets."""
        return self.parts[0].split

    @property
    def source(self) -> range:
        """As long as the union."""
        return range(len(self))

    def __len__(self) -> int:
        return self._firsts[-1]

    def record(self, index: int, /) -> records.Record:
        """The image, with the identity and camera of the union; its file name begins with the data set's name.

        Raises:
          DataError: as `datasets.Split.record`.
        """
        part, row = self._place(int(index))
        found = self.parts[part].record(row)
        if self.same:
            return found
        pid, camid = int(self.pids[index]), int(self.camids[index])
        return dataclasses.replace(found, pid=pid, camid=camid, filename=f"{self.parts[part].name}/{found.filename}")

    def filenames(self, indices: Iterable[int] | None = None) -> list[str]:
        """File names, each below the name of its data set; see `datasets.Split.filenames`."""
        return [self.record(int(row)).filename for row in (range(len(self)) if indices is None else indices)]

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the data set and row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        part = bisect.bisect_right(self._firsts, index) - 1
        return part, index - self._firsts[part]


def _numbered(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Values of each column numbered after those of the columns before it, int32; negative ones become -1."""
    first = 0
    numbered = []
    for column in columns:
        values, number = np.unique(column, return_inverse=True)
        unknown = int(np.count_nonzero(values < 0))
        numbered.append(np.where(column < 0, -1, number - unknown + first))
        first += len(values) - unknown
    return np.concatenate(numbered).astype(np.int32)
