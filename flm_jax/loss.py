"""Next-token cross-entropy, computed in chunks of positions to bound the memory of the logits; held-out loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flm_jax.config import ModelConfig
from flm_jax.model import Masks, Params, Transformer
from flm_jax.sharding import put_batch, replicated


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The loss -log p(target) of every token, (B, T), in nats, in the dtype of the logits; NaN for an unknown id."""
    # Taking the target's logit by its index would scatter its gradient into an array of zeros; a sum of the one value
    # that is not masked is the same number, and its gradient is part of one pass over the logits.
    ids_BTV = jax.lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, logits_BTV.ndim - 1)
    target_BT = jnp.sum(jnp.where(ids_BTV == targets_BT[..., None], logits_BTV, 0.0), axis=-1)
    # An id that the vocabulary does not have would count as a logit of 0.
    known_BT = (targets_BT >= 0) & (targets_BT < logits_BTV.shape[-1])
    return jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.where(known_BT, target_BT, jnp.nan)


def loss_sum(
    cfg: ModelConfig,
    params: Params,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    segments_BT: jax.Array,
    masks: Masks | None = None,
    chunks: int = 1,
) -> jax.Array:
    """The weighted sum of the losses of all tokens, (), in nats; divided by the sum of the weights it is the mean.

    Args:
      cfg: the model.
      params: its parameters.
      inputs_BT: int32 token ids.
      targets_BT: int32, the token that follows each input.
      weights_BT: float32, 0 for tokens that are ignored.
      segments_BT: int32, equal within a document.
      masks: growth masks.
      chunks: number of parts that the head is applied to one after the other, each T / chunks positions, recomputed in
        the backward pass; 1: all positions at once.

    Raises:
      ValueError: `chunks` does not divide T.
    """
    return _summed(cfg, params, (inputs_BT, targets_BT, weights_BT, segments_BT), masks, chunks, None)


def source_sums(cfg: ModelConfig, params: Params, batch: Any, masks: Masks | None = None, chunks: int = 1) -> jax.Array:
    """As `loss_sum`, of the rows of each source of a mixture, (S,); `batch` is a `Batch` whose rows have sources."""
    tokens = (batch.inputs_BT, batch.targets_BT, batch.weights_BT, batch.segments_BT)
    return by_source(_summed(cfg, params, tokens, masks, chunks, 1), batch.sources)


def by_source(values_B: jax.Array, sources: Any) -> jax.Array:
    """The sums of values of rows over the rows of each source, (S,); `sources` is a `RowSources`."""
    # Not a scatter: where rows are split over devices, each adds up its own.
    own_BS = sources.numbers_B[:, None] == jnp.arange(sources.count)[None, :]
    return jnp.sum(jnp.where(own_BS, values_B[:, None], 0), axis=0)


def _summed(
    cfg: ModelConfig, params: Params, tokens: tuple[jax.Array, ...], masks: Masks | None, chunks: int, axis: int | None
) -> jax.Array:
    """The weighted sum of the losses of all tokens, or with axis 1 of each row; `tokens` as those of `loss_sum`."""
    inputs_BT, targets_BT, weights_BT, segments_BT = tokens
    model = Transformer(cfg)
    x_BTD, _ = model.apply({"params": params}, inputs_BT, segments_BT, masks, method="hidden")

    def of_chunk(x_BtD: jax.Array, targets_Bt: jax.Array, weights_Bt: jax.Array) -> jax.Array:
        logits_BtV: Any = model.apply({"params": params}, x_BtD, method="logits")
        return jnp.sum(cross_entropy(logits_BtV, targets_Bt) * weights_Bt, axis=axis)

    found: jax.Array = in_chunks(of_chunk, chunks, x_BTD, targets_BT, weights_BT)
    return found


def in_chunks(of_chunk: Callable[..., Any], chunks: int, *arrays: jax.Array) -> Any:
    """The sums of what `of_chunk` returns over chunks of the positions of (B, T, ...) arrays.

    The chunks are computed one after the other, and again in the backward pass; one chunk: all positions at once.

    Raises:
      ValueError: `chunks` does not divide T.
    """
    T = arrays[0].shape[1]
    if T % chunks:
        raise ValueError(f"loss chunks={chunks} must divide the context of {T} tokens.")
    if chunks == 1:
        return of_chunk(*arrays)

    # Position t goes to chunk t mod chunks, so that no position has to move to another device.
    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], T // chunks, chunks, *x.shape[2:]), 2, 0)

    parts = jax.lax.map(jax.checkpoint(lambda xs: of_chunk(*xs)), tuple(split(x) for x in arrays))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Bits per byte of text (2404.16645): the loss in nats per token, divided by bytes per token and by ln 2."""
    return loss / bytes_per_token / math.log(2)


def make_heldout_loss(
    cfg: ModelConfig, mesh: Mesh, chunks: int = 1
) -> Callable[[Params, Iterable[Any], Masks | None], float]:
    """A function from parameters, batches and masks to the mean loss in nats per token.

    It is compiled once with masks and once without; all batches must have the same shape.
    """
    sums = make_heldout_sums(cfg, mesh, chunks)

    def evaluate(params: Params, batches: Iterable[Any], masks: Masks | None = None) -> float:
        total, weight = sums(params, batches, masks)
        return float(total.sum() / weight.sum())

    return evaluate


def make_heldout_sums(
    cfg: ModelConfig, mesh: Mesh, chunks: int = 1
) -> Callable[[Params, Iterable[Any], Masks | None], tuple[np.ndarray, np.ndarray]]:
    """As `make_heldout_loss`, to the sums of losses, in nats, and of weights, float64: (), or of a mixture (S,)."""

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def sums(params: Params, batch: Any, masks: Masks | None) -> tuple[jax.Array, jax.Array]:
        if batch.sources is not None:
            total = source_sums(cfg, params, batch, masks, chunks)
            return total, by_source(jnp.sum(batch.weights_BT, axis=1), batch.sources)
        total = loss_sum(
            cfg, params, batch.inputs_BT, batch.targets_BT, batch.weights_BT, batch.segments_BT, masks, chunks
        )
        return total, jnp.sum(batch.weights_BT)

    def evaluate(params: Params, batches: Iterable[Any], masks: Masks | None = None) -> tuple[np.ndarray, np.ndarray]:
        with jax.set_mesh(mesh):
            pairs = [sums(params, put_batch(batch, mesh), masks) for batch in batches]
        sides = zip(*jax.device_get(pairs), strict=True)
        total, weight = (sum((np.asarray(x, np.float64) for x in side), np.zeros(())) for side in sides)
        return total, weight

    return evaluate
