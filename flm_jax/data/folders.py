"""Files of a corpus in a folder: those with an ending, and in words what else there is."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from pathlib import Path

from flm_jax.records import meant_beside


def find_files(path: str | Path, endings: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(name, path) of a file, or of each file with one of some endings in a folder and its subfolders, sorted by name.

    Raises:
      FileNotFoundError: there is no such file or folder, or the folder holds none; the message says what it holds.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise FileNotFoundError(f"there is no file or folder {root}{meant_beside(root)}")
    # Not pipes: reading would wait.
    found = sorted(p for p in root.rglob("*") if p.name.endswith(endings) and p.is_file())
    if not found:
        held = endings_of(root)
        wanted = " or ".join(f"*{ending}" for ending in endings)
        raise FileNotFoundError(f"there is no {wanted} file in {root}" + (f"; it holds {held}" if held else ""))
    return [(p.relative_to(root).as_posix(), p) for p in found]


def all_files(root: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders; hidden ones, and those of hidden folders, are left out."""
    return (p for p in root.rglob("*") if p.is_file() and not any(q.startswith(".") for q in p.relative_to(root).parts))


def endings_of(root: Path) -> str:
    """What the files of a folder end with, such as '12 *.md, 3 *.rst, 1 other'; empty if there are none."""
    return in_words(count_endings(all_files(root)))


def count_endings(paths: Iterable[Path]) -> list[tuple[str, int]]:
    """The endings of some files, '' where there is none, and how many files have each, commonest first."""
    counts = collections.Counter(path.suffix for path in paths)
    return sorted(counts.items(), key=lambda item: (-item[1], not item[0], item[0]))


def in_words(counts: list[tuple[str, int]]) -> str:
    """The three commonest endings as text, and how many files have others."""
    said = [f"{n:,} {'*' + ending if ending else 'without an ending'}" for ending, n in counts[:3]]
    rest = sum(n for _, n in counts[3:])
    return ", ".join(said + ([f"{rest:,} other" + ("s" if rest > 1 else "")] if rest else []))
