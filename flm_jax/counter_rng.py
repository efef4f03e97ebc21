"""Random numbers by position: what stands at an entry follows from the key and the entry's place in its array.

So any contiguous block of an array can be drawn alone, on any machine, and an array that is split over devices is drawn
where it lies. Numbers are those of `jax.random` (the threefry generator in its partitionable form, jax's default),
bit for bit; its functions take no place to begin at, which is all that is added here.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Word = jax.Array  # uint32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_LOW = 0xFFFF


def truncated_normal(key: jax.Array, bound: float, shape: tuple[int, ...], offset: int | jax.Array = 0) -> jax.Array:
    """Standard normal numbers within ±bound: a contiguous block, in row-major order, of an endless sequence.

    Args:
      key: a threefry key, as `jax.random.key` makes it.
      bound: largest absolute value.
      shape: of the block; with offset 0 the result is `jax.random.truncated_normal(key, -bound, bound, shape)`.
      offset: where the block begins: below 2**64, or uint32[2], its high and its low word, if it shall be traced.

    Returns:
      float32.

    Raises:
      ValueError: the key is not a threefry one, or the sequence is left.
    """
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.shape != (2,) or data.dtype != np.uint32:
        raise ValueError(
            f"Numbers are drawn by threefry keys, which are uint32[2], not {data.dtype}{list(data.shape)}."
        )
    return _drawn(data, _words(offset, math.prod(shape)), bound, shape)


@functools.partial(jax.jit, static_argnums=(2, 3))  # op by op, products and sums would be rounded otherwise
def _drawn(data: jax.Array, offset: jax.Array, bound: float, shape: tuple[int, ...]) -> jax.Array:
    first, second = _threefry(data[0], data[1], *_counters(shape, offset))
    # 23 bits are the mantissa of a number in [1, 2).
    unit = lax.bitcast_convert_type(((first ^ second) >> np.uint32(9)) | np.uint32(0x3F800000), jnp.float32) - 1.0
    root, limit = np.float32(np.sqrt(2)), np.float32(bound)
    low, high = lax.erf(-limit / root), lax.erf(limit / root)
    normal = root * lax.erf_inv(lax.max(low, unit * (high - low) + low))
    # Rounding must not lead out of the open interval.
    return jnp.clip(normal, np.nextafter(-limit, np.float32(np.inf)), np.nextafter(limit, np.float32(-np.inf)))


def _words(offset: int | jax.Array, size: int) -> Any:
    if not isinstance(offset, int):
        return offset
    if not 0 <= offset <= 2**64 - size:
        raise ValueError(f"A block of {size} numbers from {offset} on is not within the first 2**64.")
    return np.array([offset >> 32, offset % 2**32], np.uint32)


def _counters(shape: tuple[int, ...], offset: jax.Array) -> tuple[Word, Word]:
    """The place of every entry in row-major order, plus an offset: 64 bits as two words each."""
    high, low = (jnp.broadcast_to(word, (1,) * len(shape)) for word in (offset[0], offset[1]))
    stride = 1
    for dim in reversed(range(len(shape))):
        here = tuple(size if i == dim else 1 for i, size in enumerate(shape))
        index = lax.broadcasted_iota(jnp.uint32, here, dim)
        more_high, more_low = _product(index, stride)
        low = low + more_low
        high = high + more_high + (low < more_low).astype(jnp.uint32)
        stride *= shape[dim]
    return jnp.broadcast_to(high, shape), jnp.broadcast_to(low, shape)


def _product(index: Word, stride: int) -> tuple[Word, Word]:
    """A word times a number below 2**64, mod 2**64, as two words."""
    low, high = np.uint32(stride % 2**32), np.uint32((stride >> 32) % 2**32)
    a0, a1, b0, b1 = index & _LOW, index >> 16, np.uint32(low & _LOW), np.uint32(low >> 16)
    middle = a1 * b0 + (a0 * b0 >> 16)
    carried = (middle & _LOW) + a0 * b1
    return a1 * b1 + (middle >> 16) + (carried >> 16) + index * high, index * low


def _threefry(key0: Word, key1: Word, x0: Word, x1: Word) -> tuple[Word, Word]:
    """The threefry-2x32 block cipher with 20 rounds (Salmon et al., SC 2011), of counters.

    `jax.extend.random.threefry2x32_p` gives the same words, and under a mesh is drawn where they lie, too. But on a CPU
    it is a loop (jax 0.10.2), and no fusion crosses it. `_drawn` of 4,096 x 4,096, compiled and called with the one or
    the other on a busy machine: 0.3 s of processor time instead of 0.1 s, three times its result in temporary memory
    instead of none, 0.6 to 0.8 s to compile instead of 0.1 to 0.2 s.
    """
    keys = (key0, key1, key0 ^ key1 ^ np.uint32(_PARITY))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for turn in range(5):
        for by in _ROTATIONS[turn % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(by)) | (x1 >> np.uint32(32 - by))) ^ x0
        x0 = x0 + keys[(turn + 1) % 3]
        x1 = x1 + keys[(turn + 2) % 3] + np.uint32(turn + 1)
    return x0, x1
