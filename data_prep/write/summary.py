"""What a conversion did, in words."""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion did.

    Attributes:
      folder: of the converted data set.
      splits: for each split its numbers of images, identities (without distractors) and cameras.
      junk: images left out because their identity is -1; None where the data set has no such.
      distractors: images with identity 0, kept in the gallery.
      seconds: it took.
      notes: what else a user should know, a sentence each.
    """

    folder: pathlib.Path | str
    splits: dict[str, tuple[int, int, int]]
    junk: int | None
    distractors: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        table = [("split", "images", "identities", "cameras")]
        table += [(split, f"{n:,}", f"{ids:,}", f"{cameras:,}") for split, (n, ids, cameras) in self.splits.items()]
        images = sum(counts[0] for counts in self.splits.values())
        lines = [f"written to {self.folder}"]
        lines += [f"  {split:<8}{n:>10}{ids:>12}{cameras:>10}" for split, n, ids, cameras in table]
        if self.junk is not None:
            lines.append(
                f"  {self.junk:,} junk images (identity -1) left out, "
                f"{self.distractors:,} distractors (identity 0) kept in the gallery"
            )
        lines.append(f"  {images:,} images in {self.seconds:.1f} s, {images / max(self.seconds, 1e-9):,.0f} images/s")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)
