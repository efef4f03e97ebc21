"""Operations on blocks of parameters that import and export share: casts, checksums, a bounded thread pool."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from flm_jax.checkpoint import checksum
from flm_jax.convert.layout import Part
from flm_jax.records import meant

DTYPES = ("float32", "bfloat16", "float16")
# Blocks that are read, transposed and written at the same time.
WORKERS = 2


def check_dtype(name: str) -> str:
    """`name`, if it is one of `DTYPES`.

    Raises:
      ValueError: it is not.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: use one of {', '.join(DTYPES)}{meant(name, DTYPES) or '.'}")
    return name


# The bits of the exponent: all of them are 1 where a value is NaN or infinite.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0 << 48}


def check_finite(values: np.ndarray, name: str, file: Any) -> None:
    """Checks that no weight is NaN or infinite, since a model with such a weight computes nothing else.

    Args:
      values: the weights, of a floating-point dtype of 16 bits or more.
      name: of the tensor that they belong to.
      file: where they come from.

    Raises:
      ValueError: one is; the message names the tensor and the file.
    """
    exponent = _EXPONENTS[values.dtype.name]
    # On the bits, since NumPy has no fast test for bfloat16.
    bits = values.view(f"u{values.dtype.itemsize}")
    if count := int(np.count_nonzero((bits & bits.dtype.type(exponent)) == exponent)):
        raise ValueError(
            f"{file}: {name} has weights that are NaN or infinite, {count} of {values.size} that were read."
        )


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`values` in another dtype; `name` is for error messages.

    Raises:
      ValueError: a finite value is too large for float16.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        found = values.astype(dtype)
    if dtype == np.float16 and not np.isfinite(found).all():  # the values themselves are finite, see `check_finite`
        raise ValueError(f"{name} has weights above 65504, the largest float16; use bfloat16 or float32.")
    return found


def block_checksum(part: Part, block: np.ndarray, lead: tuple[int, ...], first: int, start: int) -> np.ndarray:
    """The checksum of a block of a parameter, uint32[2]; the sum over all blocks is the parameter's checksum.

    Args:
      part: the parameter.
      block: in the layout of our checkpoints, whole along all dimensions except the first and `part.dim`.
      lead: its layer, as the first index of the array.
      first: index of its first entry along the first dimension; 0 if that is `part.dim`.
      start: index of its first entry along `part.dim`.
    """
    places = [np.arange(size) for size in block.shape[: part.dim + 1]]
    places[0] += first
    places[-1] += start
    where = tuple(np.asarray(place, np.uint32) for place in (*([lead] if lead else []), *places))
    return np.asarray(checksum.of_block(jnp.asarray(block[None] if lead else block), where, whole=part.whole))


def in_parallel(function: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[Any]:
    """The results of `function` on each item, in order, from `WORKERS` threads; at most `WORKERS + 1` are pending."""
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        pending: collections.deque[Any] = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > WORKERS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
