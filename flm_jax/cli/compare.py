"""Compare runs: what differs in their recipes, held-out loss at equal FLOPs, FLOPs to the same held-out loss.

  python experiments/compare.py runs/first runs/other [--output=runs/compared] [--json=FILE]

The arguments are work directories of train.py, also of runs that still train; the other runs are compared with the
first. The tables are printed. --output also writes them as compare.md, with compare.png (held-out loss against FLOPs,
tokens and wall clock), compare.html (the same to hover over, with training losses) and compare.json. One run alone gets
its curves.
"""

from __future__ import annotations

import os
from typing import Any

from absl import flags

from flm_jax.cli.flags import define_json, launch, refuse


def define() -> None:
    """Defines the flags."""
    define_json()
    flags.DEFINE_multi_string("run", [], "The work directory of a run; it may also be given without --run=")
    flags.DEFINE_string(
        "output", None, "A directory to write compare.md, compare.png, compare.html and compare.json into."
    )


def run(values: Any) -> None:
    """Compares the runs of some work directories."""
    if not values.run:
        refuse("give the work directories of the runs to compare")
    if not all(values.run):
        refuse("the path of a run is empty; give its work directory")
    os.environ["JAX_PLATFORMS"] = "cpu"  # It computes nothing, so it does not occupy a local accelerator.
    from flm_jax.cli import runs  # Imported here, so that --help is fast.

    runs.run_compare(values.run, values.output, values.json)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run, positional="run")


if __name__ == "__main__":
    main()
