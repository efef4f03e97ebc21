"""Questions with a category and a reference, read from JSON lines in the manner of AlignBench.

    {"id": "7", "category": "maths", "question": "One and one?", "reference": "2", "kind": "numeric"}

The kind says how an answer is judged: `exact` (the same text, normalised), `numeric` (the last number in it), `choice`
(one of `choices`), by rules; `judged`, by whatever judge is asked. AlignBench's own names `question_id` and
`subcategory` are read too. In place of `question` there may be `messages`, a conversation that ends with the user.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_jax.chat.conversation import (
    ASSISTANT,
    USER,
    ConversationError,
    Message,
    parse,
)
from flm_jax.data.json_lines import LineError, Skipped, parse_object, read_lines
from flm_jax.evaluation.numbers import last_number
from flm_jax.records import meant

EXACT, NUMERIC, CHOICE, JUDGED = "exact", "numeric", "choice", "judged"
KINDS = (EXACT, NUMERIC, CHOICE, JUDGED)


class QuestionError(ConversationError):
    """A line of a file of questions or answers cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      id: unique within its file.
      category: what results are grouped by.
      subcategory: a part of the category, or ''.
      messages: the conversation, the user's last.
      kind: one of KINDS.
      reference: accepted answers as text; for `choice` the text of the right choice; empty: there is none.
      choices: what there is to choose from.
      tolerance: how far a number may be from the reference's, absolutely; None: it must be equal.
    """

    id: str
    category: str
    messages: tuple[Message, ...]
    kind: str = JUDGED
    reference: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    subcategory: str = ""
    tolerance: float | None = None

    @property
    def text(self) -> str:
        """The question as a judge reads it; earlier turns are marked by their roles."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n\n".join(f"[{m.role}]\n{m.content}" for m in self.messages)

    @property
    def right_choice(self) -> int:
        """The index of the right choice."""
        return self.choices.index(self.reference[0])


def read_questions(path: str | Path, skipped: Skipped, with_reference: bool = False) -> list[Question]:
    """The questions of a file of JSON lines, or of the files of a folder, in order; faulty lines are counted.

    Args:
      path: the file or folder; .gz and .zst are decompressed.
      skipped: counts the lines that are left out.
      with_reference: whether questions of the kind `judged` need a reference, too.

    Raises:
      FileNotFoundError: there is no such file.
      LineError: more lines are faulty than `skipped` allows, or the file is damaged.
      ValueError: no question is left.
    """
    found: dict[str, Question] = {}
    places: dict[str, str] = {}
    for where, line in read_lines(path):
        try:
            question = parse_question(parse_object(line, where, finite=True), where)
            if question.id in found:
                raise QuestionError(where, "an id twice", f"{question.id!r} is also that of {places[question.id]}")
            if with_reference and not question.reference:
                raise QuestionError(
                    where, "no reference", "this judge compares answers with it: add it, or give --reference_answers"
                )
        except LineError as error:
            skipped.add(error)
            continue
        found[question.id], places[question.id] = question, where
    if not found:
        raise ValueError(f"{path} holds no question" + (f"; {skipped.summary()}" if skipped.counts else ""))
    return list(found.values())


def parse_question(record: Mapping[str, Any], where: str) -> Question:
    """The question of a record.

    Args:
      record: the JSON object of a line.
      where: file:line.

    Raises:
      ConversationError: it lacks a field that its kind needs, or a field is not as it should be.
    """
    kind = record.get("kind") or (CHOICE if record.get("choices") else JUDGED)
    if kind not in KINDS:
        close = meant(kind, KINDS)
        raise QuestionError(where, "unknown kind", f"{kind!r:.40}; known are {', '.join(KINDS)}{close}")
    category = _line_text(record, ("category",), where)
    if not category:
        raise QuestionError(where, "no category", "results are grouped by it")
    tolerance = record.get("tolerance")
    if tolerance is not None and (isinstance(tolerance, bool) or not isinstance(tolerance, int | float)):
        raise QuestionError(where, "no tolerance", f"it is {tolerance!r:.40} and must be a number")
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise QuestionError(where, "no tolerance", f"it is {tolerance} and must be a finite number of at least 0")
    if tolerance is not None and kind != NUMERIC:
        raise QuestionError(where, "no tolerance", f"it is only for the kind {NUMERIC}, and this one is {kind}")
    choices = _choices(record, where) if kind == CHOICE else ()
    return Question(
        identifier(record, where),
        category,
        _messages(record, where),
        kind,
        _reference(record, kind, choices, where),
        choices,
        _line_text(record, ("subcategory",), where),
        None if tolerance is None else float(tolerance),
    )


def identifier(record: Mapping[str, Any], where: str) -> str:
    """The field `id` or `question_id` of a record, as text.

    Raises:
      QuestionError: it has none.
    """
    value = record.get("id", record.get("question_id"))
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise QuestionError(where, "no id", "it must have the field 'id' or 'question_id', a text or a number")
    return str(value)


def _line_text(record: Mapping[str, Any], names: Iterable[str], where: str) -> str:
    """The first of these fields that is there, a text in one line; '' if there is none."""
    for name in names:
        if (value := record.get(name)) is not None:
            if not isinstance(value, str):
                raise QuestionError(where, f"no {name}", f"it is {value!r:.40} and must be a text")
            return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in value).split())
    return ""


def _messages(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    turns = record.get("messages")
    if turns is None:
        if "question" not in record:
            raise QuestionError(where, "no question", "it must have the field 'question', or 'messages'")
        turns = [{"role": USER, "content": record["question"]}]
    if not isinstance(turns, list) or not turns:
        raise QuestionError(where, "no question", f"'messages' must be a list of turns, and is {turns!r:.40}")
    # With an answer at its end it is a conversation, whose form is checked elsewhere.
    whole = parse({"messages": [*turns, {"role": ASSISTANT, "content": "an answer"}]}, where)
    return whole.messages[:-1]


def _choices(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    choices = record.get("choices")
    if (
        not isinstance(choices, list)
        or not all(isinstance(c, str) and c.strip() for c in choices)
        or len(set(choices)) < max(2, len(choices))
    ):
        raise QuestionError(where, "no choices", f"{choices!r:.60} must be a list of two or more different texts")
    return tuple(choices)


def _reference(record: Mapping[str, Any], kind: str, choices: tuple[str, ...], where: str) -> tuple[str, ...]:
    value = record.get("reference")
    if value is None or value in ("", []):
        if kind == JUDGED:
            return ()
        raise QuestionError(where, "no reference", f"the kind {kind} needs one")
    if kind == CHOICE:
        return (choices[_index(value, choices, where)],)
    if kind == NUMERIC and isinstance(value, int | float) and not isinstance(value, bool):
        value = repr(value)
    texts = value if isinstance(value, list) and kind == EXACT else [value]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        also = ", or a list of texts" if kind == EXACT else ", or a number" if kind == NUMERIC else ""
        raise QuestionError(where, "no reference", f"it is {value!r:.40} and must be a text{also}")
    if kind == NUMERIC and last_number(texts[0]) is None:
        raise QuestionError(where, "no reference", f"there is no number in {texts[0]!r:.40}")
    return tuple(texts)


def _index(value: Any, choices: tuple[str, ...], where: str) -> int:
    """The choice that a reference names: by its text, its letter from A, or its number from 0."""
    if value in choices:
        return choices.index(value)
    number = value
    if isinstance(value, str):
        letter = value.strip().strip("().").upper()
        number = ord(letter) - ord("A") if len(letter) == 1 and letter.isascii() and letter.isalpha() else None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
        raise QuestionError(
            where,
            "no reference",
            f"{value!r:.40} is none of the {len(choices)} choices: give its text, its letter from A, or its number "
            "from 0",
        )
    return number
