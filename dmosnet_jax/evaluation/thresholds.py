"""From which similarity on two images are of one person: error rates of that decision over all pairs.

A pair is a query and a gallery image; those of one identity and one camera are junk, as in a ranking, and a query whose
identity is not known (negative) is in no pair. What is accepted is a cosine similarity at or above a threshold. The
false-accept rate is the share of pairs of different people that are accepted, the true-accept rate that of pairs of the
same person; at the equal error rate as many of the ones are accepted as of the others refused. Only similarities that
occur are thresholds, so the figures are exact.

There may be a thousand million pairs. Those of the same person are few and kept; the others are counted in fine bins
in a first pass over the distances, and of the bins in which a threshold lies the similarities are fetched in a second.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer

from dmosnet_jax.core import arguments
from dmosnet_jax.core.errors import ArgumentError
from dmosnet_jax.core.kernels import jit, map_rows
from dmosnet_jax.evaluation import distances
from dmosnet_jax.evaluation.ranking import BLOCK, checked_labels

FALSE_ACCEPT_RATES = (1e-2, 1e-3, 1e-4)
# Of the histogram that is given out, and of the first pass, both over similarities from -1 to 1.
BINS, _FINE = 128, 1 << 16


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Result of `evaluate`; rates are fractions.

    Attributes:
        eer: equal error rate: mean of the two error rates where they come nearest to each other.
        eer_threshold: similarity there.
        tar_at_far: for each false-accept rate `far`, the lowest `threshold` that does not exceed it, and the
            true-accept rate `tar` there.
        edges: borders of the histogram's bins.
        same: pairs of the same person in each bin.
        different: pairs of different people.
        curve: receiver operating characteristic: false-accept and true-accept rates, both falling, at thresholds on a
            grid of 2^-15; thinned where it hardly moves.
    """

    eer: float
    eer_threshold: float
    tar_at_far: tuple[dict[str, float], ...]
    edges: Float64[np.ndarray, " bins_and_one"]
    same: Int64[np.ndarray, " bins"]
    different: Int64[np.ndarray, " bins"]
    curve: Float64[np.ndarray, "two points"]

    def results(self) -> dict[str, Any]:
        """The field `thresholds` of `results.json`."""
        rates = [dict(row) for row in self.tar_at_far]
        return {"eer": self.eer, "eer_threshold": self.eer_threshold, "tar_at_far": rates}


@jit()
def _bin(similarity):
    """A fine bin, never a lower one for a higher similarity; rounding may lead out of [-1, 1]."""
    return min(max(int((np.float64(similarity) + 1.0) * (_FINE // 2)), 0), _FINE - 1)


@jit()
def _similarity(distance):
    return np.float32(1.0 - distance)


@jit()
def _partners(query_id, g_ids):
    return g_ids.shape[0] if query_id >= 0 else 0


@jit()
def _count(distance, query0, q_ids, q_cams, g_ids, g_cams, start, stop):
    """Similarities of the same person in some rows, and the number of others in each fine bin."""
    counts, found = np.zeros(_FINE, np.int64), 0
    for r in range(start, stop):
        for g in range(_partners(q_ids[query0 + r], g_ids)):
            if g_ids[g] != q_ids[query0 + r]:
                counts[_bin(_similarity(distance[r, g]))] += 1
            elif g_cams[g] != q_cams[query0 + r]:
                found += 1
    same, found = np.empty(found, np.float32), 0
    for r in range(start, stop):
        for g in range(_partners(q_ids[query0 + r], g_ids)):
            if g_ids[g] == q_ids[query0 + r] and g_cams[g] != q_cams[query0 + r]:
                same[found] = _similarity(distance[r, g])
                found += 1
    return same, counts


@jit()
def _fetch(distance, query0, q_ids, g_ids, wanted, start, stop):
    """Similarities of different people that lie in one of the wanted bins."""
    found = 0
    for r in range(start, stop):
        for g in range(_partners(q_ids[query0 + r], g_ids)):
            if g_ids[g] != q_ids[query0 + r] and wanted[_bin(_similarity(distance[r, g]))]:
                found += 1
    values, found = np.empty(found, np.float32), 0
    for r in range(start, stop):
        for g in range(_partners(q_ids[query0 + r], g_ids)):
            similarity = _similarity(distance[r, g])
            if g_ids[g] != q_ids[query0 + r] and wanted[_bin(similarity)]:
                values[found] = similarity
                found += 1
    return values


def evaluate(
    query_features: Float[np.ndarray, "q d"] | None,
    gallery_features: Float[np.ndarray, "g d"] | None,
    query_ids: Integer[np.ndarray, " q"],
    gallery_ids: Integer[np.ndarray, " g"],
    query_cams: Integer[np.ndarray, " q"],
    gallery_cams: Integer[np.ndarray, " g"],
    *,
    rates: Sequence[float] = FALSE_ACCEPT_RATES,
    distance: distances.Distance | None = None,
    block: int = BLOCK,
    threads: int | None = None,
) -> Thresholds | None:
    """Error rates and thresholds over all pairs of a query and a gallery image.

    Args:
        query_features: None when `distance` is given, as `gallery_features`; L2-normalised here.
        gallery_features: of the same length.
        query_ids: identities; -1 where unknown.
        gallery_ids: likewise.
        query_cams: cameras.
        gallery_cams: likewise.
        rates: false-accept rates, each between 0 and 1.
        distance: 1 - cosine instead of features, or a function from (start, stop) to that of the queries between.
        block: queries per block; no more distances are held at a time.
        threads: worker threads, default all cores.

    Returns:
        `Thresholds`, or None where there is no pair of the same person or none of different people.

    Raises:
        DataError: shapes that do not fit, or features or distances that are not finite.
        ConfigError: a rate outside 0 to 1, or a block below 1.
    """
    if isinstance(rates, str) or not isinstance(rates, Sequence | np.ndarray):
        raise ArgumentError(f"thresholds: rates={reprlib.repr(rates)} must be a list of false-accept rates")
    rates = [arguments.number("thresholds: rates", rate, low=0, high=1) for rate in rates]
    q_ids, g_ids, q_cams, g_cams = checked_labels(query_ids, gallery_ids, query_cams, gallery_cams)
    source = distances.source(query_features, gallery_features, "cosine", distance)
    shape = (q_ids.shape[0], g_ids.shape[0])

    def visit(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        for query0, part in distances.blocks(source, shape, block):

            def rows(start: int, stop: int, query0: int = query0, part: np.ndarray = part) -> Any:
                return function(part, query0, *arguments, start, stop)

            yield from map_rows(rows, len(part), threads=threads, task_rows=128)

    counts, parts = np.zeros(_FINE, np.int64), []
    for found, counted in visit(_count, q_ids, q_cams, g_ids, g_cams):
        parts.append(found)
        counts += counted
    same = np.sort(np.concatenate(parts))
    if not same.size or not counts.any():
        return None
    pairs = _Pairs(same, counts)
    # As many pairs of different people may be accepted, without the rounding of the product.
    allowed = [int(rate * counts.sum() + 1e-6) for rate in rates]
    pairs.different = np.sort(np.concatenate(list(visit(_fetch, q_ids, g_ids, pairs.wanted(allowed)))))
    eer, eer_threshold = pairs.equal_error()
    return Thresholds(
        eer,
        eer_threshold,
        tuple({"far": float(rate), **pairs.accepting(most)} for rate, most in zip(rates, allowed, strict=True)),
        np.linspace(-1, 1, BINS + 1),
        np.bincount(_bins(same), minlength=_FINE).reshape(BINS, -1).sum(axis=1),
        counts.reshape(BINS, -1).sum(axis=1),
        pairs.curve(),
    )


class _Pairs:
    """All pairs: similarities of the same person, and those of different people by fine bins.

    Attributes:
        same: similarities, rising.
        different: of different people, those in the bins that `wanted` names, rising.
    """

    def __init__(self, same: np.ndarray, counts: np.ndarray):
        self.same, self.different = same, np.zeros(0, np.float32)
        self._counts, self._total = counts, int(counts.sum())
        # Pairs of different people in a bin or a higher one.
        self._from = np.append(counts[::-1].cumsum()[::-1], 0)

    def wanted(self, allowed: Sequence[int]) -> np.ndarray:
        """Fine bins that decide the equal error rate and the thresholds that accept so many, bool [_FINE]."""
        wanted = np.zeros(_FINE, np.bool_)
        for place in (self._crossing(), *map(self._place, allowed)):
            higher = np.flatnonzero(self._counts[place + 1 :])
            wanted[[place, *(place + 1 + higher[:1])]] = True
        return wanted

    def _place(self, rank: int) -> int:
        """Bin of the pair of different people with so many before it, by falling similarity."""
        return int(np.flatnonzero(self._from[:-1] > min(rank, self._total - 1))[-1])

    def _crossing(self) -> int:
        """The last bin at whose lower border not fewer are accepted falsely than are refused falsely."""
        refused = np.searchsorted(_bins(self.same), np.arange(_FINE))
        return int(np.flatnonzero(self._from[:-1] / self._total >= refused / self.same.size)[-1])

    def _accepted(self, thresholds: np.ndarray) -> np.ndarray:
        """Pairs of different people at or above thresholds in bins that were fetched, or above the last of these."""
        places = _bins(thresholds)
        within = np.searchsorted(_bins(self.different), places, side="right")
        return self._from[places + 1] + within - np.searchsorted(self.different, thresholds)

    def equal_error(self) -> tuple[float, float]:
        """The equal error rate and its threshold."""
        place = self._crossing()
        candidates = []
        for values in (self.same, self.different):
            places = _bins(values)
            first, last = np.searchsorted(places, (place, place + 1))
            # Those of the bin, and the next one above it.
            candidates.append(values[first : last + 1])
        thresholds = np.unique(np.concatenate(candidates))
        falsely_accepted = self._accepted(thresholds) / self._total
        falsely_refused = np.searchsorted(self.same, thresholds) / self.same.size
        best = int(np.argmin(np.abs(falsely_accepted - falsely_refused)))
        return float(falsely_accepted[best] + falsely_refused[best]) / 2, float(thresholds[best])

    def curve(self) -> np.ndarray:
        """False-accept and true-accept rates at borders of fine bins, [2, points]."""
        accepted = 1 - np.searchsorted(_bins(self.same), np.arange(_FINE + 1)) / self.same.size
        rates = np.stack([self._from / self._total, accepted])
        # A step of a hundredth of a decade, or of a five-hundredth of the height, is finer than a picture of it.
        decades = np.log10(np.maximum(rates[0], 0.1 / self._total))
        places = np.stack([np.floor(100 * decades), np.floor(500 * rates[1])])
        kept = np.append(True, (np.diff(places) != 0).any(axis=0))
        return rates[:, kept]

    def accepting(self, most: int) -> dict[str, float]:
        """The lowest similarity that so many pairs of different people reach, and the true-accept rate there."""
        if most >= self._total:
            return {"tar": 1.0, "threshold": float(min(self.same[0], self.different[0]))}
        place = self._place(most)
        last = np.searchsorted(_bins(self.different), place, side="right")
        refused = self.different[last - 1 - (most - int(self._from[place + 1]))]
        firsts = ((values, np.searchsorted(values, refused, side="right")) for values in (self.same, self.different))
        higher = [values[first] for values, first in firsts if first < values.size]
        # Where no pair is more similar, none is accepted.
        threshold = min(higher, default=np.nextafter(refused, np.float32(2)))
        return {"tar": float((self.same >= threshold).mean()), "threshold": float(threshold)}


def _bins(similarities: np.ndarray) -> np.ndarray:
    """Fine bins of many similarities."""
    return np.clip(((similarities.astype(np.float64) + 1.0) * (_FINE // 2)).astype(np.int64), 0, _FINE - 1)
