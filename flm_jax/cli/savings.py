"""Measure whether growing pays: grown runs against tuned scratch runs of the same size and of the best size.

  python experiments/savings.py --gin_file=gin_configs/savings/t0.gin --workdir=runs/savings --parallel=2

The study's steps are tune (rates and schedules of scratch runs), baseline (the best of them at several budgets, with
seeds), frontier (scratch runs of other sizes) and plans (the growths). Each run ends as a JSON file in --results, with
its recipe and every measurement; what is there is not run again. Runs that begin with the same stages share them,
through WORKDIR. --write makes the page with tables and plots. See docs/savings.md.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, launch, refuse

STEPS = ("tune", "baseline", "frontier", "plans")


def define() -> None:
    """Defines the flags."""
    define_gin("Study.seeds = 5")
    flags.DEFINE_string("workdir", None, "The directory for what runs share.")
    flags.DEFINE_string("results", None, "The directory for results; by default WORKDIR/results.")
    flags.DEFINE_list("steps", list(STEPS), f"What to run: {', '.join(STEPS)}; empty: nothing.")
    flags.DEFINE_integer("parallel", 1, "Runs at the same time; each gets its share of the cores.", lower_bound=1)
    flags.DEFINE_integer(
        "replicas", 1, "Runs that are trained as one program, where they differ only in seed and rate.", lower_bound=1
    )
    flags.DEFINE_float("minutes", None, "Minutes after which no further stage begins.", lower_bound=0.0)
    flags.DEFINE_string("write", None, "Write the page to this file, and its plots beside it.")
    flags.DEFINE_string("command", None, "The command that the page names; by default the one that was given.")


def run(values: Any) -> None:
    """Runs the study that the flags describe."""
    if not values.gin_file and not values.gin_bindings:
        refuse("give a study with --gin_file")
    if values.workdir is None:
        refuse("give a --workdir")
    steps = [step for step in values.steps if step]
    if unknown := [step for step in steps if step not in STEPS]:
        refuse(f"--steps names {unknown[0]!r}; the steps are {', '.join(STEPS)}")
    from flm_jax.cli.errors import started  # Imported here, so that --help is fast.

    with started():
        _study(values, steps)


def _study(values: Any, steps: list[str]) -> None:
    """Runs steps of the study, and writes its page if that is asked for."""
    from flm_jax.cli import configure
    from flm_jax.files import check_writable
    from flm_jax.records import check_no_run
    from flm_jax.savings.execute import How, keep_programs
    from flm_jax.savings.page import write_page
    from flm_jax.savings.run import run_steps
    from flm_jax.savings.second_text import on_second_text
    from flm_jax.savings.snapshots import Snapshots
    from flm_jax.savings.summary import summarise
    from flm_jax.sweeps.execute import shares

    configure.parse(values.gin_file, values.gin_bindings)
    study = configure.configured(configure.savings)
    configure.check_used()
    workdir = Path(values.workdir).expanduser()
    results = Path(values.results).expanduser() if values.results else workdir / "results"
    page = Path(values.write).expanduser() if values.write else None
    check_no_run(workdir, "the study")
    check_writable(workdir, f"--workdir={values.workdir}")  # before hours are spent
    check_writable(results, f"--results={results}")
    if page is not None:
        if page.is_dir():
            raise ValueError(f"--write={values.write} is a directory; give the name of a file.")
        check_writable(page.parent, f"--write={values.write}")
    deadline = None if values.minutes is None else time.monotonic() + 60 * values.minutes
    cores = shares(values.parallel) if values.parallel > 1 else ()
    programs = workdir / "programs"
    keep_programs(programs)
    how = How(Snapshots(workdir / "snapshots"), cores, values.replicas, programs, deadline)
    found = run_steps(study, steps, results, how)
    if page is not None:
        command = values.command or shlex.join(["python", *sys.argv])
        second = summarise(study, found, on_second_text(study, found)) if study.second_text else None
        write_page(summarise(study, found), page, command, second)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
