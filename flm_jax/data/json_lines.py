"""Files of JSON lines, plain or compressed: their lines with their places, and faults by file and line, counted."""

from __future__ import annotations

import gzip
import io
import logging
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flm_jax.data.folders import find_files
from flm_jax.records import counted
from flm_jax.records.foreign_json import JsonError, parse_json

# The endings of files that hold JSON lines, in the order in which compressed ones are recognised.
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# The largest line that is read; a conversation of a million words has 8 MB.
LINE_BYTES = 32 << 20
# How much of the rest of a longer line is read at a time.
_PASSED_OVER = 1 << 20
_log = logging.getLogger(__name__)


class RowError(ValueError):
    """A row of a corpus cannot be used; the message names file and row.

    Attributes:
      reason: the kind of fault, in a few words; faults are counted by it.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # so that it can pass between processes
        return type(self), (str(self), self.reason)


class LineError(RowError):
    """A line cannot be used; the message names file and line.

    Attributes:
      where: file:line.
      reason: the kind of fault, in a few words; faults are counted by it.
      detail: what was found, and what would be right.
    """

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{where}: {reason}{f': {detail}' if detail else ''}", reason)
        self.where, self.detail = where, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.where, self.reason, self.detail)


class TooManyError(LineError):
    """More lines are faulty than are allowed; the message holds the last fault, or the first ones."""

    def __init__(self, message: str, reason: str) -> None:
        RowError.__init__(self, message, reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowError.__reduce__(self)


class Skipped:
    """Counts the lines that are left out, by reason, and stops where they are too many.

    Attributes:
      limit: the most faulty lines; None: any number.
      counts: how many there were of each kind.
      examples: the first few messages of each kind.
    """

    def __init__(self, limit: int | None = 0, examples: int = 3, advice: str = "", quiet: bool = False) -> None:
        """Nothing is left out yet; `advice` says at the limit how to allow more; `quiet`: without log messages."""
        self.limit, self._advice, self._quiet = limit, advice, quiet
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self._kept = examples

    def add(self, error: LineError) -> None:
        """Counts a fault; the first of each kind is also logged, unless this is quiet.

        Raises:
          LineError: there are more faults than the limit.
        """
        self.counts[error.reason] += 1
        shown = self.examples.setdefault(error.reason, [])
        if len(shown) < self._kept:
            shown.append(str(error))
        total = sum(self.counts.values())
        if self.limit is not None and total > self.limit:
            said = f"{error}; none may be left out{self._advice}"
            if total > 1:
                said = (
                    f"{total} lines are left out, more than the {self.limit} allowed{self._advice}; the last: {error}"
                )
            raise TooManyError(said, error.reason) from error
        if self.counts[error.reason] == 1 and not self._quiet:
            _log.warning("Left out: %s.", error)

    def summary(self) -> str:
        """The counts in words, such as '3 lines left out: empty turn (2), no answer (1)'; '' without a fault."""
        if not self.counts:
            return ""
        return f"{counted(sum(self.counts.values()), 'line')} left out: {in_words(self.counts.most_common())}"


def in_words(counts: Iterable[tuple[str, int]]) -> str:
    """Reasons and their numbers in words: 'empty turn (2), no answer (1)'."""
    return ", ".join(f"{reason} ({number:,})" for reason, number in counts)


def files(path: str | Path) -> list[tuple[str, Path]]:
    """(name, path) of a file of JSON lines, or of each in a folder and its subfolders, sorted by name.

    Raises:
      FileNotFoundError: there is no such file or folder, or the folder holds none.
    """
    return find_files(path, ENDINGS)


def open_lines(path: Path) -> BinaryIO:
    """A file of lines, open for reading; .gz and .zst are decompressed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(path), 1 << 16)
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """A file that is compressed by zstd; unlike the library's own reader it says where the file is cut short."""

    PIECE = 1 << 10  # of at most 32 MB of content: a block of 4 bytes can stand for 128 KB

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{path} is compressed by zstd: pip install zstandard, to read it") from error
        self._begin = zstandard.ZstdDecompressor().decompressobj
        self._file, self._frame, self._content = path.open("rb"), self._begin(), memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            piece = (self._frame.unused_data if self._frame.eof else b"") or self._file.read(self.PIECE)
            if not piece:
                if not self._frame.eof and self._file.tell():
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame.eof:
                self._frame = self._begin()
            self._content = memoryview(self._frame.decompress(piece))
        count = min(len(buffer), len(self._content))
        buffer[:count], self._content = self._content[:count], self._content[count:]
        return count


def too_long(where: str) -> LineError:
    """The error of a line that has more than LINE_BYTES."""
    advice = "each line should hold one JSON object; a larger document belongs into a text file of its own"
    return LineError(where, "a line too long", f"over {LINE_BYTES:,} bytes; {advice}")


class Line(NamedTuple):
    """A line of a file.

    Attributes:
      number: of the line, from 1.
      offset: bytes of the file's content, decompressed, before it.
      content: its bytes, line end included.
    """

    number: int
    offset: int
    content: bytes


def numbered(
    stream: BinaryIO, file: Path, number: int = 1, most: float = math.inf
) -> Iterator[tuple[int, int, bytes | LineError]]:
    """Yields the number of each line, the bytes before it, and its content; blank lines too.

    In the place of a line that is longer than LINE_BYTES stands its error. The rest of it is passed over, a little at a
    time, and only when the next line is asked for.

    Args:
      stream: open, before its first line.
      file: its name, for errors.
      number: of the first line.
      most: how many bytes are read, which end with a line.
    """
    offset = 0
    while offset < most and (line := stream.readline(LINE_BYTES + 1)):
        whole = len(line) <= LINE_BYTES
        yield number, offset, line if whole else too_long(f"{file}:{number}")
        offset += len(line)
        while not whole and not line.endswith(b"\n") and (line := stream.readline(_PASSED_OVER)):
            offset += len(line)
        number += 1


def file_rows(file: Path) -> Iterator[Line | LineError]:
    """Yields the lines of a file that are not blank; for a line that is longer than LINE_BYTES, its error.

    Raises:
      FileNotFoundError: there is no such file.
      LineError: a compressed file is damaged or cut short.
    """
    number = 0
    try:
        with open_lines(file) as stream:
            for number, offset, line in numbered(stream, file):
                if isinstance(line, LineError):
                    yield line
                elif line.strip():
                    yield Line(number, offset, line)
    except (EOFError, OSError, zlib.error, _zstd_error()) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, such as a missing permission
            raise
        raise LineError(f"{file}:{number + 1}", "the file is damaged or cut short", str(error)) from error


def file_lines(file: Path) -> Iterator[Line]:
    """Yields the lines of a file that are not blank.

    Raises:
      FileNotFoundError: there is no such file.
      LineError: a compressed file is damaged or cut short, or a line is longer than LINE_BYTES.
    """
    for row in file_rows(file):
        if isinstance(row, LineError):
            raise row
        yield row


def read_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yields file:line and the bytes of each line that is not blank.

    Raises:
      FileNotFoundError: as `files`.
      LineError: as `file_lines`.
    """
    for _, file in files(path):
        for line in file_lines(file):
            yield f"{file}:{line.number}", line.content


def _zstd_error() -> type[BaseException]:
    try:
        import zstandard
    except ModuleNotFoundError:
        return EOFError
    error: type[BaseException] = zstandard.ZstdError
    return error


def parse_object(line: bytes, where: str, *, finite: bool = False) -> dict[str, Any]:
    """The JSON object on a line.

    Args:
      line: its bytes.
      where: file:line.
      finite: whether NaN and infinite numbers are refused, which JSON does not have but Python writes.

    Raises:
      LineError: there is none; the message names file, line and column.
    """
    try:
        found: dict[str, Any] = parse_json(line, "it", finite=finite)
    except JsonError as error:
        raise LineError(where, "a broken line", str(error)) from error
    return found


def is_text(value: str) -> bool:
    """Whether a text from JSON can be written in UTF-8: half of a surrogate pair is valid JSON, and cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
