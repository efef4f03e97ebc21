"""Planning: the time in which the recipe of the full-size series is planned, without a TPU and without its compiler."""

from __future__ import annotations

from typing import Any

from benchmarks.parts import program, table
from benchmarks.turns import Quartiles, turns

TITLE = "Planning"
READING = (
    "`experiments/plan.py` for Tele-FLM-52B to 1T on v5p-2048, a process from start to exit. The default compiles "
    "every step and growth for 1,024 simulated devices; `--compiler=none` only lowers them."
)
COMMAND = ["experiments/plan.py", "--gin_file=gin_configs/recipes/tele_flm_1t.gin", "--topology=v5p-2048"]
TINY = ["experiments/plan.py", "--help"]


def measure(effort: str) -> dict[str, Any]:
    """Seconds of the plan."""
    if effort == "tiny":
        timings = turns({"--help": lambda: program(TINY)}, 1, warm_up=0)
    else:
        calls = {"default": lambda: program(COMMAND)}
        if effort == "full":
            calls["--compiler=none"] = lambda: program([*COMMAND, "--compiler=none"])
        timings = turns(calls, 1 if effort == "quick" else 2, warm_up=0)
    return {"rows": {name: timings.of(name) for name in timings.seconds}, "seconds": timings.record()}


def tables(found: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    rows = [
        [f"`{name}`" if name[0] == "-" else name, Quartiles(*v).text(".1f") + " s"] for name, v in found["rows"].items()
    ]
    return [table(["compiler", "time"], rows)]
