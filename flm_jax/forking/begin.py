"""How a run begins that forks from another one: what it begins with, what it records, what it checks.

Until the new work directory has a checkpoint of its own, every start of the program begins from the other run again;
from then on that run is not read any more, and may be deleted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_jax.checkpoint import Checkpoints
from flm_jax.checkpoint.directory import Steps
from flm_jax.checkpoint.find import STAGES, every_stage, stage_directory, step_directory
from flm_jax.checkpoint_care import copy_checkpoint
from flm_jax.data.batches import StageNeed
from flm_jax.data.carrying import carried, small_position
from flm_jax.data.source import Data
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.distributed import is_primary
from flm_jax.files import write_json
from flm_jax.forking.changes import (
    Difference,
    check_allowed,
    data_differences,
    rate_notes,
    recipe_differences,
)
from flm_jax.forking.old import OldRun, read_old
from flm_jax.recipe import Recipe, ResolvedStage, begin
from flm_jax.records import DATA, FORK, RECIPE, as_dict, write_identity
from flm_jax.run_comparison import stage_costs
from flm_jax.source_checkpoint import SourceCheckpoint
from flm_jax.state import TrainState
from flm_jax.step import StageProgram
from flm_jax.tracking import ForkRecord, read_fork

# Of what identifies the data, that on which a held-out loss depends.
_HELD_OUT = ("digest", "vocabulary", "context")
# Of a stage, what moves its losses gradually, or not at all.
_SLOW = ("steps", "optimizer", "accumulate")


@dataclass(frozen=True)
class Fork:
    """A fork that is about to begin.

    Attributes:
      old: the run that it goes on from.
      asked: the path that was given.
      stage: the stage that goes on, with its new settings.
      differences: what the recipe changes.
      notes: sentences about the learning rate.
    """

    old: OldRun
    asked: str
    stage: ResolvedStage
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Checks that ids mean the same text as in the old run.

        Raises:
          ValueError: the vocabulary is another one.
        """
        where = self.old.source.directory
        if (theirs := self.old.data.get("vocabulary")) != vocabulary.digest:
            raise ValueError(
                f"This recipe cannot go on from {where}: the vocabulary has the digest {str(theirs)[:12]} there and "
                f"{vocabulary.digest[:12]} here, so ids would mean other text. Set DataConfig.vocabulary = "
                f"@Pretrained() and Pretrained.path = {str(where)!r}."
            )

    def record(self, data: Data, identity: Mapping[str, Any], eval_windows: int) -> tuple[ForkRecord, bytes | None]:
        """What is recorded of the fork, and where the data goes on; None: at its start.

        Args:
          data: the new run's, with the vocabulary of the old one (`check_vocabulary`).
          identity: what identifies it, as data.json records it.
          eval_windows: the new recipe's.
        """
        old = self.old
        found = carried(old.position, data.train(self.stage.source_weights))
        notes = [*self.notes, found.note]
        if not self._same_heldout(identity, eval_windows):
            notes.append(
                "The held-out loss is measured on other text from here on, or with other weights or another packing."
            )
        record = ForkRecord(
            checkpoint=str(old.source.directory),
            asked=self.asked,
            stage=self.stage.name,
            step=old.step,
            digest=old.source.digest,
            recipe=old.digest,
            changes=tuple(one.change() for one in (*self.differences, *data_differences(old, identity))),
            notes=tuple(notes),
            position=small_position(found.state),
            costs=stage_costs(old.workdir, old.index + 1),
        )
        return record, found.state

    def restore(self, program: StageProgram) -> TrainState:
        """The state of the checkpoint on the stage's mesh, with every bit checked.

        Raises:
          CheckpointError: it is damaged, or does not fit the model.
        """
        step = self.old.source.directory
        with Checkpoints(step.parent, read_only=True) as store:
            state: TrainState = store.restore(program.abstract_state, step.name).state
        return state

    def history(self, record: ForkRecord) -> dict[str, list[Any]]:
        """The measurements, growths and skipped steps of the old run until there, and the forks that led here."""
        before = self.old.history
        return {**before, "forks": [*before.get("forks", []), record.record()]}

    def measured(self, identity: Mapping[str, Any], eval_windows: int) -> dict[str, Any] | None:
        """The old run's held-out measurement at the checkpoint, if it has one and the text is the same."""
        if not self._same_heldout(identity, eval_windows):
            return None
        place = self.stage.name, self.old.step
        return next((e for e in reversed(self.old.history["evals"]) if (e["stage"], e["step"]) == place), None)

    def memory(self, identity: Mapping[str, Any]) -> bytes | None:
        """What the old run's guards remember; None if other spikes are looked for, or losses are not comparable.

        Compared with those of other data or other batches, good steps would be spikes.
        """
        differ = any(self._moves_losses(one) for one in self.differences) or any(data_differences(self.old, identity))
        return None if differ else self.old.memory

    def _moves_losses(self, one: Difference) -> bool:
        """Whether a difference moves or spreads losses and gradients at once, or changes what a spike is."""
        if one.path[0] == "stages":
            return one.path[1] == self.stage.name and one.path[2] not in _SLOW
        # Another way to name the same vocabulary: another vocabulary is refused.
        return one.path[0] in ("data", "spike_guard") and one.path[1:2] != ("vocabulary",)

    @property
    def provenance(self) -> dict[str, Any] | None:
        """What led to step 0 of the stage, if the checkpoint is that step."""
        found = self.old.source.meta.provenance
        return None if found is None else dict(found)

    def claim(self, workdir: Path, recipe: Recipe, identity: Mapping[str, Any], record: ForkRecord) -> None:
        """Records in the new work directory what it belongs to, in process 0.

        If the stage goes on with a teacher that is the model it grew from, that one's checkpoint is copied.

        Raises:
          CheckpointError, OSError: the copy cannot be made.
        """
        if not is_primary():
            return
        write_json(workdir / FORK, record.record())
        write_identity(workdir, RECIPE, as_dict(recipe))
        write_identity(workdir, DATA, identity)
        grown_from = self.stage.teacher is not None and self.stage.teacher.source is None and self.stage.index > 0
        if grown_from and self.old.step < self.stage.teacher_steps:
            before = self.old.stages[self.old.index - 1]
            folder, step = stage_directory(self.old.index - 1, before["name"]), str(before["steps"])
            if not (target := workdir / STAGES / folder / step).exists():
                copy_checkpoint(self.old.workdir / STAGES / folder / step, target)

    def _same_heldout(self, identity: Mapping[str, Any], eval_windows: int) -> bool:
        same = all(self.old.data.get(name) == identity.get(name) for name in _HELD_OUT)
        packed = any(one.path[:2] == ("data", "packing") for one in self.differences)
        return same and not packed and self.old.recipe.get("eval_windows") == eval_windows


def located(workdir: Path, asked: str | Path | None) -> str | None:
    """The checkpoint of another run that a work directory is to begin with; None: it needs none.

    It needs none if no fork is asked for, or if it has a checkpoint of its own already.

    Args:
      workdir: the new work directory.
      asked: a step's directory, or that of a stage or a work directory, whose newest step is taken; None: none is asked
        for, and a work directory that is a fork is one still.

    Raises:
      ValueError: the work directory belongs to a run that is no fork, or is a fork of another one.
      CheckpointError: there is no such checkpoint.
    """
    record = read_fork(workdir)
    path = None if asked is None else Path(asked).expanduser().absolute()
    if record is None:
        if path is None:
            return None
        if (workdir / RECIPE).exists():
            raise ValueError(
                f"{workdir} holds a run that did not begin with --fork={asked}; give a new --workdir, or leave --fork "
                "out to go on with the run there."
            )
    elif _has_own(workdir, record):
        if path is not None and path.resolve() not in (Path(record.asked).resolve(), Path(record.checkpoint).resolve()):
            raise ValueError(
                f"{workdir} holds a fork of {record.checkpoint}, and --fork={asked} names another one; give a new "
                "--workdir, or leave --fork out to go on with the run there."
            )
        return None
    step = step_directory(record.checkpoint if path is None and record is not None else str(path))
    inside, new = step.resolve().parent.parent.parent, workdir.resolve()
    if (inside / RECIPE).is_file() and new.is_relative_to(inside):
        raise ValueError(
            f"--workdir={workdir} lies in {inside}, the run to fork from, where nothing is written; give another one."
        )
    return str(step)


def _has_own(workdir: Path, record: ForkRecord) -> bool:
    """Whether a fork has a checkpoint of its own, besides that of a teacher in an earlier stage."""
    folders = every_stage(workdir) if (workdir / STAGES).is_dir() else []
    places = [number for number, folder in enumerate(folders) if folder.name.partition("_")[2] == record.stage]
    return any(Steps(folder).scan()[0] for folder in folders[places[0] :]) if places else False


def planned(
    recipe: Recipe,
    stages: Sequence[ResolvedStage],
    source: SourceCheckpoint | None,
    step: str,
    asked: str | Path | None,
) -> Fork:
    """The fork of a run from one of its checkpoints, checked as far as the recipe goes.

    Args:
      recipe: the new run's.
      stages: its stages.
      source: the checkpoint that it starts with, by `Recipe.start`, if any.
      step: the directory of the checkpoint to fork from.
      asked: the path that was given for it.

    Raises:
      ValueError: the recipe cannot go on from there; the message names fields, and both values.
      CheckpointError: the checkpoint is damaged, or is not that of a run.
    """
    old = read_old(step)
    found = recipe_differences(old, recipe)
    check_allowed(old, stages, source, found)
    path = step if asked is None else str(Path(asked).expanduser().absolute())
    stage = stages[old.index]
    return Fork(old, path, stage, tuple(found), tuple(rate_notes(old, stage)))


def preview(recipe: Recipe, asked: str | Path) -> Iterator[str]:
    """What a fork would begin with and change, as lines; neither data nor arrays are read.

    Raises:
      ValueError, CheckpointError: as `planned`.
    """
    source, stages = begin(recipe)
    fork = planned(recipe, stages, source, str(step_directory(asked)), asked)
    where, digest = fork.old.source.directory, fork.old.source.digest[:12]
    yield f"\nForks from {where} (digest {digest}): step {fork.old.step} of stage {fork.stage.name!r}."
    yield from (f"  {one.change()}" for one in fork.differences)
    yield from fork.notes


def with_fork(stages: Sequence[ResolvedStage], record: ForkRecord | None) -> tuple[ResolvedStage, ...]:
    """The stages of a run that has forked as the record says, which counts what was spent before."""
    return tuple(dataclasses.replace(stage, fork=record) for stage in stages)


def place(stages: Sequence[ResolvedStage], record: ForkRecord) -> int:
    """The index of the stage that a fork goes on with."""
    return next(stage.index for stage in stages if stage.name == record.stage)


def needs(stages: Sequence[ResolvedStage], record: ForkRecord | None) -> list[StageNeed]:
    """What the stages read; of the stage that a fork goes on with, what is left of it."""
    found = [StageNeed(s.name, s.steps, s.batch_size, s.source_weights) for s in stages]
    if record is None:
        return found
    first, *rest = found[place(stages, record) :]
    return [first._replace(steps=first.steps - record.step, since=record.step), *rest]
