"""Settings of AdamW and Muon, and schedules of the learning rate.

The learning rate is applied in the train step and follows the step within the stage. The optimizer's own state is
therefore only moments and one count, and no schedule in it has to be reset when the model grows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import optax

from flm_jax.records import counted, recorded
from flm_jax.records.fields import Count, Fraction, Limit, NonNegative, Positive, Size, one_of

OPTIMIZERS = ("adamw", "muon")
# Fields of `OptimizerConfig` that only Muon has. AdamW's apply to both: Muon leaves vector-like parameters to AdamW.
OF_MUON = ("momentum", "nesterov", "newton_schulz_steps")
SCHEDULES = ("wsd", "cosine", "linear", "constant")
Decay = Annotated[float, Limit("at least 0 and less than 1", lambda rate: 0 <= rate < 1)]


@dataclass(frozen=True)
@recorded
class OptimizerConfig:
    """The optimizer's settings and the learning-rate schedule of one stage.

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
      eps: added to the root of the second moment; for parameters of blocks times `base_layers / layers`, if a model has
        `base_layers`.
      weight_decay: decoupled, multiplied by the rate at the base width; gains and biases are exempt.
      clip: largest global norm of the gradient; 0: no clipping.
      name: adamw, or muon: for matrix-like parameters the momentum of the gradient with its singular values made equal
        (Newton-Schulz steps in the model's compute_dtype), for the others AdamW with the settings above.
      momentum: decay of the moving average of gradients (muon).
      nesterov: whether the gradient is averaged in once more before the step (muon).
      newton_schulz_steps: steps of the orthogonalisation (muon).
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
    name: Annotated[str, one_of(OPTIMIZERS)] = "adamw"
    momentum: Decay = 0.95
    nesterov: bool = True
    newton_schulz_steps: Size = 5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if self.name != "muon" and field.name in OF_MUON and (given := getattr(self, field.name)) != field.default:
                raise ValueError(f"OptimizerConfig.{field.name}={given} belongs to muon, not {self.name}.")
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
