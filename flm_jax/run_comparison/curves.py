"""A run as curves: its stages, and its losses against FLOPs, tokens and wall clock."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flm_jax.config import ModelConfig
from flm_jax.tracking import StageCost, Totals


class Point(NamedTuple):
    """A loss at one step.

    Attributes:
      stage: name of the stage.
      stage_step: steps of the stage.
      step: steps over all stages.
      tokens: over all stages.
      flops: training FLOPs over all stages, each token at the cost of its own stage's model and teacher.
      seconds: wall clock, without the pauses between starts of the program; None if nothing recorded it.
      loss: nats per token.
      bits_per_byte: of held-out losses.
    """

    stage: str
    stage_step: int
    step: int
    tokens: int
    flops: int
    seconds: float | None
    loss: float
    bits_per_byte: float | None = None


class StageCurve(NamedTuple):
    """A stage of a run.

    Attributes:
      name: as the recipe gives it.
      model: its configuration.
      params: number of parameters.
      steps: planned optimizer steps.
      cost: what its steps cost.
      before: totals of the stages before.
      grown: the method of the growth that it begins with; None if it begins without.
    """

    name: str
    model: ModelConfig
    params: int
    steps: int
    cost: StageCost
    before: Totals
    grown: str | None

    def totals(self, step: int) -> Totals:
        """Totals of the run after `step` steps of the stage."""
        return self.before.plus(step, self.cost)


@dataclass(frozen=True)
class RunCurves:
    """What a work directory says about its run.

    Attributes:
      name: short, and different from that of other runs beside it.
      workdir: the work directory.
      stages: in order.
      heldout: held-out losses, in the order of steps.
      train: training losses, as often as they were logged.
      settings: the recipe and the digests of the data, by path.
      measured_on: what a held-out loss depends on besides the model: digests of text and vocabulary, window, windows.
      device: what the run trained on, such as '8 x TPU v5p'; of its last start. None if nothing recorded it.
      notes: sentences on what is missing, or counted otherwise than one may think.
    """

    name: str
    workdir: Path
    stages: tuple[StageCurve, ...]
    heldout: tuple[Point, ...]
    train: tuple[Point, ...]
    settings: Mapping[str, Any]
    measured_on: Mapping[str, Any]
    device: str | None
    notes: tuple[str, ...]

    @property
    def reached(self) -> Point:
        """The last point that was measured."""
        return max((*self.heldout[-1:], *self.train[-1:]), key=lambda point: point.step)

    @property
    def planned(self) -> int:
        """Steps of the recipe, all stages."""
        return sum(stage.steps for stage in self.stages)

    def growths(self) -> list[tuple[StageCurve, Point]]:
        """The stages that have begun with a growth, and the first held-out loss of each."""
        found = []
        for stage in self.stages:
            points = [point for point in self.heldout if point.stage == stage.name]
            if stage.grown is not None and points:
                found.append((stage, points[0]))
        return found


def loss_at(points: Sequence[Point], flops: float) -> float | None:
    """The loss at some FLOPs, linearly between the two measurements around it; None outside what was measured.

    What was measured before the first step is left out: between it and the next measurement a line means nothing. Where
    two losses belong to the same FLOPs, before and after a growth, it is the later one.
    """
    trained = [point for point in points if point.flops > 0]
    found = None
    for a, b in itertools.pairwise([*trained, *trained[-1:]]):
        if a.flops == flops:
            found = a.loss
        elif a.flops < flops < b.flops:
            found = a.loss + (b.loss - a.loss) * (flops - a.flops) / (b.flops - a.flops)
    return found


def envelope(points: Sequence[Point]) -> list[Point]:
    """The points whose loss is lower than that of all before; without what was measured before the first step."""
    found: list[Point] = []
    for point in points:
        if point.flops > 0 and (not found or point.loss < found[-1].loss):
            found.append(point)
    return found


def flops_to(points: Sequence[Point], loss: float) -> float | None:
    """The FLOPs at which a loss was first reached, linearly between points of the envelope.

    None if it was not reached, or already before the first measurement.
    """
    lowest = envelope(points)
    if lowest and lowest[0].loss == loss:
        return float(lowest[0].flops)
    for a, b in itertools.pairwise(lowest):
        if b.loss <= loss < a.loss:
            return a.flops + (b.flops - a.flops) * (a.loss - loss) / (a.loss - b.loss)
    return None
