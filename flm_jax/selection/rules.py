"""Rules: what the text of a conversation must look like. Each is one function and one registry entry."""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flm_jax.chat.conversation import ASSISTANT, SYSTEM, USER, Conversation
from flm_jax.records import meant
from flm_jax.selection.config import TextRules
from flm_jax.selection.keywords import Keywords

Falls = Callable[[Conversation, TextRules], bool]


@dataclass(frozen=True)
class Rule:
    """A registry entry.

    Attributes:
      name: its name in reports and in `TextRules.off`.
      meaning: what falls out, in words.
      falls: whether a conversation falls out.
    """

    name: str
    meaning: str
    falls: Falls


REGISTRY: dict[str, Rule] = {}


def register(name: str, meaning: str) -> Callable[[Falls], Falls]:
    """Adds the decorated function to the registry as a rule, after the others."""

    def enter(function: Falls) -> Falls:
        REGISTRY[name] = Rule(name, meaning, function)
        return function

    return enter


def check_rules(rules: TextRules) -> None:
    """Checks the names in the rules' configuration.

    Raises:
      ValueError: a rule or a script does not exist.
    """
    for what, names, known in (("off", rules.off, list(REGISTRY)), ("scripts", rules.scripts, list(SCRIPTS))):
        for name in names:
            if name not in known:
                near = meant(name, known) or "."
                raise ValueError(f"TextRules.{what} names {name!r}; known are {', '.join(known)}{near}")


def first_broken(conversation: Conversation, rules: TextRules) -> str:
    """The name of the first rule by which a conversation falls out; '' if there is none."""
    return next(
        (rule.name for rule in REGISTRY.values() if rule.name not in rules.off and rule.falls(conversation, rules)), ""
    )


@register("turns", "more turns than TextRules.most_turns")
def turns(conversation: Conversation, rules: TextRules) -> bool:
    """Whether there are too many turns."""
    return sum(m.role != SYSTEM for m in conversation.messages) > rules.most_turns


@register("question length", "a question shorter or longer than the limits")
def question_length(conversation: Conversation, rules: TextRules) -> bool:
    """Whether a user's turn is too short or too long."""
    lengths = [len(m.content.strip()) for m in conversation.messages if m.role == USER]
    return min(lengths) < rules.least_question or max(lengths) > rules.most_question


@register("answer length", "answers shorter together, or one longer, than the limits")
def answer_length(conversation: Conversation, rules: TextRules) -> bool:
    """Whether the answers are too short or one is too long."""
    lengths = [len(answer.strip()) for answer in conversation.answers]
    return sum(lengths) < rules.least_answer or max(lengths) > rules.most_answer


_BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ue000-\uf8ff]")
_CONTROL = bytes(code for code in range(128) if _BROKEN.match(chr(code)))


@register("broken characters", "control or replacement characters: the text was decoded wrongly")
def broken_characters(conversation: Conversation, rules: TextRules) -> bool:
    """Whether a turn holds characters that no text has."""
    del rules
    text = "".join(m.content for m in conversation.messages)
    if text.isascii():
        return len(text.encode().translate(None, _CONTROL)) < len(text)
    return _BROKEN.search(text) is not None


# First and last code points of the letters of each script, as far as instruction data has them.
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xAA, 0x24F), (0x1E00, 0x1EFF), (0xFF21, 0xFF5A)),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "cyrillic": ((0x400, 0x52F),),
    "han": ((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
    "kana": ((0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F)),
    "hebrew": ((0x590, 0x5FF),),
    "devanagari": ((0x900, 0x97F),),
    "thai": ((0xE00, 0xE7F),),
}


@functools.cache
def _scripts() -> np.ndarray:
    """For each character of the first plane, 0: no letter, 1 + i: of the i-th script, 255: of another one."""
    found = np.array([255 * chr(code).isalpha() for code in range(1 << 16)], np.uint8)
    for number, spans in enumerate(SCRIPTS.values(), 1):
        for first, last in spans:
            found[first : last + 1][found[first : last + 1] > 0] = number
    return found


@register("script", "letters of other scripts than TextRules.scripts")
def script(conversation: Conversation, rules: TextRules) -> bool:
    """Whether too many letters belong to scripts that are not wanted."""
    text = "".join(m.content for m in conversation.messages)
    if text.isascii():
        return "latin" not in rules.scripts and any(map(str.isalpha, text))
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    counts = np.bincount(_scripts()[codes[codes < 1 << 16]], minlength=256)
    known = sum(int(counts[number]) for number, name in enumerate(SCRIPTS, 1) if name in rules.scripts)
    return known < rules.least_known * int(counts[1:].sum())


_LETTER = re.compile(r"[^\W_]")
_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalnum())


def _count_letters(text: str) -> int:
    """Number of letters and digits."""
    if text.isascii():  # at the speed of memory
        return len(text.encode().translate(None, _NO_LETTERS))
    return len(_LETTER.findall(text))


@register("letters", "few letters and digits in the answers")
def letters(conversation: Conversation, rules: TextRules) -> bool:
    """Whether the answers are mostly signs."""
    text = "".join("".join(conversation.answers).split())
    return _count_letters(text) < rules.least_letters * len(text)


_FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)


@register("code fence", "a block of code that is not closed")
def code_fence(conversation: Conversation, rules: TextRules) -> bool:
    """Whether an answer has an odd number of fences, as one that was cut off."""
    del rules
    return any(len(_FENCE.findall(answer)) % 2 for answer in conversation.answers)


# A loop is compressed to its first round and a few bytes; of a short text that alone is more than the share allows.
_WINDOW, _FIRST_ROUND = 1000, 30
_ROUNDS = 6


def _in_rounds(words: list[str]) -> bool:
    """Whether a text is the same few words, at least six times; the last round may be cut short."""
    return any(words[period:] == words[:-period] for period in range(1, len(words) // _ROUNDS + 1))


@register("repetition", "a loop: the same words six times, or 1,000 bytes that compress to nearly nothing")
def repetition(conversation: Conversation, rules: TextRules) -> bool:
    """Whether an answer, or a stretch of it, repeats itself."""
    for answer in conversation.answers:
        content = answer.encode()
        if len(content) < _WINDOW and _in_rounds(answer.split()):
            return True
        starts = [*range(0, len(content) - _WINDOW, _WINDOW), max(0, len(content) - _WINDOW)]
        for piece in (content[start : start + _WINDOW] for start in starts):
            most = rules.least_compressed * len(piece) + _FIRST_ROUND
            if len(piece) > 2 * most and len(zlib.compress(piece, 1)) < most:
                return True
    return False


# Every match of the first contains one of its texts, and of the second, at the beginning of an answer, one of its own.
_REFUSAL = Keywords(
    ("an ai", "a ai", "artificial intelligence", "人工智能", "为ai", "名ai", "个ai", "款ai", "是ai"),
    re.compile(
        r"\b(?:as|(?:i|i['\u2019]?m|i am)(?: just| only)?) an? (?:ai|artificial intelligence)\b"
        r"|(?:作为|我(?:只|仅仅)?是)(?:一个|一名|一款)?(?:ai|人工智能)"
    ),
)
_SORRY = Keywords(
    ("sorry", "i apologi", "i can", "i am unable", "i am not able", "抱歉", "对不起"),
    re.compile(
        r"\A\s*(?:(?:i['\u2019]?m (?:very |so )?sorry|i am (?:very |so )?sorry|sorry|i apologi[sz]e)\W.{0,20}?"
        r"\bi (?:can(?:['\u2019]|no)|am (?:not able|unable))"
        r"|i (?:cannot|can['\u2019]t|am unable to|am not able to) (?:fulfil|assist|help|comply|provide|answer|do that)"
        r"|(?:很?抱歉|对不起).{0,8}(?:无法|不能))",
        re.DOTALL,
    ),
)


@register("refusal", "an answer that refuses, or says that it is one of 'an AI language model'")
def refusal(conversation: Conversation, rules: TextRules) -> bool:
    """Whether an answer refuses."""
    del rules
    lowered = [answer.lower() for answer in conversation.answers]
    return any(_REFUSAL.found(answer) or _SORRY.found(answer[:200]) for answer in lowered)


_URL = re.compile(r"(?:https?://|www\.)\S+")


@register("only links", "an answer with hardly a word beside its links")
def only_links(conversation: Conversation, rules: TextRules) -> bool:
    """Whether an answer is nothing but links."""
    del rules
    return any(
        ("http" in a or "www." in a) and _URL.search(a) is not None and _count_letters(_URL.sub("", a)) < 20
        for a in conversation.answers
    )


_MARKERS = ("<|im_start|>", "<|im_end|>", "<_user>", "<_bot>", "<_end>", "<|endoftext|>", "### Instruction:", "[/INST]")


@register("markers", "the markup of a chat template inside a turn")
def markers(conversation: Conversation, rules: TextRules) -> bool:
    """Whether a turn holds what templates write between turns, as a conversation that was split wrongly does."""
    del rules
    return any(marker in m.content for m in conversation.messages for marker in _MARKERS)


@register("echo", "an answer that repeats its question")
def echo(conversation: Conversation, rules: TextRules) -> bool:
    """Whether an answer is its question."""
    del rules
    pairs: Sequence[tuple[str, str]] = [
        (a.content, b.content) for a, b in itertools.pairwise(conversation.messages) if b.role == ASSISTANT
    ]
    return any(question.split() == answer.split() for question, answer in pairs)
