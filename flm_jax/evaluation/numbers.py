"""The number that an answer ends with: separators, fractions, powers of ten, percent, LaTeX, full-width digits.

The notation is that of English and Chinese: a point before decimals; between groups of three digits commas, spaces or
apostrophes. A comma or space that separates no such groups separates numbers.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

# A model that repeats itself writes numbers that would take minutes to compute with; an answer is none of them.
MOST_DIGITS, MOST_EXPONENT = 100, 100
# Relative; only where one of two numbers is not whole, because 1/3 and 0.3333333 are the same answer.
ROUNDING = Fraction(1, 10**6)
_FACTORS = {
    "万亿": 10**12,
    "千万": 10**7,
    "百万": 10**6,
    "十万": 10**5,
    "万": 10**4,
    "亿": 10**8,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    # Not within a word or a version, and not an exponent. A sign after a number or a bracket is an operation.
    r"(?<![A-Za-z0-9_^])(?<!\d\.)(?:(?<![A-Za-z0-9_)\]}%])(?P<sign>[-+]))?[$€£¥]?(?<![A-Za-z0-9_^])"
    rf"(?:(?P<whole>\d+)\s{{1,2}}(?=\d+/))?(?P<number>{_PLAIN}(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?(?P<under>\d+(?:\.\d+)?)(?!\d))?"
    r"(?:\s?\^\s?\{?(?P<power>[-+]?\d+)\}?|[eE](?P<e>[-+]?\d+)(?![A-Za-z0-9])"
    r"|\s{0,2}(?:[\u00d7x*\u00b7]|\\times|\\cdot)\s{0,2}10\s?\^\s?\{?(?P<ten>[-+]?\d+)\}?)?"
    rf"\s{{0,2}}(?P<factor>{'|'.join(_FACTORS)})?\s{{0,2}}(?P<percent>\\?%|per\s?cent\b)?"
)
_FRACTION = re.compile(r"(\d?)\s?\\[dtc]?frac\s*(?:\{\s*([\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|(\d)\s*(\d))")
_BOX = re.compile(r"\\f?boxed\s*\{")
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True))


class Number(NamedTuple):
    """A number in a text.

    Attributes:
      value: exactly as written; 35 % has the value 35.
      percent: whether a percent sign follows.
      span: where it stands in the text that `_plain` makes of it.
    """

    value: Fraction
    percent: bool
    span: tuple[int, int]


def last_number(text: str) -> Number | None:
    r"""The last number in a text, or the last one in its last \boxed{}; None where there is none that can be read."""
    box = last_box(text)
    found = None
    for match in _NUMBER.finditer(_plain(text if box is None else box)):
        found = match
    return None if found is None else _value(found)


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{} that is closed, or None."""
    found, opened = None, []
    starts = {match.end() for match in _BOX.finditer(text)}
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in starts and (found is None or start > found[0]):
            found = (start, brace.start())
    return None if found is None else text[slice(*found)]


def same_number(answer: Number, reference: Number, tolerance: float | None = None) -> bool:
    """Whether an answer is the reference's number.

    35 %, 35 and 0.35 are the same where just one of the two has the sign: questions rarely say which they want.

    Args:
      answer: the answer's number.
      reference: the reference's.
      tolerance: how far apart they may be, absolutely; None: whole numbers must be equal, others up to ROUNDING.
    """
    pairs = [(answer.value, reference.value)]
    if answer.percent != reference.percent:
        parts = [n.value / 100 if n.percent else n.value for n in (answer, reference)]
        pairs.append((parts[0], parts[1]))
    return any(_close(a, b, tolerance) for a, b in pairs)


def _close(a: Fraction, b: Fraction, tolerance: float | None) -> bool:
    if tolerance is not None:
        return abs(a - b) <= Fraction(str(tolerance))
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= ROUNDING * abs(b)


def _value(match: re.Match[str]) -> Number | None:
    """The value of a match; None where it has too many digits, or no value."""
    written = (match["whole"], match["number"], match["under"])
    exponent = match["power"] or match["e"] or match["ten"]
    if any(len(part or "") > MOST_DIGITS for part in (*written, exponent)):
        return None
    shift = int(exponent or 0)
    if abs(shift) > MOST_EXPONENT:
        return None
    value = Fraction(match["number"].replace(",", ""))
    if match["power"]:
        if value == 0 and shift < 0:
            return None
        value = value**shift
    else:
        value *= Fraction(10) ** shift
    if match["under"]:
        if not Fraction(match["under"]):
            return None
        value /= Fraction(match["under"])
    value = (value + int(match["whole"] or 0)) * _FACTORS.get(match["factor"], 1)
    return Number(-value if match["sign"] == "-" else value, match["percent"] is not None, match.span())


def _plain(text: str) -> str:
    """The text with everything that is written in several ways written in one."""
    text = re.sub("[\u00a0\u2009\u202f\u2007]|\\\\[,!;: ]", "\u00a0", text.replace("{,}", ","))
    text = re.sub(
        r"(?<![\d.,])(\d{1,3})((?:[ \u00a0'\u2019]\d{3})+)(?!\d)", lambda m: m[1] + re.sub(r"\D", "", m[2]), text
    )
    text = re.sub(r"(\d?)([¼-¾⅐-⅞])", _vulgar, text)
    digits = "".join(_SUPERSCRIPTS)
    text = re.sub(rf"(?<=\d)([{digits}]+)", lambda m: "^" + "".join(_SUPERSCRIPTS[c] for c in m[1]), text)
    text = unicodedata.normalize("NFKC", re.sub(f"[{digits}]", "", text))
    text = text.replace("\u2212", "-").replace("\u2044", "/").replace("\\left", "").replace("\\right", "")
    text = re.sub(r"百分之\s?([\d.,]*\d)", r"\1%", text)
    text = _FRACTION.sub(lambda m: f"{m[1] and m[1] + ' '}{m[2] or m[4]}/{m[3] or m[5]}", text)
    # Powers and indices of what is no number, such as cm^2 and log_{2}.
    text = re.sub(r"(?<=[A-Za-z)}\]])\s?\^\s?(?:\{[-+]?\d+\}|[-+]?\d+)", "", text)
    return re.sub(r"_\s?(?:\{\d+\}|\d+)", "", text)


def _vulgar(match: re.Match[str]) -> str:
    parts = unicodedata.normalize("NFKC", match[2]).replace("\u2044", "/")
    return f"{match[1]} {parts}" if match[1] else parts
