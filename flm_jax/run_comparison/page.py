"""The curves of runs as one HTML file that needs no other: lines to hover over, growths marked, a table of stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flm_jax import costs
from flm_jax.files import atomic_write
from flm_jax.run_comparison.curves import Point, RunCurves

TEMPLATE = Path(__file__).with_name("page.html")
# The most points of a line; the training loss is averaged to that.
MOST = 1500


def write_page(runs: Sequence[RunCurves], file: Path) -> None:
    """Writes the page of one run or several."""
    # Inside a script, only "<" could end it; as an escape it means the same.
    data = json.dumps([_record(run) for run in runs], allow_nan=False).replace("<", "\\u003c")
    atomic_write(file, TEMPLATE.read_text().replace('"DATA"', data))


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most about `most` points, each with the mean loss of some neighbours of one stage, at the last of them."""
    size = -(-len(points) // most)
    if size <= 1:
        return list(points)
    found = []
    group: list[Point] = []
    for place, point in enumerate(points):
        group.append(point)
        ends = place + 1 == len(points) or points[place + 1].stage != point.stage
        if len(group) == size or ends:
            found.append(point._replace(loss=sum(p.loss for p in group) / len(group)))
            group = []
    return found


def _record(run: RunCurves) -> dict[str, Any]:
    """What the page knows of a run."""
    stages = [
        {
            "name": stage.name,
            "shape": costs.shape_line(stage.model),
            "params": costs.count(stage.params),
            "grown": stage.grown,
            "steps": stage.steps,
            "flopsPerToken": f"{stage.cost.flops_per_token:.3g}",
        }
        for stage in run.stages
    ]
    return {
        "name": run.name,
        "stages": stages,
        "notes": list(run.notes),
        "device": run.device,
        "averaged": max(-(-len(run.train) // MOST), 1),
        "heldout": [_point(point) for point in run.heldout],
        "train": [_point(point) for point in thinned(run.train)],
        "growths": [{"method": stage.grown, "stage": stage.name, **_point(point)} for stage, point in run.growths()],
    }


def _point(point: Point) -> dict[str, Any]:
    seconds = None if point.seconds is None else round(point.seconds, 1)
    bits = None if point.bits_per_byte is None else round(point.bits_per_byte, 4)
    axes = {"step": point.step, "tokens": point.tokens, "flops": point.flops, "seconds": seconds}
    return {"stage": point.stage, **axes, "loss": round(point.loss, 5), "bits": bits}
