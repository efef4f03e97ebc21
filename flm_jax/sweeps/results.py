"""What the runs of a sweep leave: their reports, the tables of them, and the best point."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_jax import costs
from flm_jax.records import counted, meant
from flm_jax.records.foreign_json import read_json
from flm_jax.sweeps.config import Sweep
from flm_jax.sweeps.space import Point, short_of

REPORT = "report.json"
WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"


@dataclass(frozen=True)
class Outcome:
    """What became of a point.

    Attributes:
      point: the point.
      state: waiting, running, done, failed or stopped.
      value: what is compared; None unless it is done.
      seconds: wall time of all its starts.
      tokens: that it was trained on, in all stages; 0 unless it is done.
      flops: training FLOPs of all stages.
      params: of its last model.
      reason: why it failed, in a line.
    """

    point: Point
    state: str
    value: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    params: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Ranked:
    """A candidate in a rung, with all its seeds.

    Attributes:
      outcomes: one per seed.
      mean: of the measure over the seeds that are done; None if any failed, or is not done.
    """

    outcomes: tuple[Outcome, ...]
    mean: float | None

    @property
    def point(self) -> Point:
        """Its first point."""
        return self.outcomes[0].point

    @property
    def values(self) -> list[float]:
        """The measure of each seed that is done."""
        return [outcome.value for outcome in self.outcomes if outcome.value is not None]


def finished(workdir: Path) -> bool:
    """Whether the run in a work directory has come to its end."""
    return (workdir / REPORT).is_file()


def read_outcome(point: Point, workdir: Path, measure: str, seconds: float) -> Outcome:
    """The outcome of a run that has come to its end; it counts as failed if its report has no such measure."""
    try:
        report = read_json(workdir / REPORT, finite=False)
        value = measured(report, measure)
        last = report["stages"][-1]
        spent: dict[str, Any] = dict(
            tokens=int(last["total_tokens"]), flops=float(last["total_flops"]), params=int(last["params"])
        )
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        return Outcome(point, FAILED, None, seconds, reason=str(error))
    if not math.isfinite(value):
        return Outcome(point, FAILED, None, seconds, reason=f"{measure} is {value}", **spent)
    return Outcome(point, DONE, value, seconds, **spent)


def measured(report: Mapping[str, Any], path: str) -> float:
    """The number at a path of a report, such as stages.-1.eval_loss.

    Raises:
      ValueError: there is no number; the message has the nearest path that leads to one.
    """
    found: Any = report
    for part in path.split("."):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, ValueError, TypeError):
            found = None
            break
    if isinstance(found, bool) or not isinstance(found, int | float):
        names = [name for name in _numbers(report) if not name.startswith("evals.")]
        near = (
            meant(path, names) or f"; it has {', '.join(name for name in names if '.-1.' in name or '.' not in name)}."
        )
        raise ValueError(f"Sweep.measure = {path!r}: the report has no such number{near}")
    return float(found)


def _numbers(value: Any, path: str = "") -> Iterator[str]:
    """The paths to all numbers of a report; into a list, by its last entry."""
    inner: Mapping[Any, Any] = (
        value if isinstance(value, dict) else {-1: value[-1]} if value and isinstance(value, list) else {}
    )
    for key, item in inner.items():
        yield from _numbers(item, f"{path}.{key}" if path else str(key))
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def ranked(outcomes: Sequence[Outcome], goal: str) -> list[Ranked]:
    """The candidates, the last rung first, in each rung the best first, those without a value last."""
    groups: dict[tuple[int, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.point.rung, outcome.point.candidate.name), []).append(outcome)
    found = []
    for group in groups.values():
        values = [outcome.value for outcome in group if outcome.value is not None]
        found.append(Ranked(tuple(group), statistics.fmean(values) if len(values) == len(group) else None))
    sign = 1 if goal == "min" else -1
    return sorted(found, key=lambda row: (-row.point.rung, row.mean is None, sign * (row.mean or 0.0)))


def best(rows: Sequence[Ranked]) -> Ranked | None:
    """The best candidate of the last rung that has one; None if no run came to its end."""
    return next((row for row in rows if row.mean is not None), None)


def _columns(outcomes: Sequence[Outcome]) -> list[str]:
    """The short names of what differs, seeds left out."""
    return list(dict.fromkeys(name for outcome in outcomes for name in outcome.point.candidate.values))


def _budget(sweep: Sweep, point: Point) -> dict[str, Any]:
    """The bindings of a point's rung, by their short names."""
    short = short_of(sweep)
    return {short[name]: value for name, value in sweep.halving.rungs[point.rung].items()} if sweep.halving else {}


def csv_text(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """The table of all runs, a line per run."""
    names = _columns(outcomes)
    budget = list(_budget(sweep, outcomes[0].point)) if outcomes else []
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(
        ["run", *budget, *names, "seed", "state", sweep.measure, "seconds", "params", "tokens", "flops", "reason"]
    )
    for o in outcomes:
        spent = _budget(sweep, o.point).values()
        own = [o.point.candidate.values.get(name, "") for name in names]
        seed = "" if o.point.seed is None else o.point.seed
        rest = [o.params or "", o.tokens or "", f"{o.flops:.6g}" if o.flops else "", o.reason]
        table.writerow([o.point.name, *spent, *own, seed, o.state, _blank(o.value), f"{o.seconds:.1f}", *rest])
    return file.getvalue()


def _blank(value: float | None) -> Any:
    return "" if value is None else value


def markdown(sweep: Sweep, outcomes: Sequence[Outcome], pictures: Sequence[str], command: str) -> str:
    """The results for readers: the best point, a table of candidates, the failures, the pictures."""
    rows, names = ranked(outcomes, sweep.goal), _columns(outcomes)
    budget = list(_budget(sweep, outcomes[0].point)) if outcomes else []
    several = len(sweep.seeds) > 1
    lines = ["# Sweep", "", f"    {command}", ""]
    if found := best(rows):
        lines += [f"Best: `{found.point.candidate.name}`, {sweep.measure} {found.mean:.4f}"]
        lines[-1] += f" (mean of {counted(len(found.values), 'seed')})." if several else "."
        lines += ["`best.gin` is that point, for `experiments/train.py`."]
    done = [outcome for outcome in outcomes if outcome.state == DONE]
    flops = sum(outcome.flops for outcome in done)
    lines += [f"{len(done)} of {counted(len(outcomes), 'run')} done, {flops:.3g} training FLOPs in all.", ""]
    heads = [*budget, *names, f"mean of {sweep.measure}" if several else sweep.measure]
    heads += ["least to greatest", "seeds"] if several else []
    heads += ["parameters", "tokens", "FLOPs", "seconds"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        values = row.point.candidate.values
        cells = [*map(str, _budget(sweep, row.point).values()), *(str(values.get(name, "")) for name in names)]
        cells += [_state(row) if row.mean is None else f"{row.mean:.4f}"]
        if several:
            cells += [f"{min(row.values):.4f} to {max(row.values):.4f}" if row.values else "", str(len(row.values))]
        one = next((o for o in row.outcomes if o.state == DONE), row.outcomes[0])
        cells += [costs.count(one.params), costs.count(one.tokens), f"{one.flops:.3g}"] if one.params else ["", "", ""]
        cells += [f"{statistics.fmean(o.seconds for o in row.outcomes):.1f}"]
        lines += [f"| {' | '.join(cells)} |"]
    if failed := [outcome for outcome in outcomes if outcome.state == FAILED]:
        lines += ["", "## Failed", ""]
        lines += [f"- `{outcome.point.name}`: {outcome.reason}" for outcome in failed]
    for name in pictures:
        lines += ["", f"![{name}]({name})"]
    return "\n".join([*lines, ""])


def _state(row: Ranked) -> str:
    states = {outcome.state for outcome in row.outcomes}
    return next(state for state in (FAILED, STOPPED, RUNNING, WAITING, DONE) if state in states)
