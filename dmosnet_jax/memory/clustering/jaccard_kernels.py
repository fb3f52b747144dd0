"""Compiled kernels of the sparse Jaccard distance; `jaccard` explains the method and calls them over row ranges.

Sums run in float32 and in the order of the dense reference (rising index, neighbours by rank), so that distances agree
with it to the last bit wherever the weights do, and a pair at the very radius falls on the same side.

Rows are visited in a given `order` that puts neighbours near each other: what they share is then still in the cache,
and the time per row hardly grows with their number. Each row's result is its own, so the order changes nothing else.
"""

import numpy as np

from dmosnet_jax.core.kernels import jit


@jit()
def least_labels(neighbours, labels, start, stop, out):
    """out[i]: the least label among the neighbours of row i."""
    for i in range(start, stop):
        least = labels[i]
        for a in range(neighbours.shape[1]):
            least = min(least, labels[neighbours[i, a]])
        out[i] = least


@jit()
def mark_mutual(neighbours, full, half, order, start, stop, marks):
    """marks[i, a]: 0 when the a-th neighbour is not mutual, 1 when it is within `full`, 2 when also within `half`."""
    for t in range(start, stop):
        i = order[t]
        for a in range(full):
            j = neighbours[i, a]
            marks[i, a] = 0
            for b in range(full):
                if neighbours[j, b] == i:
                    marks[i, a] = 2 if a < half and b < half else 1
                    break


@jit()
def expand_sets(neighbours, marks, full, half, order, start, stop, counts, indptr, indices):
    """Expanded k-reciprocal sets of rows `order[start..stop]`: sizes, and sorted members when `indices` has room.

    The first call, with empty `indices`, fills `counts`; the second, with the offsets made from them, the members.
    """
    in_set = np.full(neighbours.shape[0], -1, np.int32)
    in_expansion = np.full(neighbours.shape[0], -1, np.int32)
    fill = indices.shape[0] > 0
    for t in range(start, stop):
        i = order[t]
        for a in range(full):
            if marks[i, a] > 0:
                in_set[neighbours[i, a]] = i
        position = indptr[i] if fill else 0
        first = position
        for a in range(full):
            if marks[i, a] == 0:
                continue
            candidate = neighbours[i, a]
            if in_expansion[candidate] != i:
                in_expansion[candidate] = i
                if fill:
                    indices[position] = candidate
                position += 1
            size, shared = 0, 0
            for b in range(half):
                if marks[candidate, b] == 2:
                    size += 1
                    shared += in_set[neighbours[candidate, b]] == i
            if 3 * shared <= 2 * size:
                continue
            for b in range(half):
                member = neighbours[candidate, b]
                if marks[candidate, b] == 2 and in_expansion[member] != i:
                    in_expansion[member] = i
                    if fill:
                        indices[position] = member
                    position += 1
        if fill:
            indices[first:position].sort()
        else:
            counts[i] = position


@jit(fastmath={"reassoc", "contract", "nsz"})
def pair_products(features, indptr, indices, order, start, stop, values):
    """values[p] = <features[row], features[indices[p]]> for the entries of rows `order[start..stop]`."""
    for t in range(start, stop):
        i = order[t]
        for p in range(indptr[i], indptr[i + 1]):
            j = indices[p]
            total = np.float32(0)
            for d in range(features.shape[1]):
                total += features[i, d] * features[j, d]
            values[p] = total


@jit()
def softmax_rows(indptr, start, stop, values):
    """Softmax, in place, over the entries of each row."""
    for i in range(start, stop):
        first, last = indptr[i], indptr[i + 1]
        if first == last:
            continue
        top = values[first:last].max()
        total = 0.0
        for p in range(first, last):
            total += np.exp(np.float64(values[p] - top))
        for p in range(first, last):
            values[p] = np.float32(np.exp(np.float64(values[p] - top)) / total)


@jit()
def average_rows(neighbours, k2, source, indptr, indices, values, order, start, stop, counts):
    """Mean of the rows of the k2 nearest neighbours; sizes on the first call (empty `indices`), entries on the second.

    `source` is (indptr, indices, values) of the rows before; the mean is over k2, absent entries counting as zero.
    """
    source_indptr, source_indices, source_values = source
    seen = np.full(neighbours.shape[0], -1, np.int32)
    total = np.zeros(neighbours.shape[0], np.float32)
    fill = indices.shape[0] > 0
    for t in range(start, stop):
        i = order[t]
        first = indptr[i] if fill else 0
        position = first
        for a in range(k2):
            j = neighbours[i, a]
            for p in range(source_indptr[j], source_indptr[j + 1]):
                column = source_indices[p]
                if seen[column] != i:
                    seen[column] = i
                    total[column] = np.float32(0)
                    if fill:
                        indices[position] = column
                    position += 1
                total[column] += source_values[p]
        if not fill:
            counts[i] = position
            continue
        indices[first:position].sort()
        for p in range(first, position):
            values[p] = total[indices[p]] / np.float32(k2)


@jit()
def transpose(indptr, indices, values):
    """Columns of sparse rows: (offsets, row of each entry, rising within a column, value)."""
    rows = indptr.shape[0] - 1
    offsets = np.zeros(rows + 1, np.int64)
    for p in range(indices.shape[0]):
        offsets[indices[p] + 1] += 1
    for c in range(rows):
        offsets[c + 1] += offsets[c]
    cursor = offsets[:-1].copy()
    owner = np.empty(indices.shape[0], np.int32)
    entry = np.empty(indices.shape[0], np.float32)
    for i in range(rows):
        for p in range(indptr[i], indptr[i + 1]):
            q = cursor[indices[p]]
            owner[q] = i
            entry[q] = values[p]
            cursor[indices[p]] = q + 1
    return offsets, owner, entry


@jit()
def _distance(shared):
    """1 - m / (2 - m), not below zero, in float32 as the reference computes it."""
    distance = np.float32(1) - shared / (np.float32(2) - shared)
    return max(distance, np.float32(0))


@jit()
def dense_rows(rows, inverted, which, start, stop, out):
    """out[r] = Jaccard distances of row which[r] to all rows, for r in `start..stop`."""
    indptr, indices, values = rows
    offsets, owner, entry = inverted
    for r in range(start, stop):
        out[r] = np.float32(0)
        for p in range(indptr[which[r]], indptr[which[r] + 1]):
            for q in range(offsets[indices[p]], offsets[indices[p] + 1]):
                out[r, owner[q]] += min(values[p], entry[q])
        for c in range(out.shape[1]):
            out[r, c] = _distance(out[r, c])


@jit()
def _first_after(owner, low, high, row):
    """Position of the first entry of a column, between `low` and `high`, whose row comes after `row`."""
    while low < high:
        middle = (low + high) // 2
        if owner[middle] > row:
            high = middle
        else:
            low = middle + 1
    return low


@jit()
def near_pairs(rows, inverted, limit, order, start, stop, counts, own):
    """Pairs i < j within `limit` for rows i in `order[start..stop]`: (j of each pair, its distance); counts[i] pairs.

    `own[i]` receives the distance of a row to itself, which is zero but for rounding and empty rows.
    """
    indptr, indices, values = rows
    offsets, owner, entry = inverted
    shared = np.zeros(indptr.shape[0] - 1, np.float32)
    touched = np.empty(indptr.shape[0] - 1, np.int32)
    found = np.empty(1024, np.int32)
    distances = np.empty(1024, np.float32)
    size = 0
    for t in range(start, stop):
        i = order[t]
        reached, itself = 0, np.float32(0)
        for p in range(indptr[i], indptr[i + 1]):
            column, value = indices[p], values[p]
            itself += value
            stop_q = offsets[column + 1]
            for q in range(_first_after(owner, offsets[column], stop_q, i), stop_q):
                j = owner[q]
                if shared[j] == 0:
                    touched[reached] = j
                    reached += 1
                shared[j] += min(value, entry[q])
        own[i] = _distance(itself)
        before = size
        for r in range(reached):
            j = touched[r]
            distance = _distance(shared[j])
            shared[j] = 0
            if distance <= limit:
                if size == found.shape[0]:
                    found = np.append(found, np.empty(size, np.int32))
                    distances = np.append(distances, np.empty(size, np.float32))
                found[size] = j
                distances[size] = distance
                size += 1
        counts[i] = size - before
    return found[:size].copy(), distances[:size].copy()


@jit()
def symmetrise(counts, found, distances, own, limit, order):
    """Both directions and the diagonal from pairs i < j that come by `order`: (indptr, indices, distances)."""
    rows = counts.shape[0]
    indptr = np.zeros(rows + 1, np.int64)
    for i in range(rows):
        indptr[i + 1] += counts[i] + (own[i] <= limit)
    for p in range(found.shape[0]):
        indptr[found[p] + 1] += 1
    for i in range(rows):
        indptr[i + 1] += indptr[i]
    cursor = indptr[:-1].copy()
    indices = np.empty(indptr[rows], np.int32)
    values = np.empty(indptr[rows], np.float32)
    p = 0
    for t in range(rows):
        i = order[t]
        if own[i] <= limit:
            indices[cursor[i]] = i
            values[cursor[i]] = own[i]
            cursor[i] += 1
        for _ in range(counts[i]):
            j = found[p]
            indices[cursor[i]] = j
            values[cursor[i]] = distances[p]
            cursor[i] += 1
            indices[cursor[j]] = i
            values[cursor[j]] = distances[p]
            cursor[j] += 1
            p += 1
    return indptr, indices, values
