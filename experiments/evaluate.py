"""Evaluate a checkpoint: lm-eval's tasks, bits a byte of any text, continuations of a prompt.

  python experiments/evaluate.py --checkpoint=runs/demo --text=my/texts [--json=FILE]
  python experiments/evaluate.py --checkpoint=runs/converted --lm_eval=hellaswag,arc_easy --limit=100
  python experiments/evaluate.py --checkpoint=runs/converted --lm_eval=my_task --include_path=my/tasks
  python experiments/evaluate.py --checkpoint=runs/demo --generate='def main(' --tokens=64

Tasks need `pip install -e '.[eval]'`; those of your own, on files of your own, need no network. The tokenizer is the
checkpoint's own, or that of the data its run was configured with. Gin only lays devices out:

      --gin_bindings='evaluate.mesh = @MeshConfig()' --gin_bindings='MeshConfig.tensor = 4'
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import processes

flags.adopt_module_key_flags(processes)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A step, a stage's or a work directory.", required=True)
_LM_EVAL = flags.DEFINE_list("lm_eval", [], "Tasks or groups of lm-eval, or patterns of their names.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "A folder with lm-eval tasks of your own, as YAML.")
_LIMIT = flags.DEFINE_float("limit", None, "Examples a task; below 1, a share of them.", lower_bound=0.0)
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples shown before each question.", lower_bound=0)
_TEXT = flags.DEFINE_string("text", None, "Bits a byte of this: a text file, a *.jsonl, or a folder of *.txt.")
_GENERATE = flags.DEFINE_string("generate", None, "Continue this prompt, with the likeliest token each time.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "How many tokens to continue it by.", lower_bound=1)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "A directory with tokenizer.json, in place of the checkpoint's own."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows read at once, on all devices together.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Tokens the model reads at once; by default what it was made for, at most 4096.", lower_bound=2
)
_JSON = flags.DEFINE_string("json", None, "Write what was found to this file.")
_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times, later ones win.")
_GIN_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "A gin binding, such as 'evaluate.mesh = @MeshConfig()'.")


def main(argv: list[str]) -> None:
    """Parses flags and gin, and calls one function."""
    if len(argv) > 1:
        app.usage(shorthelp=True, detailed_error=f"unexpected argument {argv[1]!r}", exitcode=2)
    if not _LM_EVAL.value and _TEXT.value is None and _GENERATE.value is None:
        app.usage(shorthelp=True, detailed_error="say what to evaluate: --lm_eval, --text or --generate", exitcode=2)

    # Imported here, so that --help answers at once.
    from experiments import launch
    from flm_jax.evaluation.evaluate import EvalRequest

    launch.join(processes.given())
    what = EvalRequest(
        tuple(_LM_EVAL.value),
        _INCLUDE_PATH.value,
        _LIMIT.value,
        _NUM_FEWSHOT.value,
        _TEXT.value,
        _GENERATE.value,
        _TOKENS.value,
    )
    given = (_TOKENIZER.value, _BATCH_SIZE.value, _MAX_LENGTH.value, _JSON.value, _GIN_FILE.value, _GIN_BINDINGS.value)
    launch.run_evaluate(_CHECKPOINT.value, what, *given)


if __name__ == "__main__":
    app.run(main)
