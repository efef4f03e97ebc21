"""Evaluates a checkpoint: bits per byte, continuation, lm-eval tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_jax.data.folders import endings_of
from flm_jax.data.left_out import LeftOut
from flm_jax.data.rows import Jsonl
from flm_jax.data.text import TextFolder, read_utf8
from flm_jax.distributed import is_primary
from flm_jax.evaluation.loaded import load_model
from flm_jax.evaluation.scoring import bits_per_byte_of_text
from flm_jax.generation.prompts import as_they_are, continue_prompt
from flm_jax.progress import count_bar
from flm_jax.records import counted, meant_beside
from flm_jax.sharding import MeshConfig


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate, any of `tasks`, `text` and `prompt`, and how.

    Attributes:
      tasks: names of lm-eval tasks, or patterns of names.
      include_path: a folder with additional task files.
      limit: examples per task; below 1, a fraction of them.
      num_fewshot: examples shown before each question; None: the task's own number.
      text: path of the text to compute bits per byte of, see `read_texts`; None: no text.
      prompt: the text to continue; None: no continuation.
      tokens: number of tokens of the continuation, as many as fit into `max_length` at most.
      tokenizer: another vocabulary than the checkpoint's own; see `load_model`.
      batch_size: rows per batch, on all devices together.
      max_length: the longest sequence that the model reads, in tokens; None: as `find_length`.
      dtype: what the model computes in; None: the dtype of the checkpoint's parameters.
    """

    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    text: str | None = None
    prompt: str | None = None
    tokens: int = 64
    tokenizer: str | None = None
    batch_size: int = 8
    max_length: int | None = None
    dtype: str | None = None


def evaluate_checkpoint(
    checkpoint: str | Path,
    what: EvalRequest,
    mesh: MeshConfig | None = None,
    say: Callable[[str], None] = lambda _: None,
    show: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The results of evaluating a checkpoint, which is only read.

    Args:
      checkpoint: a step, a stage's directory or a work directory.
      what: what to evaluate, and how.
      mesh: how devices are laid out.
      say: called with each result as a line of text, as soon as it is known.
      show: called with each piece of the continuation while it is made, line ends included.

    Returns:
      JSON-able: checkpoint, step, digest, tokenizer, max_length, dtype, and the results that were asked for: lm_eval,
      text, generated.

    Raises:
      ValueError: the vocabulary is not known or does not fit the model, or a task or text does not exist.
      FileNotFoundError: there is nothing at `tokenizer`.
      ImportError: tasks are asked for, and lm-eval is not installed.
      DamagedError: the checkpoint is not as it was saved.
    """
    if what.tasks:
        from flm_jax.evaluation import lm_eval_model  # first, so that a missing lm-eval is reported before any work
    model = load_model(checkpoint, what.tokenizer, what.max_length, what.dtype, mesh)
    if model.note:
        say(model.note)
    source, cfg, params, masks, vocabulary, length, placed, *_ = model
    found = model.record()
    say(model.sentence())
    if what.text is not None:
        texts = read_texts(what.text)
        with count_bar(what.text, "token") as bar:
            score = bits_per_byte_of_text(
                cfg, params, vocabulary, texts, length, placed, what.batch_size, masks, told=bar.update
            )
        if not math.isfinite(score.nats):
            raise ValueError(f"The loss of {source.directory} on {what.text} is not finite: its weights are damaged.")
        found["text"] = {"path": what.text, **score._asdict(), "bits_per_byte": score.bits_per_byte}
        say(
            f"{what.text}: {score.bits_per_byte:.4f} bits per byte; {score.nats / score.tokens:.4f} nats per token, "
            f"{counted(score.documents, 'document')}, {counted(score.tokens, 'token')}, {counted(score.bytes, 'byte')}."
        )
    if what.prompt is not None:
        generator = model.generator()
        found["generated"] = continue_prompt(
            generator, as_they_are(generator), what.prompt, length, what.tokens, say=say, show=show
        )
    if what.tasks:
        adapter = lm_eval_model.LmEvalModel(model.scorer(what.batch_size), vocabulary, progress=is_primary())
        results = lm_eval_model.run_tasks(adapter, what.tasks, what.include_path, what.limit, what.num_fewshot)
        found["lm_eval"] = lm_eval_model.record(results)
        say(lm_eval_model.table(results))
    return found


def read_texts(path: str | Path) -> Iterator[str]:
    """The documents of a text file (one), of a *.jsonl (the field "text" of each line), or of a folder of *.txt.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: it is not UTF-8, or a line of a *.jsonl is not as described.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        try:
            paths = TextFolder(str(root)).paths()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"--text={path}: a folder is read for *.txt; it holds {endings_of(root) or 'no files'}: give one of "
                "the files, or a *.jsonl."
            ) from None
        return (read_utf8(path).decode() for path in paths)  # whole: nothing is held out
    if root.suffix == ".jsonl":
        return (text for _, text in Jsonl(str(root)).lines(LeftOut(0, unit="line")))
    if not root.is_file():
        raise FileNotFoundError(f"there is no text file or folder {root}{meant_beside(root)}")
    return iter([read_utf8(root).decode()])
