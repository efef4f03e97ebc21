"""Look after checkpoints: list them, describe one, check every bit, compare two, delete most, copy one.

  python experiments/checkpoint.py list runs/demo
  python experiments/checkpoint.py show runs/demo/checkpoints/0_52b_small/800
  python experiments/checkpoint.py verify runs/demo
  python experiments/checkpoint.py diff runs/demo/checkpoints/0_52b_small/700 runs/demo/checkpoints/0_52b_small/800
  python experiments/checkpoint.py prune runs/demo --every=1000 --best=3 [--yes]
  python experiments/checkpoint.py copy runs/demo backup/demo

A checkpoint is a step's directory; a stage's directory or a work directory stands for its newest step, and with list,
verify and prune for all of them. No model is built. verify exits with status 1 if a bit is not as it was saved. prune
deletes nothing without --yes; it always keeps the first and the last checkpoint of each stage. copy checks the copy
before it gets its name. --json=FILE also writes what was found as JSON. See docs/checkpoints.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from absl import flags

from flm_jax.cli.flags import define_json, launch, refuse

# The paths that each subcommand takes, and the most of them.
COMMANDS = {
    "list": ("PATH", 1),
    "show": ("CHECKPOINT", 1),
    "verify": ("PATH...", None),
    "diff": ("A B", 2),
    "prune": ("WORKDIR", 1),
    "copy": ("CHECKPOINT TARGET", 2),
}


def define() -> None:
    """Defines the flags."""
    define_json()
    flags.DEFINE_multi_string(
        "command", [], f"{', '.join(COMMANDS)}, and then its paths; they may also be given without --command="
    )
    flags.DEFINE_integer("every", None, "prune: keep the steps that are multiples of this.", lower_bound=1)
    flags.DEFINE_integer(
        "best", None, "prune: of each stage, keep so many steps with the lowest held-out loss.", lower_bound=0
    )
    flags.DEFINE_bool("dry_run", False, "prune: only say what would be deleted; so it is without --yes, too.")
    flags.DEFINE_bool("yes", False, "prune: delete.")


def run(values: Any) -> None:
    """Does what the flags say."""
    if not values.command:
        refuse(f"say what to do: {', '.join(COMMANDS)}")
    name, *paths = values.command
    if name not in COMMANDS:
        from flm_jax.records import meant  # Imported here, so that --help is fast.

        refuse(f"there is no subcommand {name!r}; there are {', '.join(COMMANDS)}{meant(name, COMMANDS)}")
    takes, count = COMMANDS[name]
    if not all(path.strip() for path in paths) or not paths or (count is not None and len(paths) != count):
        refuse(f"{name} is given {len(paths)} path{'' if len(paths) == 1 else 's'}, and takes: {name} {takes}")
    if name != "prune" and (given := [flag for flag in ("every", "best") if values[flag].value is not None]):
        refuse(f"--{given[0]} belongs to prune")
    if name != "prune" and (values.yes or values.dry_run):
        refuse(f"--{'yes' if values.yes else 'dry_run'} belongs to prune")
    if values.yes and values.dry_run:
        refuse("--yes deletes and --dry_run does not: give one of them")
    if name == "prune" and values.every is None and values.best is None:
        refuse("say what to keep besides the first and the last checkpoint of each stage: --every=N, --best=K")
    os.environ["JAX_PLATFORMS"] = "cpu"  # It runs no model, so it does not occupy a local accelerator.
    from flm_jax.cli import checkpoint_commands  # Imported here, so that --help is fast.

    if name == "verify":
        checkpoint_commands.run_verify(paths, values.json)
    elif name == "prune":
        checkpoint_commands.run_prune(paths[0], values.every, values.best, values.yes, values.json)
    else:
        one: dict[str, Callable[..., None]] = {
            "list": checkpoint_commands.run_list,
            "show": checkpoint_commands.run_show,
            "diff": checkpoint_commands.run_diff,
            "copy": checkpoint_commands.run_copy,
        }
        one[name](*paths, values.json)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run, positional="command")


if __name__ == "__main__":
    main()
