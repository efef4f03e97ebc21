"""Run a sweep: one recipe many times with different gin bindings, and compare what the runs reach.

  python experiments/sweep.py --gin_file=gin_configs/sweeps/learning_rate.gin --workdir=runs/rates --parallel=2

Each point trains by experiments/train.py into WORKDIR/points/NAME. A point that fails is reported, and the others go
on. Run the same command again to go on after a stop, or with more values in the sweep: what is done stays. At the end
WORKDIR has results.md, results.csv, a picture per swept value, and best.gin, which experiments/train.py takes.

With --scripts nothing is trained: WORKDIR/launch gets a shell script per point and all.sh, for a queue or for other
machines; the same command then collects what they have reached. See docs/sweeps.md.
"""

from __future__ import annotations

import os
from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, define_json, launch, refuse


def define() -> None:
    """Defines the flags."""
    define_gin("Sweep.seeds = [0, 1, 2]")
    define_json()
    flags.DEFINE_string("workdir", None, "The directory for points and results.")
    flags.DEFINE_integer("parallel", 1, "Runs at the same time; each gets its share of the cores.", lower_bound=1)
    flags.DEFINE_bool("scripts", False, "Write a shell script per point instead of running the points.")
    flags.DEFINE_bool("dry_run", False, "Check every point and list them; run nothing.")


def run(values: Any) -> None:
    """Runs the sweep that the flags describe."""
    if not values.gin_file and not values.gin_bindings:
        refuse("give a sweep with --gin_file")
    if values.workdir is None and not values.dry_run:
        refuse("give a --workdir, or --dry_run")
    if values.scripts and values.parallel > 1:
        refuse("--parallel belongs to runs on this machine, and --scripts starts none")
    environment = dict(os.environ)  # of the points
    # The sweep itself computes nothing, so it does not occupy an accelerator that its points need.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from flm_jax.cli import sweep_points  # Imported here, after the environment is set, and so that --help is fast.

    sweep_points.run_sweep(
        values.gin_file,
        values.gin_bindings,
        values.workdir,
        sweep_points.How(values.parallel, values.scripts, values.dry_run, values.json, environment),
    )


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
