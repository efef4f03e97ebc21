"""The plots of a study, as PNG; None where there is nothing to show yet."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flm_jax.files import sha256_json
from flm_jax.savings.catch_up import CatchUp, catch_ups
from flm_jax.savings.fit import Point
from flm_jax.savings.results import Result
from flm_jax.savings.study import baselines
from flm_jax.savings.summary import GrownRow, Summary

# The most curves that are told apart by colour.
CURVES = 6


def rates(summary: Summary) -> bytes | None:
    """Loss against the peak rate, a line per optimizer and schedule."""
    figure, plot = _figure()
    some = False
    for family in baselines(summary.study):
        found = [summary.results[arm.name] for arm in family.search(summary.results)[0] if arm.name in summary.results]
        found = [result for result in found if math.isfinite(result.loss)]
        if found:
            some = True
            xs = [result.rate for result in found]
            plot.plot(xs, [result.loss for result in found], "o-", label=f"{family.optimizer}, {family.schedule}")
    plot.set_xscale("log")
    plot.set_xlabel("peak learning rate at the base width")
    plot.set_ylabel("held-out loss, nats per token")
    plot.set_title(f"{summary.study.target.name}: scratch runs of the target")
    return _png(figure, plot) if some else None


def scratch(summary: Summary) -> bytes | None:
    """Loss of scratch runs against FLOPs, by size, and the frontier."""
    if not summary.others:
        return None
    figure, plot = _figure()
    sizes = sorted({point.params for point in summary.others})
    for size in sizes:
        points = sorted((p for p in summary.others if p.params == size), key=lambda p: p.flops)
        label = f"{size / 1e6:.2f} M parameters" + (" (target)" if size == summary.study.target.params else "")
        plot.plot([p.flops for p in points], [p.loss for p in points], "o-", markersize=4, label=label)
    if summary.frontier is not None:
        flops = np.geomspace(*summary.frontier.range, 60)
        plot.plot(flops, [summary.frontier.best(f)[0] for f in flops], "k--", label="frontier, fitted")
    return _losses(summary, figure, plot, "scratch runs of all sizes, decayed to their end")


def savings(summary: Summary) -> bytes | None:
    """Loss against FLOPs: scratch runs as lines, growths as marks."""
    if not summary.rows:
        return None
    figure, plot = _figure()
    for optimizer, points in summary.scratch.items():
        _line(plot, points, f"scratch, {optimizer}")
    if summary.frontier is not None:
        flops = np.geomspace(*summary.frontier.range, 60)
        plot.plot(flops, [summary.frontier.best(f)[0] for f in flops], "k--", label="frontier of all sizes, fitted")
    for preserving, marker, label in (
        (True, "o", "grown, preserving the function"),
        (False, "x", "grown, not preserving it"),
    ):
        rows = [row for row in summary.rows if row.preserving == preserving and math.isfinite(row.result.loss)]
        if rows:
            plot.plot([r.result.flops for r in rows], [r.result.loss for r in rows], marker, label=label)
    return _losses(summary, figure, plot, "below the line of scratch runs, growing pays")


def curves(summary: Summary) -> bytes | None:
    """Loss during training: the full scratch run and the best growths."""
    rows = sorted((row for row in summary.rows if row.gain is not None), key=lambda row: -(row.gain or 0.0))
    full = _full_run(summary)
    if not rows or full is None:
        return None
    figure, plot = _figure()
    _curve(plot, full, full.name, "k")
    # Plans of several tables may be one recipe; the one with the most seeds is first, or one of equals.
    shown: dict[str, GrownRow] = {}
    for row in sorted(rows, key=lambda row: -len(row.result.runs)):
        shown.setdefault(sha256_json(row.result.recipe), row)
    for number, row in enumerate([row for row in rows if row in shown.values()][:CURVES]):
        _curve(plot, row.result, row.name, f"C{number}")
    losses = [e["loss"] for e in full.runs[0]["evals"] if math.isfinite(e["loss"])]
    plot.set_ylim(min(losses) - 0.1, min(losses) + 1.2)
    return _losses(summary, figure, plot, "the growths with the greatest gain, and a full run from scratch", log=False)


def catch_up(summary: Summary) -> bytes | None:
    """The gap to the scratch run since the growth: for each size of the first model, the growth that ends lowest."""
    found: dict[int, CatchUp] = {}
    for one in sorted(catch_ups(summary), key=lambda one: one.gaps[-1]):
        found.setdefault(one.start, one)
    if not found:
        return None
    figure, plot = _figure()
    for number, start in enumerate(sorted(found)):
        one = found[start]
        plot.plot(one.tokens, one.gaps, "o-", color=f"C{number}", markersize=3, linewidth=1, label=one.name)
    plot.axhline(0.0, color="k", linewidth=1)
    last = max(one.gaps[-1] for one in found.values())
    plot.set_ylim(min(-0.05, *(min(one.gaps) for one in found.values())), max(0.1, 4 * last))
    plot.set_xlabel("tokens since the last growth")
    plot.set_ylabel("loss minus that of the scratch run, nats per token")
    plot.set_title(f"{summary.study.target.name}: gap to a scratch run with the same tokens")
    return _png(figure, plot)


def _full_run(summary: Summary) -> Result | None:
    budget = summary.study.target.tokens_per_param
    found = []
    for family in baselines(summary.study):
        rate = family.search(summary.results)[1]
        if rate is not None:
            found.append(summary.results[family.arm(rate, budget).name])
    return min(found, key=lambda result: result.loss, default=None)


def _curve(plot: Any, result: Result, label: str, colour: str) -> None:
    evals = [e for e in result.runs[0]["evals"] if math.isfinite(e["loss"]) and e["tokens"]]
    plot.plot([e["flops"] for e in evals], [e["loss"] for e in evals], color=colour, label=label, linewidth=1)


def _line(plot: Any, points: Sequence[Point], label: str) -> None:
    ordered = sorted(points, key=lambda point: point.flops)
    plot.plot([p.flops for p in ordered], [p.loss for p in ordered], "s-", markersize=4, label=label)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.add_subplot()


def _losses(summary: Summary, figure: Any, plot: Any, title: str, log: bool = True) -> bytes:
    if log:
        plot.set_xscale("log")
    plot.set_xlabel("FLOPs of all stages")
    plot.set_ylabel("held-out loss, nats per token")
    plot.set_title(f"{summary.study.target.name}: {title}")
    return _png(figure, plot)


def _png(figure: Any, plot: Any) -> bytes:
    plot.grid(alpha=0.3)
    plot.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
