"""The pictures of a sweep: for each swept value, the measure against it, seeds as spread."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from flm_jax.sweeps.config import Range, Sweep
from flm_jax.sweeps.results import Outcome, Ranked, ranked
from flm_jax.sweeps.space import POINT, short_of, shown

# With more values than this of the other swept thing there is one line, the best over all of them.
LINES = 6
# More values than this are dots without a line.
JOINED = 12


def axes_of(sweep: Sweep) -> list[str]:
    """The short names of what has a picture: named points, and each axis with two values or more."""
    short = short_of(sweep)
    several = [short[name] for name, values in sweep.axes.items() if isinstance(values, Range) or len(values) > 1]
    return [*([POINT] if len(sweep.points) > 1 else []), *several]


def draw(sweep: Sweep, outcomes: Sequence[Outcome], axis: str) -> bytes:
    """The picture of one swept value, as PNG.

    With one other swept value of few values, or with rungs, there is a line for each of these. Otherwise all candidates
    are dots, and the line is the best of them at each value. A bar spans the seeds from the least to the greatest.

    Args:
      sweep: the sweep.
      outcomes: of its points.
      axis: short name of what is on the horizontal axis.
    """
    from matplotlib.figure import Figure

    rows = [row for row in ranked(outcomes, sweep.goal) if row.mean is not None]
    places = _places(sweep, axis, [row.point.candidate.values[axis] for row in rows])
    joined = len(places) <= JOINED
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    plot = figure.add_subplot()
    groups = _groups(sweep, rows, axis)
    for colour, (label, members) in enumerate(groups.items()):
        xs = [places[_key(row.point.candidate.values[axis])] for row in members]
        means = [row.mean or 0.0 for row in members]
        if joined and len(set(xs)) < len(xs):  # several candidates at one value: dots, and a line through the best
            plot.plot(xs, means, "o", markersize=3, color="0.75", label="all others" if colour == 0 else None)
        chosen = [members[i] for i in _best_at(xs, means, sweep.goal)] if joined else members
        xs = [places[_key(row.point.candidate.values[axis])] for row in chosen]
        means = [row.mean or 0.0 for row in chosen]
        spread = [[m - min(row.values), max(row.values) - m] for m, row in zip(means, chosen, strict=True)]
        bars = [list(side) for side in zip(*spread, strict=True)] if spread else None
        plot.errorbar(
            xs, means, yerr=bars, fmt="o-" if joined else "o", markersize=4, capsize=3, color=f"C{colour}", label=label
        )
    _label(plot, places, [row.point.candidate.values[axis] for row in rows])
    plot.set_xlabel(next((name for name, short in short_of(sweep).items() if short == axis), axis))
    plot.set_ylabel(sweep.measure + (" (mean, least and greatest of seeds)" if len(sweep.seeds) > 1 else ""))
    if any(groups):
        plot.legend(frameon=False)
    plot.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def _groups(sweep: Sweep, rows: Sequence[Ranked], axis: str) -> dict[str, list[Ranked]]:
    """The lines of a picture, by their label; one line without others has the label ''."""
    others = [name for name in axes_of(sweep) if name != axis]
    found: dict[str, list[Ranked]] = {}
    if sweep.halving:
        for row in sorted(rows, key=lambda row: row.point.rung):
            rung = sweep.halving.rungs[row.point.rung]
            found.setdefault(", ".join(f"{name} = {value}" for name, value in rung.items()), []).append(row)
        return found
    if len(others) == 1 and len({_key(row.point.candidate.values[others[0]]) for row in rows}) <= LINES:
        for row in rows:
            value = row.point.candidate.values[others[0]]
            found.setdefault(shown(value) if others[0] == POINT else f"{others[0]} = {shown(value)}", []).append(row)
        return dict(sorted(found.items()))
    drawn = any(isinstance(sweep.axes.get(name), Range) for name, short in short_of(sweep).items() if short == axis)
    return {"the best at each value" if others and not drawn else "": list(rows)}


def _best_at(xs: Sequence[float], means: Sequence[float], goal: str) -> list[int]:
    """The indices of the best at each place, from left to right."""
    sign = 1 if goal == "min" else -1
    found: dict[float, int] = {}
    for index, x in enumerate(xs):
        if x not in found or sign * means[index] < sign * means[found[x]]:
            found[x] = index
    return [found[x] for x in sorted(found)]


def _key(value: Any) -> Any:
    return value if _is_number(value) else shown(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _places(sweep: Sweep, axis: str, values: Sequence[Any]) -> dict[Any, float]:
    """Where each value is on the horizontal axis: a number at itself, anything else in the order of the sweep."""
    if all(map(_is_number, values)):
        return {value: float(value) for value in values}
    full = next((name for name, short in short_of(sweep).items() if short == axis), "")
    listed = list(sweep.points) if axis == POINT else sweep.axes[full]
    there = {_key(value) for value in values}
    ordered = [_key(value) for value in listed if _key(value) in there] if not isinstance(listed, Range) else []
    return {key: float(index) for index, key in enumerate(dict.fromkeys(ordered))}


def _label(plot: Any, places: Mapping[Any, float], values: Sequence[Any]) -> None:
    """Marks values on the horizontal axis; numbers over a factor of 8 and more are on a logarithmic scale."""
    if not all(map(_is_number, values)):
        longest = max((len(str(key)) for key in places), default=0)
        plot.set_xticks(list(places.values()), list(map(str, places)), rotation=0 if longest < 10 else 30)
        return
    if values and min(values) > 0 and max(values) / min(values) >= 8:
        plot.set_xscale("log")
    if len(places) <= 10:
        plot.set_xticks(sorted(places.values()), [f"{x:g}" for x in sorted(places.values())])
        plot.minorticks_off()
