"""Exact and near duplicates: MinHash signatures, their bands, and which text of each group stays.

A signature (Broder 1997) has one number for each of 128 permutations: the least of the permuted hashes of the shingles.
Two texts agree in one with the probability of their Jaccard similarity: the share of common shingles. The numbers of a
signature are cut into 16 bands of 8; two texts that agree in a whole band are compared. `datasketch` computes the same
text by text; in NumPy over a batch it takes a fraction of the time (docs/select.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from flm_jax.duplicates.shingles import Tokens, mixed

PERMUTATIONS, BANDS = 128, 16
ROWS = PERMUTATIONS // BANDS
# Groups are compared with their first member; what differs from it forms a group of its own, up to this many times.
_ROUNDS = 16
_PAIRS = 1 << 14


def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """uint32 (128,) each: a and b of x -> a x + b mod 2**32, which is a permutation because a is odd."""
    drawn = mixed(np.arange(1, 2 * PERMUTATIONS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    words = (drawn >> np.uint64(32)).astype(np.uint32)
    return words[:PERMUTATIONS] | np.uint32(1), words[PERMUTATIONS:]


def signatures(found: Tokens) -> np.ndarray:
    """uint32 (texts, 128): the MinHash signatures of texts whose shingles are given."""
    hashes = (found.hashes >> np.uint64(32)).astype(np.uint32)
    signature = np.empty((PERMUTATIONS, len(found.starts) - 1), np.uint32)
    permuted = np.empty_like(hashes)
    for number, (a, b) in enumerate(zip(*_permutations(), strict=True)):
        np.multiply(hashes, a, out=permuted)
        np.add(permuted, b, out=permuted)
        signature[number] = np.minimum.reduceat(permuted, found.starts[:-1])
    return np.ascontiguousarray(signature.T)


def band_hashes(signature: np.ndarray) -> np.ndarray:
    """uint64 (16, texts): a hash of each band of signatures (texts, 128)."""
    rows = signature.reshape(len(signature), BANDS, ROWS).astype(np.uint64)
    whole = np.zeros(rows.shape[:2], np.uint64)
    for row in range(ROWS):
        whole = mixed(whole ^ (rows[:, :, row] + np.uint64(row << 32)))
    return np.ascontiguousarray(whole.T)


def short(signature: np.ndarray) -> np.ndarray:
    """uint8 (texts, 128): the last byte of each number, by which signatures are compared; chance agrees in 1 of 256."""
    return signature.astype(np.uint8)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 (pairs,): the estimated share of common shingles of rows of short signatures (pairs, 128)."""
    chance = 1 / 256
    agreeing: np.ndarray = np.count_nonzero(a == b, axis=1) / np.float32(PERMUTATIONS)
    return (agreeing - chance) / (1 - chance)


def first_of_equal(hashes: np.ndarray) -> np.ndarray:
    """int64 (n,): for each entry the index of the first entry with the same hash, its own where it is the first."""
    order = np.argsort(hashes, kind="stable")
    new = np.ones(len(hashes), bool)
    new[1:] = hashes[order[1:]] != hashes[order[:-1]]
    first = np.empty(len(hashes), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first


def _runs(numbers: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers whose hash another has too, sorted by hash and then by number, and where each group begins."""
    order = np.argsort(hashes, kind="stable")
    equal = hashes[order[1:]] == hashes[order[:-1]]
    grouped = np.concatenate([equal, [False]]) | np.concatenate([[False], equal])
    begins = grouped & ~np.concatenate([[False], equal])
    return numbers[order[grouped]], begins[grouped]


def near_pairs(
    left: np.ndarray, bands: Callable[[int], np.ndarray], compare: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yields pairs (n, 2) of near duplicates, the earlier one first, band by band.

    Args:
      left: numbers of the texts to look at, ascending.
      bands: the hashes of a band, for all texts.
      compare: whether each pair of two lists of numbers is a near duplicate.
    """
    for band in range(BANDS):
        members, begins = _runs(left, bands(band)[left])
        for _ in range(_ROUNDS):
            if not len(members):
                break
            groups = np.cumsum(begins) - 1
            leaders = members[begins][groups]
            others = ~begins
            near = np.zeros(len(members), bool)
            near[others] = compare(leaders[others], members[others])
            if near.any():
                yield np.stack([leaders[near], members[near]], axis=1)
            rest = others & ~near
            members, groups = members[rest], groups[rest]
            begins = np.ones(len(members), bool)
            begins[1:] = groups[1:] != groups[:-1]


def drop(pairs: np.ndarray, count: int) -> np.ndarray:
    """int64 (count,): for each text the one that stays in its place, itself where it stays.

    A text falls out if it is a near duplicate of an earlier one that stays, so that no chain of small changes leads to
    a text that is unlike the one that stays.

    Args:
      pairs: of near duplicates, (n, 2), in any order, some perhaps more than once.
      count: number of texts.
    """
    stays = np.arange(count)
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    for start in range(0, len(pairs), _PAIRS):  # as Python's integers, all of them would not fit in memory
        for earlier, later in pairs[start : start + _PAIRS].tolist():
            if stays[later] == later and stays[earlier] == earlier:
                stays[later] = earlier
    return stays


def comparison(read: Callable[[], np.ndarray], threshold: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function that says which pairs of numbers are near duplicates, for `near_pairs`.

    Args:
      read: opens the short signatures of all texts; a map of a file, opened for each piece of the work, so that
        the pages that were read do not add up.
      threshold: the least similarity.
    """

    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        found = np.zeros(len(a), bool)
        for start in range(0, len(a), _PAIRS):
            piece, whole = slice(start, start + _PAIRS), read()
            found[piece] = similarity(whole[a[piece]], whole[b[piece]]) >= threshold
        return found

    return compare
