"""Attention in blocks of queries, for CPUs: positions after a block are not computed, and weights are not kept.

The same function as `flm_jax.kernels.plain`, for windows of at least two blocks. The backward pass computes the
weights again from the logarithms of their sums (2205.14135, algorithm 4): between the passes, memory grows with T
instead of T^2. Within a pass the scores of a block are at most an eighth of all, or those of 64 queries. Every block
is a part of the program, which compiles in seconds more.

B batch, K key heads, G query heads per key head, T query positions, t those of a block, S key positions, H head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flm_jax.kernels import ATTENDED
from flm_jax.kernels.products import backward_dtype

# The rows of a block: fewer make small products, more compute more of the future and leave the cache.
ROWS = 64
# Every block is a part of the program, so long windows get longer blocks.
MOST_BLOCKS = 8


def blocks(length: int) -> list[tuple[int, int]]:
    """The first position of each block of queries, and the first one after it."""
    rows = max(ROWS, -(-length // MOST_BLOCKS))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, *, width: float) -> jax.Array:
    """Masked attention, softmax(q k^T / sqrt(width)) v, (B, T, N, H); the mask, (B or 1, T, S), is causal."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = jnp.transpose(q_BTNH.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4))
    k_BKSH, v_BKSH = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k_BSKH, v_BSKH))
    o_BKGTH = _attend(width**-0.5, q_BKGTH, k_BKSH, v_BKSH, mask_BTS)
    return jnp.transpose(o_BKGTH, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q_BKGTH: Any, k_BKSH: Any, v_BKSH: Any, mask_BTS: Any) -> jax.Array:
    return _forward(scale, q_BKGTH, k_BKSH, v_BKSH, mask_BTS)[0]


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product of activations, in at least float32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _scores(scale: float, q_BKGtH: jax.Array, k_BKSH: jax.Array, mask_BtS: jax.Array) -> jax.Array:
    """The scores of a block of queries, masked, in at least float32."""
    scores_BKGtS = _product("BKGtH,BKSH->BKGtS", q_BKGtH, k_BKSH) * scale
    return jnp.where(mask_BtS[:, None, None], scores_BKGtS, jnp.finfo(scores_BKGtS.dtype).min)


def _forward(scale: float, q_BKGTH: Any, k_BKSH: Any, v_BKSH: Any, mask_BTS: Any) -> tuple[jax.Array, Any]:
    """The output, and what the backward pass needs: the inputs, the output, and the logarithm of each row's sum."""
    outputs, logs = [], []
    for start, end in blocks(q_BKGTH.shape[3]):
        scores_BKGtS = _scores(scale, q_BKGTH[..., start:end, :], k_BKSH[:, :, :end], mask_BTS[:, start:end, :end])
        top_BKGt1 = jnp.max(scores_BKGtS, axis=-1, keepdims=True)
        weights_BKGtS = jnp.exp(scores_BKGtS - top_BKGt1)
        sum_BKGt1 = jnp.sum(weights_BKGtS, axis=-1, keepdims=True)
        o_BKGtH = _product("BKGtS,BKSH->BKGtH", weights_BKGtS.astype(v_BKSH.dtype), v_BKSH[:, :, :end]) / sum_BKGt1
        outputs.append(o_BKGtH.astype(v_BKSH.dtype))
        logs.append(top_BKGt1 + jnp.log(sum_BKGt1))
    o_BKGTH = checkpoint_name(jnp.concatenate(outputs, axis=3), ATTENDED)
    log_BKGT1 = checkpoint_name(jnp.concatenate(logs, axis=3), ATTENDED)
    return o_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, mask_BTS, o_BKGTH, log_BKGT1)


def _backward(scale: float, kept: Any, do_BKGTH: jax.Array) -> tuple[Any, Any, Any, None]:
    """The gradients of queries, keys and values, and none of the mask."""
    q_BKGTH, k_BKSH, v_BKSH, mask_BTS, o_BKGTH, log_BKGT1 = kept
    wide = log_BKGT1.dtype
    narrow = backward_dtype(q_BKGTH.dtype, wide)
    # What the softmax's derivative subtracts, the sum of weights times their gradients, is also that of o times do.
    # As a product of vectors: CPUs would sum the products ten times as slowly.
    mean_BKGT1 = _product("BKGTH,BKGTH->BKGT", do_BKGTH.astype(wide), o_BKGTH.astype(wide))[..., None]
    dq: list[jax.Array] = []
    # The last block has all keys, so its gradients are what those of the others are added to. Keys come last: a product
    # that contracts queries has the smaller operand on the left, which CPUs transpose.
    dk_BKHS: Any = None
    dv_BKHS: Any = None
    for start, end in reversed(blocks(q_BKGTH.shape[3])):
        rows = (..., slice(start, end), slice(None))
        q_BKGtH, do_BKGtH, k_BKsH, v_BKsH = q_BKGTH[rows], do_BKGTH[rows], k_BKSH[:, :, :end], v_BKSH[:, :, :end]
        weights_BKGts = jnp.exp(_scores(scale, q_BKGtH, k_BKsH, mask_BTS[:, start:end, :end]) - log_BKGT1[rows])
        dweights_BKGts = _product("BKGtH,BKsH->BKGts", do_BKGtH, v_BKsH)
        dscores_BKGts = (weights_BKGts * (dweights_BKGts - mean_BKGT1[rows]) * scale).astype(narrow)
        dq.insert(0, _product("BKGts,BKsH->BKGtH", dscores_BKGts, k_BKsH).astype(q_BKGTH.dtype))
        dk_BKHs = _product("BKGtH,BKGts->BKHs", q_BKGtH, dscores_BKGts)
        dv_BKHs = _product("BKGtH,BKGts->BKHs", do_BKGtH, weights_BKGts.astype(do_BKGTH.dtype))
        dk_BKHS = dk_BKHs if dk_BKHS is None else dk_BKHS.at[..., :end].add(dk_BKHs)
        dv_BKHS = dv_BKHs if dv_BKHS is None else dv_BKHS.at[..., :end].add(dv_BKHs)
    dk_BKSH, dv_BKSH = jnp.swapaxes(dk_BKHS, -1, -2), jnp.swapaxes(dv_BKHS, -1, -2)
    return jnp.concatenate(dq, axis=3), dk_BKSH.astype(k_BKSH.dtype), dv_BKSH.astype(v_BKSH.dtype), None


_attend.defvjp(_forward, _backward)
