"""A pseudorandom permutation of [0, n) that is computed, not stored: constant time and memory for any n.

A balanced Feistel network permutes [0, 4^k), the smallest such range that contains [0, n). A value that lands outside
[0, n) is permuted again until it lands inside ("cycle walking", Black and Rogaway 2002): the result is still a
permutation, and takes under four passes on average.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit of a uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The image of each index under the permutation of [0, n) that is keyed by seed and epoch.

    Args:
      indices: integers in [0, n), any shape.
      n: size of the range, 1 <= n <= 2^62.
      seed: any integer; only its low 64 bits count.
      epoch: likewise; each epoch has another permutation.

    Returns:
      int64, the shape of `indices`; over all of [0, n) every value occurs once.

    Raises:
      ValueError: an index outside the range, or n out of bounds.
    """
    if not 1 <= n <= 2**62:
        raise ValueError(f"a permutation of {n} items: 1 to 2^62 are possible")
    values = np.asarray(indices, np.int64)
    if values.size and not (values.min() >= 0 and values.max() < n):
        raise ValueError(f"indices from {values.min()} to {values.max()} do not lie in [0, {n})")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low, shift = np.uint64(2**half - 1), np.uint64(half)
    key = np.array([seed % 2**64, epoch % 2**64], np.uint64)
    base = _mix(_mix(key[:1] + np.uint64(_GOLDEN)) ^ key[1:])
    keys = _mix(base + np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    flat = values.ravel().astype(np.uint64)
    outside = np.ones(flat.shape, bool)
    while outside.any():
        left, right = flat[outside] >> shift, flat[outside] & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & low)
        flat[outside] = (left << shift) | right
        outside = flat >= n
    return flat.astype(np.int64).reshape(values.shape)
