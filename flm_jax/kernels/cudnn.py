"""cuDNN's flash attention on NVIDIA GPUs: scores are never in memory, and keys in the future are skipped.

The kernels are custom calls of XLA's GPU compiler, called here through `jax.ffi`. JAX's own wrapper
(`jax.nn.dot_product_attention`) cannot be used: it fails at tracing where the library is missing, so no program can be
lowered for GPUs elsewhere; it has no argument for packed documents; and the private one that has takes the wrong
offsets of keys with grouped queries in JAX 0.10 (corrected by its pull request 39521).

Three forms, all causal, and with a sliding window if there is one:
- "causal": each row is one document. No mask.
- "packed": rows of several documents. cuDNN is told where each document begins and how long it is, and works on each as
  on a sequence of its own: no mask, and no work on pairs of documents. The number of documents is data, and the shapes
  need a bound on it: `capacities`. A batch that has more takes the next form, in the same program.
- "bias": a mask (B, 1, T, S) in the compute dtype, added to the scores. Every pair of blocks up to the diagonal is
  worked on. Padding by sequence lengths alone would not do: it describes one document per row.

B batch, T query positions, S key positions, N query heads, K key heads, H head width, M documents.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from flm_jax.kernels import ATTENDED
from flm_jax.sharding import fitting_axes, mesh_axes

# A packed kernel has one place for a document per so many tokens. On an H200 a place in each of 16 rows of 2,048 tokens
# takes about 2 % of the forward and backward passes, used or not.
TOKENS_PER_PLACE = (512, 128)
# cuDNN has given wrong gradients at lengths that fill no whole block (NVIDIA/cudnn-frontend, issue 160).
BLOCK = 64


class Packed(NamedTuple):
    """Where the documents of each device's rows lie, as cuDNN reads it.

    Attributes:
      lengths_BM: int32, tokens of each document; documents of all rows in order, then zeros. M is the largest of
        `capacities`.
      starts_BM1: int32, the first token of each document, counted through all rows; then the number of tokens.
      documents_1: int32, one per device along the batch: its number of documents, which may be more than B M.
    """

    lengths_BM: jax.Array
    starts_BM1: jax.Array
    documents_1: jax.Array


def capacities(length: int) -> tuple[int, ...]:
    """The numbers of documents per row of `length` tokens, on average over the rows, that packed kernels hold.

    A row's first document counts, also if it began before the row. Ascending; each is a kernel of its own in the
    program, and a batch takes the first that holds its documents. What is kept for the backward pass grows with the
    largest M: M T N float32 numbers per row. With 4,096 tokens and heads of 128, that is half of what the queries take.
    """
    most = max(4, length // TOKENS_PER_PLACE[-1])
    return tuple(sorted({m for tokens in TOKENS_PER_PLACE[:-1] if 1 < (m := length // tokens) < most} | {most}))


def batch_axes(rows: int) -> tuple[str, ...]:
    """The axes of the current mesh that the batch is split over."""
    return fitting_axes((rows,), ("batch",), jax.sharding.get_abstract_mesh())[0]


def pack(segments_BT: jax.Array) -> Packed:
    """The documents of rows: runs of equal numbers in `segments_BT`."""
    if jax.sharding.get_abstract_mesh().empty:
        return _pack(segments_BT)
    rows = batch_axes(segments_BT.shape[0]) or None
    where = PartitionSpec(rows, None)
    out: Any = Packed(*_packed_specs(rows))
    packed: Packed = jax.shard_map(_pack, in_specs=where, out_specs=out, check_vma=False)(segments_BT)
    return packed


def _packed_specs(rows: tuple[str, ...] | None) -> Any:
    return PartitionSpec(rows, None), PartitionSpec(rows, None), PartitionSpec(rows)


def _pack(segments_BT: jax.Array) -> Packed:
    B, T = segments_BT.shape
    M = capacities(T)[-1]
    begins_BT = jnp.concatenate([jnp.ones((B, 1), bool), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    starts, end = jnp.nonzero(begins_BT.reshape(-1), size=B * M, fill_value=B * T)[0].astype(jnp.int32), B * T
    starts = jnp.concatenate([starts, jnp.full((B,), end, jnp.int32)])
    # A document ends where the next begins: the first token of a row always begins one.
    lengths = starts[1 : B * M + 1] - starts[: B * M]
    return Packed(lengths.reshape(B, M), starts.reshape(B, M + 1), jnp.sum(begins_BT, dtype=jnp.int32)[None])


def _first(packed: Packed, m: int) -> Packed:
    """The same documents with m places per row, which must hold them."""
    B = packed.lengths_BM.shape[0]
    lengths, starts = packed.lengths_BM.reshape(-1)[: B * m], packed.starts_BM1.reshape(-1)[: B * (m + 1)]
    return Packed(lengths.reshape(B, m), starts.reshape(B, m + 1), packed.documents_1)


def _by_documents(packed: Packed, length: int, call: Any) -> Any:
    """`call(form, packed)` of the packed form with the fewest places that hold this batch, or of the form "bias"."""
    B, sizes = packed.lengths_BM.shape[0], capacities(length)
    branches = [functools.partial(call, "packed", _first(packed, m)) for m in sizes]
    index = jnp.sum(packed.documents_1[0] > jnp.asarray([B * m for m in sizes], jnp.int32), dtype=jnp.int32)
    return jax.lax.switch(index, [*branches, functools.partial(call, "bias", packed)])


def refusal(dtype: Any, head_dim: int, capability: tuple[int, int]) -> str | None:
    """Why cuDNN cannot attend with heads of this width and dtype on a GPU of this capability; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not in {jnp.dtype(dtype)}"
    widest = 256 if capability >= (9, 0) else 128
    if head_dim % 8 or head_dim > widest:
        return f"its heads are multiples of 8 and at most {widest} wide, not {head_dim}"
    return None if capability >= (8, 0) else f"it needs compute capability 8.0, and this GPU has {capability}"


def device() -> jax.Device | None:
    """The first NVIDIA GPU of this process; None if there is none."""
    try:
        local = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return local[0] if local else None


def capability() -> tuple[int, int]:
    """The compute capability of this process's GPUs; that of an H100 where there are none, for lowering elsewhere."""
    gpu = device()
    if gpu is None:
        return 9, 0
    major, minor = str(gpu.compute_capability).split(".")
    return int(major), int(minor)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    packed: Packed | None,
    *,
    width: float,
    sliding_window: int | None = None,
) -> jax.Array:
    """Causal attention within documents, (B, T, N, H), on each device's rows and heads.

    Args:
      q_BTNH: queries, rotated, bf16 or fp16; keys and values alike.
      k_BSKH: keys; query head n reads key head n // (N / K).
      v_BSKH: values.
      segments_BT: int32, (B, T), equal within a document; None: each row is one document, the form "causal".
      packed: of `segments_BT`, for the form "packed"; None: the form "bias".
      width: the head width in the scores' scale.
      sliding_window: how many positions a query sees.
    """
    if sliding_window is not None and sliding_window >= k_BSKH.shape[1]:
        sliding_window = None
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(_local, scale=width**-0.5, window=sliding_window)
    if mesh.empty:
        return local(q_BTNH, k_BSKH, v_BSKH, segments_BT, packed)
    heads = mesh_axes("heads")
    # Query and key heads are split alike, or not at all.
    if math.gcd(q_BTNH.shape[2], k_BSKH.shape[2]) % math.prod(mesh.shape[name] for name in heads):
        heads = ()
    rows = batch_axes(q_BTNH.shape[0]) or None
    split, whole = PartitionSpec(rows, None, heads or None, None), PartitionSpec(rows, None)
    documents = None if packed is None else Packed(*_packed_specs(rows))
    specs = (split, split, split, None if segments_BT is None else whole, documents)
    # Inside, each device calls the kernel on what it holds: the partitioner knows nothing about the custom call.
    return jax.shard_map(local, in_specs=specs, out_specs=split, check_vma=False)(
        q_BTNH, k_BSKH, v_BSKH, segments_BT, packed
    )


@functools.partial(jax.custom_vjp, nondiff_argnames=("scale", "window"))
def _local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    packed: Packed | None,
    scale: float,
    window: int | None,
) -> jax.Array:
    return checkpoint_name(_forward(q, k, v, segments, packed, scale, window, stats=False)[0], ATTENDED)


def _local_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, packed: Any, scale: float, window: int | None
) -> tuple[jax.Array, Any]:
    o, stats = (checkpoint_name(x, ATTENDED) for x in _forward(q, k, v, segments, packed, scale, window, stats=True))
    return o, (q, k, v, segments, packed, o, stats)


def _local_backward(scale: float, window: int | None, kept: Any, do: jax.Array) -> tuple[Any, ...]:
    q, k, v, segments, packed, o, stats = kept

    def one(form: str, packed: Packed | None) -> Any:
        rows = q.shape[0] * (packed.lengths_BM.shape[1] if form == "packed" and packed is not None else 1)
        return _call(form, q, k, v, segments, packed, scale, window, backward=(stats[:rows], do, o))

    if packed is None:
        dq, dk, dv = one("causal" if segments is None else "bias", None)
    else:
        dq, dk, dv = _by_documents(packed, q.shape[1], one)
    return dq, dk, dv, None, None


_local.defvjp(_local_forward, _local_backward)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, packed: Any, scale: float, window: int | None, stats: bool
) -> tuple[jax.Array, ...]:
    """The output (B, T, N, H) and, with `stats`, the logarithms of the softmax's denominators, float32."""
    if packed is None:
        return _call("causal" if segments is None else "bias", q, k, v, segments, packed, scale, window, stats=stats)

    # The packed form has M rows of logarithms per row of the batch; all branches give as many as the largest M.
    rows = packed.lengths_BM.size

    def one(form: str, packed: Packed) -> tuple[jax.Array, ...]:
        o, *logs = _call(form, q, k, v, segments, packed, scale, window, stats=stats)
        return o, *(jnp.pad(x, ((0, rows - x.shape[0]), (0, 0), (0, 0))) for x in logs)

    return tuple(_by_documents(packed, q.shape[1], one))


def _bias(segments_BT: jax.Array, window: int | None, dtype: Any) -> jax.Array:
    """The mask of documents and of the sliding window, (B, 1, T, S), to be added to scores; causality is cuDNN's."""
    seen = segments_BT[:, :, None] == segments_BT[:, None, :]
    if window is not None:
        time = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
        seen &= (time[:, None] - time[None, :] < window)[None]
    # Far below any score, and far enough above the dtype's end that differences of two stay finite.
    low = -(2.0**15) if dtype == jnp.float16 else -(2.0**41)
    return jnp.where(seen, jnp.zeros((), dtype), jnp.asarray(low, dtype))[:, None]


def _call(
    form: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    packed: Packed | None,
    scale: float,
    window: int | None,
    stats: bool = False,
    backward: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """One custom call: (output,), (output, logarithms), or with `backward` the gradients of queries, keys and values.

    `backward` is (logarithms, gradient of the output, output).
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    M = packed.lengths_BM.shape[1] if form == "packed" and packed is not None else 1
    bias, places = [], []
    if form == "bias" and segments is not None:
        bias = [_bias(segments, window, q.dtype)]
    if form == "packed" and packed is not None:
        # Places are in elements, of queries and of keys; both sequence lengths are those of the documents.
        at = [packed.starts_BM1 * (heads * H) for heads in (N, K)]
        places = [packed.lengths_BM, packed.lengths_BM, *at]
    like = lambda heads: jax.ShapeDtypeStruct((B, heads, T, H), q.dtype)  # noqa: E731
    name = "__cudnn$fmhaScaleBiasSoftmax" if bias else "__cudnn$fmhaSoftmax"
    if backward is None:
        operands = [q, k, v, *bias, *places]
        results = [like(N), *([jax.ShapeDtypeStruct((B * M, N, T), jnp.float32)] if stats else [])]
    else:
        logs, do, o = backward
        operands, name = [q, k, v, logs, do, *bias, o, *places], name + "Backward"
        results = [like(N), like(K), like(K)]
    # Heads are results' second axis and the third in memory, as in the arguments, so that nothing is transposed.
    heads_inside, plain = (0, 2, 1, 3), None
    layouts: list[Any] = [heads_inside if len(x.shape) == 4 else plain for x in results]
    config = _config(B, N, T, scale, q.dtype, form, 0 if bias else window or 0, M, backward is not None)
    found = jax.ffi.ffi_call(
        name,
        # XLA gives the last result the size of the workspace that the kernel asks for.
        [*results, jax.ShapeDtypeStruct((0,), jnp.uint8)],
        output_layouts=[*layouts, plain],
        custom_call_api_version=2,
        legacy_backend_config=config,
        vmap_method="sequential",
    )(*operands)
    return tuple(jnp.swapaxes(x, 1, 2) if len(x.shape) == 4 else x for x in found[:-1])


def _config(
    B: int, N: int, T: int, scale: float, dtype: Any, form: str, window: int, documents: int, backward: bool
) -> str:
    """The custom call's configuration: XLA's CudnnfMHABackendConfig as JSON, in its words."""

    def product(*axes: tuple[int, ...]) -> dict[str, list[str]]:
        sides = ("lhs_contracting", "rhs_contracting", "lhs_batch", "rhs_batch")
        return {f"{side}_dimensions": [str(i) for i in at] for side, at in zip(sides, axes, strict=True)}

    # Axes of (B, T, N, H) arrays and (B, N, T, S) scores, in products of inputs with inputs, and of scores with inputs.
    inputs = product((3,), (3,), (0, 2), (0, 2))
    products = {
        "bmm1_dot_dimension_numbers": inputs,
        "bmm2_dot_dimension_numbers": product((3,), (1,), (0, 1), (0, 2)),
    }
    if backward:
        products = {
            "bmm1_grad_gemm1_dot_dimension_numbers": product((2,), (1,), (0, 1), (0, 2)),
            "bmm1_grad_gemm2_dot_dimension_numbers": product((3,), (1,), (0, 1), (0, 2)),
            "bmm2_grad_gemm1_dot_dimension_numbers": product((2,), (1,), (0, 1), (0, 2)),
            "bmm2_grad_gemm2_dot_dimension_numbers": inputs,
        }
    attention = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": float(scale),
        "intermediate_tensor_shape": {
            "element_type": {"bfloat16": "BF16", "float16": "F16"}[str(jnp.dtype(dtype))],
            "dimensions": [str(B), str(N), str(T), str(T)],
            "layout": {
                "minor_to_major": ["3", "2", "1", "0"],
                "index_primitive_type": "PRIMITIVE_TYPE_INVALID",
                "pointer_primitive_type": "PRIMITIVE_TYPE_INVALID",
            },
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "PADDING_CAUSAL" if form == "packed" else "CAUSAL",
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": window,
        "max_seg_per_batch": documents,
        "is_paged_attention": False,
        **products,
    }
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": attention})
