"""What gin can set of a sweep: which bindings take which values, how many draws, which points go on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from flm_jax.records import recorded
from flm_jax.records.fields import Count, Seed, Share, one_of


@dataclass(frozen=True)
@recorded
class Range:
    """Numbers from one to another, to draw from.

    Attributes:
      low: the least.
      high: the greatest.
      scale: log (each factor is as likely as another) or linear.
      whole: whether only integers are drawn.
    """

    low: float
    high: float
    scale: Annotated[str, one_of(("log", "linear"))] = "log"
    whole: bool = False

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"Range.low={self.low:g} must be less than Range.high={self.high:g}.")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"Range.low={self.low:g} has no logarithm: take one above 0, or Range.scale = 'linear'.")
        if self.whole and math.ceil(self.low) > math.floor(self.high):
            raise ValueError(
                f"Range.whole: no integer lies between Range.low={self.low:g} and Range.high={self.high:g}."
            )


@dataclass(frozen=True)
@recorded
class Halving:
    """Successive halving: all points run briefly, the best of them longer, the best of those longer still (1603.06560).

    Each rung trains from the beginning: a learning rate that decays belongs to the length of its run, so a longer run
    is another run.

    Attributes:
      rungs: the bindings of each rung, such as [{'Stage.steps': 50}, {'Stage.steps': 200}].
      keep: the share of a rung's points that go on to the next one, rounded up.
    """

    rungs: Sequence[Mapping[str, Any]]
    keep: Share = 0.5

    def __post_init__(self) -> None:
        if len(self.rungs) < 2:
            raise ValueError("Halving.rungs must have two rungs or more: with one, nothing is halved.")
        names = [set(rung) for rung in self.rungs]
        if not names[0] or any(other != names[0] for other in names):
            raise ValueError("Halving.rungs must bind the same names in every rung, and at least one.")


@dataclass(frozen=True)
@recorded
class Sweep:
    """What varies between the runs of a recipe, and how they are compared.

    Values are written as in a gin file; references stand in quotes: '@zero/Growth()', '%vocabulary'.

    Attributes:
      points: sets of bindings that belong together, by a name for each set.
      axes: by binding, such as 'OptimizerConfig.learning_rate', its values or a Range. Every point takes every
        combination of them.
      draws: number of combinations of `axes` that are drawn at random; 0: all of them. More draws keep earlier ones.
      draw_seed: for the draws.
      seeds: values of Recipe.seed; every point runs once with each. Empty: once, with the recipe's own.
      halving: which points run longer; None: all run as the recipe says.
      measure: what is compared: a number in a run's report.json, by the path to it.
      goal: whether the least (min) or the greatest (max) is best.
    """

    points: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    axes: Mapping[str, Range | Sequence[Any]] = field(default_factory=dict)
    draws: Count = 0
    draw_seed: Seed = 0
    seeds: Sequence[Seed] = ()
    halving: Halving | None = None
    measure: str = "stages.-1.eval_loss"
    goal: Annotated[str, one_of(("min", "max"))] = "min"

    def __post_init__(self) -> None:
        if not (self.points or self.axes or self.seeds):
            raise ValueError("Sweep varies nothing: give it axes, points or seeds.")
        if empty := [name for name, values in self.axes.items() if not isinstance(values, Range) and not values]:
            raise ValueError(f"Sweep.axes[{empty[0]!r}] has no values.")
        if self.draws and not self.axes:
            raise ValueError(f"Sweep.draws={self.draws}, but there are no axes to draw from.")
        if not self.draws and (ranges := [name for name, values in self.axes.items() if isinstance(values, Range)]):
            raise ValueError(
                f"Sweep.axes[{ranges[0]!r}] is a Range, which has no end of values: set Sweep.draws to how many points "
                "to draw, or list the values."
            )
        self._check_once()

    def _check_once(self) -> None:
        """Checks that no binding is set in two places, where one would hide the other."""
        bound = {f"points[{name!r}]": set(bindings) for name, bindings in self.points.items()}
        others = {"axes": set(self.axes), "seeds": {"Recipe.seed"} if self.seeds else set()}
        others["halving"] = set(self.halving.rungs[0]) if self.halving else set()
        pairs = [(a, b) for a in (*bound, *others) for b in others if a != b]
        for a, b in pairs:
            if both := sorted(({**bound, **others}[a]) & others[b]):
                raise ValueError(f"{both[0]} is set by Sweep.{a} and by Sweep.{b}: leave it to one of them.")
