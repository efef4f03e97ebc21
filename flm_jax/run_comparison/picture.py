"""The picture of a comparison: held-out loss against FLOPs, tokens and wall clock."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from flm_jax.run_comparison.curves import Point, RunCurves


def draw(runs: Sequence[RunCurves]) -> bytes:
    """The picture as PNG; a growth is a diamond on the curve of its run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    divisor, unit = _unit([point.seconds for run in runs for point in run.heldout if point.seconds is not None])
    values = {
        "training FLOPs, all stages": lambda point: point.flops,
        "tokens, all stages": lambda point: point.tokens,
        f"wall clock ({unit})": lambda point: math.nan if point.seconds is None else point.seconds / divisor,
    }
    for panel, (label, value) in zip(panels, values.items(), strict=True):
        for place, run in enumerate(runs):
            colour, points = f"C{place % 10}", run.heldout
            losses = [point.loss for point in points]
            panel.plot([value(p) for p in points], losses, marker="o", markersize=2.5, color=colour, label=run.name)
            for stage, point in run.growths():
                panel.plot(value(point), point.loss, marker="D", markersize=8, color=colour, markeredgecolor="white")
                panel.annotate(
                    stage.grown or "",
                    (value(point), point.loss),
                    xytext=(7, 7),
                    textcoords="offset points",
                    fontsize=8,
                    color="dimgrey",
                    annotation_clip=True,
                )
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out loss (nats per token)")
    if limits := _limits([point for run in runs for point in run.heldout]):
        panels[0].set_ylim(*limits)
    panels[0].legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png", metadata={"Software": None})
    return image.getvalue()


def _unit(seconds: Sequence[float]) -> tuple[float, str]:
    longest = max(seconds, default=0.0)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if longest >= 2 * size:
            return size, unit
    return 1, "seconds"


def _limits(points: Sequence[Point]) -> tuple[float, float] | None:
    """Limits of the axis that leave out the losses of models that have hardly begun: the curves would be flat."""
    losses = sorted(point.loss for point in points if point.flops > 0)
    if len(losses) < 10:
        return None
    low, high = losses[0], losses[int(0.9 * len(losses))]
    return low - 0.05 * (high - low) - 0.02, high + 0.1 * (high - low) + 0.02
