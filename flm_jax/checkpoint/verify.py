"""Checks every bit of a checkpoint step without a model."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

import jax

from flm_jax.checkpoint import manifest, orbax_io
from flm_jax.checkpoint.manager import Checkpoints
from flm_jax.checkpoint.manifest import CheckpointError, DamagedError, NoCheckpointError, read_manifest


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
      directory: the step's directory.
      step: the step's number.
      leaves: how many arrays were read and compared; 0 if the manifest is damaged or a file is a link or a device.
      bytes: the size of all files.
      problems: one sentence per damaged file or leaf, naming it.
    """

    directory: str
    step: int
    leaves: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is as it was saved."""
        return not self.problems

    def __str__(self) -> str:
        found = "\n  ".join(self.problems) or "intact"
        return f"{self.directory}: {self.leaves} leaves, {self.bytes} bytes: {found}"


def verify(directory: str | Path, step: int | None = None) -> Report:
    """Checks every bit of one checkpoint without a model, with one leaf in memory at a time.

    Args:
      directory: a directory of steps.
      step: which one; None: the newest, even if it is damaged.

    Returns:
      What was found.

    Raises:
      NoCheckpointError: there is no such step.
    """
    with Checkpoints(directory, read_only=True) as checkpoints:
        if step is None:
            step = max((s for found in checkpoints._steps.scan() for s in found), default=None)
        step_dir = checkpoints.directory / str(step)
        if step is None or not step_dir.is_dir():
            raise NoCheckpointError(
                f"{directory} holds no checkpoint" + (f" of step {step}" if step is not None else "")
            )
        inside = [path.lstat() for path in step_dir.rglob("*")]
        size = sum(found.st_size for found in inside if stat.S_ISREG(found.st_mode))
        try:
            saved = read_manifest(step_dir)
        except CheckpointError as error:
            return Report(str(step_dir), step, 0, size, (str(error),))
        problems = manifest.file_faults(step_dir, saved, contents=True)
        if not all(stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) for found in inside):
            # Where a file is a link or a device, nobody knows what orbax would read, or whether that has an end.
            return Report(str(step_dir), step, 0, size, tuple(problems or [f"{step_dir} holds links or devices"]))
        with jax.enable_x64(True):  # or 8-byte leaves would be read as 4-byte ones
            for path, leaf in saved.leaves.items():
                wanted = {path: orbax_io.target(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))}
                try:
                    arrays = orbax_io.read(checkpoints._orbax, step_dir, saved, wanted)
                except DamagedError as error:
                    problems.append(f"{path}: {error}")
                else:
                    wrong = orbax_io.wrong_leaves(saved, arrays)
                    problems += [f"{step_dir}: the values of {name} have changed" for name in wrong]
    return Report(str(step_dir), step, len(saved.leaves), size, tuple(problems))
