"""JAX's Pallas splash attention on TPUs: scores stay in fast memory, and blocks of keys in the future are skipped."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flm_jax.kernels import ATTENDED
from flm_jax.sharding import mesh_axes, spec

# Possible block sizes of the splash kernel, in rows and columns of scores; the largest that divides the window is used.
BLOCKS = (1024, 512, 256, 128)


def parts_of_mesh() -> dict[str, int]:
    """The number of devices of the current mesh that heads, and that positions, are split over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {"heads": 1, "time": 1}
    return {axis: math.prod(mesh.shape[name] for name in mesh_axes(axis)) for axis in ("heads", "time")}


def block_size(length: int) -> int | None:
    """The largest block size that divides one device's part of a window of `length` positions; None if none does."""
    share, left = divmod(length, parts_of_mesh()["time"])
    return None if left else next((size for size in BLOCKS if share % size == 0), None)


def refusal(length: int) -> str:
    """Why a window of `length` positions, which no block size divides, cannot be attended to."""
    parts = parts_of_mesh()["time"]
    return (
        f"attention='splash': each device has {length // parts} of the window's {length} positions, and the kernel "
        f"works on blocks of {BLOCKS[-1]}; use a context that is a multiple of {BLOCKS[-1] * parts}, or "
        "attention='plain'."
    )


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    *,
    width: float,
    sliding_window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas splash attention for TPUs, on each device's rows, heads and query positions; keys are gathered.

    Raises:
      ValueError: a device's part of the window is not a multiple of 128 positions.
    """
    B, T, N, _ = q_BTNH.shape
    # Imported here because it is experimental and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    mesh, parts = jax.sharding.get_abstract_mesh(), parts_of_mesh()
    block = block_size(T)
    if block is None:
        raise ValueError(refusal(T))
    columns = max(size for size in BLOCKS if T % size == 0)
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
