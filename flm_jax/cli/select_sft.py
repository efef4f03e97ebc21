r"""Choose instruction data: a small set of conversations from a large pool, without duplicates, with quotas per domain.

  python experiments/select_sft.py --gin_file=gin_configs/sft/select.gin --input=POOL --output=DIR

The pool is files and folders of JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) in the formats of OpenAI, ShareGPT or
Alpaca; it is only read. DIR gets selected.jsonl, report.md, report.json and selection.png. If it is killed, the same
command goes on. With a checkpoint, conversations are scored by it, and compared by its hidden states:

      --gin_bindings='Selection.base = @ScoringBase()' --gin_bindings='ScoringBase.checkpoint = "runs/base"' \
      --gin_bindings='SampleScore.name = "ifd"'
"""

from __future__ import annotations

from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, launch, refuse


def define() -> None:
    """Defines the flags."""
    define_gin("Selection.count = 1000")
    flags.DEFINE_multi_string("input", [], "A file or a folder of conversations")
    flags.DEFINE_string("output", None, "The new or empty directory for the results.", required=True)
    flags.DEFINE_string(
        "steps", None, "Where results of steps are kept, for several selections from one pool; default: OUTPUT/steps."
    )


def run(values: Any) -> None:
    """Runs the selection that the flags describe."""
    if not values.input:
        refuse("say what to choose from, with --input")
    from flm_jax.cli import runs  # Imported here, so that --help is fast.

    runs.run_select(values.gin_file, values.gin_bindings, values.input, values.output, values.steps)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run, computes=True)


if __name__ == "__main__":
    main()
