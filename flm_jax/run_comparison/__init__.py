"""Runs beside each other, from what they left in their work directories: curves, settings, FLOPs for the same loss."""

from flm_jax.run_comparison.compare import Comparison, compare_runs
from flm_jax.run_comparison.curves import Point, RunCurves
from flm_jax.run_comparison.page import write_page
from flm_jax.run_comparison.reading import read_run_curves, stage_costs
from flm_jax.run_comparison.text import markdown, write

__all__ = [
    "Comparison",
    "Point",
    "RunCurves",
    "compare_runs",
    "markdown",
    "read_run_curves",
    "stage_costs",
    "write",
    "write_page",
]
