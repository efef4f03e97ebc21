"""The steps of a study: which arms each one trains, given the results so far.

    tune      rates and schedules of scratch runs of the target
    baseline  for each optimizer the best of them, at several budgets: what runs of the same size reach
    frontier  scratch runs of other sizes, each with its own rate: what runs of the best size reach
    plans     the growths that are compared

The rates that later steps use are the best of what was measured before, so a study is determined by its configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flm_jax.data.corpora import FileCorpus, RowCorpus
from flm_jax.recipe import Recipe, resolve
from flm_jax.records import recorded
from flm_jax.records.fields import Positive, Size
from flm_jax.savings.results import Arm, Result
from flm_jax.savings.target import SCHEDULES, GrowthPlan, PlanGrid, Schedule, Target, Tuning, run_recipe

Results = Mapping[str, Result]
SecondText = FileCorpus | RowCorpus


@dataclass(frozen=True)
@recorded
class Study:
    """What a study compares.

    Attributes:
      target: the model to reach.
      plans: ways to reach it by growth, by a name for each; what comes before a name's first dash is its table.
      grids: more of them, as combinations, by the name of their table.
      optimizers: fields of `OptimizerConfig` that differ from the target's, by a name for them.
      rates: learning rates to begin with, in geometric steps; the range is extended until its best is inside.
      budgets: tokens per parameter of the baseline's runs, in rising order.
      schedules: of the baseline's runs.
      sizes: changes to the target's sizes for the frontier, by a name for each.
      seeds: runs of the baseline with the best optimizer.
      second_text: texts on whose held-out documents the last models are measured too; nothing is chosen by that. None:
        they are not.
    """

    target: Target
    plans: Mapping[str, GrowthPlan] = field(default_factory=dict)
    grids: Mapping[str, PlanGrid] = field(default_factory=dict)
    optimizers: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"adamw": {}})
    rates: Sequence[Positive] = (8e-3, 1.6e-2, 3.2e-2)
    budgets: Sequence[Positive] = (5.0, 10.0, 14.0, 20.0, 28.0)
    schedules: Sequence[Schedule] = SCHEDULES
    sizes: Mapping[str, Mapping[str, Size]] = field(default_factory=dict)
    seeds: Size = 3
    second_text: SecondText | None = None

    def __post_init__(self) -> None:
        if len(self.rates) < 2:
            raise ValueError(
                "Study.rates must be two or more, in geometric steps: the range is extended by their ratio."
            )
        if not self.schedules:
            raise ValueError("Study.schedules is empty.")
        if self.target.tokens_per_param not in self.budgets:
            raise ValueError(
                f"Study.budgets must hold the target's own, tokens_per_param={self.target.tokens_per_param:g}."
            )
        for name, plan in self.all_plans.items():
            if plan.schedule and plan.schedule not in self.schedules:
                raise ValueError(
                    f"Study.plans[{name!r}] has the schedule {plan.schedule!r}, for which no rate is tuned: add it to "
                    "Study.schedules."
                )
            if plan.optimizer and plan.optimizer not in self.optimizers:
                raise ValueError(
                    f"Study.plans[{name!r}] names the optimizer {plan.optimizer!r}; Study.optimizers has "
                    f"{', '.join(self.optimizers)}."
                )

    @property
    def all_plans(self) -> dict[str, GrowthPlan]:
        """`plans` and those of `grids`, by name."""
        found = dict(self.plans)
        for name, grid in self.grids.items():
            found |= grid.plans(name)
        return found


@dataclass(frozen=True)
class Baseline:
    """One family of scratch runs: a size, an optimizer and a schedule.

    Attributes:
      study: the study.
      size: "target", or a name of `Study.sizes`.
      optimizer: a name of `Study.optimizers`.
      schedule: wsd or linear.
    """

    study: Study
    size: str
    optimizer: str
    schedule: str

    def arm(self, rate: float, budget: float, seeds: int = 1) -> Arm:
        """The arm at some rate and budget, in tokens per parameter of the target."""
        study = self.study
        model = study.target.shape(**study.sizes.get(self.size, {}))
        tuning = Tuning(rate, self.schedule, study.optimizers[self.optimizer])
        cuts = [other for other in study.budgets if other < budget]
        recipe = run_recipe(study.target, model, tuning, budget, cuts=cuts)
        name = f"scratch-{self.size}-{self.optimizer}-{self.schedule}-{rate:g}-{budget:g}"
        return Arm(name, "scratch", recipe, tuple(range(seeds)))

    def search(self, results: Results) -> tuple[list[Arm], float | None]:
        """Arms at rising rates, at the full budget, and the best rate once it has a worse one on both sides."""
        rates = sorted(self.study.rates)
        factor = rates[1] / rates[0]
        while True:
            arms = [self.arm(rate, self.study.target.tokens_per_param) for rate in rates]
            if any(arm.name not in results or not results[arm.name].is_of(arm) for arm in arms):
                return arms, None
            at = min(range(len(arms)), key=lambda i: results[arms[i].name].losses[0])
            if 0 < at < len(arms) - 1:
                return arms, rates[at]
            rates = [rates[0] / factor, *rates] if at == 0 else [*rates, rates[-1] * factor]

    def rate(self, results: Results) -> float:
        """The best rate.

        Raises:
          ValueError: it is not known yet.
        """
        rate = self.search(results)[1]
        if rate is None:
            raise ValueError(
                f"The rate of {self.optimizer} with {self.schedule} is not known yet: run the step 'tune' first."
            )
        return rate

    def budgets(self, results: Results, seeds: int) -> list[Arm]:
        """The arms at the best rate, one per budget."""
        rate = self.rate(results)
        return [self.arm(rate, budget, seeds) for budget in self.study.budgets]


def baselines(study: Study) -> list[Baseline]:
    """The families of scratch runs of the target."""
    pairs = itertools.product(study.optimizers, study.schedules)
    return [Baseline(study, "target", optimizer, schedule) for optimizer, schedule in pairs]


def _families(study: Study, optimizer: str, schedule: str) -> list[Baseline]:
    """The families of scratch runs of the target, of one optimizer and schedule or (empty) of all."""
    return [
        family
        for family in baselines(study)
        if optimizer in ("", family.optimizer) and schedule in ("", family.schedule)
    ]


def best(study: Study, results: Results, optimizer: str = "", schedule: str = "") -> Baseline:
    """The family with the best tuned scratch run of the target, of one optimizer and schedule or (empty) of all.

    Raises:
      ValueError: the rate of one of them is not known yet.
    """
    budget = study.target.tokens_per_param
    return min(
        _families(study, optimizer, schedule),
        key=lambda family: results[family.arm(family.rate(results), budget).name].losses[0],
    )


def tune(study: Study, results: Results) -> Iterator[Arm]:
    """Scratch runs of the target at several rates, for each optimizer and schedule."""
    for family in baselines(study):
        yield from family.search(results)[0]


def baseline(study: Study, results: Results) -> Iterator[Arm]:
    """Scratch runs of the target at every budget, by the best schedule and rate of each optimizer.

    The best optimizer has runs with every seed, the others with one.
    """
    first = best(study, results).optimizer
    for optimizer in study.optimizers:
        seeds = study.seeds if optimizer == first else 1
        yield from best(study, results, optimizer).budgets(results, seeds)


def frontier(study: Study, results: Results) -> Iterator[Arm]:
    """Scratch runs of other sizes: rates at the full budget, then all budgets at the best rate."""
    for family in of_sizes(study, results)[1:]:
        arms, rate = family.search(results)
        yield from arms if rate is None else family.budgets(results, 1)


def of_sizes(study: Study, results: Results) -> list[Baseline]:
    """The families of the frontier, that of the target first, by the optimizer and schedule that are best for it."""
    first = best(study, results)
    return [first, *(dataclasses.replace(first, size=size) for size in study.sizes)]


def plans(study: Study, results: Results) -> Iterator[Arm]:
    """The growths."""
    for name, plan in study.all_plans.items():
        yield plan_arm(study, results, name, plan)


def plan_arm(study: Study, results: Results, name: str, plan: GrowthPlan) -> Arm:
    """The arm of a plan, at the tuned rate of scratch runs."""
    family = best(study, results, plan.optimizer, plan.schedule)
    return Arm(
        name, "plans", _plan_recipe(family, family.rate(results), name, plan), tuple(range(plan.seeds or study.seeds))
    )


def _plan_recipe(family: Baseline, rate: float, name: str, plan: GrowthPlan) -> Recipe:
    """The recipe of a plan with the optimizer and schedule of some scratch runs, given their rate."""
    study, target = family.study, family.study.target
    tuning = Tuning(plan.rate * rate, family.schedule, study.optimizers[family.optimizer])
    try:
        recipe = run_recipe(
            target,
            target.shape(**plan.start),
            tuning,
            target.tokens_per_param,
            plan.points,
            frozen=plan.frozen,
            teacher=plan.teacher,
        )
        resolve(recipe)  # what is wrong with a later stage is said before the first is trained
    except ValueError as error:
        raise ValueError(f"Study.plans[{name!r}]: {error}") from error
    return recipe


def check(study: Study) -> None:
    """Refuses a study some run of which is impossible, before anything is trained; rates are not known yet.

    Raises:
      ValueError: a size or a plan cannot be; the message names it.
    """
    for family in baselines(study):
        for size, budget in itertools.product(("target", *study.sizes), study.budgets):
            try:
                resolve(dataclasses.replace(family, size=size).arm(study.rates[0], budget).recipe)
            except ValueError as error:
                raise ValueError(f"A scratch run of {size!r} with {budget:g} tokens per parameter: {error}") from error
    for name, plan in study.all_plans.items():
        refused = []
        for family in _families(study, plan.optimizer, plan.schedule):  # the best of them is not known yet
            try:
                _plan_recipe(family, study.rates[0], name, plan)
                break
            except ValueError as error:
                refused.append(error)
        else:
            raise refused[0]


STEPS: Mapping[str, Callable[[Study, Results], Iterator[Arm]]] = {
    "tune": tune,
    "baseline": baseline,
    "frontier": frontier,
    "plans": plans,
}


def unmeasured(study: Study, results: Results) -> dict[str, int]:
    """How many arms of each step lack a result or seeds of it; a step whose rates are not known yet is left out."""
    found = {}
    for name, step in STEPS.items():
        with contextlib.suppress(ValueError):
            found[name] = len(missing(list(step(study, results)), results))
    return {name: count for name, count in found.items() if count}


def missing(arms: Sequence[Arm], results: Results) -> list[Arm]:
    """The arms that have no result for each of their seeds, each once, with the most seeds that are asked for.

    A result of another recipe, as an arm has after its rate was tuned again, does not count.
    """
    found: dict[str, Arm] = {}
    for arm in arms:
        result = results.get(arm.name)
        done = {run["seed"] for run in result.runs} if result is not None and result.is_of(arm) else set()
        if not done >= set(arm.seeds):
            most = max(arm.seeds, found[arm.name].seeds if arm.name in found else (), key=len)
            found[arm.name] = dataclasses.replace(arm, seeds=most)
    return list(found.values())
