"""Train a recipe: its first stage, then every growth and the stages after it.

  python experiments/train.py --gin_file=gin_configs/recipes/demo.gin --workdir=runs/demo

Run the same command again to go on where it was left. Add --dry_run to see parameters, FLOPs and memory of every
stage, and to compile nothing but check that everything lowers. On several hosts, the same command once a host: see
docs/pods.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import processes

flags.adopt_module_key_flags(processes)
_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times, later ones win.")
_GIN_BINDINGS = flags.DEFINE_multi_string(
    "gin_bindings", [], "A gin binding, such as 'Recipe.seed = 1'; the last wins."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; belongs to one recipe.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print parameters, FLOPs and memory, lower every stage, train nothing.")


def main(argv: list[str]) -> None:
    """Parses flags and gin, and calls one function."""
    if len(argv) > 1:
        app.usage(shorthelp=True, detailed_error=f"unexpected argument {argv[1]!r}", exitcode=2)
    if not _GIN_FILE.value and not _GIN_BINDINGS.value:
        app.usage(shorthelp=True, detailed_error="give a recipe with --gin_file", exitcode=2)
    if _WORKDIR.value is None and not _DRY_RUN.value:
        app.usage(shorthelp=True, detailed_error="give a --workdir, or --dry_run", exitcode=2)

    # Imported here, so that --help answers at once.
    from experiments import launch

    launch.join(processes.given())
    launch.run_train(_GIN_FILE.value, _GIN_BINDINGS.value, _WORKDIR.value, _DRY_RUN.value)


if __name__ == "__main__":
    app.run(main)
