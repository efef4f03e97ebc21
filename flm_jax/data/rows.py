"""Corpora of many documents per file: what they have in common, and JSON lines."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flm_jax.data.folders import find_files
from flm_jax.data.json_lines import ENDINGS, LINE_BYTES, LineError, RowError, file_rows, is_text, numbered, too_long
from flm_jax.data.left_out import LeftOut, kept
from flm_jax.data.text import Percent, border_within, check_split, describe_fields, hash_range, name_hash
from flm_jax.records import meant, recorded
from flm_jax.records.fields import Count
from flm_jax.records.foreign_json import JsonError, parse_json

COMPRESSED = (".gz", ".zst")


class Span(NamedTuple):
    """Whole lines of a file that follow one another.

    Attributes:
      start: bytes before them.
      end: bytes before what follows them.
      number: of the first line, from 1.
    """

    start: int
    end: int
    number: int


class RowCorpus(abc.ABC):
    """A corpus of many documents per file, each with a number; subclasses read their files.

    Attributes:
      most_faulty: how many rows may be left out because they are faulty; more are an error.
      unit: what a row is called.
    """

    path: str
    heldout_percent: float
    most_faulty: int = 0
    unit = "row"

    @abc.abstractmethod
    def files(self) -> list[tuple[str, Path]]:
        """(name, path) of each file, sorted by name.

        Raises:
          FileNotFoundError: there is no such file or folder, or the folder has no such files.
        """

    @abc.abstractmethod
    def texts(self, path: Path, span: Span | None = None) -> Iterator[tuple[int, str | RowError]]:
        """Yields number and text of each document of a file, in order, empty ones too; of a faulty row, its error.

        Args:
          path: one of `files`.
          span: one of `spans`; None: all of the file.
        """

    def listed(self) -> list[tuple[str, Path]] | None:
        """As `files`; None: it is not read file by file, but by `lines`."""
        return self.files()

    def spans(self, path: Path, most_bytes: int) -> list[Span] | None:
        """A file in spans of about so many bytes, which can be read apart; None: it is read as a whole."""
        del path, most_bytes
        return None

    def left_out(self) -> LeftOut:
        """Counts what is left out of the corpus, up to `most_faulty`; it has counted nothing yet."""
        return LeftOut(self.most_faulty, f"{type(self).__name__}.most_faulty", self.unit)

    def lines(self, left_out: LeftOut | None = None) -> Iterator[tuple[str, str]]:
        """Yields each non-empty document with its name, file:number, in a fixed order.

        Args:
          left_out: counts the faulty rows; None: they are counted, and nothing is told of them.

        Raises:
          TooManyError: more rows are faulty than are allowed.
        """
        left_out = self.left_out() if left_out is None else left_out
        for name, path in self.files():
            for number, text in kept(self.texts(path), left_out):
                yield f"{name}:{number}", text

    def border(self, left_out: LeftOut | None = None) -> int:
        """The held-out border of this corpus; for `left_out` see `lines`.

        Raises:
          ValueError: there is no document.
        """
        hashes = hash_range(name for name, _ in self.lines(left_out))
        if hashes is None:
            raise ValueError(f"{type(self).__name__}: {self.path} holds no document")
        return border_within(hashes, self.heldout_percent)

    def documents(self, split: str, left_out: LeftOut | None = None) -> Iterator[str]:
        """Yields the documents of one split, in the order of files and lines; for `left_out` see `lines`."""
        check_split(split)
        border = self.border()
        for name, text in self.lines(left_out):
            if (name_hash(name) < border) == (split == "heldout"):
                yield text

    def digest(self, left_out: LeftOut | None = None) -> str:
        """The sha256 over kind, held-out share, names and texts; for `left_out` see `lines`."""
        whole = hashlib.sha256(self.digest_head())
        for name, text in self.lines(left_out):
            whole.update(self.digest_entry(name, text))
        return whole.hexdigest()

    def digest_head(self) -> bytes:
        """What the digest covers before any document."""
        return f"{type(self).__name__} {self.heldout_percent!r}".encode()

    def digest_entry(self, name: str, text: str) -> bytes:
        """What the digest covers of a document."""
        return json.dumps([name, text]).encode()

    def describe(self) -> dict[str, Any]:
        """The kind and fields of the corpus; a limit of none is not named, as earlier versions had no other."""
        about = describe_fields(self)
        return about if self.most_faulty else {name: value for name, value in about.items() if name != "most_faulty"}


@dataclasses.dataclass(frozen=True)
@recorded
class Jsonl(RowCorpus):
    """JSON lines: each line of a file, or of every *.jsonl in a folder, has a document in its `field`.

    Files may end with .jsonl.gz or .jsonl.zst. A field inside another one is named by its path, such as 'page.text'.

    Attributes:
      path: a file, or a folder of such files.
      field: what holds the text.
      heldout_percent: share of the documents that is held out.
      most_faulty: how many lines may be left out because they are no JSON object with text in this field, or longer
        than 32 MiB; more are an error.
    """

    path: str = dataclasses.field(metadata={"identity": False})
    field: str = "text"
    heldout_percent: Percent = 5.0
    # What it leaves out changes the texts, by which data is identified.
    most_faulty: Count = dataclasses.field(default=0, metadata={"identity": False})
    unit = "line"

    def files(self) -> list[tuple[str, Path]]:
        """See RowCorpus."""
        return find_files(self.path, ENDINGS)

    @property
    def compressed(self) -> bool:
        """Whether any of the files is."""
        return any(path.suffix in COMPRESSED for _, path in self.files())

    def parse(self, line: bytes, where: str) -> str:
        """The document on one line; '' for a blank line or an empty document.

        Args:
          line: the line's bytes.
          where: file:line, for the error.

        Raises:
          RowError: the line is not JSON or not an object, has no such field, or the field is not text.
        """
        if len(line) > LINE_BYTES:
            raise too_long(where)
        if not line.strip():
            return ""
        try:
            # Only one field is used, and NaN in another one does no harm; Python writes it.
            record = parse_json(line, where, None, finite=False)
        except JsonError as error:
            raise RowError(str(error), "a broken line") from error
        text = self._value(record, where)
        if not isinstance(text, str):
            said = f"{where}: the field {self.field!r} is {type(text).__name__}, and should be text"
            raise RowError(said, "no text")
        if not is_text(text):
            raise RowError(f"{where}: the field {self.field!r} holds half of a surrogate pair", "no text")
        return text

    def _value(self, record: Any, where: str) -> Any:
        """What stands in the field: one of this name or, if there is none, inside others along the path."""
        names = [self.field] if isinstance(record, dict) and self.field in record else self.field.split(".")
        for name in names:
            if not isinstance(record, dict) or name not in record:
                found = f"the fields {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
                near = meant(name, record) if isinstance(record, dict) else ""
                raise RowError(f"{where} has no field {self.field!r}: found {found}{near}", "no such field")
            record = record[name]
        return record

    def spans(self, path: Path, most_bytes: int) -> list[Span] | None:
        """See RowCorpus; compressed files are read as a whole."""
        return None if path.suffix in COMPRESSED else _line_spans(path, most_bytes)

    def texts(self, path: Path, span: Span | None = None) -> Iterator[tuple[int, str | RowError]]:
        """See RowCorpus."""
        for number, line in _numbered(path, span):
            found: str | RowError
            try:
                found = line if isinstance(line, LineError) else self.parse(line, f"{path}:{number}")
            except RowError as error:
                found = error
            yield number, found


def _numbered(path: Path, span: Span | None) -> Iterator[tuple[int, bytes | LineError]]:
    if path.suffix in COMPRESSED:
        for row in file_rows(path):
            yield (0, row) if isinstance(row, LineError) else (row.number, row.content)  # an error names its line
        return
    with path.open("rb") as file:
        start, size, first = (0, math.inf, 1) if span is None else (span.start, span.end - span.start, span.number)
        file.seek(start)
        for number, _, line in numbered(file, path, first, size):
            yield number, line


def _line_spans(path: Path, most_bytes: int) -> list[Span]:
    """A plain file in spans that end with the first line end at or behind `most_bytes` bytes; none if it is empty."""
    spans, start, number, lines, at = [], 0, 1, 1, 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            counted = 0  # bytes of the piece whose line ends are in `lines`
            while (wanted := max(start + most_bytes - 1 - at, counted)) < len(piece):
                cut = piece.find(b"\n", wanted) + 1
                if not cut:
                    break
                lines += piece.count(b"\n", counted, cut)
                spans.append(Span(start, at + cut, number))
                start, number, counted = at + cut, lines, cut
            lines += piece.count(b"\n", counted)
            at += len(piece)
    if start < at:
        spans.append(Span(start, at, number))
    return spans
