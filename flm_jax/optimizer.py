"""AdamW with muP's multipliers, learning-rate schedules, and the table of which state leaves are moving averages.

The learning rate is applied in the train step and follows the step within the stage. The optimizer's own state is
therefore only moments and one count, and no schedule in it has to be reset when the model grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import optax
from jax.sharding import Mesh

from flm_jax.config import ModelConfig
from flm_jax.records import counted, recorded
from flm_jax.records.fields import Count, Fraction, Limit, NonNegative, Positive, one_of
from flm_jax.sharding import param_shardings, replicated

SCHEDULES = ("wsd", "cosine", "linear", "constant")
Decay = Annotated[float, Limit("at least 0 and less than 1", lambda rate: 0 <= rate < 1)]


@dataclass(frozen=True)
@recorded
class OptimizerConfig:
    """AdamW's settings and the learning-rate schedule of one stage.

    Attributes:
      learning_rate: peak rate at the base width; for matrix-like parameters it is divided by their width multiplier.
      matrix_rate: the rate of matrix-like parameters at the base width, as a multiple of `learning_rate`.
      schedule: wsd (warm-up, stable, linear decay), cosine, linear, constant.
      warmup_steps: steps of linear warm-up at the start of the stage, from `warmup_from`.
      warmup_from: fraction of the peak at which the warm-up starts: 0 for a first stage, more after a growth.
      decay_steps: steps of decay at the end of the stage (wsd).
      final_rate: fraction of the peak at which a decay ends; the last step of the stage is one step before that end.
      decay_span: total length in steps of a cosine or linear decay that extends beyond this stage, before it, after it
        or both. 0: the decay runs from the end of the warm-up to the end of the stage.
      decay_passed: steps of `decay_span` that are before this stage.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, multiplied by the rate at the base width; gains and biases are exempt.
      clip: largest global norm of the gradient; 0: no clipping.
    """

    learning_rate: Positive = 1e-3
    matrix_rate: Positive = 1.0
    schedule: Annotated[str, one_of(SCHEDULES)] = "wsd"
    warmup_steps: Count = 0
    warmup_from: Fraction = 0.0
    decay_steps: Count = 0
    final_rate: Fraction = 0.0
    decay_span: Count = 0
    decay_passed: Count = 0
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: NonNegative = 1e-8
    weight_decay: NonNegative = 0.0
    clip: NonNegative = 1.0

    def __post_init__(self) -> None:
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError(f"OptimizerConfig.decay_steps={self.decay_steps} belongs to wsd, not {self.schedule}.")
        if (self.decay_span or self.decay_passed) and self.schedule not in ("cosine", "linear"):
            raise ValueError(
                f"OptimizerConfig.decay_span and decay_passed belong to cosine and linear, not {self.schedule}."
            )
        if self.decay_passed and self.decay_passed >= self.decay_span:
            raise ValueError(
                f"OptimizerConfig.decay_passed={self.decay_passed} is not within decay_span={self.decay_span}: no step "
                "of the decay would be left."
            )
        if self.final_rate and (self.schedule == "constant" or (self.schedule == "wsd" and not self.decay_steps)):
            raise ValueError(f"OptimizerConfig.final_rate={self.final_rate} has no effect: nothing decays.")


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at the base width, as a function of the step within a stage of `steps` steps.

    Raises:
      ValueError: warm-up and decay together are longer than the stage, or the decay ends before the stage does.
    """
    if cfg.warmup_steps + cfg.decay_steps > steps:
        raise ValueError(
            f"Warm-up ({counted(cfg.warmup_steps, 'step')}) and decay ({cfg.decay_steps}) are longer than "
            f"the stage ({steps})."
        )
    peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_rate
    rest = steps - cfg.warmup_steps
    if cfg.decay_span and cfg.decay_span - cfg.decay_passed < steps:
        raise ValueError(
            f"decay_span={cfg.decay_span} minus decay_passed={cfg.decay_passed} is less than the stage's "
            f"{counted(steps, 'step')}: the decay would end within the stage."
        )
    if cfg.decay_span:
        decayed = _decaying(cfg, peak, final, cfg.decay_span)

        def within(step: Any) -> Any:
            """The rate of the decay, times the warm-up."""
            rate = decayed(step + cfg.decay_passed)
            if not cfg.warmup_steps:
                return rate
            return rate * optax.linear_schedule(cfg.warmup_from, 1.0, cfg.warmup_steps)(step)

        return within
    flat = optax.constant_schedule(peak)
    parts: list[tuple[int, optax.Schedule]] = []
    if cfg.warmup_steps:
        parts.append((cfg.warmup_steps, optax.linear_schedule(peak * cfg.warmup_from, peak, cfg.warmup_steps)))
    if cfg.schedule == "wsd":
        parts.append((rest - cfg.decay_steps, flat))
        if cfg.decay_steps:
            parts.append((cfg.decay_steps, optax.linear_schedule(peak, final, cfg.decay_steps)))
    elif cfg.schedule == "constant":
        parts.append((rest, flat))
    else:
        parts.append((rest, _decaying(cfg, peak, final, max(rest, 1))))
    ends = [sum(length for length, _ in parts[: i + 1]) for i in range(len(parts) - 1)]
    return optax.join_schedules([part for _, part in parts], ends)


def _decaying(cfg: OptimizerConfig, peak: float, final: float, steps: int) -> optax.Schedule:
    if cfg.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, steps, alpha=cfg.final_rate)
    return optax.linear_schedule(peak, final, steps)


def scale_by_width(width_mults: Any) -> optax.GradientTransformation:
    """The transformation that divides each parameter's update by its width multiplier (muP, 2203.03466, Table 8)."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        return jax.tree.map(lambda mult, u: u if mult == 1 else u / mult, width_mults, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def decay(rate: float, decays: Any) -> optax.GradientTransformation:
    """The transformation that adds `rate` times the parameters that decay.

    It has no state, so that the optimizer's state has the same form in every stage.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if rate:
            updates = jax.tree.map(lambda on, u, p: u + rate * p if on else u, decays, updates, params)
        return updates, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def width_mults(model: ModelConfig, signatures: Any) -> Any:
    """The tree of muP's width multipliers, one number per parameter."""
    return jax.tree.map(lambda sig: sig.width_mult(model.sizes, model.base_sizes), signatures)


def adamw(cfg: OptimizerConfig, signatures: Any, mults: Any) -> optax.GradientTransformation:
    """AdamW without clipping, sign and learning rate: the train step adds minus the rate times these updates.

    Weight decay is added after muP's division. This is the published rule, where the decay is multiplied by the width
    multiplier and the rate divided by it: every parameter that decays shrinks by the same fraction per step, at any
    width.

    Args:
      cfg: Adam's settings and weight decay.
      signatures: tree of the parameters' signatures.
      mults: tree of their width multipliers.
    """
    mults = jax.tree.map(lambda sig, m: m / cfg.matrix_rate if sig.is_matrix_like else m, signatures, mults)
    decays = jax.tree.map(lambda sig: sig.decays, signatures)
    return optax.chain(
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        scale_by_width(mults),
        decay(cfg.weight_decay, decays),
    )


# For each class of optimizer state: its fields that are moving averages, and of which power of the gradient. They grow
# by the duals of the parameters' maps. Its other fields are counts. A new optimizer adds the class of its state here.
AVERAGES: dict[type, dict[str, int]] = {optax.ScaleByAdamState: {"mu": 1, "nu": 2}}


def map_parts(one: Callable[[int | None, Any], Any], state: Any) -> Any:
    """An optimizer's state with every moving average and every count replaced by the result of `one`.

    Args:
      one: called with the power of the gradient and the average (a tree like the parameters), or with None and a count.
      state: the optimizer's state; its leaves may be anything in the place of arrays.

    Raises:
      ValueError: the state has an array with dimensions that `AVERAGES` does not declare; the message names its path.
    """

    def part(path: Any, node: Any) -> Any:
        powers = AVERAGES.get(type(node))
        if powers is not None:
            return node._replace(**{name: one(powers.get(name), value) for name, value in node._asdict().items()})
        if getattr(node, "ndim", 0):
            raise ValueError(
                f"The optimizer's state holds {jax.tree_util.keystr(path)}, {node.dtype}{list(node.shape)}, and it is "
                "not declared how it grows: add the class of its state to flm_jax.optimizer.AVERAGES, with the power "
                "of the gradient that each of its fields averages."
            )
        return node

    return jax.tree_util.tree_map_with_path(part, state, is_leaf=lambda node: type(node) in AVERAGES)


def state_shardings(tx: optax.GradientTransformation, signatures: Any, shapes: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The optimizer state's shapes and shardings: moments are sharded like their parameters, counts replicated."""
    state = jax.eval_shape(tx.init, shapes)
    where, found = param_shardings(signatures, shapes, mesh), []

    def place() -> None:
        found.append(
            optax.tree_utils.tree_map_params(
                tx, lambda _, place: place, state, where, transform_non_params=lambda _: replicated(mesh)
            )
        )

    # Optax initialises a state to see where parameters are. Traced, it makes no array: the devices of a mesh that is
    # only described have no memory for one.
    jax.eval_shape(place)
    return state, found[0]
