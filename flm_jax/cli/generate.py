"""Generate text with a checkpoint: continue a prompt, or answer a file of prompts.

  python experiments/generate.py --checkpoint=runs/demo --prompt='def main(' --max_tokens=64
  echo 'Once upon a time' | python experiments/generate.py --checkpoint=runs/demo --temperature=0.8 --top_p=0.95
  python experiments/generate.py --checkpoint=runs/demo --prompts=prompts.jsonl --output=answers.jsonl
  python experiments/generate.py --checkpoint=runs/chat --chat [--system=TEXT]

One prompt is continued on stdout while the text is made. A file has a prompt per line or, as *.jsonl, an object
{"prompt": ...} per line; each batch of answers is added to --output once it is done, a line of JSON per prompt, and the
same command goes on where it was left. What there is to say, tokens per second included, goes to stderr.

With --chat a prompt is what a user says to a model that was tuned on conversations, and the answer ends where its
template says; without a prompt, a conversation is held in the terminal (/help lists its commands). A line of a *.jsonl
may then have {"messages": [...]} instead of a prompt.

Tokens are the likeliest ones unless --temperature is given. Gin sets the mesh, and the sampling where no flag does:

      --gin_bindings='generate.mesh = @MeshConfig()' --gin_bindings='MeshConfig.tensor = 4'
      --gin_bindings='generate.sampling = @Sampling()' --gin_bindings='Sampling.temperature = 0.7'
"""

from __future__ import annotations

import sys
from typing import Any

from absl import flags

from flm_jax.cli.flags import define_gin, define_json, define_model, define_processes, launch, process_flags, refuse

# The flags that are fields of `Sampling`.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def define() -> None:
    """Defines the flags."""
    define_processes()
    define_gin("generate.sampling = @Sampling()")
    define_json()
    flags.DEFINE_string("checkpoint", None, "A step, a stage's directory or a work directory.", required=True)
    flags.DEFINE_string("prompt", None, "The text to continue; without it and --prompts, it is read from stdin.")
    flags.DEFINE_string("prompts", None, "A file of prompts: a line each, or a *.jsonl of objects {'prompt': ...}.")
    flags.DEFINE_string("output", None, "With --prompts: the *.jsonl for the answers; by default they are printed.")
    flags.DEFINE_bool("chat", False, "Answer as in a conversation; without a prompt, hold one in the terminal.")
    flags.DEFINE_string(
        "template", None, "With --chat: another template than the one that the checkpoint was tuned with."
    )
    flags.DEFINE_string("system", "", "With --chat: the system turn.")
    flags.DEFINE_integer("max_tokens", 256, "Length of an answer at most, in tokens.", lower_bound=1)
    flags.DEFINE_multi_string("stop", [], "A text that ends an answer")
    flags.DEFINE_float("temperature", None, "Divides the logits; 0, the default: the likeliest token each time.")
    flags.DEFINE_integer("top_k", None, "Sample among so many of the likeliest tokens.")
    flags.DEFINE_float("top_p", None, "Sample among the likeliest tokens whose probabilities sum to this.")
    flags.DEFINE_float("min_p", None, "Sample among tokens of at least this fraction of the largest probability.")
    flags.DEFINE_float("repetition_penalty", None, "Makes tokens of prompt and answer less likely if above 1.")
    flags.DEFINE_integer("seed", None, "Seed of the random numbers.")
    define_model("Prompts", batch_size=16)


def run(values: Any) -> None:
    """Generates what the flags describe."""
    if values.prompt is not None and values.prompts is not None:
        refuse("give --prompt or --prompts, not both")
    if values.output is not None and values.prompts is None:
        refuse("--output is for the answers to --prompts")
    if not values.chat and (values.template is not None or values.system):
        refuse("--template and --system belong to --chat")
    prompt = values.prompt
    if prompt is None and values.prompts is None and not values.chat:
        if sys.stdin is None or sys.stdin.isatty():
            refuse("say what to continue: --prompt, --prompts, or a text on stdin")
        if values.coordinator is not None or values.distributed:
            refuse("several processes do not share a stdin: give --prompt or --prompts")
        prompt = sys.stdin.read().removesuffix("\n")
    from flm_jax.cli import runs  # Imported here, so that --help is fast.
    from flm_jax.generation import GenerateRequest

    runs.join(process_flags(values))
    asked = GenerateRequest(
        prompt=prompt,
        prompts=values.prompts,
        output=values.output,
        max_tokens=values.max_tokens,
        sampling={name: values[name].value for name in SAMPLING if values[name].value is not None},
        stops=tuple(values.stop),
        tokenizer=values.tokenizer,
        max_length=values.max_length,
        dtype=values.dtype,
        batch_size=values.batch_size,
        chat=values.chat,
        template=values.template,
        system=values.system,
    )
    runs.run_generate(values.checkpoint, asked, values.json, values.gin_file, values.gin_bindings)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run, computes=True)


if __name__ == "__main__":
    main()
