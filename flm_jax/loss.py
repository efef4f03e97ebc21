"""Next-token cross-entropy, computed in chunks of positions to bound the memory of the logits; held-out loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flm_jax.config import ModelConfig
from flm_jax.model import Masks, Params, Transformer
from flm_jax.sharding import put_batch, replicated


class TokenSums(NamedTuple):
    """Weighted sums over the tokens of a batch, () each; of a mixture over those of each row, (B,).

    Attributes:
      loss: of the cross-entropies, in nats.
      squared_log_z: of (log Z)^2, where Z is the sum of the exponentials of a token's logits; None: not asked for.
    """

    loss: jax.Array
    squared_log_z: jax.Array | None = None


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The loss -log p(target) of every token, (B, T), in nats, in the dtype of the logits; NaN for an unknown id."""
    return cross_entropy_and_log_z(logits_BTV, targets_BT)[0]


def cross_entropy_and_log_z(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of every token, as `cross_entropy`, and log Z = logsumexp(logits), (B, T) each."""
    # Taking the target's logit by its index would scatter its gradient into an array of zeros; a sum of the one value
    # that is not masked is the same number, and its gradient is part of one pass over the logits.
    ids_BTV = jax.lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, logits_BTV.ndim - 1)
    target_BT = jnp.sum(jnp.where(ids_BTV == targets_BT[..., None], logits_BTV, 0.0), axis=-1)
    # An id that the vocabulary does not have would count as a logit of 0.
    known_BT = (targets_BT >= 0) & (targets_BT < logits_BTV.shape[-1])
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_z_BT - jnp.where(known_BT, target_BT, jnp.nan), log_z_BT


def loss_sum(
    cfg: ModelConfig,
    params: Params,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    segments_BT: jax.Array | None,
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
      segments_BT: int32, equal within a document; None: each row is one document.
      masks: growth masks.
      chunks: number of parts that the head is applied to one after the other, each T / chunks positions, recomputed in
        the backward pass; 1: all positions at once.

    Raises:
      ValueError: `chunks` does not divide T.
    """
    batch = _Tokens(inputs_BT, targets_BT, weights_BT, segments_BT)
    return token_sums(cfg, params, batch, masks, chunks).loss


class _Tokens(NamedTuple):
    """The fields of a `Batch` without sources, which this module may not import."""

    inputs_BT: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array
    segments_BT: jax.Array | None
    sources: None = None
    positions_BT: None = None


def by_source(values_B: jax.Array, sources: Any) -> jax.Array:
    """The sums of values of rows over the rows of each source, (S,); `sources` is a `RowSources`."""
    # Not a scatter: where rows are split over devices, each adds up its own.
    own_BS = sources.numbers_B[:, None] == jnp.arange(sources.count)[None, :]
    return jnp.sum(jnp.where(own_BS, values_B[:, None], 0), axis=0)


def token_sums(
    cfg: ModelConfig, params: Params, batch: Any, masks: Masks | None = None, chunks: int = 1, log_z: bool = False
) -> TokenSums:
    """The weighted sums over all tokens of a batch; over those of each row if the rows have sources.

    Args:
      cfg: the model.
      params: its parameters.
      batch: a `Batch`.
      masks: growth masks.
      chunks: as for `loss_sum`.
      log_z: whether to sum (log Z)^2 too.

    Raises:
      ValueError: `chunks` does not divide T.
    """
    model, axis = Transformer(cfg), rows_apart(batch)
    x_BTD, _ = hidden(cfg, params, batch, masks)

    def of_chunk(x_BtD: jax.Array, targets_Bt: jax.Array, weights_Bt: jax.Array) -> TokenSums:
        logits_BtV: Any = model.apply({"params": params}, x_BtD, method="logits")
        loss_Bt, log_z_Bt = cross_entropy_and_log_z(logits_BtV, targets_Bt)
        squares = jnp.sum(jnp.square(log_z_Bt) * weights_Bt, axis=axis) if log_z else None
        return TokenSums(jnp.sum(loss_Bt * weights_Bt, axis=axis), squares)

    found: TokenSums = in_chunks(of_chunk, chunks, x_BTD, batch.targets_BT, batch.weights_BT)
    return found


def rows_apart(batch: Any) -> int | None:
    """The axis that tokens of a `Batch` are summed over: the rows stay apart where they have sources."""
    return None if batch.sources is None else 1


def hidden(cfg: ModelConfig, params: Params, batch: Any, masks: Masks | None = None) -> Any:
    """What `Transformer.hidden` gives for the tokens of a `Batch`."""
    tokens = (batch.inputs_BT, batch.segments_BT, masks)
    return Transformer(cfg).apply({"params": params}, *tokens, positions_BT=batch.positions_BT, method="hidden")


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
        total = token_sums(cfg, params, batch, masks, chunks).loss
        weights = jnp.sum(batch.weights_BT, axis=rows_apart(batch))
        if batch.sources is None:
            return total, weights
        return by_source(total, batch.sources), by_source(weights, batch.sources)

    def evaluate(params: Params, batches: Iterable[Any], masks: Masks | None = None) -> tuple[np.ndarray, np.ndarray]:
        with jax.set_mesh(mesh):
            pairs = [sums(params, put_batch(batch, mesh), masks) for batch in batches]
        sides = zip(*jax.device_get(pairs), strict=True)
        total, weight = (sum((np.asarray(x, np.float64) for x in side), np.zeros(())) for side in sides)
        return total, weight

    return evaluate
