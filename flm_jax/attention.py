"""Rotary positions and attention: kernels behind one function, and the key-value cache.

B batch, T query positions, S key positions, N query heads, K key heads, H head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values of the positions seen so far.

    Attributes:
      key_LBSKH: rotated keys, one slice a layer.
      value_LBSKH: values.
      length: () int32, how many of the S positions are filled.
    """

    key_LBSKH: jax.Array
    value_LBSKH: jax.Array
    length: jax.Array


def rotary_tables(
    positions_BT: jax.Array, head_dim: int, width: float, theta: float, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, (B, T, 1, H/2), of RoPE (2104.09864) with frequencies theta^(-2i/width)."""
    wide = jnp.promote_types(dtype, jnp.float32)
    frequency_H = theta ** (-jnp.arange(0, head_dim, 2, dtype=wide) / width)
    angle_BT1H = positions_BT[:, :, None, None].astype(wide) * frequency_H[None, None, None]
    return jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pair (i, i + H/2) of every head: the half-split layout, as in Llama's released weights."""
    cos, sin = tables
    first, second = jnp.split(x_BTNH.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def attention_mask(
    query_BT: jax.Array, key_BS: jax.Array, query_segment_BT: jax.Array, key_segment_BS: jax.Array
) -> jax.Array:
    """(B, T, S) bool: a query sees keys at its own position or before, in its own document."""
    causal = query_BT[:, :, None] >= key_BS[:, None, :]
    same = query_segment_BT[:, :, None] == key_segment_BS[:, None, :]
    return causal & same


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, width: float, kernel: str
) -> jax.Array:
    """softmax(q k^T / sqrt(width)) v, masked; query head n reads key head n // (N / K).

    Args:
      q_BTNH: queries, rotated.
      k_BSKH: keys, rotated.
      v_BSKH: values.
      mask_BTS: bool, (B or 1, T, S).
      width: of a head, as the scores' scale takes it.
      kernel: "plain", or "cudnn" (`jax.nn.dot_product_attention` on NVIDIA GPUs, bf16 or fp16).

    Returns:
      (B, T, N, H), in the dtype of `v`.
    """
    if kernel == "cudnn":
        mask_BNTS = jnp.broadcast_to(mask_BTS, (q_BTNH.shape[0], *mask_BTS.shape[1:]))[:, None]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask_BNTS, scale=width**-0.5, implementation="cudnn"
        )
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # The queries of a key head are queries at more positions, X = G T: one batched product, whatever the grouping.
    q_BXKH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 3, 1).reshape(B, -1, K, H)
    mask_BXS = jnp.tile(mask_BTS, (1, N // K, 1))
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores_BKXS = jnp.einsum("BXKH,BSKH->BKXS", q_BXKH, k_BSKH, preferred_element_type=wide) * (width**-0.5)
    scores_BKXS = jnp.where(mask_BXS[:, None], scores_BKXS, jnp.finfo(wide).min)
    weights_BKXS = jax.nn.softmax(scores_BKXS, axis=-1).astype(v_BSKH.dtype)
    o_BXKH = jnp.einsum("BKXS,BSKH->BXKH", weights_BKXS, v_BSKH)
    return jnp.moveaxis(o_BXKH.reshape(B, N // K, T, K, H), 1, 3).reshape(B, T, N, H)
