"""Copies a checkpoint, checks every bit of the copy, and only then gives it its name."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flm_jax.checkpoint.directory import STEP, check_path, take_lock
from flm_jax.checkpoint.find import step_directory
from flm_jax.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    DamagedError,
    Manifest,
    file_faults,
    read_manifest,
)
from flm_jax.checkpoint.verify import Report, array_bytes, verify
from flm_jax.files import draft_of, fsync, missing_room
from flm_jax.records import LOCK

_PIECE = 4 << 20


@dataclass(frozen=True)
class Copied:
    """A copy that was made.

    Attributes:
      source: the step's directory.
      target: the copy's.
      report: of the check of the copy.
    """

    source: Path
    target: Path
    report: Report


def copy_checkpoint(
    source: str | Path, target: str | Path, progress: Callable[[int], object] = lambda _: None
) -> Copied:
    """Copies one checkpoint.

    The files that the manifest names are copied, each with the time of its last change, and compared with their sha256
    on the way; then the copy is read back from its disk and each array is compared with its checksum. Until all of that
    is done the copy has a hidden name, which ends in '.tmp'; after an error nothing is left of it.

    Args:
      source: a step's directory, or that of a stage or a work directory, whose newest step is taken.
      target: the directory to make, for this one step; a name that is a number must be that of the step.
      progress: called with the number of bytes of each piece that was copied, and of each block that was checked then;
        `bytes_to_copy` is the sum.

    Raises:
      NoCheckpointError: there is no checkpoint at the source.
      DamagedError: the source is damaged, or the copy is.
      CheckpointError: the target exists, cannot hold a checkpoint, or a run writes checkpoints beside it.
      OSError: a file cannot be read or written.
    """
    found = step_directory(source)
    manifest = read_manifest(found)
    path = Path(target).expanduser().absolute()
    _check_target(found, path, manifest)
    if faults := file_faults(found, manifest, contents=False):
        raise DamagedError(f"{faults[0]}; nothing was copied")
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    try:
        with contextlib.ExitStack() as stack:
            if (path.parent / LOCK).exists():  # a stage of a run, perhaps
                stack.enter_context(take_lock(path.parent))
            if missing := missing_room(path.parent, sum(file.size for file in manifest.files.values())):
                raise CheckpointError(f"{missing}, or copy to another disk; nothing was copied")
            draft.mkdir()
            for name in (*manifest.files, MANIFEST):
                known = manifest.files.get(name)
                sha256 = _copy(found / name, draft / name, progress)
                if known is not None and known.sha256 not in (None, sha256):
                    raise DamagedError(f"{found / name} is damaged: it does not match its sha256; nothing was copied")
            for folder in [*(one for one in draft.rglob("*") if one.is_dir()), draft]:
                fsync(folder)
            report = verify(draft, progress)
            if not report.ok:
                what = report.problems[0].replace(str(draft), str(found))
                raise DamagedError(f"{what} (seen in the copy, which was removed)")
            _check_free(path)
            draft.rename(path)
            fsync(path.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody has put something there
            for folder in made:
                folder.rmdir()
        raise
    return Copied(found, path, dataclasses.replace(report, directory=str(path)))


def bytes_to_copy(step: Path) -> int:
    """How many bytes `copy_checkpoint` copies and checks of a step.

    Raises:
      DamagedError: its manifest cannot be read.
    """
    manifest = read_manifest(step)
    files = sum(file.size for file in manifest.files.values())
    return files + (step / MANIFEST).stat().st_size + array_bytes(manifest)


def _check_target(source: Path, target: Path, manifest: Manifest) -> None:
    """Refuses a target that exists, or that could not be read as this checkpoint.

    Raises:
      CheckpointError: it is refused.
    """
    _check_free(target)
    check_path(target)
    if target.is_relative_to(source):
        raise CheckpointError(f"{target} lies inside the checkpoint that is copied; give a directory outside it.")
    if STEP.fullmatch(target.name) and target.name != str(manifest.step):
        raise CheckpointError(
            f"{target}: a directory whose name is a number is taken for that step, and this is step {manifest.step}; "
            f"give {target.parent / str(manifest.step)}, or a name that is no number."
        )


def _check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already, and nothing is overwritten; give a directory that does not.")


def _copy(source: Path, target: Path, progress: Callable[[int], object]) -> str:
    """Copies a file, waits until it is on disk, and returns the sha256 of what was read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("xb") as write:
        while piece := read.read(_PIECE):
            digest.update(piece)
            write.write(piece)
            progress(len(piece))
        write.flush()
        os.fsync(write.fileno())
    shutil.copystat(source, target)
    return digest.hexdigest()
