"""Tables of results as text for a terminal of 100 columns, and as Markdown."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from flm_jax.evaluation.compare import Interval, Row, Table
from flm_jax.evaluation.judges import ACCURACY, WINS

WIDTH = 100
_ABOUT = {
    ACCURACY: "accuracy: share of right answers, in percent",
    "score": "score: mean of the judge's scores, from 1 to 10",
    WINS: "wins: share of questions on which the answer is preferred, in percent, ties as halves",
}


class _Column(NamedTuple):
    title: str
    cell: Callable[[Row], str]


def _columns(table: Table, short: bool) -> list[_Column]:
    """The columns of a table; of `short` ones, all fit into a terminal."""
    rows = (table.overall, *table.rows, *table.parts)
    scale, digits = (1, 2) if table.measure == "score" else (100, 1)

    def number(value: float | None) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

    def interval(value: Interval | None, scale: float = scale, digits: int = digits) -> str:
        return "-" if value is None else f"{scale * value[0]:.{digits}f}-{scale * value[1]:.{digits}f}"

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    found = [
        _Column("n", lambda row: str(row.n)),
        _Column(table.measure, lambda row: number(row.mean)),
        _Column("95 %", lambda row: interval(row.interval)),
    ]
    if any(row.per_byte is not None for row in rows) and not short:
        found.append(_Column("by likelihood per byte", lambda row: number(row.per_byte)))
    if table.measure != WINS and any(row.pairs for row in rows):
        found += [
            _Column("ref." if short else "reference", lambda row: number(row.reference)),
            _Column("relative", lambda row: percent(row.relative)),
            _Column("95 %", lambda row: interval(row.relative_interval, 100, 1)),
        ]
    if any(row.pairs for row in rows):
        found.append(_Column("win/tie/loss", lambda row: f"{row.wins}/{row.ties}/{row.losses}"))
    if any(row.disagreed for row in rows):
        found.append(_Column("disagreed", lambda row: str(row.disagreed)))
    if any(row.unjudged for row in rows):
        found.append(_Column("unjudged", lambda row: str(row.unjudged)))
    return found


def as_text(table: Table) -> str:
    """A table of at most WIDTH columns, under a line that says what it shows."""
    columns = _columns(table, short=True)
    rows = [*table.rows, table.overall]
    cells = [[column.title, *(column.cell(row) for row in rows)] for column in columns]
    widths = [max(map(len, column)) for column in cells]
    names = ["category", *(row.category for row in rows)]
    room = max(8, WIDTH - sum(widths) - 2 * len(widths))
    names = [fitted(name, room) for name in names]
    first = max(map(shown_width, names))
    lines = [_ABOUT[table.measure]]
    for i, name in enumerate(names):
        if i == len(names) - 1 and len(rows) > 2:
            lines.append("-" * (first + sum(widths) + 2 * len(widths)))
        elif i == len(names) - 1 and len(rows) == 2:
            break  # of one category, the whole is the same
        padded = name + " " * (first - shown_width(name))
        lines.append(
            "  ".join([padded, *(column[i].rjust(width) for column, width in zip(cells, widths, strict=True))])
        )
    if table.overall.per_byte is not None:
        lines.append(f"choices by their likelihood per byte: {100 * table.overall.per_byte:.1f} percent right")
    return "\n".join(lines)


def as_markdown(table: Table) -> str:
    """A table with all columns, and one of the subcategories if there are any."""
    columns = _columns(table, short=False)
    found = []
    for title, rows in (("category", [*table.rows, table.overall]), ("subcategory", list(table.parts))):
        if rows:
            lines = [[title, *(c.title for c in columns)], ["---", *("---:" for _ in columns)]]
            lines += [[_escaped(row.category), *(c.cell(row) for c in columns)] for row in rows]
            found.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return f"{_ABOUT[table.measure]}\n\n" + "\n\n".join(found)


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def shown_width(text: str) -> int:
    """The columns that a text takes in a terminal; Chinese characters take two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fitted(text: str, width: int) -> str:
    """A text of at most `width` columns, its end cut off where it is longer."""
    if shown_width(text) <= width:
        return text
    while shown_width(text) > width - 1:
        text = text[:-1]
    return text.rstrip() + "…"
