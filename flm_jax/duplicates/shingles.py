"""Texts to hashes of their tokens and shingles, a whole batch at a time in NumPy.

A token is a run of letters and digits, a single character of a script that is written without spaces (Han, kana), or a
single other character that is not a space. So `1 + 1` and `1 - 1` differ, and Chinese has shingles too. A shingle is
five tokens in a row; a text of fewer tokens is one shingle.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHINGLE = 5
# Characters of a text that are looked at: its beginning tells long texts apart, and memory stays bounded.
LONGEST = 100_000
_SPACE, _WORD, _SINGLE = 0, 1, 2
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse mod 2**64
_PLANE = 1 << 16
_RUNS_TOGETHER = ((0x2E80, 0x3100), (0x31C0, 0xA000), (0xF900, 0xFB00))


class Tokens(NamedTuple):
    """The tokens of some texts.

    Attributes:
      hashes: uint64 (n,), of the tokens of all texts in order.
      starts: int64 (texts + 1,), where the tokens of each text begin, and n.
    """

    hashes: np.ndarray
    starts: np.ndarray


def normalised(text: str) -> str:
    """A text in which case, width and spaces make no difference."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def text_hash(text: str) -> int:
    """A hash of 64 bits; two of ten million different texts share one with a probability of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@functools.cache
def _classes() -> np.ndarray:
    """What each character of the first plane is: a space, part of a word, or a token by itself."""
    found = np.full(_PLANE, _SINGLE, np.uint8)
    for code in range(_PLANE):
        character = chr(code)
        if character.isspace():
            found[code] = _SPACE
        elif character.isalnum() or unicodedata.category(character) in ("Mn", "Mc"):
            found[code] = _WORD
    for first, end in _RUNS_TOGETHER:
        found[first:end][found[first:end] == _WORD] = _SINGLE
    return found


@functools.lru_cache(2)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """uint64 (size,) each: the powers of the base, and of its inverse, mod 2**64."""
    found = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        steps = np.full(size, base, np.uint64)
        steps[0] = 1
        found.append(np.multiply.accumulate(steps))
    return found[0], found[1]


def mixed(x: np.ndarray) -> np.ndarray:
    """Hashes, uint64 of the same shape, in which every bit depends on all bits of an entry (splitmix64's last step)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def tokens(texts: Sequence[str]) -> Tokens:
    """The hashes of the tokens of each text.

    A token's hash is a polynomial of its characters, which for all tokens at once is a difference of running sums.
    """
    texts = [text[:LONGEST] for text in texts]
    # A space before each text ends the token before it, and one at the end the last.
    joined = "".join(f" {text}" for text in texts) + " "
    codes = np.frombuffer(joined.encode("utf-32-le", "replace"), np.uint32)
    kinds = np.where(codes < _PLANE, _classes()[codes & np.uint32(_PLANE - 1)], np.uint8(_SINGLE))
    begins = (kinds != _SPACE) & ((kinds == _SINGLE) | (np.concatenate([[np.uint8(0)], kinds[:-1]]) != _WORD))
    first = np.flatnonzero(begins)
    # A word ends before the first character that is no part of one.
    breaks = np.flatnonzero(kinds != _WORD)
    after = breaks[np.searchsorted(breaks, first)]
    end = np.where(kinds[first] == _SINGLE, first + 1, after)
    powers, inverses = _powers(1 << len(codes).bit_length())  # few sizes, so that they are computed once
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(codes.astype(np.uint64) * powers[: len(codes)], out=sums[1:])
    hashes = mixed((sums[end] - sums[first]) * inverses[first])
    places = np.cumsum([0, *(len(text) + 1 for text in texts)])
    return Tokens(hashes, np.searchsorted(first, places))


def shingles(found: Tokens) -> Tokens:
    """The hashes of the shingles of each text, in the form of tokens; every text has at least one."""
    counts = np.diff(found.starts)
    padded = np.maximum(counts, SHINGLE)
    starts = np.concatenate([[0], np.cumsum(padded)])
    text = np.repeat(np.arange(len(counts)), counts)
    hashes = np.zeros(int(starts[-1]) + SHINGLE - 1, np.uint64)
    hashes[np.arange(len(found.hashes)) - found.starts[text] + starts[text]] = found.hashes
    whole = hashes[: starts[-1]].copy()
    for ahead in range(1, SHINGLE):
        whole = whole * np.uint64(_BASE) + hashes[ahead : ahead + len(whole)]
    # The last four places of a text would reach into the next one.
    number = np.repeat(np.arange(len(counts)), padded)
    inside = np.arange(starts[-1]) - starts[number] <= padded[number] - SHINGLE
    return Tokens(mixed(whole[inside]), np.concatenate([[0], np.cumsum(padded - SHINGLE + 1)]))


def word_counts(found: Tokens, width: int) -> np.ndarray:
    """float32 (texts, width): counts of tokens and pairs of tokens, hashed into `width` places with a sign each."""
    text = np.repeat(np.arange(len(found.starts) - 1), np.diff(found.starts))
    pairs = mixed(found.hashes[:-1] * np.uint64(_BASE) + found.hashes[1:])[text[:-1] == text[1:]]
    rows = np.concatenate([text, text[:-1][text[:-1] == text[1:]]])
    hashes = np.concatenate([found.hashes, pairs])
    signs = 1 - 2 * (hashes >> np.uint64(63)).astype(np.float32)
    places = rows * width + (hashes % np.uint64(width)).astype(np.int64)
    texts = len(found.starts) - 1
    # The root keeps a few frequent words from deciding alone.
    counted = np.bincount(places, signs, texts * width).astype(np.float32).reshape(texts, width)
    return np.sign(counted) * np.sqrt(np.abs(counted))
