"""The loss with a teacher: cross-entropy and divergence of the same tokens, in chunks of positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flm_jax.config import ModelConfig
from flm_jax.loss import cross_entropy_and_log_z, hidden, in_chunks, rows_apart
from flm_jax.model import Masks, Params, Transformer


class DistilledSums(NamedTuple):
    """Weighted sums over the tokens of a batch, in nats.

    Attributes:
      loss: of the cross-entropies, (); of a mixture those of each row, (B,).
      kl: of the divergences from the teacher, ().
      squared_log_z: as in `TokenSums`; None: not asked for.
    """

    loss: jax.Array
    kl: jax.Array
    squared_log_z: jax.Array | None = None


def divergence(theirs_BTV: jax.Array, ours_BTU: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(teacher || model) of the next token at every position, (B, T), in nats; no gradient reaches the teacher.

    Args:
      theirs_BTV: the teacher's logits.
      ours_BTU: the model's, U at least V: to further ids the teacher gives no probability, the model its own.
      temperature: what both are divided by before the softmax.
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(theirs_BTV) / temperature, axis=-1)
    scaled = ours_BTU / temperature
    whole = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    V = theirs_BTV.shape[-1]
    log_q = (scaled if scaled.shape[-1] == V else scaled[..., :V]) - whole
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def distilled_sums(
    cfg: ModelConfig,
    params: Params,
    teacher: ModelConfig,
    teacher_params: Params,
    batch: Any,
    masks: Masks | None = None,
    chunks: int = 1,
    temperature: float = 1.0,
    log_z: bool = False,
) -> DistilledSums:
    """The weighted sums of cross-entropies and of divergences from the teacher.

    Args:
      cfg: the model.
      params: its parameters.
      teacher: the model that it learns from.
      teacher_params: that one's parameters; they get no gradient.
      batch: a `Batch` of (B, T); the weights of tokens count in both sums.
      masks: growth masks of the model.
      chunks: as for `loss.loss_sum`: of both models' logits only those of T / chunks positions exist at a time.
      temperature: of the divergence.
      log_z: whether to sum (log Z)^2 of the model's logits too.

    Raises:
      ValueError: `chunks` does not divide T.
    """
    model, other, axis = Transformer(cfg), Transformer(teacher), rows_apart(batch)
    x_BTD, _ = hidden(cfg, params, batch, masks)
    y_BTE, _ = hidden(teacher, teacher_params, batch)

    def of_chunk(x_BtD: jax.Array, y_BtE: jax.Array, targets_Bt: jax.Array, weights_Bt: jax.Array) -> DistilledSums:
        ours_BtU: Any = model.apply({"params": params}, x_BtD, method="logits")
        theirs_BtV: Any = other.apply({"params": teacher_params}, y_BtE, method="logits")
        loss_Bt, log_z_Bt = cross_entropy_and_log_z(ours_BtU, targets_Bt)
        kl = jnp.sum(divergence(theirs_BtV, ours_BtU, temperature) * weights_Bt)
        squares = jnp.sum(jnp.square(log_z_Bt) * weights_Bt, axis=axis) if log_z else None
        return DistilledSums(jnp.sum(loss_Bt * weights_Bt, axis=axis), kl, squares)

    found: DistilledSums = in_chunks(
        of_chunk, chunks, x_BTD, jax.lax.stop_gradient(y_BTE), batch.targets_BT, batch.weights_BT
    )
    return found
