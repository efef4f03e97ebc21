"""Comparing runs: settings that differ, held-out loss at equal FLOPs, FLOPs to the same held-out loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flm_jax import costs
from flm_jax.run_comparison.curves import RunCurves, envelope, flops_to, loss_at
from flm_jax.run_comparison.reading import names_of, read_run_curves

# Of the largest FLOPs that all runs have in common.
PARTS = (1 / 8, 1 / 4, 1 / 2, 1.0)
# What stands for a setting that a run does not have.
ABSENT = "-"


class Saving(NamedTuple):
    """The FLOPs of two runs to the same held-out loss.

    Attributes:
      run: name of the run that is compared with the first.
      loss: nats per token.
      first: FLOPs of the first run.
      own: FLOPs of this run.
    """

    run: str
    loss: float
    first: float
    own: float

    @property
    def ratio(self) -> float:
        """This run's FLOPs per FLOP of the first run."""
        return self.own / self.first


@dataclass(frozen=True)
class Comparison:
    """Runs, and what a comparison of them shows.

    Attributes:
      runs: in the order given; the first is what the others are compared with.
      differences: by setting, the value of each run.
      at_equal_flops: FLOPs, and the held-out loss of each run there.
      savings: of every other run against the first, at some losses.
      notes: sentences on what cannot be compared.
    """

    runs: tuple[RunCurves, ...]
    differences: Mapping[str, tuple[Any, ...]]
    at_equal_flops: tuple[tuple[float, tuple[float, ...]], ...]
    savings: tuple[Saving, ...]
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """The comparison as JSON-able data, with every held-out loss."""
        return {
            "runs": [_run_record(run) for run in self.runs],
            "differences": {name: list(values) for name, values in self.differences.items()},
            "heldout_loss_at_equal_flops": [
                {"flops": flops, "losses": dict(zip([run.name for run in self.runs], losses, strict=True))}
                for flops, losses in self.at_equal_flops
            ],
            "flops_to_the_same_loss": [
                {"run": s.run, "loss": s.loss, "first": self.runs[0].name, "flops_first": s.first, "flops": s.own}
                | {"ratio": s.ratio, "saving": 1 - s.ratio}
                for s in self.savings
            ],
            "notes": list(self.notes),
        }


def compare_runs(workdirs: Sequence[str]) -> Comparison:
    """Compares the runs of some work directories with the first of them.

    Raises:
      ValueError, OSError: as `read_run_curves`; or a directory is named twice.
    """
    names = names_of(workdirs)
    runs = tuple(read_run_curves(workdir, name) for workdir, name in zip(workdirs, names, strict=True))
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    for run in runs[1:]:
        if other := [key for key, value in run.measured_on.items() if value != runs[0].measured_on[key]]:
            notes.append(
                f"{run.name}: its held-out text is not that of {runs[0].name} (they differ in {', '.join(other)}), so "
                "their losses are not compared."
            )
    comparable = [run for run in runs if run.measured_on == runs[0].measured_on]
    equal = at_equal_flops(runs) if len(runs) > 1 and len(comparable) == len(runs) else ()
    if len(runs) > 1 and len(comparable) == len(runs) and not equal:
        notes.append("There are no FLOPs at which all of these runs have a held-out loss.")
    found: list[Saving] = []
    for run in comparable[1:]:
        own = savings(runs[0], run)
        found += own
        if not own:
            notes.append(
                f"{run.name}: its held-out losses ({span(run)}) and those of {runs[0].name} ({span(runs[0])}) do not "
                "overlap, so nothing is said about FLOPs to the same loss."
            )
    return Comparison(runs, differences(runs), equal, tuple(found), tuple(notes))


def span(run: RunCurves) -> str:
    """The highest and lowest held-out loss after the first step, as text."""
    lowest = envelope(run.heldout)
    return f"{lowest[0].loss:.4f} to {lowest[-1].loss:.4f}" if lowest else "none"


def differences(runs: Sequence[RunCurves]) -> dict[str, tuple[Any, ...]]:
    """The settings that are not equal in all runs, and their values; stages are compared by their names.

    A stage that not every run has is one entry: its shape.
    """
    stages = [{stage.name: stage for stage in run.stages} for run in runs]
    shared = set.intersection(*(set(own) for own in stages))
    found: dict[str, tuple[Any, ...]] = {}
    for name in dict.fromkeys(name for own in stages for name in own):
        if name not in shared:
            values = [costs.shape_line(own[name].model) if name in own else ABSENT for own in stages]
            found[f"stages.{name}"] = tuple(values)
    left_out = tuple(f"{entry}." for entry in found)
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [run.settings.get(name, ABSENT) for run in runs]
        if any(value != values[0] for value in values) and not name.startswith(left_out):
            found[name] = tuple(values)
    return found


def at_equal_flops(runs: Sequence[RunCurves]) -> tuple[tuple[float, tuple[float, ...]], ...]:
    """FLOPs at which every run has a held-out loss, and these losses: parts of the most that all runs have spent."""
    ends = [run.heldout[-1].flops if run.heldout else 0 for run in runs]
    rows = []
    for part in PARTS:
        losses = [loss_at(run.heldout, min(ends) * part) for run in runs]
        if all(loss is not None for loss in losses):
            rows.append((min(ends) * part, tuple(loss for loss in losses if loss is not None)))
    return tuple(rows)


def savings(first: RunCurves, run: RunCurves) -> list[Saving]:
    """FLOPs to the same losses: the lowest that both reach, and those of the first run at 1/4 and 1/2 of that."""
    lowest = [envelope(one.heldout) for one in (first, run)]
    if not all(lowest):
        return []
    target = max(points[-1].loss for points in lowest)
    end = flops_to(first.heldout, target)
    if end is None:
        return []
    found = []
    for part in (1 / 4, 1 / 2, 1.0):
        loss = target if part == 1 else loss_at(lowest[0], end * part)
        own = None if loss is None else flops_to(run.heldout, loss)
        spent = None if loss is None else flops_to(first.heldout, loss)
        if loss is not None and own is not None and spent is not None:
            found.append(Saving(run.name, loss, spent, own))
    return found


def _run_record(run: RunCurves) -> dict[str, Any]:
    stages = [
        {
            "name": stage.name,
            "params": stage.params,
            "steps": stage.steps,
            "tokens_per_step": stage.cost.tokens_per_step,
            "flops_per_token": stage.cost.flops_per_token,
            "grown": stage.grown,
        }
        for stage in run.stages
    ]
    about = {"name": run.name, "workdir": str(run.workdir), "device": run.device, "planned_steps": run.planned}
    return {**about, "stages": stages, "heldout": [point._asdict() for point in run.heldout], "notes": list(run.notes)}
