"""What a step minimises, and its gradient, accumulated over parts of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.distillation import distilled_sums
from flm_jax.loss import by_source, token_sums
from flm_jax.model import Masks, Params
from flm_jax.recipe import ResolvedStage

# The cross-entropy of a step, and what else it measures by the field of `Metrics`; and the function of parameters and
# rows of a batch that gives what is minimised, and these.
Measured = tuple[jax.Array, dict[str, jax.Array]]
Objective = Callable[[Params, Any], tuple[jax.Array, Measured]]


def objective_of(
    stage: ResolvedStage,
    chunks: int,
    batch: Any,
    masks: Masks | None = None,
    teacher: Params | None = None,
    weight: jax.Array | None = None,
) -> tuple[Objective, Measured]:
    """What a step minimises, for rows of a batch, and zeros like what it measures.

    Args:
      stage: the stage.
      chunks: parts of a window that the head runs on, one at a time.
      batch: the whole batch, whose weights all means are divided by.
      masks: growth masks.
      teacher: the weights of the stage's teacher, if the step has one.
      weight: (), that of the divergence from the teacher.
    """
    cfg, total, resolved, z_loss = stage.cfg, jnp.sum(batch.weights_BT), stage.teacher, stage.stage.z_loss
    weights_S = None if batch.sources is None else by_source(jnp.sum(batch.weights_BT, axis=1), batch.sources)

    def measured(sums: Any, rows: Any, more: dict[str, jax.Array]) -> Measured:
        """The cross-entropy, and what is measured besides; with sources the sums are those of rows."""
        if weights_S is None:
            return sums.loss / total, more
        sums_S = by_source(sums.loss, rows.sources)
        return jnp.sum(sums_S) / total, {**more, "source_losses_S": sums_S / weights_S}

    def with_z(minimised: jax.Array, sums: Any, found: Measured) -> tuple[jax.Array, Measured]:
        """Adds what the z-loss adds, if the stage has one."""
        if sums.squared_log_z is None:
            return minimised, found
        z = z_loss * jnp.sum(sums.squared_log_z) / total
        return minimised + z, (found[0], {**found[1], "z_loss": z})

    def of_text(params: Params, rows: Any) -> tuple[jax.Array, Measured]:
        sums = token_sums(cfg, params, rows, masks, chunks, log_z=z_loss > 0)
        found = measured(sums, rows, {})
        return with_z(found[0], sums, found)

    def of_both(params: Params, rows: Any) -> tuple[jax.Array, Measured]:
        assert teacher is not None and weight is not None and resolved is not None
        temperature = resolved.teacher.temperature
        sums = distilled_sums(cfg, params, resolved.cfg, teacher, rows, masks, chunks, temperature, log_z=z_loss > 0)
        kl = sums.kl / total
        found = measured(sums, rows, {"kl": kl})
        return with_z((1 - weight) * found[0] + weight * temperature**2 * kl, sums, found)

    taught = teacher is not None and weight is not None and resolved is not None
    zero = jnp.zeros((), jnp.promote_types(cfg.compute, jnp.float32))
    zeros = {"kl": zero} if taught else {}
    if z_loss:
        zeros["z_loss"] = zero
    if weights_S is not None:
        zeros["source_losses_S"] = jnp.zeros(weights_S.shape, zero.dtype)
    return of_both if taught else of_text, (zero, zeros)


def accumulated(
    objective: Objective, zero: Measured, params: Params, batch: Any, parts: int
) -> tuple[Measured, Params]:
    """What an objective measures on a batch, and its gradient, accumulated over `parts` parts of the batch."""

    def derived(rows: Any) -> tuple[Measured, Params]:
        (_, measured), grads = jax.value_and_grad(objective, has_aux=True)(params, rows)
        return measured, grads

    if parts == 1:
        return derived(batch)
    # Row i goes to part i mod parts, so that no row has to move to another device.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def add(carry: tuple[Measured, Params], rows: Any) -> tuple[tuple[Measured, Params], None]:
        return jax.tree.map(jnp.add, carry, derived(rows)), None

    found: tuple[Measured, Params] = jax.lax.scan(add, (zero, jax.tree.map(jnp.zeros_like, params)), split)[0]
    return found
