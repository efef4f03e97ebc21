"""What a run that forked from another one records of it, in fork.json and in the history of its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flm_jax.records import FORK
from flm_jax.records.foreign_json import check, field, read_json
from flm_jax.tracking.writer import StageCost

# Characters of a value in a sentence or a table.
_WIDE = 60


class Change(NamedTuple):
    """A setting that differs from the run before; a value is as records hold it, None where there is no such setting.

    Attributes:
      field: its path, such as 'stages.first.batch_size'.
      old: its value there.
      new: its value from the fork on.
    """

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {shown(self.old)} -> {shown(self.new)}"


@dataclass(frozen=True)
class ForkRecord:
    """Where a run has forked from, and what is different since.

    Attributes:
      checkpoint: the directory of the step that it began with, of the other run.
      asked: the path that was given, which may be that of the other run's work directory.
      stage: the stage's name.
      step: of the stage.
      digest: of the checkpoint's state, a sha256.
      recipe: of the other run's recipe.json, a sha256.
      changes: the settings that differ.
      notes: sentences about the learning rate, the data and the held-out losses from the fork on.
      position: where the data began, as its batches record it; None: at its start, or where seqio reads it.
      costs: by name of a stage that the other run had begun, what its steps cost there.
    """

    checkpoint: str
    asked: str
    stage: str
    step: int
    digest: str
    recipe: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    position: Mapping[str, Any] | None
    costs: Mapping[str, StageCost]

    def record(self) -> dict[str, Any]:
        """The fields as JSON-able data."""
        changes = [change._asdict() for change in self.changes]
        costs = {name: cost.record() for name, cost in self.costs.items()}
        return {**vars(self), "changes": changes, "notes": list(self.notes), "costs": costs}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str) -> ForkRecord:
        """Reads what `record` returns.

        Raises:
          ValueError: a field is missing or has the wrong type; `where` is what the message calls the record.
        """
        known = dict(record)
        texts = {name: field(known, name, str, where) for name in ("checkpoint", "asked", "stage", "digest", "recipe")}
        step = field(known, "step", int, where)
        if step < 0:
            raise ValueError(f"{where}: the step is {step}")
        changes = []
        for number, entry in enumerate(field(known, "changes", list, where)):
            about = f"{where}: change {number}"
            one = check(entry, dict, about)
            changes.append(Change(field(one, "field", str, about), one.get("old"), one.get("new")))
        notes = tuple(check(note, str, f"{where}: a note") for note in field(known, "notes", list, where))
        costs = {
            name: StageCost.from_record(
                check(cost, dict, f"{where}: the cost of {name}"), f"{where}: the cost of {name}"
            )
            for name, cost in field(known, "costs", dict, where).items()
        }
        position = field(known, "position", (dict, type(None)), where)
        return cls(**texts, step=step, changes=tuple(changes), notes=notes, position=position, costs=costs)

    @property
    def begun(self) -> bytes | None:
        """Where the data began, for `TokenBatches.restore`; None: at its start, or where seqio reads it."""
        return None if self.position is None else json.dumps(self.position).encode()

    def sentence(self) -> str:
        """Where the run has forked from."""
        return f"Forked from {self.checkpoint} (digest {self.digest[:12]}): step {self.step} of stage {self.stage!r}."

    def lines(self) -> list[str]:
        """Where the run has forked from, what is different since, and what else there is to say, a line for each."""
        return [self.sentence(), *(f"  {change}" for change in self.changes or ("nothing is changed",)), *self.notes]

    def cost(self, name: str, own: StageCost) -> StageCost:
        """The cost of a stage, whose steps until the fork cost what they cost in the other run."""
        if name not in self.costs:
            return own
        return own.following(self.costs[name], self.step) if name == self.stage else self.costs[name]


def read_fork(workdir: Path) -> ForkRecord | None:
    """What a work directory records of the run that it has forked from; None if it is no fork.

    Raises:
      OSError: its fork.json cannot be read.
      ValueError: that file is not what a run writes.
    """
    path = workdir / FORK
    return ForkRecord.from_record(read_json(path), str(path)) if path.is_file() else None


def recorded_forks(history: Mapping[str, Any], where: str) -> tuple[ForkRecord, ...]:
    """The forks in the history of a checkpoint, the oldest first.

    Raises:
      ValueError: an entry is not what a run writes.
    """
    found: Sequence[Any] = check(history.get("forks", []), list, f"{where}: forks")
    return tuple(
        ForkRecord.from_record(check(entry, dict, f"{where}: fork {number}"), f"{where}: fork {number}")
        for number, entry in enumerate(found)
    )


def shown(value: Any) -> str:
    """A value in a sentence: a configuration by its class, a list of them by its length; '-' for none."""
    if isinstance(value, Mapping) and "class" in value:
        return f"a {value['class']}"
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return f"{len(value)} of them"
    text = "-" if value is None else repr(value)
    return text if len(text) <= _WIDE else f"{text[: _WIDE - 3]}..."
