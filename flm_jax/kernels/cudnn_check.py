"""Whether cuDNN's kernels compute on this machine's GPU what the plain kernel computes."""

from __future__ import annotations

import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.kernels import cudnn, plain

FORMS = ("causal", "packed", "bias")
# The largest difference, relative to the largest value, of an output or gradient in 16 bits from float32. It is a few
# thousandths if the kernel is right, and a large part of 1 if it takes a wrong mask or reads at a wrong place.
TOLERANCE = 0.03


def inputs(
    dtype: Any, head_dim: int, heads: int, kv_heads: int, rows: int = 2, length: int = 256, fewest: int = 2
) -> tuple[list[jax.Array], jax.Array]:
    """Random queries, keys, values and gradients of the output, and document numbers, (rows, length).

    The rows have `fewest`, `fewest` + 1, `fewest` + 2, `fewest`, ... documents of any lengths.
    """
    rng = np.random.default_rng(0)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    tensors = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        segments[row, rng.choice(np.arange(1, length), fewest - 1 + row % 3, replace=False)] = 1
    return tensors, jnp.asarray(np.cumsum(segments, axis=1), jnp.int32)


def differences(
    form: str, tensors: list[jax.Array], segments_BT: jax.Array, window: int | None = None, kernel: Any = None
) -> dict[str, float]:
    """Of the output and each gradient, the largest difference from plain float32 relative to the largest value.

    Args:
      form: one of `FORMS`.
      tensors: as of `inputs`.
      segments_BT: the documents; the form "causal" takes each row as one.
      window: the sliding window.
      kernel: what is called in the place of `cudnn.attend`, for tests.
    """
    width = float(tensors[0].shape[-1])
    segments = None if form == "causal" else segments_BT
    time_1T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None]
    of_plain = jnp.zeros_like(time_1T) if segments is None else segments

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        packed = cudnn.pack(segments_BT) if form == "packed" else None
        return (kernel or cudnn.attend)(q, k, v, segments, packed, width=width, sliding_window=window)

    def reference(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return plain.attend(q, k, v, plain.attention_mask(time_1T, time_1T, of_plain, of_plain, window), width=width)

    def all_of(attend: Any, *given: jax.Array) -> tuple[jax.Array, ...]:
        output, transpose = jax.vjp(attend, *given[:3])
        return output, *transpose(given[3])

    found = jax.jit(functools.partial(all_of, fused))(*tensors)
    with jax.default_matmul_precision("highest"):
        right = jax.jit(functools.partial(all_of, reference))(*(x.astype(jnp.float32) for x in tensors))
    relative = [
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(found, right, strict=True)
    ]
    return dict(zip(("output", "queries", "keys", "values"), relative, strict=True))


@functools.lru_cache(maxsize=64)
def agrees(form: str, dtype: str, head_dim: int, heads: int, kv_heads: int, windowed: bool) -> bool:
    """Whether a form of cuDNN's attention is right on this process's first GPU, for heads of this number and width.

    Compiled and computed once per process and kind of heads, in seconds. Without a GPU (a program is lowered for one
    that is elsewhere), true. A form that is wrong or fails is reported by a warning.
    """
    gpu = cudnn.device()
    if gpu is None:
        return True

    def check() -> str:
        with jax.default_device(gpu):
            found: list[tuple[str, float]] = []
            # With 1,024 tokens the packed form has two numbers of places, and each batch takes one of them.
            for fewest, length in [(1, 1024), (4, 1024)] if form == "packed" else [(2, 256)]:
                tensors, segments_BT = inputs(jnp.dtype(dtype), head_dim, heads, kv_heads, 2, length, fewest)
                found += differences(form, tensors, segments_BT, 100 if windowed else None).items()
        # Not-a-number is a difference too.
        return ", ".join(f"{name} by {value:.2g}" for name, value in found if not value <= TOLERANCE)

    # The model is being traced, perhaps for a mesh. A new thread has neither, and computes.
    with ThreadPoolExecutor(1) as thread:
        try:
            wrong = thread.submit(check).result()
        except Exception as error:  # whatever a kernel does that this GPU or cuDNN does not have
            wrong = f"it failed: {' '.join(str(error).split())[:300]}"
    if wrong:
        what = f"{heads} heads ({kv_heads} kv) of {head_dim} in {dtype}{', with a sliding window' if windowed else ''}"
        warnings.warn(
            f"cuDNN's attention is not used in the form {form!r} for {what}: it differs from the plain kernel on "
            f"{gpu.device_kind} ({wrong}).",
            stacklevel=2,
        )
    return not wrong
