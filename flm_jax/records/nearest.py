"""The nearest names to one that does not exist, for the end of the sentence that says so."""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# How alike names must be, from 0 to 1: 'cosin' and 'cosine' are 0.91, 'zeros' and 'noise' 0.6.
_ALIKE = 0.6
# Entries of a directory that are looked at.
_MOST_ENTRIES = 10_000


def nearest(given: Any, names: Iterable[str], most: int = 1) -> list[str]:
    """The names most like a given one, the nearest first, capitals or not; empty if none is close."""
    if not isinstance(given, str):
        return []
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(name.casefold(), name)
    return [folded[name] for name in difflib.get_close_matches(given.casefold(), list(folded), most, _ALIKE)]


def meant(given: Any, names: Iterable[str], most: int = 1) -> str:
    """The end of a sentence about a name that does not exist: "; did you mean 'zero'?", or nothing if none is close.

    Args:
      given: what was written; what is no text is like no name.
      names: those that exist.
      most: how many to offer.
    """
    return _offered(nearest(given, names, most))


def meant_beside(path: str | Path) -> str:
    """The same for a path with nothing there: an entry like its first part that does not exist."""
    missing = Path(path).expanduser()
    while missing != missing.parent and not missing.parent.is_dir():
        missing = missing.parent
    with contextlib.suppress(OSError):
        entries = (entry.name for entry in itertools.islice(missing.parent.iterdir(), _MOST_ENTRIES))
        return _offered([str(missing.parent / name) for name in nearest(missing.name, entries)])
    return ""


def _offered(names: list[str]) -> str:
    if not names:
        return ""
    *first, last = map(repr, names)
    return f"; did you mean {', '.join(first)}{' or ' if first else ''}{last}?"
