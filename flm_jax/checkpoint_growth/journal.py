"""The journal of a streamed growth: which blocks of the target are on disk already."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flm_jax.records.foreign_json import check, parse_json

Sum = tuple[int, int]
Name = tuple[str, int, int]


def _entry(line: list[Any]) -> tuple[Name, tuple[Sum, Sum]]:
    """The block group of a line, and its checksums.

    Raises:
      ValueError: the line is not one that `Journal.add` writes.
    """
    path, old, start, *sums = line
    read, written = (check(lanes, list, "a checksum") for lanes in sums)
    (a, b), (c, d) = read, written
    for number in (old, start, a, b, c, d):
        check(number, int, "a number")
    return (check(path, str, "a path"), old, start), ((a, b), (c, d))


class Journal:
    """The block groups of a target that are on disk, one line each, with the checksums of what was read and written.

    A journal belongs to one source, growth and seed; that of another growth is not resumed. A line is written once its
    block group is on disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[Name, tuple[Sum, Sum]] = {}
        self._file: Any = None

    def resume(self, identity: str) -> bool:
        """Reads the journal and continues it, if it belongs to this growth; returns whether it does."""
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]  # the last line may be incomplete
        except FileNotFoundError:
            return False
        good = 0
        try:
            if not lines or parse_json(lines[0], str(self.path)) != {"identity": identity}:
                return False
            for line in lines:
                if good:
                    name, sums = _entry(parse_json(line, str(self.path), list))
                    self.done[name] = sums
                good += len(line) + 1
        except ValueError:
            pass  # a damaged line: blocks from there on are grown again
        os.truncate(self.path, good)
        self._file = self.path.open("a")
        return True

    def begin(self, identity: str) -> None:
        """Starts an empty journal."""
        self.done = {}
        self._file = self.path.open("w")
        self._file.write(json.dumps({"identity": identity}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, name: Name, read: Sum, written: Sum) -> None:
        """Records a block group that is on disk."""
        self.done[name] = (read, written)
        self._file.write(json.dumps([*name, read, written]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
