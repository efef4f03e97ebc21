"""Convert a model of the Llama family into a checkpoint, and a checkpoint into one that other programs load.

  python experiments/convert.py --from_hf=DIR --workdir=runs/llama [--dtype=float32]
  python experiments/convert.py --from_hf=org/name[@revision] --workdir=runs/llama [--dtype=float32]
  python experiments/convert.py --to_hf=my/larger --workdir=runs/larger [--dtype=bfloat16] [--architecture=NAME]

The first reads config.json, safetensors and tokenizer of a Llama, Mistral, Qwen2, Qwen3 or Tele-FLM directory, of any
size, and writes step 0 of a new work directory. It can be grown, verified, and trained on with `Recipe.start`. For
training, use --dtype=float32: AdamW's small steps are lost in 16 bits. The second does the same with a repository of
the Hugging Face hub, whose files it fetches into the hub's cache first: a branch, a tag or a commit, main by default.
Where there is a directory of that name, that is read.

The third writes a directory that `transformers` loads without code of flm_jax, with the tokenizer that the model was
trained with, SentencePiece and bytes included. Kept widths and multipliers are folded into the weights; with
--architecture=TeleFLMForCausalLM multipliers stay multipliers.

Weights that need no folding and keep their dtype stay the same bit for bit; see docs/convert.md.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from flm_jax.cli.flags import launch, refuse


def define() -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "from_hf",
        None,
        "A directory to read (config.json, safetensors, tokenizer), or org/name[@revision] on the Hugging Face hub.",
    )
    flags.DEFINE_string("to_hf", None, "A directory to write: new or empty.")
    flags.DEFINE_string(
        "workdir",
        None,
        "With --from_hf: a new or empty directory. With --to_hf: a work directory, a stage's directory or a step.",
        required=True,
    )
    flags.DEFINE_string("dtype", None, "Dtype of the weights: float32, bfloat16 or float16. Default: unchanged.")
    flags.DEFINE_string("architecture", None, "With --to_hf: the architecture to write, such as Qwen2ForCausalLM.")
    flags.DEFINE_float("shard_gb", 1.0, "With --to_hf: bound on a file, in 10^9 bytes.", lower_bound=1e-9)


def run(values: Any) -> None:
    """Runs the conversion that the flags describe."""
    source, target = values.from_hf, values.to_hf
    if (source is None) == (target is None):
        refuse("give one of --from_hf and --to_hf")
    if source is not None and values.architecture is not None:
        refuse("--architecture needs --to_hf")
    from flm_jax.cli import runs  # Imported here, so that --help is fast.

    if source is not None:
        runs.run_import(source, values.workdir, values.dtype)
    else:
        runs.run_export(values.workdir, target, values.architecture, values.dtype, int(values.shard_gb * 1e9))


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run)


if __name__ == "__main__":
    main()
