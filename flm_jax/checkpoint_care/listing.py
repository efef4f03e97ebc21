"""The checkpoints of a work directory, stage by stage: step, tokens, size, whether complete, held-out loss."""

from __future__ import annotations

import dataclasses
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_jax.checkpoint.directory import STEP, holder
from flm_jax.checkpoint.find import STAGES, every_stage
from flm_jax.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    NoCheckpointError,
    file_faults,
    read_manifest,
    read_meta,
)
from flm_jax.checkpoint_care.losses import (
    Heldout,
    Losses,
    at_or_before,
    losses_of_log,
    losses_of_record,
    tokens_of,
)
from flm_jax.records import meant_beside
from flm_jax.tracking import METRICS, StageCost, read_fork

# What an entry of a stage's directory is.
COMPLETE, DAMAGED, UNFINISHED, ASIDE = "complete", "damaged", "unfinished", "set aside"
_OTHERS = {
    "partial": (UNFINISHED, "a save that is going on, or that a killed run left"),
    "deleted": (UNFINISHED, "a deletion that is going on, or that was killed"),
    "growing": (UNFINISHED, "a streamed growth; the command that began it goes on with it"),
    "damaged": (ASIDE, "it was damaged, and a run that saved the step again renamed it"),
}
_OTHER = re.compile(r"(0|[1-9][0-9]*)\.(partial|deleted|growing|damaged)(?:-[0-9]+)?")


@dataclass(frozen=True)
class Entry:
    """A directory among the checkpoints of a stage.

    Attributes:
      directory: the directory.
      step: of the stage.
      state: 'complete' (all files are there, in their sizes; values are not read), 'damaged', 'unfinished' (it is being
        written or deleted, or was left so), 'set aside'.
      fault: why it is not complete, as a sentence without its end; '' if it is.
      bytes: of its files.
      tokens: that the run has trained on until there, over all stages; None if no recipe says so.
      heldout: the held-out measurement at this step, or the last one of the stage before it.
      digest: of its state, a sha256; '' if it is not known.
      written: when its manifest was written, in seconds since 1970; None if it has none.
    """

    directory: Path
    step: int
    state: str
    fault: str
    bytes: int
    tokens: int | None = None
    heldout: Heldout | None = None
    digest: str = ""
    written: float | None = None

    @property
    def stage(self) -> str:
        """The directory of its stage, such as '0_first'."""
        return self.directory.parent.name

    @property
    def complete(self) -> bool:
        """Whether all of its files are there."""
        return self.state == COMPLETE

    def record(self) -> dict[str, Any]:
        """The entry, JSON-able."""
        measured = None if self.heldout is None else self.heldout.record()
        return {**vars(self), "directory": str(self.directory), "stage": self.stage, "heldout": measured}


@dataclass(frozen=True)
class Listing:
    """What lies in a work directory, or in the directory of one stage.

    Attributes:
      path: the directory.
      entries: stage by stage, in the order of steps.
      writer: the process that writes there, such as '123 on host'; None if nobody does.
      notes: sentences on what could not be read.
    """

    path: Path
    entries: tuple[Entry, ...]
    writer: str | None
    notes: tuple[str, ...]

    @property
    def complete(self) -> list[Entry]:
        """The complete checkpoints."""
        return [entry for entry in self.entries if entry.complete]

    def record(self) -> dict[str, Any]:
        """The listing, JSON-able."""
        found = [entry.record() for entry in self.entries]
        return {"path": str(self.path), "writer": self.writer, "notes": list(self.notes), "checkpoints": found}


def list_checkpoints(path: str | Path) -> Listing:
    """The checkpoints of a work directory, or of one of its stages; also while a run writes them. No arrays are read.

    Raises:
      NoCheckpointError: there is no such directory, or it holds no checkpoint.
      CheckpointError: it is a checkpoint itself.
    """
    path = Path(path).expanduser().absolute()
    folders, workdir = stage_folders(path)
    entries, manifests = [], {}
    for folder in folders:
        for entry, manifest in _entries(folder):
            entries.append(entry)
            if manifest is not None:
                manifests[entry.directory] = manifest
    if not entries:
        raise NoCheckpointError(f"{path} holds no checkpoint; give the work directory of a run, or one of its stages.")
    writer = next((held for where in (workdir, *folders) if where and (held := holder(where))), None)
    notes: list[str] = []
    tokens: dict[str, tuple[int, StageCost]] = {}
    if workdir is not None:
        try:
            tokens = tokens_of(workdir)
            fork = read_fork(workdir)
            notes += [] if fork is None else fork.lines()
        except (OSError, ValueError) as error:
            notes.append(f"Tokens are not known: {error}.")
    newest = next((entry.directory for entry in reversed(entries) if entry.complete), None)
    losses = _losses(workdir, newest, manifests, notes)
    found = []
    for entry in entries:
        known = None
        if entry.stage in tokens and entry.complete:
            before, cost = tokens[entry.stage]
            known = before + cost.tokens(entry.step)
        measured = at_or_before(losses, entry.stage.partition("_")[2], entry.step) if entry.complete else None
        found.append(dataclasses.replace(entry, tokens=known, heldout=measured))
    return Listing(path, tuple(found), writer, tuple(notes))


def stage_folders(path: Path) -> tuple[list[Path], Path | None]:
    """The directories of stages that a path means, in order, and the work directory that they belong to, if any.

    Raises:
      NoCheckpointError: there is no such directory.
      CheckpointError: it is a checkpoint itself.
    """
    if not path.is_dir():
        near = "" if path.exists() else meant_beside(path)
        raise NoCheckpointError(
            f"{path} is no directory; give a work directory or the directory of a stage{near or '.'}"
        )
    if (path / MANIFEST).exists():
        raise CheckpointError(f"{path} is one checkpoint; give the work directory or the stage's directory around it.")
    if (path / STAGES).is_dir():
        return every_stage(path), path
    return [path], path.parent.parent if path.parent.name == STAGES else None


def size_of(directory: Path) -> int:
    """The size of all files in a directory, in bytes."""
    found = (path.lstat() for path in directory.rglob("*"))
    return sum(one.st_size for one in found if stat.S_ISREG(one.st_mode))


def _entries(folder: Path) -> Iterator[tuple[Entry, Manifest | None]]:
    """The entries of a stage's directory that belong to checkpoints, in the order of steps, with their manifests."""
    named = []
    for directory in folder.iterdir():
        match = _OTHER.fullmatch(directory.name)
        if directory.is_dir() and (match or STEP.fullmatch(directory.name)):
            named.append((int(directory.name.partition(".")[0]), directory.name, match))
    for step, name, match in sorted(named, key=lambda one: one[:2]):
        directory = folder / name
        try:
            if match is not None:
                state, fault = _OTHERS[match[2]]
                yield Entry(directory, step, state, fault, size_of(directory)), None
                continue
            manifest: Manifest | None = None
            faults = ["it is empty"]
            if any(directory.iterdir()):
                try:
                    manifest = read_manifest(directory)
                    faults = file_faults(directory, manifest, contents=False)
                except CheckpointError as error:
                    faults = [str(error)]
            if manifest is None or faults:
                yield Entry(directory, step, DAMAGED, faults[0], size_of(directory)), None
                continue
            about = (directory / MANIFEST).stat()
            size = about.st_size + sum(file.size for file in manifest.files.values())
            digest, written = manifest.state_digest, about.st_mtime
            yield Entry(directory, step, COMPLETE, "", size, None, None, digest, written), manifest
        except FileNotFoundError:  # a run has renamed or deleted it meanwhile
            continue


def _losses(workdir: Path | None, newest: Path | None, manifests: dict[Path, Manifest], notes: list[str]) -> Losses:
    """The held-out losses of metrics.jsonl, or else those that the newest checkpoint records; adds to the notes."""
    if workdir is not None:
        try:
            if found := losses_of_log(workdir):
                return found
        except (OSError, ValueError) as error:
            notes.append(f"{METRICS} cannot be used ({error}): losses are those of the newest checkpoint's record.")
    if newest is None:
        return {}
    try:
        return losses_of_record(read_meta(newest, manifests[newest]), str(newest))
    except (CheckpointError, ValueError) as error:
        notes.append(f"Losses are not known: {error}.")
    return {}
