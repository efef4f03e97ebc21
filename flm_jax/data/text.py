"""Corpora of text files: the standard library, a folder; and the rule that holds documents out.

Documents are held out by a hash of their names, so the held-out split stays the same when other documents are added or
the folder moves.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from flm_jax.data.folders import all_files, count_endings, in_words
from flm_jax.records import counted, meant_beside, recorded
from flm_jax.records.fields import Limit

SPLITS = ("train", "heldout")
# A whole number stays one: digests hold it as it was given.
Percent = Annotated[int | float, Limit("between 0 and 100, both excluded", lambda percent: 0 < percent < 100)]


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: a corpus has {' and '.join(map(repr, SPLITS))}")


def describe_fields(corpus: Any) -> dict[str, Any]:
    """The kind and fields of a corpus, JSON-able."""
    return {"kind": type(corpus).__name__, **dataclasses.asdict(corpus)}


def name_hash(name: str) -> int:
    """A 64-bit hash of a document's name, the same in every process (Python's own hash is not)."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def heldout_border(names: Iterable[str], percent: float) -> int:
    """The border below which the `name_hash` of a document puts it into the held-out split.

    Args:
      names: every document's name.
      percent: share of the documents to hold out, 0 < percent < 100.

    Returns:
      A border in [0, 2^64], moved just enough that no split is empty if there are two documents or more.

    Raises:
      ValueError: percent is out of range.
    """
    return border_within(hash_range(names), percent)


def hash_range(names: Iterable[str]) -> tuple[int, int] | None:
    """The lowest and the highest `name_hash` of some names, which are not kept; None: there is no name."""
    lowest, highest = 2**64, -1
    for hashed in map(name_hash, names):
        lowest, highest = min(lowest, hashed), max(highest, hashed)
    return None if highest < 0 else (lowest, highest)


def border_within(hashes: tuple[int, int] | None, percent: float) -> int:
    """As `heldout_border`, of the `hash_range` of the names."""
    if not 0 < percent < 100:
        raise ValueError(f"heldout_percent is {percent}: a held-out side needs a share between 0 and 100")
    border = int(percent / 100 * 2**64)
    if hashes is not None and hashes[0] < hashes[1]:
        border = min(max(border, hashes[0] + 1), hashes[1])
    return border


# A single document is cut into parts of about this size, this many at most.
PART_BYTES, MOST_PARTS = 2000, 200


def cut(text: bytes) -> list[bytes]:
    """A text in parts, cut after empty lines, or where there is none nearby after a line, or after a character.

    Joined, the parts are the text. A text of one character or none is one part.
    """
    count = min(max(len(text) // PART_BYTES, 2), MOST_PARTS)
    parts, start = [], 0
    for number in range(1, count):
        wanted = len(text) * number // count
        if wanted <= start:
            continue
        near = range(max(start, wanted - len(text) // count // 2), wanted)
        ends = (text.rfind(mark, near.start, near.stop) + len(mark) for mark in (b"\n\n", b"\n"))
        at = next((end for end, mark in zip(ends, (2, 1), strict=True) if end >= near.start + mark), wanted)
        while at > start and text[at] & 0xC0 == 0x80:  # within a character
            at -= 1
        if at > start:
            parts.append(text[start:at])
            start = at
    return [*parts, text[start:]]


class FileCorpus(abc.ABC):
    """A corpus of one document per file; subclasses say which files, and what to do with unreadable ones."""

    heldout_percent: float

    @abc.abstractmethod
    def contents(self) -> Iterator[tuple[str, Path, bytes]]:
        """Yields (name, path, UTF-8 bytes) of each document, sorted by name; empty files are left out."""

    def listed(self) -> list[tuple[str, Path]] | None:
        """(name, path) of each file that may be a document, sorted by name; None: only `contents` tells documents."""
        return None

    def content(self, path: Path) -> bytes:
        """The UTF-8 bytes of one of the files that `listed` names; b'' where it is left out."""
        raise NotImplementedError(f"{type(self).__name__} lists files, and does not say how one is read")

    def notes(self) -> list[str]:
        """Sentences about what a reader may not expect: files that are left out, a document that is cut into parts."""
        return []

    def _names(self, split: str) -> set[str]:
        """The names of the documents of one split.

        Raises:
          ValueError: an unknown split, or a corpus without any document.
        """
        check_split(split)
        names = [name for name, _, _ in self.contents()]
        border = self._border(names)
        return {name for name in names if (name_hash(name) < border) == (split == "heldout")}

    def _border(self, names: Iterable[str]) -> int:
        if (hashes := hash_range(names)) is None:
            raise ValueError(f"{self} holds no document: every file it names is empty or unreadable")
        return border_within(hashes, self.heldout_percent)

    def border(self) -> int:
        """The border below which the hash of a name puts a document into the held-out split.

        Raises:
          ValueError: there is no document.
        """
        return self._border(name for name, _, _ in self.contents())

    def files(self, split: str) -> list[Path]:
        """The files of one split, sorted by name of their documents.

        Raises:
          ValueError: an unknown split, or a corpus without any document.
        """
        names = self._names(split)
        return [path for name, path, _ in self.contents() if name in names]

    def parts(self, split: str) -> list[bytes] | None:
        """The documents of one split where they are parts of a single file; None: each is a file."""
        check_split(split)
        return None

    def documents(self, split: str) -> Iterator[str]:
        """Yields the text of each document of one split, byte for byte: line ends are kept as they are."""
        names = self._names(split)
        for name, _, text in self.contents():
            if name in names:
                yield text.decode("utf-8")

    def digest(self) -> str:
        """The sha256 over kind, held-out share, names and contents; the location of the folder does not count."""
        whole = hashlib.sha256(self.digest_head())
        for name, _, text in self.contents():
            whole.update(self.digest_entry(name, text))
        return whole.hexdigest()

    def digest_head(self) -> bytes:
        """What the digest covers before any document."""
        return f"{type(self).__name__} {self.heldout_percent!r}".encode()

    def digest_entry(self, name: str, text: bytes) -> bytes:
        """What the digest covers of a document."""
        return json.dumps([name, len(text)]).encode() + hashlib.sha256(text).digest()

    def describe(self) -> dict[str, Any]:
        """The kind and fields of the corpus."""
        return describe_fields(self)


@dataclasses.dataclass(frozen=True)
@recorded
class StandardLibrary(FileCorpus):
    """The Python sources of the interpreter's standard library: 31 MB of text that every machine has, offline.

    Files that are not UTF-8 (the library has a few, for its own tests) are left out.
    """

    heldout_percent: Percent = 5.0

    def listed(self) -> list[tuple[str, Path]]:
        """Every *.py file outside site-packages."""
        root = Path(sysconfig.get_path("stdlib"))
        apart = {"site-packages", "dist-packages", "__pycache__"}
        return _by_name(root, (path for path in root.rglob("*.py") if not apart & set(path.relative_to(root).parts)))

    def content(self, path: Path) -> bytes:
        """See FileCorpus; b'' for a file that is not readable or not UTF-8."""
        return _readable(path)

    def contents(self) -> Iterator[tuple[str, Path, bytes]]:
        """Yields every readable, non-empty *.py file outside site-packages."""
        yield from _filled(self.listed())

    def describe(self) -> dict[str, Any]:
        """The kind and fields of the corpus, and the interpreter's version."""
        return {**describe_fields(self), "python": sys.version.split()[0]}


def _by_name(root: Path, paths: Iterable[Path]) -> list[tuple[str, Path]]:
    """(name below `root`, path) of some files, sorted by name."""
    return sorted((path.relative_to(root).as_posix(), path) for path in paths)


def _readable(path: Path) -> bytes:
    """The content of a file; b'' if it cannot be read or is not UTF-8."""
    try:
        text = path.read_bytes()
        text.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    return text


def _filled(listed: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Path, bytes]]:
    """Yields name, path and content of each listed file that is UTF-8 and not empty."""
    for name, path in listed:
        if text := _readable(path):
            yield name, path, text


@dataclasses.dataclass(frozen=True)
@recorded
class SitePackages(FileCorpus):
    """The files of installed Python packages that match `pattern`, in site-packages: other kinds of text, offline.

    Files that are not UTF-8 are left out.
    """

    pattern: str = "**/*.txt"
    heldout_percent: Percent = 5.0

    def listed(self) -> list[tuple[str, Path]]:
        """Every file that matches.

        Raises:
          FileNotFoundError: none does.
        """
        root = Path(sysconfig.get_path("purelib"))
        paths = [path for path in root.glob(self.pattern) if path.is_file()]
        if not paths:
            raise FileNotFoundError(
                f"SitePackages: no file in {root} matches the pattern {self.pattern!r}; install what holds such files, "
                "or leave the source out"
            )
        return _by_name(root, paths)

    def content(self, path: Path) -> bytes:
        """See FileCorpus; b'' for a file that is not readable or not UTF-8."""
        return _readable(path)

    def contents(self) -> Iterator[tuple[str, Path, bytes]]:
        """Yields every readable, non-empty file.

        Raises:
          FileNotFoundError: as `listed`.
        """
        yield from _filled(self.listed())


@dataclasses.dataclass(frozen=True)
@recorded
class TextFolder(FileCorpus):
    """The UTF-8 files under `path` that match `pattern`, one document each; or `path` is a file.

    A single document is cut into parts (`cut`), so that some can be held out. Folders that are links are not entered.
    """

    path: str = dataclasses.field(metadata={"identity": False})
    pattern: str = "**/*.txt"
    heldout_percent: Percent = 5.0

    def paths(self) -> list[Path]:
        """The matching files, empty ones too, sorted by name.

        Raises:
          FileNotFoundError: there is no such folder, or no matching file in it.
        """
        root = Path(self.path).expanduser()
        if root.is_file():
            return [root]
        if not root.is_dir():
            near = meant_beside(root) or "; set TextFolder.path to your text"
            raise FileNotFoundError(f"TextFolder: there is no folder or file {root}{near}")
        if Path(self.pattern).is_absolute():
            raise ValueError(
                f"TextFolder.pattern = {self.pattern!r}: a pattern begins at the folder, TextFolder.path; such as "
                "'**/*.txt'."
            )
        paths = sorted(
            (p for p in root.glob(self.pattern) if p.is_file()), key=lambda p: p.relative_to(root).as_posix()
        )
        if not paths:
            counts = count_endings(all_files(root))
            others = f"; it holds {in_words(counts)}: bind TextFolder.pattern = '**/*{counts[0][0]}'" if counts else ""
            raise FileNotFoundError(f"TextFolder: no file in {root} matches the pattern {self.pattern!r}{others}")
        return paths

    def listed(self) -> list[tuple[str, Path]] | None:
        """See FileCorpus; None where a single file is cut into parts.

        Raises:
          FileNotFoundError: as `paths`.
        """
        root, paths = Path(self.path).expanduser(), self.paths()
        if len([path for path in paths if path.stat().st_size]) == 1:
            return None
        return [(path.relative_to(root).as_posix(), path) for path in paths]

    def content(self, path: Path) -> bytes:
        """See FileCorpus; b'' for an empty file.

        Raises:
          ValueError: it is not UTF-8.
        """
        return read_utf8(path)

    def notes(self) -> list[str]:
        """How many files match, which do not, and whether a single document is cut."""
        root, paths = Path(self.path).expanduser(), self.paths()
        said = []
        if root.is_dir():
            matching = set(paths)
            left = in_words(count_endings(path for path in all_files(root) if path not in matching))
            said.append(
                f"{root}: {counted(len(paths), 'file matches', 'files match')} {self.pattern!r}"
                + (f"; left out: {left}." if left else ".")
            )
            if links := [path for path in root.rglob("*") if path.is_symlink() and path.is_dir()]:
                said.append(f"{root}: folders that are links are not entered: {', '.join(map(str, links[:3]))}.")
        if lines := [path for path in paths if path.suffix == ".jsonl"]:
            said.append(f"{lines[0]} is read as text, braces and all; @Jsonl() reads a field of each line.")
        documents = list(self.contents())
        if len({path for _, path, _ in documents}) == 1:
            name, size = documents[0][1], sum(len(text) for _, _, text in documents)
            said.append(
                f"{name} is the only document: its {counted(size, 'byte is', 'bytes are')} cut into "
                f"{counted(len(documents), 'part')}."
            )
            if size < 20 * PART_BYTES:
                said.append("So little held-out text measures a loss only roughly.")
        return said

    def parts(self, split: str) -> list[bytes] | None:
        """The parts of a single document; None where each document is a file."""
        names = self._names(split)
        found = list(self.contents())
        if len({path for _, path, _ in found}) > 1:
            return None
        return [text for name, _, text in found if name in names]

    def contents(self) -> Iterator[tuple[str, Path, bytes]]:
        """Yields every non-empty matching file.

        Raises:
          FileNotFoundError: as `paths`.
          ValueError: a file is not UTF-8.
        """
        listed = self.listed()
        if listed is None:
            (path,) = (path for path in self.paths() if path.stat().st_size)
            for number, part in enumerate(cut(read_utf8(path))):
                yield f"{path.name}[{number}]", path, part
            return
        for name, path in listed:
            if text := read_utf8(path):
                yield name, path, text


def read_utf8(path: Path) -> bytes:
    """The content of a text file, in bytes.

    Raises:
      ValueError: it is not UTF-8.
    """
    text = path.read_bytes()
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return text
