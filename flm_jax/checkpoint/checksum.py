"""Checksums of arrays, computed on their own devices: of whole arrays, and of blocks that add up to them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of 32-bit words under which every output bit depends on every input bit.

    Source: the finalizer of MurmurHash3 (A. Appleby, public domain): xor with a right shift of itself and the
    product with an odd number are each invertible mod 2**32.
    """
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32 words of at least one dimension; 8-byte dtypes have a last dimension of 2."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    x = x.reshape((1,)) if x.ndim == 0 else x
    if x.dtype.itemsize >= 4:
        return lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = jnp.uint8 if x.dtype.itemsize == 1 else jnp.uint16
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _position(
    shape: tuple[int, ...], places: tuple[jax.Array, ...] = (), whole: tuple[int, ...] | None = None
) -> jax.Array:
    """A uint32 for every position; no two of one leading index share theirs (below 2**32 of them).

    The leading index is mixed, not multiplied by its stride: strides of stacked layers are multiples of large
    powers of two, and a plain linear index mod 2**32 would give layer 0 and layer 32 the same numbers.
    """

    def index(axis: int) -> jax.Array:
        if axis < len(places):
            along = tuple(-1 if i == axis else 1 for i in range(len(shape)))
            return jnp.broadcast_to(places[axis].reshape(along), shape)
        return lax.broadcasted_iota(jnp.uint32, shape, axis)

    position = _mix(index(0))
    stride = 1
    for axis in range(len(shape) - 1, 0, -1):
        position = position + index(axis) * np.uint32(stride % 2**32)
        stride *= (whole or shape)[axis]
    return position


def _lanes(
    x: jax.Array,
    places: tuple[jax.Array, ...] = (),
    counts: jax.Array | None = None,
    whole: tuple[int, ...] | None = None,
) -> jax.Array:
    words = _words(x)
    # Eight-byte dtypes have an axis more as words.
    position = _position(words.shape, places, None if whole is None else (*whole, *words.shape[len(whole) :]))
    first = _mix(words ^ (position * np.uint32(0x9E3779B1)))
    second = _mix(first + position)
    if counts is not None:
        along = tuple(-1 if i == len(places) - 1 else 1 for i in range(words.ndim))
        first, second = (jnp.where(counts.reshape(along), lane, np.uint32(0)) for lane in (first, second))
    # Both in one pass: each sum by itself would compute the words anew, and slowly.
    zero, every = np.uint32(0), tuple(range(words.ndim))
    return jnp.stack(lax.reduce((first, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), every))


@functools.lru_cache(maxsize=64)
def _jitted(replicated: NamedSharding | None) -> Any:
    # Every process must be able to read the two words, so on a mesh they are asked for on every device.
    return jax.jit(_lanes) if replicated is None else jax.jit(_lanes, out_shardings=replicated)


def of(x: jax.Array) -> jax.Array:
    """Starts the checksum of one array, on its own devices, without gathering it.

    With m the bijection `_mix`, w_i the i-th word of the array's bits, p_i a number made from the position i,
    and c odd:

        a_i = m(w_i xor c p_i),  b_i = m(a_i + p_i),  checksum = (sum_i a_i, sum_i b_i) mod 2**32.

    A change inside one word, so a single flipped bit, is always seen, by both lanes: with the other words as
    they were, w -> w xor c p_i, m, and a -> a + p_i are bijections of the 32-bit words, so a_i and b_i each
    become another number below 2**32, and a sum changes by a difference of two such numbers, which is not 0
    mod 2**32. The widening of 8- and 16-bit dtypes is injective. Several changed words go unseen with
    probability of about 2**-64, as a_i and b_i are pseudorandom in w_i. (A weighted sum of the words
    themselves would be weaker: with odd weights the difference that two flipped sign bits make is 2**31 (u +
    v), u + v even, which is always 0.)

    The sums are of integers that wrap, so neither their order nor the sharding matters. The function is
    compiled once for each shape, dtype and sharding: a parameter and its moments share one program, and so do
    a save and a restore.

    Args:
      x: an array of any shape, of a dtype whose bits are whole bytes.

    Returns:
      uint32[2], not waited for; `digests` makes text of it.
    """
    sharding = x.sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return _jitted(replicated)(x)


_jitted_part = jax.jit(_lanes, static_argnames="whole")


def of_block(
    x: jax.Array, places: tuple[Any, ...], counts: Any = None, whole: tuple[int, ...] | None = None
) -> jax.Array:
    """Starts the checksum of a block of an array: those of blocks that make it up add up to that of the whole.

    Args:
      x: the block.
      places: for its first axes, uint32 vectors: the index in the whole array of every entry along the axis; it is
        whole along the others.
      counts: bool, along the last of these axes: entries that are left out, as another block has them; None: none.
      whole: shape of the whole array, where the block is not whole along an axis after its second.

    Returns:
      uint32[2], not waited for; see `add`.
    """
    return _jitted_part(x, places, counts, whole=whole)


def add(total: tuple[int, int], lanes: Any) -> tuple[int, int]:
    """A sum of checksums of blocks, and one more; `digest` makes text of it."""
    return (total[0] + int(lanes[0])) % 2**32, (total[1] + int(lanes[1])) % 2**32


def digest(total: Any) -> str:
    """Writes a checksum as 16 hexadecimal digits."""
    return f"{int(total[0]):08x}{int(total[1]):08x}"


def digests(lanes: Mapping[str, jax.Array]) -> dict[str, str]:
    """Waits for checksums, one transfer for all of them, and writes each as 16 hexadecimal digits."""
    values = jax.device_get(dict(lanes))
    return {path: digest(value) for path, value in values.items()}
