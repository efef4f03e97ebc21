"""A comparison as Markdown, and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flm_jax import costs
from flm_jax.files import atomic_write, write_json
from flm_jax.run_comparison.compare import Comparison
from flm_jax.run_comparison.curves import RunCurves
from flm_jax.run_comparison.page import write_page
from flm_jax.run_comparison.picture import draw


def duration(seconds: float | None) -> str:
    """Wall clock as text; '-' if it is not known."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def markdown(found: Comparison, picture: str | None = None) -> str:
    """The comparison as Markdown; with the name of its picture, if that lies beside it."""
    runs = found.runs
    lines = ["# Comparison of runs", ""] + ([f"![held-out loss]({picture})", ""] if picture else [])
    lines += [*table(RUN_HEAD, [_run_row(run) for run in runs]), ""]
    lines += [*(f"- {note}" for note in found.notes), ""] if found.notes else []
    if found.at_equal_flops:
        rows = [[f"{flops:.3g}", *(f"{loss:.4f}" for loss in losses)] for flops, losses in found.at_equal_flops]
        lines += ["## Held-out loss at equal FLOPs", "", "Linear between measurements, in nats per token.", ""]
        lines += [*table(["FLOPs", *(run.name for run in runs)], rows), ""]
    if found.savings:
        first = runs[0].name
        rows = [
            [s.run, f"{s.loss:.4f}", f"{s.first:.3g}", f"{s.own:.3g}", f"{s.ratio:.3f}", _saved(s.ratio)]
            for s in found.savings
        ]
        lines += ["## FLOPs to the same held-out loss", ""]
        said = (
            f"The ratio is the run's FLOPs over those of {first}. A run's last line is the lowest loss that both reach."
        )
        lines += [said, ""]
        lines += [*table(["run", "loss", f"FLOPs of {first}", "of the run", "ratio", "saving"], rows), ""]
    if len(runs) > 1:
        lines += ["## Settings that differ", ""]
        rows = [[name, *map(_value, values)] for name, values in found.differences.items()]
        head = ["setting", *(run.name for run in runs)]
        lines += [*(table(head, rows) if rows else ["None: the recipes and the data are equal."]), ""]
    return "\n".join(lines)


RUN_HEAD = (
    "run", "stages", "parameters", "steps", "tokens", "FLOPs", "wall clock", "on", "held-out loss", "bits per byte"
)  # fmt: skip


def _run_row(run: RunCurves) -> list[str]:
    reached, last = run.reached, run.heldout[-1] if run.heldout else None
    stages = " -> ".join(stage.name + (f" ({stage.grown})" if stage.grown else "") for stage in run.stages)
    params = " -> ".join(costs.count(stage.params) for stage in run.stages)
    steps = f"{reached.step:,}" + ("" if reached.step == run.planned else f" of {run.planned:,}")
    spent = [costs.count(reached.tokens), f"{reached.flops:.3g}", duration(reached.seconds), run.device or "-"]
    bits = "-" if last is None or last.bits_per_byte is None else f"{last.bits_per_byte:.3f}"
    return [run.name, stages, params, steps, *spent, "-" if last is None else f"{last.loss:.4f}", bits]


def _saved(ratio: float) -> str:
    return f"{1 - ratio:.1%}" if ratio <= 1 else f"none, {ratio - 1:.1%} more"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write(found: Comparison, folder: Path) -> None:
    """Writes compare.md, .png, .html and .json into a folder, which is made if it does not exist."""
    atomic_write(folder / "compare.png", draw(found.runs))
    atomic_write(folder / "compare.md", markdown(found, "compare.png"))
    write_page(found.runs, folder / "compare.html")
    write_json(folder / "compare.json", found.record())
