"""Checks every byte of a checkpoint step without a model, block by block: `flm-checkpoint verify`, `flm-verify`."""

from __future__ import annotations

import dataclasses
import math
import stat
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.checkpoint import checksum, manifest
from flm_jax.checkpoint.blocks import StoredLeaf, open_leaves
from flm_jax.checkpoint.manifest import ARRAYS, CheckpointError, DamagedError, Leaf, NoCheckpointError, read_manifest
from flm_jax.checkpoint.places import told
from flm_jax.records import counted
from flm_jax.records.verification import Verification


@dataclasses.dataclass(frozen=True)
class Report(Verification):
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

    def whole(self) -> str:
        """See Verification."""
        return f"{counted(self.leaves, 'leaf', 'leaves')} and {counted(self.bytes, 'byte')} are as they were saved"


def verify(step_dir: str | Path, progress: Callable[[int], object] = lambda _: None) -> Report:
    """Checks every byte of the step in a directory, with two blocks of one leaf in memory at a time.

    Args:
      step_dir: the directory.
      progress: called with the size of each block that has been read, in bytes; `array_bytes` is the sum.

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
        # Where a file is a link or a device, nobody knows what would be read, or whether that has an end.
        return Report(str(step_dir), 0, size, tuple(problems or [f"{step_dir} holds links or devices"]))
    with jax.enable_x64(True):  # or 8-byte leaves would be read as 4-byte ones
        for path, leaf in saved.leaves.items():
            try:
                found = _checksum(step_dir, path, leaf, progress)
            except DamagedError as error:
                problems.append(f"{step_dir}: {error}")
                continue
            if leaf.checksum and found != leaf.checksum:
                problems.append(f"{step_dir}: the values of {path} have changed{told(step_dir / ARRAYS, path)}")
    return Report(str(step_dir), len(saved.leaves), size, tuple(problems))


def array_bytes(saved: manifest.Manifest) -> int:
    """How many bytes `verify` reads of a step's arrays."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in saved.leaves.values())


def _checksum(step_dir: Path, path: str, leaf: Leaf, progress: Callable[[int], object]) -> str:
    """The checksum of a leaf as it lies on disk.

    Raises:
      DamagedError: it cannot be read; the message names the leaf and the chunk.
    """
    if 0 in leaf.shape:  # not stored
        return checksum.digest((0, 0))
    stored: StoredLeaf = open_leaves(step_dir / ARRAYS, {path: leaf})[path]
    total, pending = (0, 0), jnp.zeros(2, jnp.uint32)
    for lead, start, rows in stored.blocks():
        lanes = block_checksum(lead, start, rows)
        total = checksum.add(total, np.asarray(pending))  # computed while this block was read
        pending = lanes
        progress(rows.nbytes)
    return checksum.digest(checksum.add(total, np.asarray(pending)))


def block_checksum(lead: tuple[int, ...], start: int, rows: np.ndarray) -> jax.Array:
    """Starts the checksum of a block that `StoredLeaf.blocks` yields; those of all blocks add up to the leaf's."""
    places = tuple(np.array([index], np.uint32) for index in lead)
    places = (*places, np.arange(start, start + len(rows), dtype=np.uint32))
    # Entries of a row in one axis, so that leaves of equally many share a program.
    flat = rows if rows.ndim == 1 else rows.reshape(len(rows), -1)
    return checksum.of_block(jnp.asarray(flat[None] if lead else flat), places)
