"""Rotary positions, the choice between attention kernels, and the key-value cache.

The kernels (`flm_jax/kernels/`): "plain" runs everywhere, on CPUs in blocks of queries if windows are long; "cudnn" on
NVIDIA GPUs; "splash" on TPUs. "auto" is splash on TPUs if its blocks divide the window, cuDNN on NVIDIA GPUs if it can
compute what is asked and agrees there with the plain kernel, and plain otherwise.

B batch, T query positions, S key positions, N query heads, K key heads, H head width.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flm_jax.config import ModelConfig
from flm_jax.kernels import blocked, cudnn, cudnn_check, plain, splash
from flm_jax.kernels.plain import attention_mask
from flm_jax.sharding import constrain, mesh_axes, platform

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


class Seen(NamedTuple):
    """What the queries of a window see, in the form that the chosen kernel reads.

    Attributes:
      mask_BTS: bool, (B or 1, T, S); None if the kernel is cuDNN's, which makes its own.
      segments_BT: int32, (B, T), document numbers; None: each row is one document.
      packed: where the documents lie, if cuDNN is told.
    """

    mask_BTS: jax.Array | None
    segments_BT: jax.Array | None = None
    packed: cudnn.Packed | None = None


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


def attend_cached(q_BTNH: jax.Array, cache: Cache, layer: jax.Array, seen: Seen, width: float) -> jax.Array:
    """Masked attention of queries (B, T, N, H) to one layer of the cache, (B, T, N, H); as `attend` computes it."""
    mask_BTS = seen.mask_BTS  # that of `cached_mask`
    assert mask_BTS is not None
    B, T, N, H = q_BTNH.shape
    k_BKHS, v_BKSH = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in cache[:2])
    K, S = k_BKHS.shape[1], k_BKHS.shape[3]
    # The G = N / K queries of a key head are X = G T rows of one product.
    q_BKXH = jnp.transpose(q_BTNH.reshape(B, T, K, N // K, H), (0, 2, 3, 1, 4)).reshape(B, K, -1, H)
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scores_BKXS = jnp.einsum("BKXH,BKHS->BKXS", q_BKXH, k_BKHS, preferred_element_type=wide) * (width**-0.5)
    mask = jnp.broadcast_to(mask_BTS[:, None, None], (mask_BTS.shape[0], K, N // K, T, S)).reshape(-1, K, N // K * T, S)
    weights_BKXS = jax.nn.softmax(jnp.where(mask, scores_BKXS, jnp.finfo(wide).min), axis=-1).astype(v_BKSH.dtype)
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


def see(cfg: ModelConfig, shape: tuple[int, ...], segments_BT: jax.Array | None) -> Seen:
    """What the queries of windows see: positions up to their own, in their document, within the sliding window.

    Args:
      cfg: the model; its `attention` is the kernel that is asked for.
      shape: (B, T).
      segments_BT: int32, equal within a document, and documents are contiguous; None: one document per row.

    Raises:
      ValueError: `attention` is "cudnn", and it cannot compute this; the message says what can.
    """
    rows, length = shape
    form = cudnn_form(cfg, rows, length, segments_BT is not None)
    if form is not None:
        return Seen(
            None, segments_BT, cudnn.pack(segments_BT) if form == "packed" and segments_BT is not None else None
        )
    time_1T = jnp.arange(length, dtype=jnp.int32)[None]
    segments = jnp.zeros_like(time_1T) if segments_BT is None else segments_BT
    return Seen(attention_mask(time_1T, time_1T, segments, segments, cfg.sliding_window), segments)


def check(cfg: ModelConfig, rows: int, length: int) -> None:
    """Checks that the kernel that a model asks for can train on windows of `length` positions on the current mesh.

    Raises:
      ValueError: it cannot; the message says what can.
    """
    if cfg.attention == "splash" and platform() != "tpu":
        raise ValueError(
            f"attention='splash': it needs TPUs, and the devices here are of the platform {platform()!r}; use "
            "attention='auto', or 'plain'."
        )
    if cfg.attention == "splash" and splash.block_size(length) is None:
        raise ValueError(splash.refusal(length))
    cudnn_form(cfg, rows, length, documents=True)


def cudnn_form(cfg: ModelConfig, rows: int, length: int, documents: bool) -> str | None:
    """The form of cuDNN's attention that windows of a model take (see `kernels/cudnn.py`); None: another kernel.

    Raises:
      ValueError: as for `see`.
    """
    if cfg.attention not in ("cudnn", "auto") or (cfg.attention == "auto" and platform() != "gpu"):
        return None
    mesh, capability = jax.sharding.get_abstract_mesh(), cudnn.capability()
    reason = cudnn.refusal(cfg.compute, cfg.h_dim, capability)
    if not mesh.empty and math.prod(mesh.shape[name] for name in mesh_axes("time")) > 1:
        reason = "it needs whole windows on each device, and MeshConfig.sequence splits them"
    if length % cudnn.BLOCK:
        reason = reason or f"it needs windows of a multiple of {cudnn.BLOCK} positions, not {length}"
    if platform() != "gpu":
        reason = f"it needs NVIDIA GPUs, and the devices here are of the platform {platform()!r}"
    if cfg.attention == "cudnn" and reason:
        raise ValueError(f"attention='cudnn': {reason}; use attention='auto', or 'plain'.")
    # A program lowered on a machine without GPUs gets cuDNN's attention only if it asks for it by name.
    if cfg.attention == "auto" and (reason or cudnn.device() is None):
        return None
    windowed = cfg.sliding_window is not None and cfg.sliding_window < length
    heads = cfg.heads // math.gcd(cfg.heads, cfg.k_heads), cfg.k_heads // math.gcd(cfg.heads, cfg.k_heads)
    agrees = functools.partial(cudnn_check.agrees, dtype=str(cfg.compute), head_dim=cfg.h_dim, windowed=windowed)
    form = "causal"
    if documents:
        # Places are int32 and count elements; JAX documents the packed layout for Hopper and later.
        local = (
            rows // max(1, math.prod(mesh.shape[name] for name in cudnn.batch_axes(rows))) if not mesh.empty else rows
        )
        holds = capability >= (9, 0) and (local + 1) * length * cfg.heads * cfg.h_dim < 2**31
        form = "packed" if holds and agrees("packed", heads=heads[0], kv_heads=heads[1]) else "bias"
    right = agrees("bias" if documents else "causal", heads=heads[0], kv_heads=heads[1])
    if not right and cfg.attention == "cudnn":
        raise ValueError("attention='cudnn': it is wrong on this GPU (see the warning); use attention='plain'.")
    return form if right else None


def in_blocks(length: int) -> bool:
    """Whether the plain kernel works in blocks of queries: on CPUs, if windows are long and whole on each device."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or math.prod(mesh.shape[name] for name in mesh_axes("time")) == 1
    return whole and length >= 2 * blocked.ROWS and platform() == "cpu"


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    seen: Seen,
    width: float,
    kernel: str,
    sliding_window: int | None = None,
) -> jax.Array:
    """Masked attention, softmax(q k^T / sqrt(width)) v; query head n reads key head n // (N / K).

    Args:
      q_BTNH: queries, rotated.
      k_BSKH: keys, rotated.
      v_BSKH: values.
      seen: what queries see (`see`).
      width: the head width in the scores' scale.
      kernel: "plain", "cudnn", "splash" or "auto".
      sliding_window: how many positions a query sees, as in `seen`; the fused kernels make their masks from it.

    Returns:
      (B, T, N, H), in the dtype of `v`.
    """
    if seen.mask_BTS is None:
        return cudnn.attend(
            q_BTNH, k_BSKH, v_BSKH, seen.segments_BT, seen.packed, width=width, sliding_window=sliding_window
        )
    assert seen.segments_BT is not None
    arguments = (q_BTNH, k_BSKH, v_BSKH, seen.mask_BTS, seen.segments_BT)

    def by_plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, segments: jax.Array) -> jax.Array:
        del segments
        return (blocked if in_blocks(q.shape[1]) else plain).attend(q, k, v, mask, width=width)

    def by_splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, segments: jax.Array) -> jax.Array:
        del mask
        return splash.attend(q, k, v, segments, width=width, sliding_window=sliding_window)

    if kernel == "splash":
        return by_splash(*arguments)
    if kernel == "plain" or splash.block_size(q_BTNH.shape[1]) is None:
        return by_plain(*arguments)
    return jax.lax.platform_dependent(*arguments, default=by_plain, tpu=by_splash)
