"""Attention by two matrix products and a softmax, on any device; the reference of the other kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flm_jax.kernels import ATTENDED
from flm_jax.sharding import constrain


def attention_mask(
    query_BT: jax.Array,
    key_BS: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    sliding_window: int | None = None,
) -> jax.Array:
    """The mask, (B, T, S) bool: a query sees keys up to its own position, in its own document, within the window."""
    causal = query_BT[:, :, None] >= key_BS[:, None, :]
    seen = causal & (query_segment_BT[:, :, None] == key_segment_BS[:, None, :])
    return seen if sliding_window is None else seen & (query_BT[:, :, None] - key_BS[:, None, :] < sliding_window)


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, *, width: float) -> jax.Array:
    """Masked attention, softmax(q k^T / sqrt(width)) v, (B, T, N, H); the mask is (B or 1, T, S)."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # The G = N / K queries of a key head are treated as queries at X = T G positions: one batched product for any G.
    q_BXKH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 3, 2).reshape(B, -1, K, H)
    mask_BXS = jnp.repeat(mask_BTS, N // K, axis=1)
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores_BKXS = jnp.einsum("BXKH,BSKH->BKXS", q_BXKH, k_BSKH, preferred_element_type=wide) * (width**-0.5)
    # Said aloud, because the partitioner would split scores of split windows in ways that it then cannot undo. Meshes
    # whose `tensor` does not divide the key heads are refused with the parameters, so none is gathered here.
    scores_BKXS = constrain(scores_BKXS, "batch", "kv_heads", "time", "history")
    scores_BKXS = jnp.where(mask_BXS[:, None], scores_BKXS, jnp.finfo(wide).min)
    weights_BKXS = jax.nn.softmax(scores_BKXS, axis=-1).astype(v_BSKH.dtype)
    o_BXKH = jnp.einsum("BKXS,BSKH->BXKH", weights_BKXS, v_BSKH)
    o_BXKH = constrain(o_BXKH, "batch", "time", "kv_heads", "head_dim")
    o_BTNH = jnp.moveaxis(o_BXKH.reshape(B, T, N // K, K, H), 2, 3).reshape(B, T, N, H)
    return checkpoint_name(o_BTNH, ATTENDED)
