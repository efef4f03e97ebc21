"""Convert a model of the Llama family into a checkpoint, and a checkpoint into one that other programs load.

  python experiments/convert.py --from_hf=my/llama --workdir=runs/llama [--dtype=float32]
  python experiments/convert.py --to_hf=my/larger --workdir=runs/larger [--dtype=bfloat16] [--architecture=NAME]

The first reads config.json, safetensors and tokenizer of a Llama, Mistral, Qwen2, Qwen3 or Tele-FLM directory, of any
size, and writes step 0 of a new work directory: grow it, verify it, train on from it with `Recipe.start`. To train,
take --dtype=float32: AdamW's small steps are lost in 16 bits.

The second writes a directory that `transformers` loads with no code of ours, tokenizer included; kept widths and
multipliers are folded into the weights. With --architecture=TeleFLMForCausalLM multipliers stay multipliers.

Neither changes a bit of the weights that need not change: docs/convert.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_FROM = flags.DEFINE_string("from_hf", None, "A directory to read: config.json, safetensors, tokenizer.")
_TO = flags.DEFINE_string("to_hf", None, "A directory to write: new or empty.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "With --from_hf: new or empty. With --to_hf: a work directory, a stage's or a step.", required=True
)
_DTYPE = flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; without it, the dtype stays.")
_ARCHITECTURE = flags.DEFINE_string(
    "architecture", None, "With --to_hf: what to write it as, such as Qwen2ForCausalLM."
)
_SHARD_GB = flags.DEFINE_float(
    "shard_gb", 1.0, "With --to_hf: the largest file, in 10^9 bytes; it is assembled in memory.", lower_bound=1e-9
)


def main(argv: list[str]) -> None:
    """Parses flags, and calls one function."""
    if len(argv) > 1:
        app.usage(shorthelp=True, detailed_error=f"unexpected argument {argv[1]!r}", exitcode=2)
    source, target = _FROM.value, _TO.value
    if (source is None) == (target is None):
        app.usage(shorthelp=True, detailed_error="give one of --from_hf and --to_hf", exitcode=2)
    if source is not None and _ARCHITECTURE.value is not None:
        app.usage(shorthelp=True, detailed_error="--architecture belongs to --to_hf", exitcode=2)

    # Imported here, so that --help answers at once.
    from experiments import launch

    if source is not None:
        launch.run_import(source, _WORKDIR.value, _DTYPE.value)
    elif target is not None:
        launch.run_export(_WORKDIR.value, target, _ARCHITECTURE.value, _DTYPE.value, int(_SHARD_GB.value * 1e9))


if __name__ == "__main__":
    app.run(main)
