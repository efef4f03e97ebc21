"""What both directions do with pieces of parameters: cast them, add up their checksums, work on a few at a time."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from flm_jax.checkpoint import checksum
from flm_jax.convert.layout import Part

DTYPES = ("float32", "bfloat16", "float16")
# Pieces that are read, turned and written at the same time.
WORKERS = 2


def check_dtype(name: str) -> str:
    """A dtype that weights may have.

    Raises:
      ValueError: it is another.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: use one of {', '.join(DTYPES)}.")
    return name


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Values in another dtype.

    Raises:
      ValueError: one is finite, and too large for it.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        found = values.astype(dtype)
    if dtype == np.float16 and not np.array_equal(np.isfinite(found), np.isfinite(values)):
        raise ValueError(f"{name} has weights beyond what float16 holds, 65504; take bfloat16 or float32.")
    return found


def block_checksum(part: Part, block: np.ndarray, lead: tuple[int, ...], first: int, start: int) -> np.ndarray:
    """The checksum of a block of a parameter, uint32[2]: those of all blocks add up to the parameter's.

    Args:
      part: the parameter.
      block: as it lies here, whole along all dimensions but the first and `part.dim`.
      lead: its layer.
      first: where it begins along the first dimension; 0 where that is `part.dim`.
      start: where it begins along `part.dim`.
    """
    places = [np.arange(size) for size in block.shape[: part.dim + 1]]
    places[0] += first
    places[-1] += start
    where = tuple(np.asarray(place, np.uint32) for place in (*([lead] if lead else []), *places))
    return np.asarray(checksum.of_block(jnp.asarray(block[None] if lead else block), where, whole=part.whole))


def in_parallel(function: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[Any]:
    """Results in order, of a few calls at a time: no more of them are held than are worked on."""
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
