"""Results of parts on disk, so that a preparation that was killed goes on, and one process can put them together.

    job.json            what is prepared; results of another job are removed
    vocabulary.json     what it is tokenised with
    dropped.npy         whether each document is a duplicate, and of which kind; starts.npy: where each part begins
    tokens-000003/      the result of part 3: files, and record.json with their sizes and crc32 sums
    hashes-000003/      the same for hashes, by which duplicates are found

The result of a part gets its name once it is whole, so two processes may do the same part: the later one's is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from flm_jax.files import atomic_write, draft_of, naming, sha256_json
from flm_jax.records.foreign_json import JsonError, check, field, read_json

JOB, RECORD, DROPPED, STARTS = "job.json", "record.json", "dropped.npy", "starts.npy"
# Part of a job: increase it when results of parts change.
FORMAT = 1
_PIECE = 1 << 22


def result_name(kind: str, number: int) -> str:
    """The name of the folder with a part's result."""
    return f"{kind}-{number:06}"


def is_done(folder: Path, kind: str, number: int) -> bool:
    """Whether the result of a part is there."""
    return (folder / result_name(kind, number) / RECORD).is_file()


class PartWriter:
    """The files of one part's result, appended to; `result` makes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._sums: dict[str, list[int]] = {}
        self.facts: dict[str, Any] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Appends the bytes of an array to a file."""
        path = self._folder / name
        if name not in self._files:
            with naming(path):
                self._files[name] = path.open("wb", 1 << 20)
            self._sums[name] = [0, 0]
        content = np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
        with naming(path):
            self._files[name].write(content)
        size, crc = self._sums[name]
        self._sums[name] = [size + len(content), zlib.crc32(content, crc)]

    def close(self) -> None:
        """Ends the files, and writes the record."""
        for name, file in self._files.items():
            with naming(self._folder / name):
                file.close()
        record = {"files": self._sums, "facts": self.facts}
        (self._folder / RECORD).write_text(json.dumps({**record, "seal": sha256_json(record)}))

    def abandon(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()


@contextlib.contextmanager
def result(folder: Path, name: str) -> Iterator[PartWriter]:
    """A context in which a part's result is written; it gets its name at the end, unless there is one by then."""
    draft = draft_of(folder / name)
    draft.mkdir()
    writer = PartWriter(draft)
    try:
        yield writer
        writer.close()
        try:
            draft.rename(folder / name)
        except OSError:
            if not (folder / name / RECORD).is_file():
                raise OSError(f"{folder / name} lies where the result of a part belongs: delete it") from None
            shutil.rmtree(draft, ignore_errors=True)
    except BaseException:
        writer.abandon()
        shutil.rmtree(draft, ignore_errors=True)
        raise


class PartResult:
    """The result of a part, read.

    Attributes:
      facts: what was recorded of it.
    """

    def __init__(self, folder: Path) -> None:
        """Takes the folder of `result_name`.

        Raises:
          ValueError: its record is damaged.
        """
        self._folder = folder
        try:
            record = read_json(folder / RECORD)
            seal = record.pop("seal", None)
            if sha256_json(record) != seal:
                raise JsonError("its seal does not match")
            self.facts: dict[str, Any] = field(record, "facts", dict, "the record")
            self._sums = field(record, "files", dict, "the record")
        except (JsonError, OSError) as error:
            raise ValueError(f"{folder / RECORD} is damaged ({error}): {self._advice}") from None

    @property
    def _advice(self) -> str:
        return f"delete {self._folder}, and the same command does this part again"

    def array(self, name: str, dtype: np.dtype | type | str) -> np.ndarray:
        """The content of a file, as a map of it; empty if the part has none. It is compared with its checksum first.

        Raises:
          ValueError: the file is damaged.
        """
        path = self._folder / name
        if name not in self._sums:
            return np.zeros(0, dtype)
        size, crc = (check(value, int, str(path)) for value in self._sums[name])
        found = path.stat().st_size if path.is_file() else -1
        if found == size == 0:
            return np.zeros(0, dtype)
        content = np.memmap(path, np.uint8, "r") if found == size else np.zeros(0, np.uint8)
        now = 0
        for start in range(0, len(content), _PIECE):
            now = zlib.crc32(content[start : start + _PIECE].data, now)
        if found != size or now != crc:
            raise ValueError(f"{path} is damaged: {self._advice}")
        return content.view(dtype)


class PartFolder:
    """The folder with the results of a preparation's parts; a context manager, in which one process has it.

    Attributes:
      path: where it is.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        """Names a folder.

        Args:
          path: it is made if it does not exist.
          job: all that results of parts depend on; JSON-able.
        """
        self.path, self._job = path, {"format": FORMAT, **job}
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Takes the folder, and removes what belongs to another job.

        Raises:
          ValueError: another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ValueError(
                f"{self.path} is in use: another process prepares the same text; wait for it, or end it first"
            ) from None
        digest = sha256_json(self._job)
        try:
            same = field(read_json(self.path / JOB), "digest", str, "the job") == digest
        except (JsonError, OSError):
            same = False
        if not same:
            self._clear()
            atomic_write(self.path / JOB, json.dumps({"digest": digest, "job": self._job}, indent=1))
        for draft in self.path.glob(".*.tmp"):  # of processes that were killed
            shutil.rmtree(draft, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

    def remove(self) -> None:
        """Removes the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
