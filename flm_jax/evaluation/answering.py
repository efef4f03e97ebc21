"""A checkpoint answers questions: in batches, by generating or choosing; each answer is kept as it comes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flm_jax import generation
from flm_jax.chat.conversation import ConversationError
from flm_jax.chat.template import ChatEncoder
from flm_jax.distributed import from_primary
from flm_jax.evaluation.answers import Answer, from_record
from flm_jax.evaluation.likelihood import choice_log_probs
from flm_jax.evaluation.loaded import LoadedModel
from flm_jax.evaluation.questions import CHOICE, Question
from flm_jax.files import sha256_json, write_json
from flm_jax.progress import count_bar
from flm_jax.records import differences
from flm_jax.records.foreign_json import read_json
from flm_jax.records.kept import kept_by_all

ANSWERS, MADE_BY = "answers.jsonl", "answered_by.json"


def answers_of(
    model: LoadedModel, encoder: ChatEncoder, questions: Sequence[Question], tokens: int, rows: int, output: Path
) -> tuple[dict[str, Answer], dict[str, Any]]:
    """A checkpoint's answers by question id, kept in a directory, and a record of what made them.

    Answers that the directory holds already are not made again, unless their question has changed.

    Args:
      model: the checkpoint's model.
      encoder: the template that it was tuned with, and its vocabulary.
      questions: the questions.
      tokens: the most tokens of an answer.
      rows: rows per batch.
      output: the directory.

    Raises:
      ValueError: it holds answers of another checkpoint, or made in another way.
    """
    made = {**model.record(), "template": encoder.template.record(), "tokens": tokens}
    from_primary("answers' origin", lambda: _check_made(output, made))
    with kept_by_all(output / ANSWERS, "id") as (kept, keep), count_bar("answers", "question", len(questions)) as bar:
        return answer_questions(model, encoder, questions, tokens, rows, kept, keep, bar.update), made


def _check_made(output: Path, made: Mapping[str, Any]) -> None:
    """Checks that the answers of a directory were made by the same checkpoint in the same way; records it at first.

    Raises:
      ValueError: they were not.
    """
    path = output / MADE_BY
    if not path.exists():
        write_json(path, made)
        return
    # A checkpoint that was moved is the same.
    before, mine = ({n: x for n, x in one.items() if n != "checkpoint"} for one in (read_json(path), dict(made)))
    if found := list(differences(before, mine)):
        raise ValueError(
            f"{output} holds answers that were made otherwise: {'; '.join(found[:3])}. Nothing was changed: give a new "
            f"--output, or judge those answers by --answers={output / ANSWERS}"
        )


def longest_answer(model: LoadedModel, encoder: ChatEncoder, questions: Sequence[Question], tokens: int) -> int:
    """The most tokens that an answer can have: `tokens`, or the room after the shortest question; 0: none is made."""
    written = [question for question in questions if question.kind != CHOICE]
    prompts = encode_questions(encoder, written, model.length).ids.values()
    return max((min(tokens, model.length - len(ids)) for ids in prompts), default=0)


class Prompts(NamedTuple):
    """The questions of a file as a checkpoint reads them.

    Attributes:
      ids: the tokens after which it answers, by the question's id.
      missing: why a question cannot be asked, by its id.
    """

    ids: dict[str, list[int]]
    missing: dict[str, str]


def encode_questions(encoder: ChatEncoder, questions: Sequence[Question], length: int) -> Prompts:
    """The questions as tokens.

    Args:
      encoder: the checkpoint's template and vocabulary.
      questions: the questions.
      length: the longest sequence that the model reads, in tokens; at least one of them is the answer's.
    """
    found = Prompts({}, {})
    for question in questions:
        try:
            ids = encoder.prompt(question.messages, f"question {question.id}")
        except ConversationError as error:
            found.missing[question.id] = error.reason
            continue
        if len(ids) < length:
            found.ids[question.id] = ids
        else:
            found.missing[question.id] = "a question longer than the model reads"
    return found


def answer_questions(
    model: LoadedModel,
    encoder: ChatEncoder,
    questions: Sequence[Question],
    tokens: int,
    rows: int,
    kept: Mapping[str, Mapping[str, Any]],
    keep: Callable[[dict[str, Any]], None],
    told: Callable[[int], object] = lambda _: None,
) -> dict[str, Answer]:
    """A checkpoint's answers by question id: text to questions of most kinds, for `choice` the likeliest one.

    Args:
      model: the checkpoint's model.
      encoder: the template that it was tuned with, and its vocabulary.
      questions: the questions.
      tokens: the most tokens of an answer.
      rows: rows per batch.
      kept: records of answers by id, of a run before; of a question that has changed since they are not used.
      keep: called with the record of each new answer.
      told: called with numbers of questions, once they are answered.
    """
    prompts = encode_questions(encoder, questions, model.length)
    # The prompt as it is read, so that an answer is made again where the question or its choices have changed.
    keys = {q.id: sha256_json([prompts.ids.get(q.id), q.choices, prompts.missing.get(q.id)])[:16] for q in questions}
    records = {q.id: dict(kept[q.id]) for q in questions if kept.get(q.id, {}).get("key") == keys[q.id]}
    told(len(records))

    def add(name: str, **fields: Any) -> None:
        records[name] = {"id": name, **fields, "key": keys[name]}
        keep(records[name])
        told(1)

    left = [q for q in questions if q.id not in records]
    for question in left:
        if question.id in prompts.missing:
            add(question.id, answer=None, missing=prompts.missing[question.id])
    left = [q for q in left if q.id not in records]
    choosing = [q for q in left if q.kind == CHOICE]
    scorer = model.scorer(rows)
    for start in range(0, len(choosing), 8 * scorer.rows):
        part = choosing[start : start + 8 * scorer.rows]
        scores = choice_log_probs(
            scorer, model.vocabulary, [prompts.ids[q.id] for q in part], [q.choices for q in part]
        )
        for question, log_probs in zip(part, scores, strict=True):
            per_byte = [x / len(text.encode()) for x, text in zip(log_probs, question.choices, strict=True)]
            best, best_per_byte = int(np.argmax(log_probs)), int(np.argmax(per_byte))
            text = question.choices[best]
            add(question.id, answer=text, choice=best, per_byte=best_per_byte, log_probs=log_probs)
    writing = [q for q in left if q.kind != CHOICE]
    asked = [prompts.ids[q.id] for q in writing]
    for number, written in answer_all(model, asked, encoder.stop_ids, encoder.stop_texts, tokens, rows):
        add(writing[number].id, answer=written.text, tokens=len(written.ids), ended=written.ended)
    return {q.id: from_record(records[q.id], f"the answer to {q.id}") for q in questions}


def answer_all(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    stop_texts: Sequence[str],
    tokens: int,
    rows: int,
) -> Iterator[tuple[int, generation.Answer]]:
    """The number of each prompt and its likeliest continuation, batch after batch, the longest prompts first.

    Args:
      model: the model.
      prompts: token ids, fewer than `model.length`.
      stop_ids: each ends an answer.
      stop_texts: each ends an answer.
      tokens: the most tokens of an answer; prompt and answer have at most `model.length`.
      rows: rows per batch.
    """
    most = [min(tokens, model.length - len(prompt)) for prompt in prompts]
    return model.generator(rows).answers(prompts, max_tokens=most, stops=stop_texts, ends=stop_ids, in_context=False)
