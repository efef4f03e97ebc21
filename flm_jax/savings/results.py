"""The result of an arm of a study: its recipe and, per seed, every measurement, as one JSON file."""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_jax import costs
from flm_jax.files import atomic_write
from flm_jax.recipe import Recipe, Stage
from flm_jax.records import DATA, completed, from_dict
from flm_jax.savings.replicas import recipe_record
from flm_jax.savings.snapshots import Snapshots
from flm_jax.savings.target import run_flops, seeded


@dataclass(frozen=True)
class Arm:
    """One way to train, run with some seeds.

    Attributes:
      name: unique in a study; also the name of its file.
      step: the step of the study that asks for it first.
      recipe: with seed 0.
      seeds: of its runs.
    """

    name: str
    step: str
    recipe: Recipe
    seeds: tuple[int, ...] = (0,)

    @property
    def recipes(self) -> list[Recipe]:
        """The recipe of each seed."""
        return [seeded(self.recipe, seed) for seed in self.seeds]


@dataclass(frozen=True)
class Result:
    """What an arm reached.

    Attributes:
      name: of the arm.
      step: of the study.
      recipe: its record, with seed 0 (see `recipe_record`).
      runs: per seed: seed, evals (as in a `Snapshot`), seconds.
      params: parameters of the last model.
      tokens: of a run.
      flops: of a run, all stages together.
    """

    name: str
    step: str
    recipe: Mapping[str, Any]
    runs: tuple[Mapping[str, Any], ...]
    params: int
    tokens: int
    flops: int

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of its recipe."""
        return tuple(from_dict(stage) for stage in self.recipe["stages"])

    @property
    def rate(self) -> float:
        """The peak learning rate of its first stage."""
        return self.stages[0].optimizer.learning_rate

    def is_of(self, arm: Arm) -> bool:
        """Whether it is a result of this arm: of the same recipe, but for fields that recipes have gained since."""
        return bool(completed(self.recipe) == recipe_record(arm.recipe))

    @property
    def losses(self) -> list[float]:
        """The held-out loss of each run at its end; infinite if it diverged."""
        return [float(run["evals"][-1]["loss"]) for run in self.runs]

    @property
    def loss(self) -> float:
        """The mean of the losses."""
        return statistics.fmean(self.losses)

    def growths(self) -> list[tuple[float, float]]:
        """For each growth of each run: the loss right after it minus that before it, and the tokens of recovery.

        Tokens are counted until a measurement is no longer above the one before the growth; infinite: none was.
        """
        found = []
        for run in self.runs:
            evals = run["evals"]
            for number, (before, after) in enumerate(itertools.pairwise(evals)):
                if after["stage"] > before["stage"] and after["step"] == 0:
                    back = next((e for e in evals[number + 1 :] if e["loss"] <= before["loss"]), None)
                    tokens = math.inf if back is None else back["tokens"] - before["tokens"]
                    found.append((float(after["loss"]) - float(before["loss"]), float(tokens)))
        return found

    def record(self) -> dict[str, Any]:
        """The fields as JSON-able data."""
        fields = {"name": self.name, "step": self.step, "recipe": dict(self.recipe)}
        numbers = {"params": self.params, "tokens": self.tokens, "flops": self.flops}
        return {**fields, **numbers, "runs": [_finite(run) for run in self.runs]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Result:
        """Reads what `record` returns."""
        runs = tuple(_infinite(run) for run in record["runs"])
        numbers = record["params"], record["tokens"], record["flops"]
        return cls(record["name"], record["step"], record["recipe"], runs, *numbers)


def collect(arm: Arm, snapshots: Snapshots) -> Result | None:
    """The result of an arm from what is kept of it; None if no run has come to its end."""
    last = len(arm.recipe.stages) - 1
    runs = []
    for seed, recipe in zip(arm.seeds, arm.recipes, strict=True):
        if snapshots.has(recipe, last):
            about = snapshots.about(recipe, last)
            runs.append({"seed": seed, "evals": about["evals"], "seconds": round(about["seconds"], 1)})
    if not runs:
        return None
    model = arm.recipe.stages[-1].model
    tokens = sum(stage.steps * stage.batch_size for stage in arm.recipe.stages) * arm.recipe.data.context
    numbers = costs.param_count(model), tokens, run_flops(arm.recipe)
    return Result(arm.name, arm.step, recipe_record(arm.recipe), tuple(runs), *numbers)


def write(directory: Path, result: Result) -> None:
    """Writes a result into a directory, under the arm's name."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in result.record().items())
    atomic_write(directory / f"{result.name}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def read(directory: Path) -> dict[str, Result]:
    """All results of a directory, by name.

    Raises:
      ValueError: a file is not as `write` writes it.
    """
    found = {}
    for path in sorted(directory.glob("*.json")):
        if path.name == DATA:
            continue
        try:
            result = Result.from_record(json.loads(path.read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the result of an arm: {error}.") from error
        found[result.name] = result
    return found


def _finite(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run with null for infinite losses, which JSON does not have."""
    evals = [{**entry, "loss": entry["loss"] if math.isfinite(entry["loss"]) else None} for entry in run["evals"]]
    return {**run, "evals": evals}


def _infinite(run: Mapping[str, Any]) -> dict[str, Any]:
    evals = [{**entry, "loss": math.inf if entry["loss"] is None else entry["loss"]} for entry in run["evals"]]
    return {**run, "evals": evals}
