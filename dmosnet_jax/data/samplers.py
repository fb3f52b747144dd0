"""Which images make up each batch: index plans, computed at once per epoch with NumPy.

Every plan is a pure function of its arguments: the same (seed, epoch) gives the same plan in every process and after a
restart. Rows are positions in the split; plans are int32.
"""

import numpy as np
from jaxtyping import Bool, Int32, Integer

from dmosnet_jax.core import arguments
from dmosnet_jax.core.errors import ConfigError

# The random streams of the samplers are unrelated even for equal (seed, epoch).
_IDENTITY, CLASS, SOURCE = 1, 2, 3


def identity_epoch(
    pids: Integer[np.ndarray, " n"],
    *,
    batch_size: int,
    instances: int,
    seed: int,
    epoch: int,
    steps: int | None = None,
) -> Int32[np.ndarray, "steps batch"]:
    """P x K batches: P = batch_size / instances identities with K = instances images each, contiguous.

    The semantics of torchreid's RandomIdentitySampler and fast-reid's NaiveIdentitySampler: the shuffled images of an
    identity are cut into chunks of K (an incomplete last chunk is left out; an identity with fewer than K images gives
    one chunk drawn with replacement); each batch takes one chunk from each of P random identities that still have some,
    and the pass ends when fewer than P have. Images with a negative pid are never drawn. With K = 1 and fewer
    identities than images in a batch, a batch must repeat identities: then a pass goes over the shuffled images.

    Args:
      pids: the identity of each image.
      batch_size: images per batch, a multiple of `instances`.
      instances: images per identity in a batch (K).
      seed: of the run.
      epoch: number of the epoch.
      steps: number of batches: passes are repeated, and the last one is cut. None: as many as one pass has, which
        varies a little from epoch to epoch.

    Raises:
      DataError: pids that are no whole numbers.
      ConfigError: batch_size is not a multiple of instances, or the data has fewer than P identities (with K > 1), or
        fewer images than a batch.
    """
    pids = arguments.integers("sampler: pids", pids)
    steps = None if steps is None else arguments.count("sampler: steps", steps, least=0)
    per_batch = _classes_per_batch(batch_size, instances)
    rng = _generator(seed, epoch, _IDENTITY)
    order, starts, counts = _group(pids)
    if len(counts) < per_batch and instances == 1:
        return _shuffled_passes(rng, order, batch_size, steps)
    if len(counts) < per_batch:
        raise ConfigError(
            f"batch_size={batch_size} with instances={instances} needs {per_batch} identities per batch, the data has "
            f"{len(counts)}: lower batch_size or raise instances"
        )
    if steps is None:
        return _identity_pass(rng, order, starts, counts, per_batch, instances)
    plan = np.empty((0, batch_size), np.int32)
    while len(plan) < steps:
        plan = np.concatenate([plan, _identity_pass(rng, order, starts, counts, per_batch, instances)])
    return plan[:steps]


def class_epoch(
    labels: Integer[np.ndarray, " n"],
    camids: Integer[np.ndarray, " n"] | None,
    *,
    batch_size: int,
    instances: int,
    seed: int,
    epoch: int,
    steps: int,
    stream: int = CLASS,
) -> Int32[np.ndarray, "steps batch"]:
    """Class-balanced batches: the semantics of SpCL's RandomMultipleGallerySampler (`spcl/utils/data/sampler.py`).

    A pass visits every class once in random order. A class gives one random image and `instances - 1` others: from
    other cameras than that image's when the class has any, from the rest of the class otherwise; with replacement when
    there are fewer than `instances` to choose from. A class of a single image gives that image alone, so groups do not
    align with batches. Passes follow each other without a gap until `steps` batches are full (SpCL drops the incomplete
    batch at the end of each pass, and cannot run when a pass is smaller than a batch).

    Args:
      labels: the class of each image; images with a negative label are never drawn.
      camids: cameras, or None to choose within the class regardless of cameras.
      batch_size: images per batch, a multiple of `instances`.
      instances: images per class (K).
      seed: of the run.
      epoch: number of the epoch.
      steps: number of batches.
      stream: of random numbers: `SOURCE` for the labelled source beside a target.

    Raises:
      DataError: labels or cameras that are no whole numbers, or not as many.
      ConfigError: batch_size is not a multiple of instances, or no label is >= 0.
    """
    labels = arguments.integers("sampler: labels", labels)
    if camids is not None:
        camids = arguments.integers("sampler: camids", camids, length=len(labels))
    steps = arguments.count("sampler: steps", steps, least=0)
    _classes_per_batch(batch_size, instances)
    rng = _generator(seed, epoch, stream)
    order, starts, counts = _group(labels, camids)
    if not len(counts):
        raise ConfigError("no image has a class (all labels are negative): there is nothing to train on")
    sorted_camids = None if camids is None else camids[order]
    needed = steps * batch_size
    parts: list[np.ndarray] = []
    while needed > 0:
        # Every class gives at least one image, so more classes than images still needed are never looked at.
        classes = rng.permutation(len(counts))[:needed]
        images = _class_pass(rng, order, sorted_camids, starts[classes], counts[classes], instances)[:needed]
        parts.append(images)
        needed -= len(images)
    return np.concatenate([np.empty(0, np.int32), *parts]).reshape(steps, batch_size)


def alternating(
    first: Int32[np.ndarray, "steps half"], second: Int32[np.ndarray, "steps half"]
) -> Int32[np.ndarray, "steps batch"]:
    """Batches whose images are turn about from one plan and from another."""
    return np.stack([first, second], axis=2).reshape(len(first), -1)


def evaluation_order(
    n: int, batch_size: int
) -> tuple[Int32[np.ndarray, "steps batch"], Bool[np.ndarray, "steps batch"]]:
    """Rows of all n images in order, the last batch padded by repeating the last image, and False where padded.

    Raises:
      ConfigError: batch_size is not positive, or n negative.
    """
    n, batch_size = arguments.count("sampler: n", n, least=0), arguments.count("sampler: batch_size", batch_size)
    steps = -(-n // batch_size)
    rows = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
    return np.minimum(rows, n - 1).astype(np.int32), rows < n


def _shuffled_passes(rng: np.random.Generator, rows: np.ndarray, batch_size: int, steps: int | None) -> np.ndarray:
    """Passes over shuffled rows, each without its incomplete last batch: int32 [steps, batch_size]."""
    per_pass = len(rows) // batch_size
    if not per_pass:
        raise ConfigError(f"batch_size={batch_size} is more than the {len(rows)} images with an identity: lower it")
    passes = 1 if steps is None else -(-steps // per_pass)
    plan = np.concatenate([rng.permutation(rows)[: per_pass * batch_size] for _ in range(passes)])
    return plan.reshape(-1, batch_size)[:steps].astype(np.int32)


def _identity_pass(
    rng: np.random.Generator,
    order: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    per_batch: int,
    instances: int,
) -> np.ndarray:
    """One pass: int32 [steps, per_batch * instances]."""
    # Random keys sorted within each identity shuffle all identities at once; the groups stay where they are.
    group = np.repeat(np.arange(len(counts)), counts)
    shuffled = order[np.lexsort((rng.random(len(order)), group))]
    chunks_of = np.maximum(counts // instances, 1)
    first_chunk = np.cumsum(chunks_of) - chunks_of
    owner = np.repeat(np.arange(len(counts)), chunks_of)
    number = np.arange(len(owner)) - first_chunk[owner]
    within = number[:, None] * instances + np.arange(instances)[None, :]
    short = counts < instances
    within[first_chunk[short]] = rng.integers(0, counts[short, None], (int(short.sum()), instances))
    chunks = shuffled[starts[owner][:, None] + within].astype(np.int32)
    picked = _random_order(rng, chunks_of, per_batch)
    # The i-th time an identity is picked it gives its i-th chunk.
    by_identity = np.argsort(picked.ravel(), kind="stable")
    times = np.bincount(picked.ravel(), minlength=len(counts))
    chunk = np.empty(picked.size, np.int64)
    chunk[by_identity] = np.arange(picked.size) - np.repeat(np.cumsum(times) - times - first_chunk, times)
    return chunks[chunk].reshape(len(picked), per_batch * instances)


def _random_order(rng: np.random.Generator, chunks_of: np.ndarray, per_batch: int) -> np.ndarray:
    """Identities of each batch, int64 [steps, per_batch]: distinct, uniform over those with chunks left."""
    left = chunks_of.copy()
    available = np.arange(len(left))
    remaining = len(left)
    batches: list[np.ndarray] = []
    while remaining >= per_batch:
        positions = rng.choice(remaining, per_batch, replace=False)
        chosen = available[positions]
        batches.append(chosen)
        left[chosen] -= 1
        # The last available identity replaces one without chunks; from the back, so that it has chunks itself.
        for position in sorted(positions[left[chosen] == 0], reverse=True):
            remaining -= 1
            available[position] = available[remaining]
    return np.stack(batches)


def _class_pass(
    rng: np.random.Generator,
    order: np.ndarray,
    sorted_camids: np.ndarray | None,
    starts: np.ndarray,
    counts: np.ndarray,
    instances: int,
) -> np.ndarray:
    """Images of the given classes in their order, int32 [between len(starts) and len(starts) * instances]."""
    anchor = starts + rng.integers(0, counts)
    # Within a class the images are sorted by camera, so those of the anchor's camera are one run [low, high); the
    # others are numbered 0..others-1, skipping that run.
    low, high = anchor, anchor + 1
    others = counts - 1
    if sorted_camids is not None:
        run_low, run_high = _camera_runs(sorted_camids, order.size, starts, counts)
        run_low, run_high = run_low[anchor], run_high[anchor]
        elsewhere = counts - (run_high - run_low)
        low, high = np.where(elsewhere > 0, run_low, low), np.where(elsewhere > 0, run_high, high)
        others = np.where(elsewhere > 0, elsewhere, others)
    picks = _subsets(rng, np.maximum(others, 1), instances - 1, others < instances)
    position = starts[:, None] + picks
    position += np.where(position >= low[:, None], (high - low)[:, None], 0)
    table = np.concatenate([anchor[:, None], position], axis=1)
    present = np.ones(table.shape, bool)
    present[:, 1:] = (others > 0)[:, None]
    return order[table[present]].astype(np.int32)


def _camera_runs(
    sorted_camids: np.ndarray, size: int, starts: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each position inside the given classes, the bounds of the run of equal cameras around it in its class."""
    begins = np.zeros(size, bool)
    begins[1:] = sorted_camids[1:] != sorted_camids[:-1]
    begins[starts] = True
    ends = starts + counts
    begins[ends[ends < size]] = True
    begins[0] = True
    edges = np.flatnonzero(begins)
    run = np.cumsum(begins) - 1
    return edges[run], np.append(edges[1:], size)[run]


def _subsets(rng: np.random.Generator, n: np.ndarray, k: int, replace: np.ndarray) -> np.ndarray:
    """Takes k numbers below n[i] in each row i: with replacement where `replace`, else distinct (n[i] >= k)."""
    picks = rng.integers(0, n[:, None], (len(n), k))
    distinct = ~replace
    # Floyd's algorithm (Bentley 1987) on all rows at once: pick from 0..last, and take `last` itself on a repeat.
    for i in range(k):
        last = n - k + i
        pick = rng.integers(0, np.where(distinct, last, 0) + 1)
        repeated = np.any(picks[:, :i] == pick[:, None], axis=1)
        picks[:, i] = np.where(distinct, np.where(repeated, last, pick), picks[:, i])
    return picks


def _group(labels: np.ndarray, camids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions with label >= 0 sorted by label (then camera), and where each label's group starts and its size."""
    order = np.flatnonzero(labels >= 0)
    keys = (labels[order],) if camids is None else (camids[order], labels[order])
    order = order[np.lexsort(keys)]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    return order, starts, counts


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    for name, value in (("seed", seed), ("epoch", epoch)):
        arguments.count(f"sampler: {name}", value, least=0, most=2**64)
    return np.random.default_rng([seed, epoch, stream])


def _classes_per_batch(batch_size: int, instances: int) -> int:
    for name, value in (("batch_size", batch_size), ("instances", instances)):
        arguments.count(f"sampler: {name}", value)
    if batch_size % instances:
        raise ConfigError(
            f"batch_size={batch_size} is not a multiple of instances={instances}: use "
            f"{max(1, batch_size // instances) * instances}, or change instances"
        )
    return batch_size // instances
