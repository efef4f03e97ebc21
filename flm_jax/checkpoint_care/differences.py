"""What differs between two checkpoints: settings, lineage, and each array, which is read block by block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flm_jax.checkpoint.blocks import StoredLeaf, open_leaves
from flm_jax.checkpoint.manifest import ARRAYS, Leaf, read_manifest
from flm_jax.checkpoint_care.description import lineage_sentences, settings
from flm_jax.records import flattened
from flm_jax.source_checkpoint import SourceCheckpoint, read_source

# Entries of a block: a few blocks of eight bytes per entry are in memory at a time.
_ENTRIES = 1 << 20


@dataclass(frozen=True)
class ArrayDifference:
    """How an array of one checkpoint differs from that of another.

    Attributes:
      path: in the state.
      a: its shape and dtype in the first, such as 'float32[8, 64]'; '' if it lacks it.
      b: in the second.
      equal: whether all bits are equal, going by shape, dtype and checksum; if a checksum is missing, by the values.
      entries: that differ; None if they were not compared, as shapes differ or one lacks it.
      max_abs: the largest absolute difference of an entry; None if not compared.
      relative: norm of the difference over the norm of the first; None if not compared, or the first is 0.
      cosine: of the angle between both as vectors; None if not compared, or one is 0.
    """

    path: str
    a: str
    b: str
    equal: bool
    entries: int | None = None
    max_abs: float | None = None
    relative: float | None = None
    cosine: float | None = None

    @property
    def compared(self) -> bool:
        """Whether the values of both were read."""
        return self.entries is not None

    def record(self) -> dict[str, Any]:
        """The difference, JSON-able; a number that is not finite is None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }


@dataclass(frozen=True)
class Difference:
    """What differs between two checkpoints.

    Attributes:
      a: the first.
      b: the second.
      settings: by name, such as 'model.embed', those that differ, with the values of both; None where one has none.
      lineage: of each, the growths and models that the other does not share, as sentences.
      arrays: every array of either.
    """

    a: SourceCheckpoint
    b: SourceCheckpoint
    settings: Mapping[str, tuple[Any, Any]]
    lineage: tuple[tuple[str, ...], tuple[str, ...]]
    arrays: tuple[ArrayDifference, ...]

    @property
    def equal(self) -> bool:
        """Whether settings, lineage and all arrays are equal."""
        return not self.settings and not any(self.lineage) and all(array.equal for array in self.arrays)

    def record(self) -> dict[str, Any]:
        """The difference, JSON-able."""
        return {
            "a": {"directory": str(self.a.directory), "digest": self.a.digest},
            "b": {"directory": str(self.b.directory), "digest": self.b.digest},
            "equal": self.equal,
            "settings": {name: list(values) for name, values in self.settings.items()},
            "lineage": [list(only) for only in self.lineage],
            "arrays": [array.record() for array in self.arrays],
        }


def difference(a: str | Path, b: str | Path, progress: Callable[[int], object] = lambda _: None) -> Difference:
    """Compares two checkpoints: steps, or directories whose newest step is taken.

    Arrays with equal checksums are equal and are not read; whether what lies on disk still has them is for
    `flm_jax.checkpoint.verify` to say. Of all others of one shape a few MB are in memory at a time.

    Args:
      a: the first.
      b: the second.
      progress: called with the size of each block that has been read from either, in bytes.

    Raises:
      NoCheckpointError: there is no checkpoint.
      DamagedError: an array cannot be read.
      CheckpointError: a checkpoint was not written by a run, a growth or an import of this project.
    """
    first, second = read_source(a), read_source(b)
    return Difference(
        first,
        second,
        _settings(first, second),
        _lineages(first, second),
        tuple(compare_arrays(first.directory, second.directory, progress)),
    )


def compare_arrays(a: Path, b: Path, progress: Callable[[int], object] = lambda _: None) -> list[ArrayDifference]:
    """Compares every array of two steps, given by their directories; see `difference`."""
    there, here = read_manifest(a).leaves, read_manifest(b).leaves
    found = []
    for path in [*there, *(path for path in here if path not in there)]:
        one, other = there.get(path), here.get(path)
        about = (path, str(one or ""), str(other or ""))
        if one is None or other is None or one.shape != other.shape:
            found.append(ArrayDifference(*about, equal=False))
        elif _same(one, other) or 0 in one.shape:
            found.append(ArrayDifference(*about, equal=one.dtype == other.dtype))
        else:
            pair = (_open(a, path, one), _open(b, path, other))
            found.append(_compared(about, pair, progress))
    return found


def bytes_to_read(a: Path, b: Path) -> int:
    """How many bytes `compare_arrays` reads: those of arrays of one shape in both whose checksums differ."""
    there, here = read_manifest(a).leaves, read_manifest(b).leaves
    total = 0
    for path in there.keys() & here.keys():
        one, other = there[path], here[path]
        if one.shape == other.shape and not _same(one, other):
            total += math.prod(one.shape) * sum(_dtype(leaf).itemsize for leaf in (one, other))
    return total


def _same(one: Leaf, other: Leaf) -> bool:
    """Whether two leaves of one shape are equal going by their checksums, which not every checkpoint has."""
    return one.dtype == other.dtype and bool(one.checksum) and one.checksum == other.checksum


def _dtype(leaf: Leaf) -> np.dtype[Any]:
    return np.dtype(leaf.dtype)


def _open(directory: Path, path: str, leaf: Leaf) -> StoredLeaf:
    return open_leaves(directory / ARRAYS, {path: leaf})[path]


def _compared(
    about: tuple[str, str, str], pair: tuple[StoredLeaf, StoredLeaf], progress: Callable[[int], object]
) -> ArrayDifference:
    same_bits = pair[0].dtype == pair[1].dtype
    entries, largest = 0, 0.0
    squares = np.zeros(4)  # of the difference, of the first, of the second; and the product of both
    readers = (leaf.blocks(_ENTRIES * leaf.dtype.itemsize) for leaf in pair)
    for (_, _, x), (_, _, y) in zip(*readers, strict=True):
        same_bits = same_bits and x.tobytes() == y.tobytes()
        a, b = (values.astype(np.float64).reshape(-1) for values in (x, y))
        with np.errstate(invalid="ignore", over="ignore"):
            apart = b - a
            both_nan = np.isnan(a) & np.isnan(b)
            entries += int(np.count_nonzero((a != b) & ~both_nan))
            largest = float(np.maximum(largest, np.max(np.abs(apart))))  # NaN where one is
            squares += [apart @ apart, a @ a, b @ b, a @ b]
        progress(x.nbytes + y.nbytes)
    with np.errstate(invalid="ignore", over="ignore"):
        relative = float(np.sqrt(squares[0] / squares[1])) if squares[1] else None
        scale = float(np.sqrt(squares[1]) * np.sqrt(squares[2]))
    cosine = float(squares[3] / scale) if scale else None
    return ArrayDifference(*about, same_bits, entries, largest, relative, cosine)


def _settings(a: SourceCheckpoint, b: SourceCheckpoint) -> dict[str, tuple[Any, Any]]:
    there, here = (flattened(settings(one.meta, one.trained)) for one in (a, b))
    names = [*there, *(name for name in here if name not in there)]
    return {name: (there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)}


def _lineages(a: SourceCheckpoint, b: SourceCheckpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    there, here = (checkpoint.lineage.record() for checkpoint in (a, b))
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(there, here, strict=False))
    shared = len(list(pairs))
    first, second = (lineage_sentences(checkpoint.lineage)[shared:] for checkpoint in (a, b))
    return tuple(first), tuple(second)
