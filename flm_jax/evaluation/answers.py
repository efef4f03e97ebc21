"""Answers to questions, read from JSON lines that any system wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_jax.data.json_lines import LineError, Skipped, parse_object, read_lines
from flm_jax.evaluation.questions import Question, QuestionError, identifier

# The fields in which other programs keep an answer.
_TEXTS = ("answer", "output", "response")


@dataclass(frozen=True)
class Answer:
    """A system's answer to a question.

    Attributes:
      text: the answer; None: there is none.
      missing: why there is none, in a few words.
      choice: for a choice by likelihood, the index of the likeliest one.
      choice_per_byte: the index of the one that is likeliest per byte of its text.
    """

    text: str | None
    missing: str = ""
    choice: int | None = None
    choice_per_byte: int | None = None


NO_ANSWER = Answer(None, "no answer")


def from_record(record: Mapping[str, Any], where: str) -> Answer:
    """The answer of a JSON object: our own, or one with the answer in 'answer', 'output' or 'response'.

    Raises:
      QuestionError: it has none of these fields, or one is not of its type.
    """
    name = next((name for name in _TEXTS if name in record), None)
    if name is None:
        raise QuestionError(where, "no answer", f"it must have a text in {', '.join(_TEXTS[:-1])} or {_TEXTS[-1]}")
    text, missing, choices = record[name], record.get("missing", ""), (record.get("choice"), record.get("per_byte"))
    if not isinstance(text, str) and not (text is None and missing):
        raise QuestionError(where, "no answer", f"{name!r} is {text!r:.40} and must be a text")
    if not isinstance(missing, str) or not all(i is None or (type(i) is int and i >= 0) for i in choices):
        raise QuestionError(where, "no answer", "'choice' and 'per_byte' must be numbers of choices, 'missing' a text")
    return Answer(text, missing, *choices)


def read_answers(path: str | Path, questions: Sequence[Question], skipped: Skipped) -> dict[str, Answer]:
    """The answers of a file of JSON lines to some questions, by their ids; faulty lines are counted.

    Args:
      path: the file or folder; .gz and .zst are decompressed. Each line has 'id' (or 'question_id') and 'answer'.
      questions: the questions; answers to others are left out.
      skipped: counts the lines that are left out for a fault.

    Raises:
      FileNotFoundError: there is no such file.
      LineError: more lines are faulty than `skipped` allows, or the file is damaged.
      ValueError: none of the questions has an answer there.
    """
    known = {question.id: question for question in questions}
    found: dict[str, Answer] = {}
    others: set[str] = set()
    for where, line in read_lines(path):
        try:
            record = parse_object(line, where)
            name = identifier(record, where)
            if name in found:
                raise QuestionError(where, "an id twice", f"{name!r} has been answered on a line before")
            if name not in known:
                others.add(name)
                continue
            answer = from_record(record, where)
            chosen = [i for i in (answer.choice, answer.choice_per_byte) if i is not None]
            if any(i >= len(known[name].choices) for i in chosen):
                raise QuestionError(where, "no answer", f"{name!r} has only {len(known[name].choices)} choices")
        except LineError as error:
            skipped.add(error)
            continue
        found[name] = answer
    if not found:
        raise ValueError(
            f"{path} answers none of the questions, {len(known):,} in all"
            + (f"; it has answers to others, such as {min(others)!r:.40}" if others else "")
        )
    return found
