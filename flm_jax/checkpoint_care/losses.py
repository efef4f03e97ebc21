"""What the files of a work directory say of its stages: tokens per step, and the held-out losses that were measured."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flm_jax.checkpoint.find import stage_directory
from flm_jax.records import RECIPE, completed
from flm_jax.records.foreign_json import check, field, read_json
from flm_jax.tracking import METRICS, StageCost, read_fork, read_log


class Heldout(NamedTuple):
    """A held-out measurement: step of the stage, and the loss in nats per token, NaN if it was not finite."""

    step: int
    loss: float

    def record(self) -> dict[str, Any]:
        """The measurement, JSON-able."""
        return {"step": self.step, "loss": self.loss if math.isfinite(self.loss) else None}


# By name of a stage, in the order of steps.
Losses = Mapping[str, Sequence[Heldout]]


def tokens_of(workdir: Path) -> dict[str, tuple[int, StageCost]]:
    """By directory of a stage: tokens of the run before it, and what counts those of it; empty if there is no recipe.

    Raises:
      ValueError: the recipe is not what a run writes.
    """
    path = workdir / RECIPE
    if not path.is_file():
        return {}
    recipe, fork, found, before = completed(read_json(path, finite=False)), read_fork(workdir), {}, 0
    context = field(field(recipe, "data", dict, str(path)), "context", int, f"{path}: data")
    for number, entry in enumerate(field(recipe, "stages", list, str(path))):
        where = f"{path}: stage {number}"
        stage = check(entry, dict, where)
        name = field(stage, "name", str, where)
        steps, batch = (field(stage, key, int, where) for key in ("steps", "batch_size"))
        cost = StageCost(batch * context, 0)
        cost = cost if fork is None else fork.cost(name, cost)
        found[stage_directory(number, name)] = before, cost
        before += cost.tokens(steps)
    return found


def losses_of_log(workdir: Path) -> dict[str, list[Heldout]]:
    """The held-out losses in metrics.jsonl by stage, the latest of each step; empty if there is no such file.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is no measurement.
    """
    path = workdir / METRICS
    if not path.is_file():
        return {}
    found: dict[str, dict[int, float]] = {}
    for number, line in enumerate(read_log(path), 1):
        if line["kind"] == "heldout":
            loss = field(line, "loss", (float, type(None)), f"{path}, line {number},")
            found.setdefault(line["stage"], {})[line["stage_step"]] = math.nan if loss is None else loss
    return {stage: [Heldout(*item) for item in sorted(steps.items())] for stage, steps in found.items()}


def losses_of_record(meta: Mapping[str, Any], where: str) -> dict[str, list[Heldout]]:
    """The held-out losses in the record of a checkpoint, by stage: those of the run until then.

    Raises:
      ValueError: an entry is no measurement.
    """
    history = check(meta.get("history") or {}, dict, f"{where}: history")
    found: dict[str, dict[int, float]] = {}
    for number, entry in enumerate(check(history.get("evals", []), list, f"{where}: evals")):
        about = f"{where}: measurement {number}"
        kinds = {"stage": str, "step": int, "loss": float}
        stage, step, loss = (field(check(entry, dict, about), key, kind, about) for key, kind in kinds.items())
        found.setdefault(stage, {})[step] = loss
    return {stage: [Heldout(*item) for item in sorted(steps.items())] for stage, steps in found.items()}


def at_or_before(losses: Losses, stage: str, step: int) -> Heldout | None:
    """The measurement of a stage at a step, or the last one before it; None if there is none."""
    measured = losses.get(stage, ())
    place = bisect.bisect_right(measured, step, key=lambda one: one.step)
    return measured[place - 1] if place else None
