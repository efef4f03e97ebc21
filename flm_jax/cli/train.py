"""Train a recipe: its first stage, then every growth and the stages after it.

  python experiments/train.py --gin_file=gin_configs/recipes/demo.gin --workdir=runs/demo

Run the same command again to resume it. Add --dry_run to open the data, to print parameters, FLOPs and memory of every
stage, and to check that all programs lower, without preparing, compiling or training. On several hosts, start the same
command once per host: see docs/pods.md. With --fork=runs/demo another recipe goes on from a checkpoint of that run, in
a work directory of its own: see docs/fork.md.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, define_processes, launch, process_flags, refuse


def define() -> None:
    """Defines the flags."""
    define_processes()
    define_gin("Recipe.seed = 1")
    flags.DEFINE_string("workdir", None, "The directory for checkpoints and results; it belongs to one recipe.")
    flags.DEFINE_string(
        "fork",
        None,
        "Begin with a checkpoint of another run, optimizer and data position included, and go on with this recipe: its "
        "work directory, or a step's.",
    )
    flags.DEFINE_bool(
        "dry_run", False, "Open the data, print parameters, FLOPs and memory, and lower every stage; do not train."
    )


def run(values: Any) -> None:
    """Trains the recipe that the flags describe."""
    if not values.gin_file and not values.gin_bindings:
        refuse("give a recipe with --gin_file")
    if values.workdir is None and not values.dry_run:
        refuse("give a --workdir, or --dry_run")
    from flm_jax.cli import runs  # Imported here, so that --help is fast.

    runs.join(process_flags(values))
    runs.run_train(values.gin_file, values.gin_bindings, values.workdir, values.dry_run, values.fork)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run, computes=True)


if __name__ == "__main__":
    main()
