"""The run that another one forks from: its recipe, its data and one of its checkpoints, which are only read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_jax import report
from flm_jax.checkpoint import CheckpointError, read_manifest
from flm_jax.checkpoint.directory import Steps
from flm_jax.checkpoint.find import STAGES, stage_directory, step_directory
from flm_jax.checkpoint.manifest import read_blobs
from flm_jax.files import sha256_json
from flm_jax.guards import MEMORY
from flm_jax.records import DATA, RECIPE, completed
from flm_jax.records.foreign_json import check, field, read_json
from flm_jax.source_checkpoint import SourceCheckpoint, read_source


@dataclass(frozen=True)
class OldRun:
    """A run, and the checkpoint of it that another one begins with.

    Attributes:
      workdir: its work directory.
      recipe: its recipe.json, completed.
      digest: of recipe.json as it is, a sha256.
      data: its data.json: what identifies its data, its start and its teachers.
      index: place of the checkpoint's stage in the recipe.
      source: the checkpoint.
      history: of the run until there.
      position: in its data.
      memory: what its guards remember of the steps before.
    """

    workdir: Path
    recipe: Mapping[str, Any]
    digest: str
    data: Mapping[str, Any]
    index: int
    source: SourceCheckpoint
    history: dict[str, list[Any]]
    position: bytes
    memory: bytes | None

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The records of its stages."""
        return list(self.recipe["stages"])

    @property
    def stage(self) -> dict[str, Any]:
        """The record of the checkpoint's stage."""
        return self.stages[self.index]

    @property
    def step(self) -> int:
        """Steps of that stage."""
        return self.source.step

    def steps(self) -> list[int]:
        """The complete checkpoints of that stage."""
        return Steps(self.source.directory.parent).scan()[0]


def read_old(path: str | Path) -> OldRun:
    """Reads what a run records of itself and of a checkpoint: a step's directory, or the newest step of a stage or run.

    Raises:
      NoCheckpointError: there is none.
      CheckpointError: it does not lie in the work directory of a run, or is damaged.
      ValueError: a record of the run is not what a run writes.
    """
    step = step_directory(path)
    workdir = step.parent.parent.parent
    record = workdir / RECIPE
    if step.parent.parent.name != STAGES or not record.is_file():
        raise CheckpointError(
            f"{step} does not lie in the work directory of a run, with its {RECIPE}: give a checkpoint where it was "
            "written, or go on with its model alone by Recipe.start."
        )
    written = read_json(record, finite=False)
    recipe, where = completed(written), str(record)
    names = [
        field(check(stage, dict, f"{where}: a stage"), "name", str, f"{where}: a stage")
        for stage in field(recipe, "stages", list, where)
    ]
    folders = [stage_directory(number, name) for number, name in enumerate(names)]
    if step.parent.name not in folders:
        raise CheckpointError(f"{step} belongs to no stage of {where}, whose stages are {', '.join(folders)}.")
    source = read_source(step)
    blobs = read_blobs(step, read_manifest(step))
    history, position = report.read_run({"history": source.meta.history}, blobs, step)
    data = read_json(workdir / DATA, finite=False)
    index, memory = folders.index(step.parent.name), blobs.get(MEMORY)
    return OldRun(workdir, recipe, sha256_json(written), data, index, source, history, position, memory)
