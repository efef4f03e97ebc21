"""Runs the steps of a study and keeps its results."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from flm_jax.data.config import DataConfig
from flm_jax.data.source import open_data
from flm_jax.files import write_json
from flm_jax.records import DATA, differences
from flm_jax.records.foreign_json import read_json
from flm_jax.savings import results as kept
from flm_jax.savings.execute import How, train_all
from flm_jax.savings.results import Arm, Result
from flm_jax.savings.second_text import measure
from flm_jax.savings.snapshots import Snapshots
from flm_jax.savings.study import STEPS, Study, check, missing


def run_steps(study: Study, steps: Sequence[str], directory: Path, how: How) -> dict[str, Result]:
    """Trains what steps of a study still lack, and returns all results; each is also a file of `directory`.

    Args:
      study: what to compare.
      steps: names of `STEPS`, in their order.
      directory: of the results.
      how: how to train.

    Raises:
      ValueError: a run of the study is impossible, a step needs another one that has not come to its end, or a stage
        failed; or what is kept was trained on other data.
    """
    if steps:
        check(study)
    found, opened = kept.read(directory), False
    for step in steps:
        while True:
            arms = missing(list(STEPS[step](study, found)), found)
            if not opened:
                _open_data(study.target.data, (directory, how.snapshots.directory))
                opened = True
            if not arms:
                break
            recipes = [recipe for arm in arms for recipe in arm.recipes]
            print(f"{step}: {len(recipes)} runs: {', '.join(arm.name for arm in arms)}", flush=True)
            complete = train_all(recipes, how, functools.partial(_report, arms, directory, how.snapshots, found))
            for arm in arms:
                if (result := kept.collect(arm, how.snapshots)) is not None:  # with fewer seeds, if it was stopped
                    kept.write(directory, result)
                    found[arm.name] = result
            if not complete and how.late:
                return measure(study, found, directory, how.snapshots)
            if not complete:
                raise ValueError(
                    f"Step {step!r} lacks runs whose stages failed, as said above; the others are in {directory}. Mend "
                    "the cause, and the same command goes on."
                )
    return measure(study, found, directory, how.snapshots)


def _open_data(config: DataConfig, directories: Sequence[Path]) -> None:
    """Prepares the data, before several processes would at the same time, and checks whose runs directories hold.

    Recipes do not record where texts are nor what they hold, so each directory gets a file with their digests.

    Raises:
      ValueError: a directory holds runs on other data.
    """
    data = open_data(config)
    identity = {"digest": data.digest, "vocabulary": data.vocabulary.digest}
    for path in (directory / DATA for directory in directories):
        if not path.exists():
            write_json(path, identity)
        elif other := list(differences(read_json(path), identity)):
            raise ValueError(
                f"{path.parent} holds runs on other data: {'; '.join(other)}. Give this study a --workdir of its own "
                "and, if they were named, other --results."
            )


def _report(arms: Sequence[Arm], directory: Path, snapshots: Snapshots, found: dict[str, Result], line: str) -> None:
    """Prints a line about a stage that has ended, and keeps the result of each arm that has come to its end by it."""
    print(f"  {line}", flush=True)
    for arm in missing(arms, found):
        if all(snapshots.has(recipe, len(recipe.stages) - 1) for recipe in arm.recipes):
            result = kept.collect(arm, snapshots)
            assert result is not None
            kept.write(directory, result)
            found[arm.name] = result
            print(f"  {arm.name}: {', '.join(f'{loss:.4f}' for loss in result.losses)}", flush=True)
