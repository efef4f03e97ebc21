"""A sweep from gin: its points checked against the recipe before anything runs, run rung by rung, and compared."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin

from flm_jax.checkpoint.directory import locked
from flm_jax.cli import configure, gin_reader
from flm_jax.cli.configure import SHIPPED, check_used, configured, parse
from flm_jax.cli.errors import EXPECTED, started
from flm_jax.cli.flags import STOPPED
from flm_jax.cli.runs import check_directory, check_json_file
from flm_jax.files import atomic_write, write_json
from flm_jax.recipe import Recipe, begin
from flm_jax.records import RECIPE, as_dict, check_identity, check_no_run, counted
from flm_jax.records.kept import KeptLines
from flm_jax.sweeps import picture, results, space
from flm_jax.sweeps.config import Sweep
from flm_jax.sweeps.execute import Places, Runner, shares, write_scripts
from flm_jax.sweeps.halving import survivors
from flm_jax.sweeps.space import Candidate, Point
from flm_jax.sweeps.table import Table


@dataclass(frozen=True)
class How:
    """How a sweep is run; nothing here changes its results.

    Attributes:
      parallel: runs at the same time.
      scripts: whether scripts are written, and nothing is run.
      dry_run: whether points are only checked.
      json_file: where the results go as JSON too; None: nowhere.
      environment: of the points.
    """

    parallel: int
    scripts: bool
    dry_run: bool
    json_file: str | None
    environment: Mapping[str, str]


def run_sweep(gin_files: Sequence[str], gin_bindings: Sequence[str], workdir: str | None, how: How) -> None:
    """Runs a sweep and compares its points.

    The program exits with status 1 if a point failed, and with `STOPPED` if a signal stopped the points, which are then
    saved.
    """
    with started():
        check_json_file(how.json_file)
        places = None if workdir is None else Places(Path(workdir).expanduser().absolute())
        sweep, steps = checked(gin_files, gin_bindings, places)
        cores = shares(how.parallel)
        if how.dry_run:
            first = space.points(sweep, space.candidates(sweep))
            print("\n".join(f"{point.name}: {'; '.join(point.statements) or 'the recipe as it is'}" for point in first))
            print(_counts(sweep, first))
            return
        assert workdir is not None and places is not None
        check_directory("workdir", workdir)
        check_no_run(places.workdir, "the sweep")
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(places.workdir))
            record = stack.enter_context(KeptLines(places.workdir / "runs.jsonl", "point"))
            table = Table(places, steps)
            runner = Runner(places, sweep.measure, cores, how.environment, record, table)
            _run_rungs(sweep, runner, (gin_files, gin_bindings), how.scripts)
            table.close()
            outcomes = list(runner.outcomes.values())
            _write_results(sweep, places, outcomes, (gin_files, gin_bindings), how.json_file)
    if runner.stopped:
        print("Stopped; run the same command to go on.")
        sys.exit(STOPPED)
    if any(outcome.state == results.FAILED for outcome in outcomes):
        sys.exit(1)


def _counts(sweep: Sweep, first: Sequence[Point]) -> str:
    text = f"{counted(len(first), 'run')}: {counted(len(first) // max(len(sweep.seeds), 1), 'point')}"
    text += f" with {counted(len(sweep.seeds), 'seed')} each" if sweep.seeds else ""
    if sweep.halving:
        text += f"; the best {sweep.halving.keep:.0%} of each of {len(sweep.halving.rungs)} rungs go on"
    return f"{text}. All of them were checked."


def checked(
    gin_files: Sequence[str], gin_bindings: Sequence[str], places: Places | None
) -> tuple[Sweep, dict[str, int]]:
    """The sweep, and the steps of every run that it may come to, by name; each run's recipe has been made and checked.

    Args:
      gin_files: of the recipe and the sweep.
      gin_bindings: of the command line.
      places: where runs of it may be already, which must be of the same recipe; None: nowhere.

    Raises:
      ValueError: the sweep or a point is wrong; the message names the point, the binding, and what would be right.
    """
    parse(gin_files, gin_bindings)
    sweep = configured(configure.sweep)
    everything = space.candidates(sweep)
    found = {}
    for rung in range(space.rungs(sweep)):
        for point in space.points(sweep, everything, rung):
            recipe, steps = _recipe_of(point, gin_files, gin_bindings)
            found[point.name] = steps
            if places is not None:
                try:
                    check_identity(places.run(point), RECIPE, as_dict(recipe), "another recipe")
                except ValueError as error:
                    text = str(error).partition(" Nothing was changed.")[0]
                    raise ValueError(f"{text} Give the sweep a new --workdir, or remove that point.") from None
    return sweep, found


def _recipe_of(point: Point, gin_files: Sequence[str], gin_bindings: Sequence[str]) -> tuple[Recipe, int]:
    """The recipe of a point, and its steps in all stages.

    Raises:
      ValueError: the bindings of the point do not fit.
    """
    gin.clear_config()
    try:
        parse(gin_files, [*gin_bindings, *point.statements])
        configured(configure.sweep)
        recipe, run = configured(configure.train)
        check_used()
        run.check(recipe)
        return recipe, sum(stage.steps for stage in begin(recipe)[1])
    except EXPECTED as error:
        text = str(error).split(gin_reader.IN_CALL)[0].replace(gin_reader.COMMAND_LINE, "the sweep")
        raise ValueError(f"Point {point.name!r}: {text}") from error


def gin_text(given: tuple[Sequence[str], Sequence[str]], statements: Sequence[str], about: Sequence[str]) -> str:
    """A gin file that `experiments/train.py` takes: the given files, the given bindings, then some statements."""
    files, bindings = given
    lines = [f"# {text}".rstrip() for text in about] + [f"include {_lasting(name)!r}" for name in files]
    return "\n".join([*lines, *bindings, *statements, ""])


def _lasting(name: str) -> str:
    """The name of a gin file from anywhere: a shipped one as it is shipped, any other by its whole path."""
    path = gin_reader.find(name, (), SHIPPED)
    base = next((base for base in SHIPPED if path.is_relative_to(base / "gin_configs")), None)
    return str(path.relative_to(base) if base else path)


def _run_rungs(sweep: Sweep, runner: Runner, given: tuple[Sequence[str], Sequence[str]], scripts: bool) -> None:
    """Runs rung after rung, or writes the scripts of the first rung that is not done."""
    places = runner.places
    chosen: Sequence[Candidate] = space.candidates(sweep)
    for rung in range(space.rungs(sweep)):
        points = space.points(sweep, chosen, rung)
        for point in points:
            about = [f"The point {point.name} of a sweep.", "", *_command_lines(point, places)]
            atomic_write(places.gin(point), gin_text(given, point.statements, about))
        if sweep.halving:
            print(f"Rung {rung + 1} of {space.rungs(sweep)}: {counted(len(points), 'run')}", flush=True)
        if scripts:
            runner.ask(points)
            if left := [point for point in points if runner.outcomes[point.name].state == results.WAITING]:
                every = write_scripts(places, left, Path.cwd())
                print(
                    f"{counted(len(left), 'run')} to start, each by a script in {every.parent}; all of them: sh {every}"
                )
                return
        else:
            runner.run(points)
        if runner.stopped or rung == space.rungs(sweep) - 1:
            return
        assert sweep.halving is not None
        rows = results.ranked([runner.outcomes[point.name] for point in points], sweep.goal)
        scores = {row.point.candidate.name: row.mean for row in rows}
        names = survivors(scores, sweep.halving.keep, sweep.goal)
        chosen = [candidate for candidate in chosen if candidate.name in names]
        if not chosen:
            print("No point of this rung came to its end, so none goes on.")
            return


def _command_lines(point: Point, places: Places) -> list[str]:
    return [f"  python experiments/train.py --gin_file={places.gin(point)} --workdir={places.run(point)}"]


def _write_results(
    sweep: Sweep,
    places: Places,
    outcomes: Sequence[results.Outcome],
    given: tuple[Sequence[str], Sequence[str]],
    json_file: str | None,
) -> None:
    """Writes tables, pictures, and the best point, and prints where they are."""
    rows = results.ranked(outcomes, sweep.goal)
    best = results.best(rows)
    drawn = [row for row in rows if row.mean is not None]
    pictures = {f"{space.shown(name)}.png": name for name in picture.axes_of(sweep)} if len(drawn) > 1 else {}
    for file, name in pictures.items():
        atomic_write(places.workdir / file, picture.draw(sweep, outcomes, name))
    command = "python experiments/sweep.py " + shlex.join(
        [f"--gin_file={name}" for name in given[0]]
        + [f"--gin_bindings={text}" for text in given[1]]
        + [f"--workdir={places.workdir}"]
    )
    atomic_write(places.workdir / "results.md", results.markdown(sweep, outcomes, list(pictures), command))
    atomic_write(places.workdir / "results.csv", results.csv_text(sweep, outcomes))
    written = {"results.md": "the table", "results.csv": "every run", **dict.fromkeys(pictures, "a picture")}
    if best is not None:
        seedless = {name: value for name, value in best.point.bindings.items() if name != space.SEED}
        about = [f"The best point of a sweep: {best.point.candidate.name}, {sweep.measure} {best.mean:.4f}."]
        about += ["", f"  python experiments/train.py --gin_file={places.workdir / 'best.gin'} --workdir=runs/best"]
        statements = [f"{name} = {space.literal(value, name)}" for name, value in seedless.items()]
        atomic_write(places.workdir / "best.gin", gin_text(given, statements, about))
        written["best.gin"] = "the best point, for experiments/train.py"
        print(f"\nBest: {best.point.candidate.name}, {sweep.measure} {best.mean:.4f}.")
    for outcome in outcomes:
        if outcome.state == results.FAILED:
            print(f"Failed: {outcome.point.name}: {outcome.reason}")
    for name, what in written.items():
        print(f"  {places.workdir / name!s:<40} {what}")
    if json_file:
        write_json(Path(json_file), _record(sweep, outcomes, best))


def _record(sweep: Sweep, outcomes: Sequence[results.Outcome], best: results.Ranked | None) -> dict[str, Any]:
    runs = [
        {
            "run": o.point.name,
            "point": o.point.candidate.name,
            "bindings": dict(o.point.bindings),
            "rung": o.point.rung,
            "seed": o.point.seed,
            "state": o.state,
            "value": o.value,
            "seconds": o.seconds,
            "params": o.params,
            "tokens": o.tokens,
            "flops": o.flops,
            "reason": o.reason,
        }
        for o in outcomes
    ]
    found = None if best is None else {"point": best.point.candidate.name, "rung": best.point.rung, "mean": best.mean}
    return {"sweep": as_dict(sweep), "runs": runs, "best": found}
