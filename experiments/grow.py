"""Grow a checkpoint, optimizer state included, into a new work directory, and verify it.

  python experiments/grow.py --source=runs/demo/checkpoints/0_52b_small --workdir=runs/copied \
      --gin_file=gin_configs/growth/copy_small.gin

The source, a step, a stage's directory or a work directory, is only read. Go on from the result with
`Recipe.start = 'runs/copied'`.

A checkpoint that does not fit in memory grows block by block, from disk to disk, with the same result:

      --gin_bindings='grow.streamed = True' --gin_bindings='Growth.depth = "interleave"'

The models are not run then, so distances cannot be measured; killed and run again, it goes on where it was.
`grow.chunk_bytes` bounds a block, and so the memory (docs/streaming.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import processes

flags.adopt_module_key_flags(processes)
_SOURCE = flags.DEFINE_string("source", None, "The checkpoint to grow.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the grown one goes: new or empty.", required=True)
_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times, later ones win.")
_GIN_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "A gin binding, such as 'grow.seed = 1'; the last wins.")


def main(argv: list[str]) -> None:
    """Parses flags and gin, and calls one function."""
    if len(argv) > 1:
        app.usage(shorthelp=True, detailed_error=f"unexpected argument {argv[1]!r}", exitcode=2)
    if not _GIN_FILE.value and not _GIN_BINDINGS.value:
        app.usage(shorthelp=True, detailed_error="say how to grow, with --gin_file", exitcode=2)

    # Imported here, so that --help answers at once.
    from experiments import launch

    launch.join(processes.given())
    launch.run_grow(_SOURCE.value, _WORKDIR.value, _GIN_FILE.value, _GIN_BINDINGS.value)


if __name__ == "__main__":
    app.run(main)
