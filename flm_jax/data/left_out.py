"""Faulty rows of a corpus, which are left out: counted by the kind of fault, the first few named, up to a limit.

The same is counted, said and refused whether a corpus is read as a whole, or in parts whose counts are added in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flm_jax.data.json_lines import RowError, Skipped, TooManyError, in_words
from flm_jax.records import counted
from flm_jax.records.foreign_json import check, field

# In the description of a store's corpus.
LEFT_OUT = "left_out"
# How many faulty rows are named in a record, and in a refusal; and the longest message that is kept, in characters.
_NAMED, _SAID, _LONGEST = 5, 3, 1000


class LeftOut:
    """The faulty rows of a corpus or of a part of it.

    Attributes:
      limit: the most that may be left out.
      reasons: how many there are of each kind of fault.
      first: the messages of the first few, which name file and row.
    """

    def __init__(self, limit: int, binding: str = "", unit: str = "row") -> None:
        """Nothing is left out yet.

        Args:
          limit: the most faulty rows; one more is an error.
          binding: what sets the limit, such as Jsonl.most_faulty, for the error; '': nothing does.
          unit: what a row is called.
        """
        self.limit, self._binding, self._unit = limit, binding, unit
        self.reasons: dict[str, int] = {}
        self.first: list[str] = []

    @property
    def count(self) -> int:
        """How many rows are left out."""
        return sum(self.reasons.values())

    def add(self, error: RowError) -> None:
        """Counts a faulty row, which stands behind those that are counted.

        Raises:
          TooManyError: there are more than the limit.
        """
        self._add({error.reason: 1}, [_short(str(error))])

    def add_all(self, record: Mapping[str, Any]) -> None:
        """Counts what was left out of the next part of the corpus, from its `record`.

        Raises:
          TooManyError: there are more than the limit; the message is the one that reading in one go leads to.
          JsonError: it is no record.
        """
        _, reasons, first = _checked(record)
        self._add(reasons, first)

    def _add(self, reasons: Mapping[str, int], first: Iterable[str]) -> None:
        for reason, number in reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + number
        self.first += list(first)[: _NAMED - len(self.first)]
        if self.count <= self.limit:
            return
        if not self.limit:
            more = f"; {self._binding} = N leaves out up to N such {self._unit}s" if self._binding else ""
            raise TooManyError(f"{self.first[0]}{more}", next(iter(reasons)))
        # How many more there are depends on how much was read at once; the first ones do not.
        named = "; ".join(self.first[: min(_SAID, self.limit + 1)])
        said = f"there are more faulty {self._unit}s than the {self.limit:,} that {self._binding} allows"
        raise TooManyError(f"{said}; the first: {named}", next(iter(reasons)))

    def record(self) -> dict[str, Any]:
        """The counts and the first messages, JSON-able."""
        return _record(self._unit, self.reasons, self.first)


def record_of(skipped: Skipped) -> dict[str, Any]:
    """The record, as `LeftOut.record`, of what was left out of conversations; it names the first line of each kind."""
    first = [_short(messages[0]) for messages in skipped.examples.values()]
    return _record("line", skipped.counts, first[:_NAMED])


def _record(unit: str, reasons: Mapping[str, int], first: list[str]) -> dict[str, Any]:
    ordered = dict(sorted(reasons.items()))
    return {"count": sum(ordered.values()), "unit": unit, "reasons": ordered, "first": first}


def description(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the description of a store gains by a record; nothing where nothing is left out."""
    return {LEFT_OUT: record} if record["count"] else {}


def kept(rows: Iterable[tuple[int, str | RowError]], left_out: LeftOut) -> Iterator[tuple[int, str]]:
    """Yields number and text of each row that has one, and counts the faulty ones.

    Raises:
      TooManyError: as `LeftOut.add`.
    """
    for number, found in rows:
        if isinstance(found, RowError):
            left_out.add(found)
        elif found:
            yield number, found


def sentence(record: Mapping[str, Any], named: int = _SAID) -> str:
    """A `LeftOut.record` in words, without an end; '' where nothing is left out.

    Args:
      record: such as {"count": 2, "unit": "line", "reasons": {"a broken line": 2}, "first": ["a.jsonl:7 is not ..."]}.
      named: how many of the faulty rows are named.

    Raises:
      JsonError: it is no record.
    """
    unit, reasons, first = _checked(record)
    if not reasons:
        return ""
    ordered = sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))
    said = f"{counted(sum(reasons.values()), unit)} left out: {in_words(ordered)}"
    return said + (f"; the first: {'; '.join(first[:named])}" if first[:named] else "")


def _checked(record: Mapping[str, Any]) -> tuple[str, dict[str, int], list[str]]:
    where = "the record of what was left out"
    reasons = {reason: check(n, int, where) for reason, n in field(record, "reasons", dict, where).items()}
    return (
        field(record, "unit", str, where),
        reasons,
        [check(m, str, where) for m in field(record, "first", list, where)],
    )


def _short(message: str) -> str:
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST - 3]}..."
