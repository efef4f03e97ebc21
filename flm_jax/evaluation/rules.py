"""Judges answers by rules: the same text, the same number, the right choice."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from flm_jax.evaluation.numbers import last_box, last_number, same_number
from flm_jax.evaluation.questions import CHOICE, EXACT, NUMERIC, Question

BY_RULE = (EXACT, NUMERIC, CHOICE)
_QUOTES = "\"'`*_$\u201c\u201d\u2018\u2019\u00ab\u00bb\u300c\u300d\u300e\u300f"
_ENDS = ".。!?,;:"
# "The answer is (B)", "答案：B"; the last such sentence counts.
_SAID = re.compile(
    r"(?:(?i:answer|choice|option)(?i:\s+is)?|(?:答案|选项|选择|应选|选)(?:是|为)?)\s*:?\s*[*(\[]*([A-Z])(?![A-Za-z])"
)


def right(question: Question, answer: str) -> bool:
    """Whether an answer to a question of the kind `exact`, `numeric` or `choice` is right."""
    if question.kind == EXACT:
        return normalised(answer) in {normalised(text) for text in question.reference}
    if question.kind == NUMERIC:
        found, wanted = last_number(answer), last_number(question.reference[0])
        assert wanted is not None  # as `parse_question` checks
        return found is not None and same_number(found, wanted, question.tolerance)
    if question.kind == CHOICE:
        return choice_of_text(answer, question.choices) == question.right_choice
    raise ValueError(f"the kind {question.kind} has no rule: it needs a judge")


def normalised(text: str) -> str:
    """The text as it is compared: without case, width, repeated spaces, and quotes and sentence ends around it."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    before = None
    while text != before:
        before, text = text, text.strip().strip(_QUOTES).rstrip(_ENDS)
    return text


def choice_of_text(answer: str, choices: Sequence[str]) -> int | None:
    """The index of the choice that an answer names; None where it names none, or it is not clear which.

    In this order: the answer is a choice's text or letter; its last box holds one; it says which letter the answer is;
    it begins with a letter, as in "B) Paris"; it contains the text of just one choice.
    """
    for text in (answer, last_box(answer)):
        if text is not None and (found := _itself(text, choices)) is not None:
            return found
    text = unicodedata.normalize("NFKC", answer).strip()
    said = [letter for match in _SAID.finditer(text) if (letter := _letter(match[1], choices)) is not None]
    if said:
        return said[-1]
    if begins := re.match(r"[*(\[]*([A-Z])[*)\]]*(?:[.:)、,]|\s*\n|$)", text):
        return _letter(begins[1], choices)
    whole = f" {normalised(answer)} "
    named = [i for i, choice in enumerate(choices) if _contains(whole, normalised(choice))]
    # "New York" also contains "York".
    longest = [i for i in named if not any(i != j and normalised(choices[i]) in normalised(choices[j]) for j in named)]
    return longest[0] if len(longest) == 1 else None


def _itself(text: str, choices: Sequence[str]) -> int | None:
    found = [i for i, choice in enumerate(choices) if normalised(choice) == normalised(text)]
    if len(found) == 1:
        return found[0]
    return _letter(normalised(text).strip("()[]. "), choices)


def _letter(text: str, choices: Sequence[str]) -> int | None:
    number = ord(text.upper()) - ord("A") if len(text) == 1 and text.isascii() and text.isalpha() else -1
    return number if 0 <= number < len(choices) else None


def _contains(text: str, part: str) -> bool:
    """Whether a text contains another that is not the middle of a word."""
    edges = [r"(?<![^\W_])" if part[:1].isascii() else "", r"(?![^\W_])" if part[-1:].isascii() else ""]
    return bool(part) and re.search(edges[0] + re.escape(part) + edges[1], text) is not None
