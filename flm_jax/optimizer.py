"""AdamW with muP's multipliers, and learning-rate schedules.

The learning rate is applied in the train step, from the step within the stage, so that the optimizer's own state is
moments and one count: nothing in it has to be rewound when the model grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from flm_jax.config import ModelConfig
from flm_jax.records import recorded
from flm_jax.sharding import param_shardings, replicated

SCHEDULES = ("wsd", "cosine", "linear", "constant")


@recorded
@dataclass(frozen=True)
class OptimizerConfig:
    """How one stage is optimised.

    Attributes:
      learning_rate: peak rate at the base width; matrix-like parameters get it divided by their width multiplier.
      matrix_rate: the rate of matrix-like parameters at the base width, as a multiple of `learning_rate`.
      schedule: wsd (warm up, stay, decay linearly), cosine, linear, constant.
      warmup_steps: linear warm-up at the start of the stage, from `warmup_from`.
      warmup_from: fraction of the peak that the warm-up starts at: 0 for a first stage, more after a growth.
      decay_steps: steps of decay at the end of the stage (wsd).
      final_rate: fraction of the peak that a decay leads to; its last step is one short of it.
      decay_span: steps that a cosine or linear decay is laid out over, where that is more than this stage: it may begin
        before it and end after it. 0: from the end of the warm-up to the end of the stage.
      decay_passed: steps of `decay_span` that lie before this stage.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, multiplied by the rate at the base width; gains are exempt.
      clip: largest global norm of the gradient; 0 for no clipping.
    """

    learning_rate: float = 1e-3
    matrix_rate: float = 1.0
    schedule: str = "wsd"
    warmup_steps: int = 0
    warmup_from: float = 0.0
    decay_steps: int = 0
    final_rate: float = 0.0
    decay_span: int = 0
    decay_passed: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"OptimizerConfig.schedule={self.schedule!r}: use one of {', '.join(SCHEDULES)}.")
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError(f"OptimizerConfig.decay_steps={self.decay_steps} belongs to wsd, not {self.schedule}.")
        if (self.decay_span or self.decay_passed) and self.schedule not in ("cosine", "linear"):
            raise ValueError(
                f"OptimizerConfig.decay_span and decay_passed belong to cosine and linear, not {self.schedule}."
            )
        if self.decay_passed and self.decay_passed >= self.decay_span:
            raise ValueError(
                f"OptimizerConfig.decay_passed={self.decay_passed} is not within decay_span={self.decay_span}: nothing "
                "would be left of the decay."
            )
        if self.final_rate and (self.schedule == "constant" or (self.schedule == "wsd" and not self.decay_steps)):
            raise ValueError(f"OptimizerConfig.final_rate={self.final_rate} has no effect: nothing decays.")


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate at each step of a stage of `steps` steps, at the base width.

    Raises:
      ValueError: warm-up and decay together are longer than the stage, or the stage is longer than `decay_span`.
    """
    if cfg.warmup_steps + cfg.decay_steps > steps:
        raise ValueError(
            f"Warm-up ({cfg.warmup_steps} steps) and decay ({cfg.decay_steps}) are longer than the stage ({steps})."
        )
    peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_rate
    rest = steps - cfg.warmup_steps
    if cfg.decay_span and cfg.decay_span - cfg.decay_passed < steps:
        raise ValueError(
            f"decay_span={cfg.decay_span}, of which {cfg.decay_passed} steps lie before this stage, ends before its "
            f"{steps} steps do."
        )
    if cfg.decay_span:
        decayed = _decaying(cfg, peak, final, cfg.decay_span)

        def within(step: Any) -> Any:
            """The decay where it stands, under the warm-up's ramp."""
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
    """Divides every parameter's updates by its width multiplier (muP for Adam, 2203.03466, Table 8)."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        return jax.tree.map(lambda mult, u: u if mult == 1 else u / mult, width_mults, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def decay(rate: float, decays: Any) -> optax.GradientTransformation:
    """Adds `rate` times the parameters that decay; without a state, whose form could differ from stage to stage."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if rate:
            updates = jax.tree.map(lambda on, u, p: u + rate * p if on else u, decays, updates, params)
        return updates, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def width_mults(model: ModelConfig, signatures: Any) -> Any:
    """MuP's width multiplier of every parameter."""
    return jax.tree.map(lambda sig: sig.width_mult(model.sizes, model.base_sizes), signatures)


def adamw(cfg: OptimizerConfig, signatures: Any, mults: Any) -> optax.GradientTransformation:
    """AdamW up to clipping, sign and rate: the parameters' step is minus the rate times what this returns.

    Weight decay is added after muP's division, which is the published rule (decay times the width multiplier) under a
    rate divided by it: every decaying parameter shrinks by the same fraction per step, whatever its width.

    Args:
      cfg: how.
      signatures: of the parameters.
      mults: their width multipliers.
    """
    mults = jax.tree.map(lambda sig, m: m / cfg.matrix_rate if sig.is_matrix_like else m, signatures, mults)
    decays = jax.tree.map(lambda sig: sig.decays, signatures)
    return optax.chain(
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        scale_by_width(mults),
        decay(cfg.weight_decay, decays),
    )


# By the class of an optimizer's state, its fields that are moving averages of a power of the gradient, which grow by
# the duals of the parameters' maps; the other fields of such a state are counts. An optimizer enters here.
AVERAGES: dict[type, dict[str, int]] = {optax.ScaleByAdamState: {"mu": 1, "nu": 2}}


def map_parts(one: Callable[[int | None, Any], Any], state: Any) -> Any:
    """An optimizer's state with its averages and their counts replaced.

    Args:
      one: from the power of the gradient (None for a count) and an average, a tree like the parameters, to the new one.
      state: arrays, or anything in their places.

    Raises:
      ValueError: an array that is no scalar stands outside of what `AVERAGES` declares; the message has its path.
    """

    def part(path: Any, node: Any) -> Any:
        powers = AVERAGES.get(type(node))
        if powers is not None:
            return node._replace(**{name: one(powers.get(name), value) for name, value in node._asdict().items()})
        if getattr(node, "ndim", 0):
            raise ValueError(
                f"The optimizer's state holds {jax.tree_util.keystr(path)}, {node.dtype}{list(node.shape)}, and "
                "nothing says how it grows: declare its class in flm_jax.optimizer.AVERAGES, with the power of the "
                "gradient that each of its fields averages."
            )
        return node

    return jax.tree_util.tree_map_with_path(part, state, is_leaf=lambda node: type(node) in AVERAGES)


def state_shardings(tx: optax.GradientTransformation, signatures: Any, shapes: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes and shardings of the optimizer's state: moments live where their parameters do, counts everywhere."""
    state = jax.eval_shape(tx.init, shapes)
    where = param_shardings(signatures, shapes, mesh)
    shardings = optax.tree_utils.tree_map_params(
        tx, lambda _, place: place, state, where, transform_non_params=lambda _: replicated(mesh)
    )
    return state, shardings
