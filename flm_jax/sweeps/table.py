"""The table of a sweep while it runs: drawn again and again in a terminal, a line per event elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from flm_jax.records import counted
from flm_jax.sweeps.execute import Places, Runner
from flm_jax.sweeps.results import DONE, FAILED, RUNNING, STOPPED, WAITING, Outcome

ORDER = (RUNNING, DONE, FAILED, STOPPED, WAITING)
REDRAWN = 1.0  # seconds
TAIL = 1 << 14  # bytes; more than a few lines of metrics.jsonl


def newest(workdir: Path) -> Mapping[str, Any]:
    """The last measurement of a training step of a run; empty if there is none yet."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:  # half a line, at the cut or at the end
            continue
        if isinstance(found, dict) and found.get("kind") == "train":
            return found
    return {}


def line(outcome: Outcome, width: int, progress: Mapping[str, Any], steps: int) -> str:
    """An outcome in a line: the name, the state, and how far or how good it is."""
    text = f"{outcome.point.name[:width]:<{width}}  {outcome.state:<8}"
    if outcome.state == RUNNING and progress:
        text += f"  step {progress['step']} of {steps}, loss {progress['loss'] or float('nan'):.4f}"
    elif outcome.state == DONE:
        text += f"  {outcome.value:.4f}  {outcome.seconds:.0f} s"
    elif outcome.state == FAILED:
        text += f"  {outcome.reason}"
    return text


class Table:
    """Shows how a sweep goes on; called with its runner at every look at the processes."""

    def __init__(self, places: Places, steps: Mapping[str, int], out: TextIO = sys.stdout) -> None:
        """Shows nothing yet.

        Args:
          places: where the points are.
          steps: steps of all stages of each point, by its name.
          out: where it is written.
        """
        self._places, self._steps, self._out = places, steps, out
        self._live = out.isatty()
        self._drawn = 0  # lines of the terminal that the last table takes
        self._when = 0.0
        self._seen: dict[str, str] = {}

    def __call__(self, runner: Runner) -> None:
        """Draws the table if its time has come, or writes a line for each point whose state has changed."""
        outcomes = list(runner.outcomes.values())
        changed = [o for o in outcomes if self._seen.get(o.point.name, WAITING) != o.state]
        self._seen |= {o.point.name: o.state for o in outcomes}
        if not self._live:
            for outcome in changed:
                width = max(len(o.point.name) for o in outcomes)
                self._write(f"{self._line(outcome, width)}\n")
        elif changed or time.monotonic() - self._when > REDRAWN:
            self._when = time.monotonic()
            self._draw(outcomes)

    def close(self) -> None:
        """Leaves the last table where it is."""
        self._drawn = 0

    def _line(self, outcome: Outcome, width: int) -> str:
        running = outcome.state == RUNNING
        progress = newest(self._places.run(outcome.point)) if running else {}
        return line(outcome, width, progress, self._steps.get(outcome.point.name, 0))

    def _draw(self, outcomes: Sequence[Outcome]) -> None:
        columns, rows = shutil.get_terminal_size()
        counts = [f"{n} {state}" for state in ORDER if (n := sum(o.state == state for o in outcomes))]
        shown = sorted(outcomes, key=lambda o: ORDER.index(o.state))
        most = max(rows - 4, 3)
        width = min(max(len(o.point.name) for o in outcomes), max(columns - 40, 10))
        lines = [f"{counted(len(outcomes), 'run')}: {', '.join(counts)}"]
        lines += [self._line(outcome, width) for outcome in shown[:most]]
        lines += [f"and {len(shown) - most} more"] if len(shown) > most else []
        back = f"\x1b[{self._drawn}F" if self._drawn else ""
        # Each line is cleared to its end; below the table, whatever a longer one has left.
        self._write(back + "".join(f"{text[: columns - 1]}\x1b[K\n" for text in lines) + "\x1b[J")
        self._drawn = len(lines)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
