"""Checks every byte of a checkpoint step without a model: `python experiments/verify.py --checkpoint=...`."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from flm_jax.checkpoint import manifest, orbax_io
from flm_jax.checkpoint.manifest import CheckpointError, DamagedError, NoCheckpointError, read_manifest
from flm_jax.records import counted


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
      directory: the step's directory.
      leaves: how many arrays were read and compared; 0 if the manifest is damaged or a file is a link or a device.
      bytes: the size of all files.
      problems: one sentence per damaged file or leaf, naming it.
    """

    directory: str
    leaves: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was saved."""
        return not self.problems

    def __str__(self) -> str:
        if self.ok:
            return (
                f"{self.directory}: {counted(self.leaves, 'leaf', 'leaves')} and "
                f"{counted(self.bytes, 'byte')} are as they were saved."
            )
        return "\n  ".join([f"{self.directory} is DAMAGED:", *self.problems])

    def record(self) -> dict[str, Any]:
        """The report, JSON-able."""
        return {**dataclasses.asdict(self), "ok": self.ok}


def verify(step_dir: str | Path) -> Report:
    """Checks every byte of the step in a directory, with one leaf in memory at a time.

    Raises:
      NoCheckpointError: there is no such directory.
    """
    step_dir = Path(step_dir).absolute()
    if not step_dir.is_dir():
        raise NoCheckpointError(f"{step_dir} is no directory; give that of a step.")
    inside = [path.lstat() for path in step_dir.rglob("*")]
    size = sum(found.st_size for found in inside if stat.S_ISREG(found.st_mode))
    try:
        saved = read_manifest(step_dir)
    except CheckpointError as error:
        return Report(str(step_dir), 0, size, (str(error),))
    problems = manifest.file_faults(step_dir, saved, contents=True)
    if not all(stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) for found in inside):
        # Where a file is a link or a device, nobody knows what orbax would read, or whether that has an end.
        return Report(str(step_dir), 0, size, tuple(problems or [f"{step_dir} holds links or devices"]))
    reader = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
    with jax.enable_x64(True):  # or 8-byte leaves would be read as 4-byte ones
        for path, leaf in saved.leaves.items():
            wanted = {path: orbax_io.target(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))}
            try:
                arrays = orbax_io.read(reader, step_dir, saved, wanted)
            except DamagedError as error:
                problems.append(f"{path}: {error}")
            else:
                wrong = orbax_io.wrong_leaves(saved, arrays)
                problems += [f"{step_dir}: the values of {name} have changed" for name in wrong]
    return Report(str(step_dir), len(saved.leaves), size, tuple(problems))
