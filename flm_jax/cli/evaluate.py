"""Evaluate a checkpoint: lm-eval's tasks, bits per byte of any text, continuations of a prompt, judged answers.

  python experiments/evaluate.py --checkpoint=runs/demo --text=my/texts [--json=FILE]
  python experiments/evaluate.py --checkpoint=runs/converted --lm_eval=hellaswag,arc_easy --limit=100
  python experiments/evaluate.py --checkpoint=runs/converted --lm_eval=my_task --include_path=my/tasks
  python experiments/evaluate.py --checkpoint=runs/demo --generate='def main(' --tokens=64
  python experiments/evaluate.py --checkpoint=runs/tuned --prompts=questions.jsonl --output=runs/judged --judge=JUDGE

Tasks need `pip install -e '.[eval]'`; your own tasks on your own files need no network. The vocabulary is the one
that the checkpoint was trained with and holds; nothing beside the step's directory is read. Judged answers
are described in docs/sft.md. Gin sets only the mesh:

      --gin_bindings='evaluate.mesh = @MeshConfig()' --gin_bindings='MeshConfig.tensor = 4'
"""

from __future__ import annotations

from typing import Any

from absl import flags

from flm_jax.cli import judge_flags
from flm_jax.cli.flags import define_gin, define_json, define_model, define_processes, launch, process_flags, refuse


def define() -> None:
    """Defines the flags."""
    define_processes()
    define_gin("evaluate.mesh = @MeshConfig()")
    define_json()
    flags.DEFINE_string("checkpoint", None, "A step, a stage's directory or a work directory.")
    flags.DEFINE_list("lm_eval", [], "Tasks or groups of lm-eval, or patterns of their names.")
    flags.DEFINE_string("include_path", None, "A folder with lm-eval tasks of your own, as YAML.")
    flags.DEFINE_float("limit", None, "Examples per task; below 1, a fraction of them.", lower_bound=0.0)
    flags.DEFINE_integer("num_fewshot", None, "Examples shown before each question.", lower_bound=0)
    flags.DEFINE_string("text", None, "Compute bits per byte of a text file, a *.jsonl, or a folder of *.txt.")
    flags.DEFINE_string("generate", None, "Continue this prompt, with the likeliest token each time.")
    flags.DEFINE_integer(
        "tokens", None, "Number of tokens of the continuation (64), or the most of an answer (512).", lower_bound=1
    )
    define_model("Rows", batch_size=8)
    judge_flags.define()


def run(values: Any) -> None:
    """Runs the evaluations that the flags describe."""
    others = values.lm_eval or values.text is not None or values.generate is not None
    if values.prompts is not None:
        if others:
            refuse("--prompts goes without --lm_eval, --text and --generate: run them one after the other")
        judge_flags.run(values)
        return
    judge_flags.check_unused(values)
    if not others:
        refuse("say what to evaluate: --lm_eval, --text, --generate or --prompts")
    if values.checkpoint is None:
        refuse("say which checkpoint to evaluate: --checkpoint")
    from flm_jax.cli import runs  # Imported here, so that --help is fast.
    from flm_jax.evaluation import EvalRequest

    runs.join(process_flags(values))
    asked = EvalRequest(
        tasks=tuple(values.lm_eval),
        include_path=values.include_path,
        limit=values.limit,
        num_fewshot=values.num_fewshot,
        text=values.text,
        prompt=values.generate,
        tokens=values.tokens or EvalRequest.tokens,
        tokenizer=values.tokenizer,
        batch_size=values.batch_size,
        max_length=values.max_length,
        dtype=values.dtype,
    )
    runs.run_evaluate(values.checkpoint, asked, values.json, values.gin_file, values.gin_bindings)


def main() -> None:
    """Runs the program."""
    launch(__doc__ or "", define, run, computes=True)


if __name__ == "__main__":
    main()
