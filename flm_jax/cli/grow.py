r"""Grow a checkpoint, optimizer state included, into a new work directory, and verify it.

  python experiments/grow.py --source=runs/demo/checkpoints/0_52b_small --workdir=runs/copied \
      --gin_file=gin_configs/growth/copy_small.gin

The source (a step, a stage's directory or a work directory) is only read; its vocabulary goes with it. The two models
are compared on held-out text of `grow.data` in gin, or of the token store of the source's run if it is still there;
otherwise on random tokens. To train on from the result, set `Recipe.start = 'runs/copied'`.

A checkpoint that does not fit in memory is grown block by block, from disk to disk, with the same result:

      --gin_bindings='grow.streamed = True' --gin_bindings='Growth.depth = "interleave"'

In this mode the models are not run, so `Growth.depth = "distance"` is not possible. If it is killed, the same command
resumes it. `grow.chunk_bytes` bounds the size of a block, and with it the memory (docs/streaming.md).
"""

from __future__ import annotations

from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, define_processes, launch, process_flags, refuse


def define() -> None:
    """Defines the flags."""
    define_processes()
    define_gin("grow.seed = 1")
    flags.DEFINE_string("source", None, "The checkpoint to grow.", required=True)
    flags.DEFINE_string("workdir", None, "The new or empty directory for the grown checkpoint.", required=True)


def run(values: Any) -> None:
    """Runs the growth that the flags describe."""
    if not values.gin_file and not values.gin_bindings:
        refuse("say how to grow, with --gin_file")
    from flm_jax.cli import runs  # Imported here, so that --help is fast.

    runs.join(process_flags(values))
    runs.run_grow(values.source, values.workdir, values.gin_file, values.gin_bindings)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
