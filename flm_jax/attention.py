"""Rotary positions, attention kernels behind one function, and the key-value cache.

The kernels: "plain" runs everywhere; "cudnn" on NVIDIA GPUs; "splash" on TPUs, where scores stay in the chip's fast
memory and blocks that are entirely in the future are skipped; "auto" is splash on TPUs if its blocks divide the window,
and plain otherwise.

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
from flm_jax.sharding import constrain, mesh_axes, spec

# The axes of the cache's arrays.
KEYS = ("layers", "batch", "kv_heads", "head_dim", "history")
VALUES = ("layers", "batch", "kv_heads", "history", "head_dim")


class Cache(NamedTuple):
    """The key-value cache: keys and values of the positions seen so far, in slots that all rows fill at the same time.

    Both products of attention read it in the order in which it lies, without a transposed copy. It is carried through
    the scan over layers, so that new entries are written in place.

    Attributes:
      key_LBKHS: rotated keys.
      value_LBKSH: values.
      length: () int32, how many of the S slots are filled.
      start_B: int32, the slot of each row's position 0; slots before it are padding. None: no row has padding.
    """

    key_LBKHS: jax.Array
    value_LBKSH: jax.Array
    length: jax.Array
    start_B: jax.Array | None = None


def empty_cache(cfg: ModelConfig, batch: int, slots: int, start_B: jax.Array | None = None) -> Cache:
    """An empty cache with so many slots, in the compute dtype."""
    shape = (cfg.layers, batch, cfg.k_heads)
    keys, values = (jnp.zeros((*shape, *rest), cfg.compute) for rest in ((cfg.h_dim, slots), (slots, cfg.h_dim)))
    return Cache(constrain(keys, *KEYS), constrain(values, *VALUES), jnp.zeros((), jnp.int32), start_B)


def append(cache: Cache, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Cache:
    """The cache with the keys and values of T more positions in one layer; `length` stays."""
    keys = jnp.transpose(k_BTKH, (0, 2, 3, 1))[None].astype(cache.key_LBKHS.dtype)
    values = jnp.transpose(v_BTKH, (0, 2, 1, 3))[None].astype(cache.value_LBKSH.dtype)
    zero = jnp.zeros((), jnp.int32)
    keys = jax.lax.dynamic_update_slice(cache.key_LBKHS, keys, (layer, zero, zero, zero, cache.length))
    values = jax.lax.dynamic_update_slice(cache.value_LBKSH, values, (layer, zero, zero, cache.length, zero))
    return cache._replace(key_LBKHS=constrain(keys, *KEYS), value_LBKSH=constrain(values, *VALUES))


def cached_mask(cache: Cache, slots_1T: jax.Array, sliding_window: int | None = None) -> jax.Array:
    """The mask, (B or 1, T, S) bool: the query in a slot sees slots up to its own, from its row's start on."""
    keys_1S = jnp.arange(cache.key_LBKHS.shape[-1], dtype=jnp.int32)[None]
    alike = jnp.zeros_like(slots_1T), jnp.zeros_like(keys_1S)
    mask_BTS = attention_mask(slots_1T, keys_1S, *alike, sliding_window)
    return mask_BTS if cache.start_B is None else mask_BTS & (keys_1S >= cache.start_B[:, None])[:, None]


def attend_cached(q_BTNH: jax.Array, cache: Cache, layer: jax.Array, mask_BTS: jax.Array, width: float) -> jax.Array:
    """Masked attention of queries (B, T, N, H) to one layer of the cache, (B, T, N, H); as `attend` computes it."""
    B, T, N, H = q_BTNH.shape
    k_BKHS, v_BKSH = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in cache[:2])
    K, S = k_BKHS.shape[1], k_BKHS.shape[3]
    # The G = N / K queries of a key head are X = G T rows of one product.
    q_BKXH = jnp.transpose(q_BTNH.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4)).reshape(B, K, -1, H)
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores_BKXS = jnp.einsum("BKXH,BKHS->BKXS", q_BKXH, k_BKHS, preferred_element_type=wide) * (width**-0.5)
    seen = jnp.broadcast_to(mask_BTS[:, None, None], (mask_BTS.shape[0], K, N // K, T, S)).reshape(-1, K, N // K * T, S)
    weights_BKXS = jax.nn.softmax(jnp.where(seen, scores_BKXS, jnp.finfo(wide).min), axis=-1).astype(v_BKSH.dtype)
    o_BKXH = jnp.einsum("BKXS,BKSH->BKXH", weights_BKXS, v_BKSH)
    return jnp.transpose(o_BKXH.reshape(B, K, N // K, T, H), (0, 3, 1, 2, 4)).reshape(B, T, N, H)


def rotary_frequencies(cfg: ModelConfig) -> jax.Array:
    """The rotary frequency of every pair of a head, (H/2,), in radians per position: theta^(-2i/width) (2104.09864).

    With `rope_scaling` (Llama 3.1, 2407.21783), a frequency f becomes k f + (1 - k) f / factor, where
    k = (turns - low) / (high - low), clipped to [0, 1], and turns are those of the pair over the original context.
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
    """The cosines and sines of RoPE (2104.09864), each (B, T, 1, H/2)."""
    wide = frequency_H.dtype
    angle_BT1H = positions_BT[:, :, None, None].astype(wide) * frequency_H[None, None, None]
    return jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Heads (B, T, N, H) with pairs (i, i + H/2) rotated: the half-split layout, as in Llama's released weights."""
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
    """The mask, (B, T, S) bool: a query sees keys up to its own position, in its own document, within the window."""
    causal = query_BT[:, :, None] >= key_BS[:, None, :]
    seen = causal & (query_segment_BT[:, :, None] == key_segment_BS[:, None, :])
    return seen if sliding_window is None else seen & (query_BT[:, :, None] - key_BS[:, None, :] < sliding_window)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    segments_BT: jax.Array,
    width: float,
    kernel: str,
    sliding_window: int | None = None,
) -> jax.Array:
    """Masked attention, softmax(q k^T / sqrt(width)) v; query head n reads key head n // (N / K).

    Args:
      q_BTNH: queries, rotated.
      k_BSKH: keys, rotated.
      v_BSKH: values.
      mask_BTS: bool, (B or 1, T, S).
      segments_BT: int32, (B or 1, T), document numbers; splash builds its mask from them: causal within a document.
      width: the head width in the scores' scale.
      kernel: "plain"; "cudnn" (`jax.nn.dot_product_attention` on NVIDIA GPUs, bf16 or fp16); "splash" (TPUs); "auto".
      sliding_window: how many positions a query sees, as in `mask_BTS`; splash builds its mask from it.

    Returns:
      (B, T, N, H), in the dtype of `v`.
    """
    plain = functools.partial(_plain, width=width)
    if kernel == "plain":
        return plain(q_BTNH, k_BSKH, v_BSKH, mask_BTS, segments_BT)
    splash_kernel = functools.partial(_splash, width=width, sliding_window=sliding_window)
    chosen = {"cudnn": functools.partial(_cudnn, width=width), "splash": splash_kernel}
    if kernel in chosen:
        return chosen[kernel](q_BTNH, k_BSKH, v_BSKH, mask_BTS, segments_BT)
    # "auto" never chooses cudnn: its function fails already at tracing where the library is missing.
    if splash_block(q_BTNH.shape[1]) is None:
        return plain(q_BTNH, k_BSKH, v_BSKH, mask_BTS, segments_BT)
    return jax.lax.platform_dependent(
        *(q_BTNH, k_BSKH, v_BSKH, mask_BTS, segments_BT), default=plain, tpu=chosen["splash"]
    )


def _plain(q_BTNH: Any, k_BSKH: Any, v_BSKH: Any, mask_BTS: Any, segments_BT: Any, *, width: float) -> jax.Array:
    del segments_BT
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # The G = N / K queries of a key head are treated as queries at X = G T positions: one batched product for any G.
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


# Possible block sizes of the splash kernel, in rows and columns of scores; the largest that divides the window is used.
SPLASH_BLOCKS = (1024, 512, 256, 128)
# The checkpoint name of the attention's output. With splash, the kernel's other residuals have this name too.
ATTENDED = "attended"


def splash_parts() -> dict[str, int]:
    """The number of devices of the current mesh that heads, and that positions, are split over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {"heads": 1, "time": 1}
    return {axis: math.prod(mesh.shape[name] for name in mesh_axes(axis)) for axis in ("heads", "time")}


def splash_block(length: int) -> int | None:
    """The largest block size that divides one device's part of a window of `length` positions; None if none does."""
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
    """JAX's Pallas splash attention for TPUs, on each device's rows, heads and query positions; keys are gathered.

    Raises:
      ValueError: a device's part of the window is not a multiple of 128 positions.
    """
    del mask_BTS
    B, T, N, _ = q_BTNH.shape
    # Imported here because it is experimental and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    mesh, parts = jax.sharding.get_abstract_mesh(), splash_parts()
    block = splash_block(T)
    if block is None:
        raise ValueError(
            f"attention='splash': each device has {T // parts['time']} of the window's {T} positions, and the kernel "
            f"works on blocks of {SPLASH_BLOCKS[-1]}; use a context that is a multiple of "
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
