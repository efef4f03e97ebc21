"""Deletes checkpoints of a work directory, except those that a rule keeps.

Kept are always the first and the last complete checkpoint of each stage: a run goes on from the last one, and the next
stage has grown from it. Which others are kept does not depend on what was deleted before, so the same command again
deletes nothing more, and one that was killed is finished by it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_jax.checkpoint.directory import Steps, locked
from flm_jax.checkpoint.find import STAGES
from flm_jax.checkpoint_care.listing import UNFINISHED, Entry, Listing, list_checkpoints, stage_folders
from flm_jax.records import counted


@dataclass(frozen=True)
class Fate:
    """What becomes of a checkpoint.

    Attributes:
      entry: the checkpoint.
      kept: why it is kept, such as 'first, multiple of 100'; '' if it is deleted.
    """

    entry: Entry
    kept: str


@dataclass(frozen=True)
class Pruning:
    """What `prune` deletes or, in a dry run, would delete.

    Attributes:
      listing: what lay there before.
      fates: of each checkpoint, and of what is unfinished, if nobody writes there; not of damaged ones, which stay.
      notes: sentences on what is to be known.
    """

    listing: Listing
    fates: tuple[Fate, ...]
    notes: tuple[str, ...]

    @property
    def deleted(self) -> list[Entry]:
        """What is deleted."""
        return [fate.entry for fate in self.fates if not fate.kept]

    @property
    def kept(self) -> list[Entry]:
        """What is kept, damaged ones apart."""
        return [fate.entry for fate in self.fates if fate.kept]

    def record(self) -> dict[str, Any]:
        """The fates, JSON-able."""
        found = [{**fate.entry.record(), "kept": fate.kept or None} for fate in self.fates]
        sizes = {what: sum(one.bytes for one in getattr(self, what)) for what in ("deleted", "kept")}
        return {"path": str(self.listing.path), "bytes": sizes, "notes": list(self.notes), "checkpoints": found}


def prune(
    workdir: str | Path,
    every: int | None = None,
    best: int | None = None,
    *,
    delete: bool = False,
    before: Callable[[Pruning], None] = lambda _: None,
) -> Pruning:
    """Deletes all complete checkpoints of a work directory but those to keep, and what killed runs left unfinished.

    A checkpoint loses its name before its first file is deleted, so that half of one never passes for a whole one,
    wherever the process is killed.

    Args:
      workdir: the work directory of a run, or of a growth or an import.
      every: keep the steps that are multiples of this; None: none for that reason.
      best: of each stage, keep so many steps with the lowest held-out loss measured at that very step.
      delete: whether anything is deleted; otherwise this is a dry run, and takes no lock.
      before: called with what is to be deleted, under the lock, before the first deletion.

    Raises:
      ValueError: `every` or `best` is too small, both are None, or the directory is no work directory.
      NoCheckpointError: there is no such directory, or it holds no checkpoint.
      CheckpointError: a run writes there.
    """
    if every is None and best is None:
        raise ValueError("Say what to keep besides the first and last checkpoint of each stage: --every=N, --best=K.")
    if every is not None and every < 1:
        raise ValueError(f"--every={every}: steps that are multiples of it are kept, so it must be at least 1.")
    if best is not None and best < 0:
        raise ValueError(f"--best={best}: so many checkpoints are kept, so it must be at least 0.")
    path = Path(workdir).expanduser().absolute()
    folders, around = stage_folders(path)
    if around != path:
        raise ValueError(f"{path} has no folder {STAGES!r}; give the work directory of a run.")
    with contextlib.ExitStack() as stack:
        for folder in (path, *folders) if delete else ():
            stack.enter_context(locked(folder))
        listing = list_checkpoints(path)
        found = _decided(listing, every, best, free=delete or listing.writer is None)
        before(found)
        if delete:
            for folder in folders:
                Steps(folder).clear()
            for entry in found.deleted:
                if entry.complete:
                    Steps(entry.directory.parent).delete([entry.step])
    return found


def _decided(listing: Listing, every: int | None, best: int | None, *, free: bool) -> Pruning:
    """The fates of a listing's entries; `free`: no other process writes there."""
    fates, notes = [], []
    for stage, group in itertools.groupby(listing.entries, key=lambda entry: entry.stage):
        entries = list(group)
        complete = [entry for entry in entries if entry.complete]
        measured = [entry for entry in complete if entry.heldout and entry.heldout.step == entry.step]
        ranked = sorted((entry for entry in measured if math.isfinite(_loss(entry))), key=_loss)[: best or 0]
        if len(ranked) < min(best or 0, len(complete)):
            notes.append(
                f"{stage}: a held-out loss was measured at the step of {len(ranked)} of its "
                f"{counted(len(complete), 'checkpoint')}, so no more are kept for theirs."
            )
        for entry in entries:
            if entry.complete:
                fates.append(Fate(entry, ", ".join(_reasons(entry, complete, ranked, every))))
            elif entry.state == UNFINISHED and _clears(entry) and free:
                fates.append(Fate(entry, ""))
            elif entry.state != UNFINISHED:
                notes.append(f"{entry.directory} is {entry.state} and stays: {entry.fault}.")
    return Pruning(listing, tuple(fates), tuple(notes))


def _reasons(entry: Entry, complete: list[Entry], ranked: list[Entry], every: int | None) -> list[str]:
    found = ["first"] if entry is complete[0] else []
    found += ["last"] if entry is complete[-1] else []
    found += [f"multiple of {every}"] if every and entry.step % every == 0 else []
    return found + [f"loss no. {rank}" for rank, one in enumerate(ranked, 1) if one is entry]


def _loss(entry: Entry) -> float:
    assert entry.heldout is not None
    return entry.heldout.loss


def _clears(entry: Entry) -> bool:
    """Whether a writer removes such a leftover: one of a save or a deletion, not of a streamed growth."""
    return not entry.directory.name.endswith(".growing")
