"""Results of the steps of a selection on disk: each in a folder named by the digest of all that it depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flm_jax.files import draft_of, fsync, sha256_json, write_json
from flm_jax.records.foreign_json import read_json

RECORD = "record.json"
# Part of every digest: increase it when a step computes something else.
FORMAT = 1


class Step:
    """The folder of a step.

    Attributes:
      folder: where its result lies.
      digest: of the configuration and the inputs of the step.
    """

    def __init__(self, base: Path, name: str, depends: Mapping[str, Any]) -> None:
        """Opens the folder, and makes it if necessary.

        Args:
          base: holds the folders of steps.
          name: of the step.
          depends: all that its result depends on: configuration, digests of files and of other steps; JSON-able.
        """
        self.digest = sha256_json([FORMAT, name, depends])
        self.folder = base / f"{name}-{self.digest[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def finished(self) -> bool:
        """Whether the whole result is there."""
        return (self.folder / RECORD).exists()

    def clear(self) -> None:
        """Removes what a process that was killed left; shards are whole, and stay."""
        for path in self.folder.iterdir():
            if path.is_file() and path.name != RECORD and not path.name.startswith("shard"):
                path.unlink()

    def path(self, name: str) -> Path:
        """The path of a file of the result."""
        return self.folder / name

    @contextlib.contextmanager
    def columns(self, *names: str) -> Iterator[dict[str, BinaryIO]]:
        """A context with a file per column, to which arrays of any length are written one after the other."""
        with contextlib.ExitStack() as stack:
            yield {name: stack.enter_context((self.folder / f"{name}.bin").open("wb", 1 << 20)) for name in names}

    def column(self, name: str, dtype: np.dtype | type, mapped: bool = False) -> np.ndarray:
        """Reads a column.

        Args:
          name: as it was written.
          dtype: as it was written.
          mapped: whether it stays on disk, and what is looked at is read.
        """
        path = self.folder / f"{name}.bin"
        if mapped and path.stat().st_size:
            return np.memmap(path, dtype, "r")
        return np.fromfile(path, dtype)

    def save(self, name: str, array: np.ndarray) -> None:
        """Writes an array."""
        np.save(self.folder / f"{name}.npy", array, allow_pickle=False)

    def array(self, name: str, mapped: bool = False) -> np.ndarray:
        """Reads an array.

        Args:
          name: as it was written.
          mapped: whether it stays on disk, and what is looked at is read.

        Raises:
          ValueError: the file is damaged.
        """
        return _load(self.folder / f"{name}.npy", mapped)

    def shard(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """A part of the result: read if a start before this one has written it, else computed and written."""
        path = self.folder / f"shard-{name}.npy"
        if path.exists():
            return _load(path)
        found = compute()
        draft = draft_of(path)
        try:
            with draft.open("wb") as file:
                np.save(file, found, allow_pickle=False)
            fsync(draft)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        return found

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Waits until the result is on disk, and records that it is whole, with what the report says of it."""
        for path in sorted(self.folder.iterdir()):
            if path.is_file():
                fsync(path)
        write_json(self.folder / RECORD, {"digest": self.digest, "facts": facts})

    def facts(self) -> dict[str, Any]:
        """What was given to `finish`."""
        found: dict[str, Any] = read_json(self.folder / RECORD, finite=False)["facts"]
        return found


def _load(path: Path, mapped: bool = False) -> np.ndarray:
    try:
        found: np.ndarray = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: delete its folder, and the step is computed again ({error})") from error
    return found
