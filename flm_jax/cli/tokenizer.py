"""Train a tokenizer on a corpus or a mixture, and measure tokenizers side by side, on held-out text of each source.

  python experiments/tokenizer.py train --gin_file=gin_configs/data/small_mixture.gin --output=runs/tokenizer
  python experiments/tokenizer.py measure --gin_file=gin_configs/data/small_mixture.gin --tokenizer=runs/tokenizer

The gin files and bindings say what DataConfig has: a corpus, and for train a vocabulary to train. A recipe does, too.
train writes a directory that Pretrained.path and --tokenizer take, with the measurements in report.json. measure takes
any number of tokenizers: --tokenizer may be repeated. See docs/tokenizers.md.
"""

from __future__ import annotations

import os
from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, define_json, launch, refuse

COMMANDS = ("train", "measure")


def define() -> None:
    """Defines the flags."""
    define_gin("SentencePiece.size = 32_000")
    define_json()
    flags.DEFINE_enum("command", None, COMMANDS, "What to do; it may also be given without --command=.")
    flags.DEFINE_string("output", None, "train: the directory to write; it must not exist, or be empty.")
    flags.DEFINE_multi_string(
        "tokenizer",
        [],
        "measure: a directory with tokenizer.json, or one that train wrote, a SentencePiece model file, a checkpoint, "
        "or a repository of the Hugging Face hub (org/name or org/name@revision)",
    )
    flags.DEFINE_integer(
        "sample_bytes", 1_000_000, "Bytes of held-out text to measure on, of each source.", lower_bound=1
    )


def run(values: Any) -> None:
    """Does what the flags say."""
    if values.command is None:
        refuse(f"say what to do: {' or '.join(COMMANDS)}")
    if not values.gin_file and not values.gin_bindings:
        refuse("say what text there is, with --gin_file or --gin_bindings")
    training = values.command == "train"
    if training and values.tokenizer:
        refuse("--tokenizer belongs to measure")
    if training and values.output is None:
        refuse("give the directory to write, with --output")
    if not training and values.output is not None:
        refuse("--output belongs to train")
    if not training and not values.tokenizer:
        refuse("name what to measure, with --tokenizer")
    os.environ["JAX_PLATFORMS"] = "cpu"  # It runs no model, so it does not occupy a local accelerator.
    from flm_jax.cli import tokenizer_commands  # Imported here, so that --help is fast.

    given = values.gin_file, values.gin_bindings, values.sample_bytes, values.json
    if training:
        tokenizer_commands.run_train(values.output, *given)
    else:
        tokenizer_commands.run_measure(values.tokenizer, *given)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run, positional="command")


if __name__ == "__main__":
    main()
