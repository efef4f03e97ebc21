"""What is measured at a step, and what every writer of measurements offers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from flm_jax.records.foreign_json import check, field


class Totals(NamedTuple):
    """Steps, tokens and training FLOPs of a run so far, over all stages."""

    steps: int
    tokens: int
    flops: int

    def plus(self, steps: int, cost: StageCost) -> Totals:
        """These and the first steps of a stage."""
        return Totals(self.steps + steps, self.tokens + cost.tokens(steps), self.flops + cost.flops(steps))


class StageCost(NamedTuple):
    """What the steps of a stage cost; whatever counts FLOPs of training asks it.

    Attributes:
      tokens_per_step: tokens of one batch.
      flops_per_token: training FLOPs per token, without a teacher.
      teacher_flops_per_token: those of a teacher's forward pass.
      teacher_steps: steps at the start of the stage that have a teacher.
      since: the step from which on this holds, where a run goes on with other settings from there; else 0.
      before: what the steps until then cost; None if `since` is 0.
    """

    tokens_per_step: int
    flops_per_token: int
    teacher_flops_per_token: int = 0
    teacher_steps: int = 0
    since: int = 0
    before: StageCost | None = None

    def at(self, step: int) -> int:
        """FLOPs per token of one step, counted from 1, its teacher's included."""
        if self.before is not None and step <= self.since:
            return self.before.at(step)
        return self.flops_per_token + (self.teacher_flops_per_token if step <= self.teacher_steps else 0)

    def tokens(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        if self.before is None:
            return steps * self.tokens_per_step
        return self.before.tokens(min(steps, self.since)) + max(steps - self.since, 0) * self.tokens_per_step

    def teacher_flops(self, steps: int) -> int:
        """FLOPs of the teacher in the first `steps` steps."""
        first = self.since if self.before is not None else 0
        taught = max(min(steps, self.teacher_steps) - first, 0)
        own = self.tokens_per_step * taught * self.teacher_flops_per_token
        return own + (self.before.teacher_flops(min(steps, first)) if self.before is not None else 0)

    def flops(self, steps: int) -> int:
        """FLOPs of the first `steps` steps, the teacher's included."""
        return self._own_flops(steps) + self.teacher_flops(steps)

    def _own_flops(self, steps: int) -> int:
        if self.before is None:
            return steps * self.tokens_per_step * self.flops_per_token
        more = max(steps - self.since, 0) * self.tokens_per_step * self.flops_per_token
        return self.before._own_flops(min(steps, self.since)) + more

    def following(self, before: StageCost, since: int) -> StageCost:
        """This cost from the step `since` on, and another one until there."""
        if self[:4] == before[:4]:
            return before
        return self._replace(since=since, before=before) if since else self

    def record(self) -> dict[str, Any]:
        """The cost as JSON-able data."""
        before = None if self.before is None else self.before.record()
        return {**self._asdict(), "before": before}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> StageCost:
        """Reads what `record` returns.

        Raises:
          ValueError: a field is missing or has the wrong type; `where` is what the message calls the record.
        """
        known = dict(record)
        numbers = {name: field(known, name, int, where) for name in cls._fields if name != "before"}
        before = check(known.get("before"), (dict, type(None)), f"{where}: before")
        return cls(**numbers, before=None if before is None else cls.from_record(before, where))


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
