"""How the loss of a grown run comes back to that of a scratch run, against the tokens since the growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flm_jax import costs
from flm_jax.savings.results import Result
from flm_jax.savings.study import best
from flm_jax.savings.summary import Summary


@dataclass(frozen=True)
class CatchUp:
    """The held-out loss of a grown run minus that of a scratch run of the target, at the same tokens.

    Both runs have the same learning rate at the same tokens, unless the growth re-warms it. So the gap is what it
    costs to have been small, and to grow.

    Attributes:
      name: of the plan.
      start: parameters of its first model.
      tokens: since the last growth, in rising order.
      gaps: there, in nats per token: the mean over the seeds that both runs have.
    """

    name: str
    start: int
    tokens: Sequence[float]
    gaps: Sequence[float]

    def at(self, tokens: float) -> float | None:
        """The gap so many tokens after the growth, between two measurements on a straight line; None beyond the end."""
        return float(np.interp(tokens, self.tokens, self.gaps)) if tokens <= self.tokens[-1] else None


def catch_ups(summary: Summary) -> list[CatchUp]:
    """One for each growth for which a scratch run with the same rates and tokens was measured."""
    found = []
    for row in summary.rows:
        scratch = _scratch_run(summary, row.name)
        if scratch is not None and (gaps := _gaps(row.result, scratch)):
            start = costs.param_count(row.result.stages[0].model)
            found.append(CatchUp(row.name, start, *zip(*gaps, strict=True)))
    return found


def _scratch_run(summary: Summary, name: str) -> Result | None:
    """The scratch run of the target with the rates and the tokens of a plan; None if the plan has another rate."""
    study, plan = summary.study, summary.study.all_plans[name]
    family = best(study, summary.results, plan.optimizer, plan.schedule)
    arm = family.arm(family.rate(summary.results), study.target.tokens_per_param)
    return summary.results[arm.name] if plan.rate == 1 else None


def _gaps(grown: Result, scratch: Result) -> list[tuple[float, float]]:
    """Tokens since the last growth, and the gap there."""
    last = max(number for number, stage in enumerate(grown.stages) if stage.growth is not None)
    losses = {run["seed"]: _curve(run) for run in scratch.runs}
    found: dict[int, list[float]] = {}
    for run in grown.runs:
        after = [entry for entry in run["evals"] if entry["stage"] >= last]
        if run["seed"] not in losses or not all(math.isfinite(entry["loss"]) for entry in after):
            continue
        for entry in after:
            gap = float(entry["loss"]) - float(np.interp(entry["tokens"], *losses[run["seed"]]))
            found.setdefault(entry["tokens"] - after[0]["tokens"], []).append(gap)
    return [(float(tokens), statistics.fmean(gaps)) for tokens, gaps in sorted(found.items())]


def _curve(run: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Tokens and losses of a run."""
    return [float(entry["tokens"]) for entry in run["evals"]], [float(entry["loss"]) for entry in run["evals"]]
