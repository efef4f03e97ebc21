"""Domains: which one a conversation belongs to, and how many places each of them has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flm_jax.chat.conversation import Conversation
from flm_jax.records import meant
from flm_jax.selection.config import Domains
from flm_jax.selection.keywords import Keywords

# More domains than this are no domains: the field holds something else.
MOST = 1000
_LANGUAGES = ("python", "javascript", "typescript", "java", "c++", "c#", "golang", "rust", "sql", "html", "css", "bash")
_TERMS = ("regex", "algorithm", "compiler", "unit test", "stack trace")
_CODE = Keywords(
    (*_LANGUAGES, *_TERMS, "```", "def ", "#include", "function ", "代码", "编程", "函数"),
    re.compile(
        rf"```|(?<!\w)(?:{'|'.join(map(re.escape, (*_LANGUAGES, *_TERMS)))})s?(?!\w)"
        r"|\bdef \w+\(|#include\s*<|\bfunction \w+\(|代码|编程|函数(?:名|调用)"
    ),
)
_LATEX = ("\\frac", "\\sqrt", "\\sum", "\\int", "\\boxed", "\\begin{")
# These count only before a number in the same sentence.
_TASKS = ("solve", "calculate", "compute", "evaluate", "simplify", "how many", "how much", "计算", "多少")
_NOUNS = ("integral", "derivative", "equation", "polynomial", "probability", "theorem", "triangle", "perimeter", "方程")
_MATHS = Keywords(
    (*_LATEX, *_TASKS, *_NOUNS, "$", "=", "求解", "求值", "求证"),
    re.compile(
        rf"{'|'.join(map(re.escape, _LATEX))}|\$[^$\n]{{1,80}}[=^\\][^$\n]{{0,80}}\$"
        rf"|(?:{'|'.join((*_TASKS, *_NOUNS))})(?=[^?.!\uff1f\u3002]{{0,200}}\d)"
        r"|\d\s*[-+*/\u00d7\u00f7^]\s*\d+\s*=|方程|求(?:解|值|证)"
    ),
)
MULTI_TURN, CODE, MATHS, CHAT = "multi-turn", "code", "maths", "chat"
_LONGEST = 4000


def _matches(keywords: Keywords) -> Callable[[Conversation], bool]:
    def found(conversation: Conversation) -> bool:
        return any(keywords.found(m.content[:_LONGEST].lower()) for m in conversation.messages)

    return found


# In this order: a dialogue about code is a dialogue, and code that calculates is code.
KEYWORDS: dict[str, Callable[[Conversation], bool]] = {
    MULTI_TURN: lambda conversation: len(conversation.answers) > 1,
    CODE: _matches(_CODE),
    MATHS: _matches(_MATHS),
    CHAT: lambda _: True,
}


def domain_of(conversation: Conversation, field: str) -> str:
    """The domain of a conversation: what its line says in this field, otherwise the first whose keywords it has."""
    named = conversation.fields.get(field) if field else None
    if isinstance(named, str) and named.strip():
        return named.strip()
    return next(name for name, holds in KEYWORDS.items() if holds(conversation))


def check_domains(domains: Domains, found: Sequence[str]) -> None:
    """Checks that the domains with a fraction exist.

    Args:
      domains: the configuration.
      found: the names of the pool's domains.

    Raises:
      ValueError: one does not exist.
    """
    known = sorted({*found, *KEYWORDS})
    for name in domains.fractions:
        if name not in known:
            near = meant(name, known) or "."
            raise ValueError(
                f"Domains.fractions names {name!r}, and no conversation is of this domain; known are "
                f"{', '.join(known)}{near}"
            )


def places(fractions: Mapping[str, float], names: Sequence[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The group of each domain, int64 (names,), and how many places each group has, int64 (groups,).

    Each domain with a fraction is a group; the others are the last group, which has the places that are left. What
    rounding leaves goes to the largest remainders, in the order of the fractions.

    Args:
      fractions: per domain.
      names: of all domains.
      count: of all places.
    """
    exact = [fraction * count for fraction in fractions.values()]
    room = [int(value + 1e-9) for value in exact]
    left = round(sum(exact)) - sum(room)
    for number in sorted(range(len(exact)), key=lambda number: room[number] - exact[number])[:left]:
        room[number] += 1
    groups = {name: number for number, name in enumerate(fractions)}
    return (
        np.array([groups.get(name, len(groups)) for name in names], np.int64),
        np.array([*room, count - sum(room)], np.int64),
    )
