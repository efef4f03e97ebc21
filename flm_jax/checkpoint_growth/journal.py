"""The journal of a target that is written block by block: what of it is on disk already."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Sum = tuple[int, int]
Name = tuple[str, int, int]


class Journal:
    """What of a target is on disk: a line for each unit, with the checksums of what was read and written for it.

    It belongs to one source, plan and seed; of another it keeps nothing. A line is written once its unit is on disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[Name, tuple[Sum, Sum]] = {}
        self._file: Any = None

    def resume(self, identity: str) -> bool:
        """Reads it and goes on, if it is of this growth."""
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last line break was cut off
        except FileNotFoundError:
            return False
        good = 0
        try:
            if not lines or json.loads(lines[0]) != {"identity": identity}:
                return False
            for line in lines:
                if good:
                    path, old, start, read, written = json.loads(line)
                    self.done[path, old, start] = (tuple(read), tuple(written))
                good += len(line) + 1
        except ValueError:
            pass  # from there on it is done again
        os.truncate(self.path, good)
        self._file = self.path.open("a")
        return True

    def begin(self, identity: str) -> None:
        """Begins anew."""
        self.done = {}
        self._file = self.path.open("w")
        self._file.write(json.dumps({"identity": identity}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, name: Name, read: Sum, written: Sum) -> None:
        """A unit that is on disk."""
        self.done[name] = (read, written)
        self._file.write(json.dumps([*name, read, written]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
