"""What a study has found: the baseline, its noise, the frontier, and for each growth its two ratios."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flm_jax.growth.lineage import Lineage
from flm_jax.savings.fit import Frontier, Point, Ratio, fit_frontier, frontier_ratio, pooled_noise, same_size_ratio
from flm_jax.savings.results import Result
from flm_jax.savings.study import Baseline, Study, baselines, best, of_sizes


@dataclass(frozen=True)
class GrownRow:
    """What a growth reached, against runs from scratch.

    Attributes:
      name: of the plan.
      result: of its arm.
      preserving: whether all its growths promise to preserve the function.
      same_size: FLOPs of scratch runs of the target with the same optimizer, at its loss, divided by its own.
      best_optimizer: the same against the best optimizer.
      frontier: FLOPs of the best scratch run of any size, divided by its own.
      gain: the loss of a scratch run with the same FLOPs, minus its own, in nats per token.
      equal_tokens: FLOPs of a scratch run of the target with the same tokens, divided by its own: the same-size ratio
        of a growth that reaches the loss of that run.
    """

    name: str
    result: Result
    preserving: bool
    same_size: Ratio | None
    best_optimizer: Ratio | None
    frontier: Ratio | None
    gain: float | None
    equal_tokens: float | None


@dataclass(frozen=True)
class Summary:
    """What a study has found so far.

    Attributes:
      study: the study.
      results: of all arms; by these rates, schedules and optimizers were chosen.
      noise: standard deviation of a run's loss over seeds, pooled over the arms that ran with several; 0 if none did.
      scratch: by optimizer, for each budget the best of its schedules.
      others: what the frontier is fitted to: scratch runs of all sizes, by the best optimizer and schedule.
      frontier: fitted to them; None if there are too few.
      rows: a row per growth that has come to its end.
    """

    study: Study
    results: Mapping[str, Result]
    noise: float
    scratch: Mapping[str, Sequence[Point]]
    others: Sequence[Point]
    frontier: Frontier | None
    rows: Sequence[GrownRow]

    @property
    def best_scratch(self) -> list[Point]:
        """For each budget the best of all optimizers."""
        return lowest([point for points in self.scratch.values() for point in points])


def lowest(points: Sequence[Point]) -> list[Point]:
    """For each budget, the point with the lowest loss."""
    found: dict[float, Point] = {}
    for point in points:
        if point.tokens not in found or point.loss < found[point.tokens].loss:
            found[point.tokens] = point
    return [found[tokens] for tokens in sorted(found)]


def point_of(result: Result) -> Point:
    """The point of a scratch run."""
    return Point(result.params, result.tokens, result.flops, result.loss, len(result.runs))


def family_points(family: Baseline, results: Mapping[str, Result], measured: Mapping[str, Result]) -> list[Point]:
    """What was measured of a family at its best rate by the results, as far as it is there and did not diverge."""
    if family.search(results)[1] is None:
        return []
    arms = family.budgets(results, 1)
    points = [point_of(measured[arm.name]) for arm in arms if arm.name in measured]
    return [point for point in points if math.isfinite(point.loss)]


def loss_at(points: Sequence[Point], flops: float) -> float | None:
    """The loss of scratch runs of one size with so many FLOPs, interpolated in their logarithm; None outside."""
    ordered = sorted(points, key=lambda point: point.flops)
    for before, after in itertools.pairwise(ordered):
        if before.flops <= flops <= after.flops:
            part = math.log(flops / before.flops) / math.log(after.flops / before.flops)
            return before.loss + part * (after.loss - before.loss)
    return None


def summarise(study: Study, results: Mapping[str, Result], measured: Mapping[str, Result] | None = None) -> Summary:
    """The summary of a study's results so far.

    Args:
      study: the study.
      results: by these rates, schedules and optimizers are chosen.
      measured: what is summarised, such as losses on a text that nothing is chosen by; None: the results.
    """
    measured = results if measured is None else measured
    losses = [[loss for loss in r.losses if math.isfinite(loss)] for r in measured.values()]
    noise = pooled_noise(losses) or 0.0
    scratch: dict[str, list[Point]] = {}
    for family in baselines(study):
        points = family_points(family, results, measured)
        scratch[family.optimizer] = lowest([*scratch.get(family.optimizer, []), *points])
    others: list[Point] = []
    tuned = all(family.search(results)[1] is not None for family in baselines(study))
    if tuned:
        for family in of_sizes(study, results):
            others += family_points(family, results, measured)
    try:
        fitted = fit_frontier(others)
    except ValueError:
        fitted = None
    found = Summary(study, results, noise, scratch, others, fitted, ())
    names = [name for name in study.all_plans if tuned and name in measured]
    return dataclasses.replace(found, rows=[_row(found, name, measured[name]) for name in names])


def _row(summary: Summary, name: str, result: Result) -> GrownRow:
    study = summary.study
    plan, noise = study.all_plans[name], summary.noise
    own = summary.scratch[plan.optimizer or best(study, summary.results).optimizer]
    about = (result.loss, result.flops, noise, len(result.runs))
    finite = math.isfinite(result.loss)
    scratch_loss = loss_at(own, result.flops)
    as_long = next((point.flops for point in own if point.tokens == result.tokens), None)
    return GrownRow(
        name,
        result,
        preserving(result),
        same_size_ratio(own, *about) if finite and own else None,
        same_size_ratio(summary.best_scratch, *about) if finite and own else None,
        frontier_ratio(summary.others, *about) if finite and summary.frontier else None,
        scratch_loss - result.loss if finite and scratch_loss is not None else None,
        None if as_long is None else as_long / result.flops,
    )


def preserving(result: Result) -> bool:
    """Whether all growths of a run promise to preserve the function."""
    lineage: Lineage | None = None
    promises = []
    for stage in result.stages:
        if lineage is None or stage.growth is None:
            lineage = lineage or Lineage(stage.model)
        else:
            lineage = lineage.grown(stage.model, stage.growth)
            promises.append(lineage.preserving)
    return all(promises)


def spread(losses: Sequence[float]) -> str:
    """A mean with its standard deviation over seeds, as text."""
    if not all(map(math.isfinite, losses)):
        return "diverged"
    mean = f"{statistics.fmean(losses):.4f}"
    return mean if len(losses) < 2 else f"{mean} ± {statistics.stdev(losses):.4f}"
