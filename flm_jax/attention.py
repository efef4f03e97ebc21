"""Rotary positions and attention: kernels behind one function, and the key-value cache.

The kernels: "plain" everywhere; "cudnn" on NVIDIA GPUs; "splash" on TPUs, where scores never leave the chip's fast
memory and blocks that lie wholly in the future are skipped; "auto" is splash on TPUs where it
can cut the window up, and plain elsewhere.

B batch, T query positions, S key positions, N query heads, K key heads, H head width.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from flm_jax.config import ModelConfig
from flm_jax.sharding import mesh_axes, spec


class Cache(NamedTuple):
    """Keys and values of the positions seen so far.

    Attributes:
      key_LBSKH: rotated keys, one slice a layer.
      value_LBSKH: values.
      length: () int32, how many of the S positions are filled.
      start_B: int32, the first position of each row that is not padding; None: every row begins at 0.
    """

    key_LBSKH: jax.Array
    value_LBSKH: jax.Array
    length: jax.Array
    start_B: jax.Array | None = None


def rotary_frequencies(cfg: ModelConfig) -> jax.Array:
    """Radians a position of every pair of a head, (H/2,): theta^(-2i/width) (2104.09864), scaled if the model says so.

    Of the scaling (Llama 3.1, 2407.21783): with t the turns of a pair over the original context, it keeps the share
    (t - low) / (high - low), between 0 and 1, of its frequency, and of the rest 1 / factor.
    """
    wide = jnp.promote_types(cfg.compute, jnp.float32)
    frequency_H = cfg.rope_theta ** (-jnp.arange(0, cfg.h_dim, 2, dtype=wide) / cfg.effective_head_width)
    if cfg.rope_scaling is None:
        return frequency_H
    s = cfg.rope_scaling
    turns_H = frequency_H * (s.original_context / (2 * math.pi))
    kept_H = jnp.clip((turns_H - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return frequency_H * kept_H + frequency_H / s.factor * (1 - kept_H)


def rotary_tables(positions_BT: jax.Array, frequency_H: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, (B, T, 1, H/2), of RoPE (2104.09864)."""
    wide = frequency_H.dtype
    angle_BT1H = positions_BT[:, :, None, None].astype(wide) * frequency_H[None, None, None]
    return jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pair (i, i + H/2) of every head: the half-split layout, as in Llama's released weights."""
    cos, sin = tables
    first, second = jnp.split(x_BTNH.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def attention_mask(
    query_BT: jax.Array,
    key_BS: jax.Array,
    query_segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    sliding_window: int | None = None,
) -> jax.Array:
    """(B, T, S) bool: a query sees keys at its own position or before, in its own document and within the window."""
    causal = query_BT[:, :, None] >= key_BS[:, None, :]
    seen = causal & (query_segment_BT[:, :, None] == key_segment_BS[:, None, :])
    return seen if sliding_window is None else seen & (query_BT[:, :, None] - key_BS[:, None, :] < sliding_window)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    segments_BT: jax.Array | None,
    width: float,
    kernel: str,
    sliding_window: int | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(width)) v, masked; query head n reads key head n // (N / K).

    Args:
      q_BTNH: queries, rotated.
      k_BSKH: keys, rotated.
      v_BSKH: values.
      mask_BTS: bool, (B or 1, T, S).
      segments_BT: int32, (B or 1, T), where the mask is that of whole rows: causal within equal numbers. None: keys
        are from a cache, and every kernel is the plain one.
      width: of a head, as the scores' scale takes it.
      kernel: "plain"; "cudnn" (`jax.nn.dot_product_attention` on NVIDIA GPUs, bf16 or fp16); "splash" (TPUs); "auto".
      sliding_window: how many positions a query sees, as in the mask; splash makes its own of it.

    Returns:
      (B, T, N, H), in the dtype of `v`.
    """
    plain = functools.partial(_plain, width=width)
    if kernel == "plain" or segments_BT is None:
        return plain(q_BTNH, k_BSKH, v_BSKH, mask_BTS, segments_BT)
    splash_kernel = functools.partial(_splash, width=width, sliding_window=sliding_window)
    chosen = {"cudnn": functools.partial(_cudnn, width=width), "splash": splash_kernel}
    if kernel in chosen:
        return chosen[kernel](q_BTNH, k_BSKH, v_BSKH, mask_BTS, segments_BT)
    # cudnn's function asks for the library already when it is traced, so it has to be asked for by name.
    if splash_block(q_BTNH.shape[1]) is None:
        return plain(q_BTNH, k_BSKH, v_BSKH, mask_BTS, segments_BT)
    return jax.lax.platform_dependent(
        *(q_BTNH, k_BSKH, v_BSKH, mask_BTS, segments_BT), default=plain, tpu=chosen["splash"]
    )


def _plain(q_BTNH: Any, k_BSKH: Any, v_BSKH: Any, mask_BTS: Any, segments_BT: Any, *, width: float) -> jax.Array:
    del segments_BT
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
    o_BTNH = jnp.moveaxis(o_BXKH.reshape(B, N // K, T, K, H), 1, 3).reshape(B, T, N, H)
    return checkpoint_name(o_BTNH, ATTENDED)


def _cudnn(q_BTNH: Any, k_BSKH: Any, v_BSKH: Any, mask_BTS: Any, segments_BT: Any, *, width: float) -> jax.Array:
    del segments_BT
    mask_BNTS = jnp.broadcast_to(mask_BTS, (q_BTNH.shape[0], *mask_BTS.shape[1:]))[:, None]
    o_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BNTS, scale=width**-0.5, implementation="cudnn"
    )
    return checkpoint_name(o_BTNH, ATTENDED)


# Rows and columns of scores that the kernel holds at once: the largest that divide the window.
SPLASH_BLOCKS = (1024, 512, 256, 128)
# The attention's output, by the name that a checkpoint policy may keep it under; with what its backward pass needs
# besides, where the kernel is splash.
ATTENDED = "attended"


def splash_parts() -> dict[str, int]:
    """Over how many devices of the current mesh heads and positions are split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {"heads": 1, "time": 1}
    return {axis: math.prod(mesh.shape[name] for name in mesh_axes(axis)) for axis in ("heads", "time")}


def splash_block(length: int) -> int | None:
    """The largest block that divides a device's share of a window of so many positions."""
    share, left = divmod(length, splash_parts()["time"])
    return None if left else next((size for size in SPLASH_BLOCKS if share % size == 0), None)


def _splash(
    q_BTNH: Any,
    k_BSKH: Any,
    v_BSKH: Any,
    mask_BTS: Any,
    segments_BT: Any,
    *,
    width: float,
    sliding_window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas kernel for TPUs, on every device's own rows, heads and query positions; keys come whole.

    Raises:
      ValueError: a device's share of the window is no multiple of 128 positions.
    """
    del mask_BTS
    B, T, N, _ = q_BTNH.shape
    # Imported here: experimental, and nothing but a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    mesh, parts = jax.sharding.get_abstract_mesh(), splash_parts()
    block = splash_block(T)
    if block is None:
        raise ValueError(
            f"attention='splash': each device has {T // parts['time']} of the window's {T} positions, and the kernel "
            f"works on blocks of {SPLASH_BLOCKS[-1]}; take a context that is a multiple of "
            f"{SPLASH_BLOCKS[-1] * parts['time']}, or attention='plain'."
        )
    columns = max(size for size in SPLASH_BLOCKS if T % size == 0)
    mask: splash_attention_mask.Mask = splash_attention_mask.CausalMask((T, T), shard_count=parts["time"])
    if sliding_window is not None:
        mask = splash_attention_mask.LocalMask((T, T), (sliding_window - 1, 0), offset=0, shard_count=parts["time"])
    kernel = splash.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=columns,
            block_kv_compute=min(columns, 512),
            block_q_dkv=block,
            block_kv_dkv=columns,
            block_kv_dkv_compute=min(columns, 512),
            block_q_dq=block,
            block_kv_dq=columns,
        ),
        head_shards=parts["heads"],
        q_seq_shards=parts["time"],
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, of_q: jax.Array, of_k: jax.Array) -> jax.Array:
        heads_first = [jnp.swapaxes(x, 1, 2) for x in (q * jnp.asarray(width**-0.5, q.dtype), k, v)]
        return jnp.swapaxes(jax.vmap(kernel)(*heads_first, splash.SegmentIds(of_q, of_k)), 1, 2)

    segments_BT = jnp.broadcast_to(segments_BT, (B, T))
    arguments = (q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT)
    if mesh.empty:
        return local(kernel, *arguments)
    here = spec(("batch", "time", "heads", "head_dim"))
    whole = PartitionSpec(here[0], None, here[2], None)
    split_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(here[2], here[1])))
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split_kernel, here, whole, whole, PartitionSpec(here[0], here[1]), PartitionSpec(here[0], None)),
        out_specs=here,
        check_vma=False,
    )(kernel, *arguments)
