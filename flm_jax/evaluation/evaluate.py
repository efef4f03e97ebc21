"""Evaluates a checkpoint: choice of tokenizer and context length, then bits per byte, continuation, lm-eval tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flm_jax.data.text import Jsonl, TextFolder
from flm_jax.data.train_vocabulary import load_vocabulary
from flm_jax.distributed import fetch, is_primary
from flm_jax.evaluation.scoring import Scorer, bits_per_byte_of_text, check_vocabulary
from flm_jax.generate import generate
from flm_jax.records.foreign_json import check, parse_json
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.source_checkpoint import CONFIG, SourceCheckpoint, read_source

# Upper bound of the default context length, for models made for contexts that are too long to evaluate by default.
LONGEST_BY_DEFAULT = 4096


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate: any of `tasks`, `text` and `prompt`.

    Attributes:
      tasks: names of lm-eval tasks, or patterns of names.
      include_path: a folder with additional task files.
      limit: examples per task; below 1, a fraction of them.
      num_fewshot: examples shown before each question; None: the task's own number.
      text: path of the text to compute bits per byte of, see `read_texts`; None: no text.
      prompt: the text to continue; None: no continuation.
      tokens: number of tokens of the continuation.
    """

    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    text: str | None = None
    prompt: str | None = None
    tokens: int = 64


def evaluate_checkpoint(
    checkpoint: str | Path,
    what: EvalRequest,
    tokenizer: str | None = None,
    mesh: MeshConfig | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The results of evaluating a checkpoint, which is only read.

    Args:
      checkpoint: a step, a stage's directory or a work directory.
      what: what to evaluate.
      tokenizer: another vocabulary than the checkpoint's own: a checkpoint, a directory with tokenizer.json, or a
        SentencePiece model file.
      mesh: how devices are laid out.
      batch_size: rows per batch, on all devices together.
      max_length: the longest sequence that the model reads, in tokens; None: what the model was made for, at most
        LONGEST_BY_DEFAULT.
      say: called with each result as text, as soon as it is known.

    Returns:
      JSON-able: checkpoint, step, digest, tokenizer, max_length, and the results that were asked for: lm_eval, text,
      generated.

    Raises:
      ValueError: the vocabulary is not known or does not fit the model, or a task or text does not exist.
      FileNotFoundError: there is nothing at `tokenizer`.
      ImportError: tasks are asked for, and lm-eval is not installed.
      DamagedError: the checkpoint is not as it was saved.
    """
    if what.tasks:
        from flm_jax.evaluation import lm_eval_model  # first, so that a missing lm-eval is reported before any work
    origin = read_source(checkpoint)
    cfg = origin.cfg
    vocabulary = origin.vocabulary if tokenizer is None else load_vocabulary(tokenizer)
    if tokenizer is not None and (other := origin.other_vocabulary(vocabulary)):
        say(other)
    check_vocabulary(vocabulary, cfg.vocab)
    length = max_length or find_length(origin)
    placed = make_mesh(mesh)
    with jax.set_mesh(placed):
        params = origin.restore_params(placed)
    masks = origin.masks()
    found: dict[str, Any] = {
        "checkpoint": str(origin.directory),
        "step": origin.step,
        "digest": origin.digest,
        "tokenizer": {"kind": vocabulary.kind, "size": vocabulary.size, "digest": vocabulary.digest},
        "max_length": length,
    }
    say(f"{origin.directory}: {vocabulary.kind} vocabulary of {vocabulary.size} ids, sequences of {length} tokens.")
    if what.text is not None:
        texts = read_texts(what.text)
        score = bits_per_byte_of_text(cfg, params, vocabulary, texts, length, placed, batch_size, masks)
        if not math.isfinite(score.nats):
            raise ValueError(f"The loss of {origin.directory} on {what.text} is not finite: its weights are damaged.")
        found["text"] = {"path": what.text, **score._asdict(), "bits_per_byte": score.bits_per_byte}
        say(
            f"{what.text}: {score.bits_per_byte:.4f} bits per byte; {score.nats / score.tokens:.4f} nats per token, "
            f"{score.documents} documents, {score.tokens} tokens, {score.bytes} bytes."
        )
    if what.prompt is not None:
        ids = vocabulary.special.begin + tuple(vocabulary.encode(what.prompt)) or (vocabulary.special.prefix_id,)
        with jax.set_mesh(placed):
            prompt_BT = np.asarray([ids], np.int32)
            tokens_BS = generate(cfg, params, prompt_BT, what.tokens, jax.random.key(0), 0.0, masks)
        new = [int(token) for token in fetch(tokens_BS)[0]]
        stops = vocabulary.special.stop_ids
        end = next((i for i, token in enumerate(new) if token in stops), len(new))
        found["generated"] = {"prompt": what.prompt, "text": vocabulary.decode(new[:end]), "tokens": new[:end]}
        say(what.prompt + found["generated"]["text"])
    if what.tasks:
        scorer = Scorer(cfg, params, placed, length, batch_size, masks)
        model = lm_eval_model.LmEvalModel(scorer, vocabulary, progress=is_primary())
        results = lm_eval_model.run_tasks(model, what.tasks, what.include_path, what.limit, what.num_fewshot)
        found["lm_eval"] = lm_eval_model.record(results)
        say(lm_eval_model.table(results))
    return found


def find_length(origin: SourceCheckpoint) -> int:
    """The context length that a checkpoint's model was made for, in tokens, at most LONGEST_BY_DEFAULT.

    Raises:
      ValueError: neither the checkpoint's config.json nor the record of its data has it.
    """
    config = parse_json(origin.files.get(CONFIG, b"{}"), f"{origin.directory}: {CONFIG}")
    said = [config.get("max_position_embeddings"), origin.context]
    where = f"{origin.directory}: the length that its model was made for"
    length = max((n for n in said if n is not None and check(n, int, where)), default=None)
    if length is None:
        raise ValueError(
            f"The context length of the model of {origin.directory} is not known: neither a config.json in the "
            "checkpoint nor the recorded data of its run gives it; set --max_length."
        )
    return min(length, LONGEST_BY_DEFAULT)


def read_texts(path: str | Path) -> Iterator[str]:
    """The documents of a text file (one), of a *.jsonl (the field "text" of each line), or of a folder of *.txt.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: it is not UTF-8, or a line of a *.jsonl is not as described.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        return (text.decode() for _, _, text in TextFolder(str(root)).contents())
    if root.suffix == ".jsonl":
        return (text for _, text in Jsonl(str(root)).lines())
    if not root.is_file():
        raise FileNotFoundError(f"there is no text file or folder {root}")
    try:
        return iter([root.read_bytes().decode()])
    except UnicodeDecodeError as error:
        raise ValueError(f"{root} is not UTF-8 text ({error.reason} at byte {error.start})") from None
