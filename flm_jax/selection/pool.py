"""The pool: its files, where each conversation stands in them, and its lines read in order or by their places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from flm_jax.chat.conversation import Conversation, parse_line
from flm_jax.data.json_lines import Line, file_lines, files
from flm_jax.files import sha256_file
from flm_jax.progress import count_bar

# Where a conversation stands: number of the file, of the line, the bytes before it in the content, its own bytes.
PLACE = np.dtype([("file", "<u4"), ("line", "<u4"), ("offset", "<u8"), ("length", "<u4")])
BATCH_LINES, BATCH_BYTES = 1024, 1 << 20
COMPRESSED = (".gz", ".zst")
# A pool may have more files than a process may open.
MOST_OPEN = 100


class PoolFile(NamedTuple):
    """A file of the pool.

    Attributes:
      name: its path within the input that names it.
      path: where it is.
      size: in bytes.
      sha256: of its content.
    """

    name: str
    path: Path
    size: int
    sha256: str

    @property
    def compressed(self) -> bool:
        """Whether its lines can only be read from the beginning."""
        return self.path.suffix in COMPRESSED

    def record(self) -> dict[str, Any]:
        """What identifies it; JSON-able."""
        return {"name": self.name, "bytes": self.size, "sha256": self.sha256}


class Batch(NamedTuple):
    """Some lines of one file in order.

    Attributes:
      name: for messages: the path of the file.
      places: (n,) of `PLACE`.
      lines: their bytes.
    """

    name: str
    places: np.ndarray
    lines: list[bytes]

    def where(self, number: int) -> str:
        """file:line of one of them."""
        return f"{self.name}:{self.places['line'][number]}"


def find_files(inputs: Sequence[str | Path], output: Path) -> list[PoolFile]:
    """The files of the pool, in the order of the inputs and of their names.

    Args:
      inputs: files and folders.
      output: where results will lie.

    Raises:
      FileNotFoundError: an input does not exist, or holds no file of JSON lines.
      ValueError: there is no input, a file is named twice, or the results would become part of the pool.
    """
    if not inputs:
        raise ValueError("there is no pool: name files or folders of conversations")
    found: dict[Path, str] = {}
    for source in inputs:
        root = Path(source).expanduser().resolve()
        if root.is_dir() and output.resolve().is_relative_to(root):
            raise ValueError(f"{output} lies in {source}, and would become part of the pool: write it elsewhere")
        for name, path in files(source):
            if path.resolve() in found:
                raise ValueError(f"{path} is in the pool twice: name each file or folder once")
            found[path.resolve()] = name
    with count_bar("checksums", "B", sum(path.stat().st_size for path in found)) as bar:
        result = []
        for path, name in found.items():
            size = path.stat().st_size
            result.append(PoolFile(name, path, size, sha256_file(path)))
            bar.update(size)
    return result


def batches(pool: Sequence[PoolFile]) -> Iterator[Batch]:
    """Yields all lines of the pool that are not blank.

    Raises:
      LineError: a file is damaged, or a line too long.
    """
    for number, file in enumerate(pool):
        places: list[tuple[int, int, int, int]] = []
        lines: list[bytes] = []
        room = BATCH_BYTES
        for line in file_lines(file.path):
            places.append((number, line.number, line.offset, len(line.content)))
            lines.append(line.content)
            room -= len(line.content)
            if len(lines) >= BATCH_LINES or room <= 0:
                yield Batch(str(file.path), np.array(places, PLACE), lines)
                places, lines, room = [], [], BATCH_BYTES
        if lines:
            yield Batch(str(file.path), np.array(places, PLACE), lines)


class Reader:
    """Reads lines of the pool by their places; a context manager.

    Plain files are read at any place. Compressed ones are read from the beginning, and their places must be asked for
    in order, unless there is a spool: then the offsets of their places are those in the spool.
    """

    def __init__(self, pool: Sequence[PoolFile], spool: Path | None = None) -> None:
        """Names what to read.

        Args:
          pool: the files.
          spool: a plain file with lines of the compressed ones.
        """
        self._pool, self._spool = pool, spool
        self._plain: dict[Path, BinaryIO] = {}
        self._stream: tuple[int, Iterator[Line]] = (-1, iter(()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._plain.values():
            file.close()

    def read(self, place: np.void) -> bytes:
        """The line at a place."""
        number = int(place["file"])
        path = self._pool[number].path
        if self._pool[number].compressed:
            if self._spool is None:
                return self._forward(number, int(place["line"]))
            path = self._spool
        if path not in self._plain:
            if len(self._plain) >= MOST_OPEN:
                self._plain.pop(next(iter(self._plain))).close()
            self._plain[path] = path.open("rb")
        file = self._plain[path]
        file.seek(int(place["offset"]))
        return file.read(int(place["length"]))

    def _forward(self, number: int, line: int) -> bytes:
        if self._stream[0] != number:
            self._stream = number, file_lines(self._pool[number].path)
        return next(found.content for found in self._stream[1] if found.number == line)

    def conversations(self, places: np.ndarray) -> list[Conversation]:
        """The conversations at places, in the order of these."""
        return [parse_line(self.read(place), f"{self._pool[place['file']].path}:{place['line']}") for place in places]

    def batches(self, places: np.ndarray) -> Iterator[Batch]:
        """Yields the lines at places, in the form of `batches`; each batch is of one file."""
        for span in _spans(places):
            part = places[span]
            yield Batch(str(self._pool[part["file"][0]].path), part, [self.read(place) for place in part])


def _spans(places: np.ndarray) -> Iterable[slice]:
    """Slices of places in one file each, of a batch's size."""
    start = 0
    ends = np.cumsum(places["length"], dtype=np.int64)
    borders = np.append(np.flatnonzero(np.diff(places["file"])) + 1, len(places))
    while start < len(places):
        before = int(ends[start - 1]) if start else 0
        most = int(np.searchsorted(ends, before + BATCH_BYTES)) + 1
        border = int(borders[np.searchsorted(borders, start, "right")])
        end = min(start + BATCH_LINES, most, border)
        yield slice(start, end)
        start = end
