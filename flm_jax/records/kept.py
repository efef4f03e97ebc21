"""JSON lines that are kept as they come, so that a run that was killed goes on after the last of them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flm_jax.distributed import from_primary, is_primary
from flm_jax.files import atomic_write, naming
from flm_jax.records.foreign_json import field, parse_json


class KeptLines:
    """A file of JSON objects, one per line, that one process at a time appends to; any of its threads may.

    Attributes:
      path: the file.
      records: the objects by their key; of several with one key the last.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Reads what is there; a line that was cut off by a kill is removed.

        Args:
          path: the file; it and its folder are made if necessary.
          key: the field, a text, that tells objects apart.

        Raises:
          ValueError: a line is no such object, or another process has the file open.
        """
        self.path, self._key, self._lock = path, key, threading.Lock()
        self.records: dict[str, dict[str, Any]] = {}
        self._replaced = False
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"{path} is being written by another process; give each its own --output") from error
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        kept = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            where = f"{self.path}:{number}"
            record = parse_json(line, where, finite=False)
            name = field(record, self._key, str, where)
            self._replaced |= name in self.records
            self.records[name] = record
            kept += len(line)
        self._file.truncate(kept)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds an object; once this returns, the operating system has it."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._lock, naming(self.path):
            # Half of a surrogate pair, as in a broken reply, has no UTF-8.
            self._file.write(line.encode("utf-8", "backslashreplace"))
            self._file.flush()
            self._replaced |= record[self._key] in self.records
            self.records[record[self._key]] = dict(record)

    def close(self) -> None:
        """Closes the file; lines that later ones replaced are removed from it."""
        with self._lock:
            if self._file.closed:
                return
            os.fsync(self._file.fileno())
            if self._replaced:
                lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in self.records.values())
                atomic_write(self.path, "".join(lines).encode("utf-8", "backslashreplace"))
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def kept_by_all(path: Path, key: str) -> Iterator[tuple[dict[str, dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """What a file keeps, and a function that adds to it; only process 0 writes, and all have what it has read."""
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(KeptLines(path, key)) if is_primary() else None
        records = from_primary("lines kept", lambda: dict(lines.records) if lines else {})
        yield records, lines.append if lines else lambda _: None
