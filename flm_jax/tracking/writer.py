"""What is measured at a step, and what every writer of measurements offers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class Totals(NamedTuple):
    """Steps, tokens and training FLOPs of a run so far, over all stages."""

    steps: int
    tokens: int
    flops: int

    def plus(self, steps: int, cost: StageCost) -> Totals:
        """These and the first steps of a stage."""
        tokens = steps * cost.tokens_per_step
        return Totals(self.steps + steps, self.tokens + tokens, self.flops + cost.flops(steps))


class StageCost(NamedTuple):
    """What the steps of a stage cost; whatever counts FLOPs of training asks it.

    Attributes:
      tokens_per_step: tokens of one batch.
      flops_per_token: training FLOPs per token, without a teacher.
      teacher_flops_per_token: those of a teacher's forward pass.
      teacher_steps: steps at the start of the stage that have a teacher.
    """

    tokens_per_step: int
    flops_per_token: int
    teacher_flops_per_token: int = 0
    teacher_steps: int = 0

    def at(self, step: int) -> int:
        """FLOPs per token of one step, counted from 1, its teacher's included."""
        return self.flops_per_token + (self.teacher_flops_per_token if step <= self.teacher_steps else 0)

    def flops(self, steps: int) -> int:
        """FLOPs of the first `steps` steps, the teacher's included."""
        taught = min(steps, self.teacher_steps)
        return self.tokens_per_step * (steps * self.flops_per_token + taught * self.teacher_flops_per_token)


class Measurement(NamedTuple):
    """What was measured at one step.

    Attributes:
      kind: "train", "heldout", "growth", "save", "skip", or "start" (of the program, on which devices).
      stage: name of the stage.
      stage_step: steps of the stage.
      total: steps, tokens and FLOPs over all stages.
      time: seconds since 1970.
      values: by name.
    """

    kind: str
    stage: str
    stage_step: int
    total: Totals
    time: float
    values: Mapping[str, Any]

    def line(self) -> dict[str, Any]:
        """The object that stands in metrics.jsonl; a number that is not finite is None."""
        total = self.total
        about = {"kind": self.kind, "stage": self.stage, "stage_step": self.stage_step}
        about |= {"tokens": total.tokens, "flops": total.flops, "step": total.steps, "time": self.time}
        return about | {name: None if _not_finite(value) else value for name, value in self.values.items()}

    def numbers(self) -> dict[str, float]:
        """The values that are numbers, finite or not, and tokens and FLOPs, each as `kind/name`."""
        found = {name: value for name, value in self.values.items() if isinstance(value, int | float)}
        found |= {"tokens": self.total.tokens, "flops": self.total.flops}
        return {f"{self.kind}/{name}": value for name, value in found.items()}

    def finite(self) -> dict[str, float]:
        """The numbers that are finite: services differ in what they make of others."""
        return {name: value for name, value in self.numbers().items() if not _not_finite(value)}


class Writer(Protocol):
    """Takes measurements in the order of steps."""

    def write(self, measured: Measurement) -> None:
        """Writes one."""
        ...

    def close(self) -> None:
        """Ends the writing."""
        ...


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
