"""The loss with a teacher: cross-entropy and divergence of the same tokens, in chunks of positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.config import ModelConfig
from flm_jax.loss import cross_entropy, in_chunks
from flm_jax.model import Masks, Params, Transformer


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
) -> tuple[jax.Array, jax.Array]:
    """The weighted sums of cross-entropies and of divergences from the teacher, each (), in nats.

    Args:
      cfg: the model.
      params: its parameters.
      teacher: the model that it learns from.
      teacher_params: that one's parameters; they get no gradient.
      batch: a `Batch` of (B, T); the weights of tokens count in both sums.
      masks: growth masks of the model.
      chunks: as for `loss.loss_sum`: of both models' logits only those of T / chunks positions exist at a time.
      temperature: of the divergence.

    Raises:
      ValueError: `chunks` does not divide T.
    """
    model, other = Transformer(cfg), Transformer(teacher)
    inputs_BT, segments_BT = batch.inputs_BT, batch.segments_BT
    x_BTD, _ = model.apply({"params": params}, inputs_BT, segments_BT, masks, method="hidden")
    y_BTE, _ = other.apply({"params": teacher_params}, inputs_BT, segments_BT, method="hidden")

    def of_chunk(
        x_BtD: jax.Array, y_BtE: jax.Array, targets_Bt: jax.Array, weights_Bt: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        ours_BtU: Any = model.apply({"params": params}, x_BtD, method="logits")
        theirs_BtV: Any = other.apply({"params": teacher_params}, y_BtE, method="logits")
        losses = cross_entropy(ours_BtU, targets_Bt), divergence(theirs_BtV, ours_BtU, temperature)
        return jnp.sum(losses[0] * weights_Bt), jnp.sum(losses[1] * weights_Bt)

    found: tuple[jax.Array, jax.Array] = in_chunks(
        of_chunk, chunks, x_BTD, jax.lax.stop_gradient(y_BTE), batch.targets_BT, batch.weights_BT
    )
    return found
