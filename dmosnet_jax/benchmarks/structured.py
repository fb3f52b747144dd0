"""Made-up features with the structure that clustering meets, their nearest neighbours known; and random directions.

Images form groups of 256 that resemble each other (same camera, same day), with about a dozen people in each and images
that belong to nobody. Across groups similarities scatter around zero, so the nearest images are those of the own group:
no search over all images is needed. The order is random, so that memory accesses are as irregular as with real data.
"""

import numpy as np

GROUP = 256
_PEOPLE, _ALONE = 12, 0.25
# Shares of the squared length: common to the group; the person's own; along the few directions in which its images
# vary (pose, light), which is what makes neighbourhoods overlap as those of a network do; the image's own.
_SHARED, _OWN, _VARIED, _NOISE = 0.3, 0.2, 0.4, 0.1
_DIRECTIONS = 12
_GROUPS_AT_ONCE, _ROWS_AT_ONCE = 64, 65_536


def features(images: int, dim: int, *, seed: int = 0, k: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, identities and nearest images.

    Args:
        images: N.
        dim: feature length; from about 128 on the groups do not mix.
        seed: of the draw.
        k: columns of the neighbour table, at most 256.

    Returns:
        float32 [N, dim] of unit length; int32 [N] identities, -1 for nobody's; int32 [N, min(k, N)] nearest images,
        best first, the image itself first of all.
    """
    rng = np.random.default_rng(seed)
    k = min(k, images)
    order_of_rows = rng.permutation(images)
    table = np.empty((images, dim), np.float32)
    people = np.empty(images, np.int32)
    nearest = np.empty((images, k), np.int32)
    # The last group takes the remainder, so that none is smaller than k.
    groups = max(images // GROUP, 1)
    start = 0
    while start < images:
        first = start // GROUP
        count = min(_GROUPS_AT_ONCE, groups - 1 - first) or 1
        size = GROUP if first < groups - 1 else images - start
        rows = order_of_rows[start : start + count * size]
        drawn, who = _groups(rng, count, size, dim)
        similarity = np.matmul(drawn, drawn.transpose(0, 2, 1))
        best = np.argpartition(-similarity, k - 1, axis=2)[:, :, :k] if k < size else _all(count, size)
        order = np.argsort(-np.take_along_axis(similarity, best, axis=2), axis=2, kind="stable")
        best = np.take_along_axis(best, order, axis=2) + size * np.arange(count)[:, None, None]
        table[rows] = drawn.reshape(-1, dim)
        nearest[rows] = rows[best.reshape(-1, k)]
        own = (np.arange(first, first + count, dtype=np.int32) * _PEOPLE)[:, None]
        people[rows] = np.where(who < 0, -1, who + own).reshape(-1)
        start += count * size
    return table, people, nearest


def directions(rng: np.random.Generator, images: int, dim: int) -> np.ndarray:
    """Random directions, float32 [images, dim] of unit length."""
    table = np.empty((images, dim), np.float32)
    for start in range(0, images, _ROWS_AT_ONCE):
        rows = table[start : start + _ROWS_AT_ONCE]
        rng.standard_normal(out=rows, dtype=np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return table


def _all(count: int, size: int) -> np.ndarray:
    return np.broadcast_to(np.arange(size), (count, size, size))


def _groups(rng: np.random.Generator, count: int, size: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [count, size, dim] and the person in the group, int32 [count, size], -1 for nobody."""

    def draw(share: float, *shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, dim), np.float32) * np.float32(np.sqrt(share / dim))

    # Some people are seen more often than others.
    who = (_PEOPLE * rng.random((count, size)) ** 1.5).astype(np.int32)
    alone = rng.random((count, size)) < _ALONE
    drawn = draw(_NOISE, count, size)
    amounts = rng.standard_normal((count, size, _DIRECTIONS), np.float32)
    drawn += np.matmul(amounts, draw(_VARIED / _DIRECTIONS, count, _DIRECTIONS))
    drawn += draw(_SHARED, count, 1)
    own = np.take_along_axis(draw(_OWN, count, _PEOPLE), who[:, :, None], axis=1)
    own[alone] = draw(_OWN, int(alone.sum()))
    drawn += own
    drawn /= np.sqrt(np.einsum("gnd,gnd->gn", drawn, drawn))[:, :, None]
    return drawn, np.where(alone, np.int32(-1), who)
