"""What a study is about: the target model, its data and its budget; and the recipes of scratch and of grown runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from flm_jax import costs
from flm_jax.config import ModelConfig
from flm_jax.data.config import DataConfig
from flm_jax.distillation import Teacher
from flm_jax.growth import Growth
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, ResolvedStage, Stage, resolve
from flm_jax.records import recorded
from flm_jax.records.fields import Count, Fraction, Name, Positive, Share, Size, one_of

SCHEDULES = ("wsd", "linear")
Schedule = Annotated[str, one_of(SCHEDULES)]


@dataclass(frozen=True)
@recorded
class Target:
    """The model that a study wants to reach, from scratch or by growth.

    Attributes:
      name: for results.
      model: its configuration.
      data: what it is trained on.
      batch_size: windows per step, in every stage of every run.
      tokens_per_param: tokens of a full run, per parameter of the target.
      warmup_steps: steps of warm-up at the start of every run.
      decay: the share of a run's tokens in which the rate decays linearly to zero (schedule wsd).
      optimizer: settings that all runs share; rate and schedule are what is tuned.
      measurements: held-out measurements along a full run.
      eval_windows: held-out windows per measurement.
    """

    name: Name
    model: ModelConfig
    data: DataConfig
    batch_size: Size
    tokens_per_param: Positive = 20.0
    warmup_steps: Count = 50
    decay: Share = 0.2
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    measurements: Size = 20
    eval_windows: Size = 512

    @property
    def params(self) -> int:
        """Parameters of the target, the embedding included."""
        return costs.param_count(self.model)

    def steps(self, tokens_per_param: float) -> int:
        """Optimizer steps for so many tokens per parameter of the target."""
        return max(round(tokens_per_param * self.params / (self.batch_size * self.data.context)), 1)

    def shape(self, **changes: Any) -> ModelConfig:
        """The target's configuration with some sizes changed, for a smaller or another model."""
        return self.model.changed(changes)


@dataclass(frozen=True)
@recorded
class Tuning:
    """The hyperparameters of a run that a study tunes.

    Attributes:
      rate: peak learning rate at the base width.
      schedule: wsd, or linear: to zero from the end of the warm-up on.
      optimizer: settings that differ from the target's, by field.
    """

    rate: Positive
    schedule: Schedule = "wsd"
    optimizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
@recorded
class GrowthPoint:
    """A growth at some point of a run.

    Attributes:
      at: the share of the run's tokens before it.
      growth: how the model grows.
      sizes: changes to the target's sizes after it; empty: it grows to the target.
    """

    at: Share
    growth: Growth
    sizes: Mapping[str, Size] = field(default_factory=dict)


@dataclass(frozen=True)
@recorded
class GrowthPlan:
    """A way to reach the target by growth.

    Attributes:
      start: changes to the target's sizes for the first model.
      points: its growths, in order.
      schedule: wsd or linear; empty: that of the best scratch run.
      optimizer: the name of the optimizer's settings in the study; empty: those of the best scratch run.
      rate: the peak rate, as a multiple of the tuned rate of scratch runs.
      frozen: the share of the run's tokens, from each growth on, in which only new entries train.
      teacher: what the model learns from after each growth, besides the text.
      seeds: number of runs; 0: that of the study.
    """

    start: Mapping[str, Size]
    points: Sequence[GrowthPoint]
    schedule: Annotated[str, one_of(("", *SCHEDULES))] = ""
    optimizer: str = ""
    rate: Positive = 1.0
    frozen: Fraction = 0.0
    teacher: Teacher | None = None
    seeds: Count = 1


@dataclass(frozen=True)
@recorded
class PlanGrid:
    """Every combination of some first models, times and growths, each as a plan with one growth to the target.

    Attributes:
      starts: changes to the target's sizes for the first model, by a name for each.
      times: shares of the tokens before the growth.
      growths: by a name for each.
      optimizers: as `GrowthPlan.optimizer`.
      schedules: as `GrowthPlan.schedule`.
      rates: as `GrowthPlan.rate`.
      frozen: as `GrowthPlan.frozen`.
      teacher: as `GrowthPlan.teacher`.
      seeds: as `GrowthPlan.seeds`.
    """

    starts: Mapping[str, Mapping[str, Size]]
    times: Sequence[Share]
    growths: Mapping[str, Growth]
    optimizers: Sequence[str] = ("",)
    schedules: Sequence[Annotated[str, one_of(("", *SCHEDULES))]] = ("",)
    rates: Sequence[Positive] = (1.0,)
    frozen: Fraction = 0.0
    teacher: Teacher | None = None
    seeds: Count = 1

    def plans(self, name: str) -> dict[str, GrowthPlan]:
        """The plans; each is named after the grid and what differs in it."""
        found = {}
        for start, at, growth in itertools.product(self.starts, self.times, self.growths):
            for optimizer, schedule, rate in itertools.product(self.optimizers, self.schedules, self.rates):
                given = [
                    *([optimizer] if len(self.optimizers) > 1 else []),
                    *([schedule] if len(self.schedules) > 1 else []),
                    *([f"rate{rate:g}"] if len(self.rates) > 1 else []),
                ]
                point = GrowthPoint(at, self.growths[growth])
                plan = GrowthPlan(
                    self.starts[start], (point,), schedule, optimizer, rate, self.frozen, self.teacher, self.seeds
                )
                found["-".join([name, start, f"{at:g}", growth, *given])] = plan
        return found


def run_recipe(
    target: Target,
    first: ModelConfig,
    tuning: Tuning,
    tokens_per_param: float,
    points: Sequence[GrowthPoint] = (),
    cuts: Sequence[float] = (),
    frozen: float = 0.0,
    teacher: Teacher | None = None,
) -> Recipe:
    """The recipe of one run, from scratch or with growths.

    With the schedule wsd, the stable part is cut into stages where growths are and where other runs branch off, so that
    runs which share it are trained once. Every decay begins at a border.

    Args:
      target: what the study is about.
      first: the model of the first stage.
      tuning: rate and schedule.
      tokens_per_param: tokens of the whole run, per parameter of the target.
      points: growths, in order.
      cuts: tokens per parameter of shorter runs that branch off the stable part.
      frozen: as `GrowthPlan.frozen`.
      teacher: as `GrowthPlan.teacher`.

    Raises:
      ValueError: a growth lies in the decay, or growths are not in order.
    """
    total = target.steps(tokens_per_param)
    decay = round(total * target.decay) if tuning.schedule == "wsd" else 0
    stable = total - decay
    grown = {round(total * point.at): point for point in points}
    if list(grown) != sorted(grown) or len(grown) < len(points):
        raise ValueError("Growths of a run must be in order, at different steps.")
    if grown and not 0 < min(grown) <= max(grown) < stable:
        raise ValueError(f"Growths of a run must be between its first step and step {stable}, where its decay begins.")
    rest = round(total * frozen)
    if frozen and not rest:
        raise ValueError(f"frozen={frozen:g} of {total} steps is less than one: give a larger share, or 0.")
    for at, end in itertools.pairwise([*grown, stable]):
        if rest and not at + rest < end:
            raise ValueError(
                f"frozen={frozen:g} lets old entries rest until step {at + rest} of the run, but at step {end} "
                f"{'its decay begins' if end == stable else 'it grows again'}: give a smaller share."
            )
    borders = {*grown, *(at + rest for at in grown)}
    if tuning.schedule == "wsd":
        whole = (target.steps(cut) for cut in cuts)
        borders |= {at for steps in whole if 0 < (at := steps - round(steps * target.decay)) < stable}
    starts = [0, *sorted(borders)]
    stages: list[Stage] = []
    model = first
    for start, end in zip(starts, [*starts[1:], stable], strict=True):
        point = grown.get(start)
        if point is not None:
            model = target.shape(**point.sizes)
        optimizer = _stable(target, tuning, start, total)
        new: dict[str, Any] = {} if point is None else {"growth": point.growth, "teacher": teacher}
        new |= {"train": "new"} if point is not None and frozen else {}
        stages.append(Stage(f"stage{len(stages)}", model, end - start, target.batch_size, optimizer, **new))
    if decay:
        down = dataclasses.replace(_settings(target, tuning), schedule="linear")
        stages.append(Stage("decay", model, decay, target.batch_size, down))
    return Recipe(
        stages=tuple(stages),
        data=target.data,
        eval_windows=target.eval_windows,
        eval_every=max(target.steps(target.tokens_per_param) // target.measurements, 1),
    )


def _settings(target: Target, tuning: Tuning) -> OptimizerConfig:
    """The optimizer's settings without a schedule."""
    rate: dict[str, Any] = {"learning_rate": tuning.rate, "schedule": "constant", "warmup_steps": 0}
    return dataclasses.replace(target.optimizer, **rate, **tuning.optimizer)


def _stable(target: Target, tuning: Tuning, start: int, total: int) -> OptimizerConfig:
    """The settings of a stage from step `start` of a run of `total` steps, before any decay of wsd."""
    settings = _settings(target, tuning)
    if not start:
        settings = dataclasses.replace(settings, warmup_steps=min(target.warmup_steps, total // 2))
    if tuning.schedule == "wsd":
        return settings
    return dataclasses.replace(settings, schedule="linear", decay_span=total, decay_passed=start)


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another initialisation and another order of the data."""
    return dataclasses.replace(recipe, seed=seed, data=dataclasses.replace(recipe.data, seed=seed))


def run_flops(recipe: Recipe) -> int:
    """FLOPs of all stages of a recipe."""
    return sum(stage_flops(stage, stage.steps, recipe.data.context) for stage in resolve(recipe))


def stage_flops(stage: ResolvedStage, steps: int, context: int) -> int:
    """FLOPs of the first steps of a stage: of the model, its teacher, and Muon's orthogonalisation.

    At the size of a pod the last is below a hundredth and no report counts it; for a model 64 wide it is a twentieth.
    """
    muon = stage.optimizer.name == "muon"
    extra = costs.orthogonalisation_flops(stage.cfg, stage.optimizer.newton_schulz_steps) if muon else 0
    return stage.cost(context).flops(steps) + round(steps * extra)
