"""What the processes of a selection do with a batch of lines: hash them, hold them to the rules."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flm_jax.chat.conversation import SYSTEM, Conversation, parse_line
from flm_jax.data.json_lines import LineError
from flm_jax.duplicates import near, shingles
from flm_jax.selection import scores
from flm_jax.selection.config import TextRules
from flm_jax.selection.domains import domain_of
from flm_jax.selection.pool import Batch
from flm_jax.selection.rules import first_broken


class Hashed(NamedTuple):
    """The hashes of the conversations of a batch.

    Attributes:
      good: bool (lines,), which lines are conversations.
      faults: what the others are.
      texts: uint64 (conversations,), of the whole text.
      bands: uint64 (16, conversations), of the bands of signatures; (16, 0) if near duplicates are not looked for.
      short: uint8 (conversations, 128), short signatures.
    """

    good: np.ndarray
    faults: list[LineError]
    texts: np.ndarray
    bands: np.ndarray
    short: np.ndarray


def compared_text(conversation: Conversation) -> str:
    """The normalised text of a conversation, without system turns: many pools put one of a few before each of them."""
    return shingles.normalised("\n".join(m.content for m in conversation.messages if m.role != SYSTEM))


def hash_batch(batch: Batch, near_too: bool = True) -> Hashed:
    """The hashes of a batch.

    Args:
      batch: lines of the pool.
      near_too: whether near duplicates are looked for.
    """
    good = np.zeros(len(batch.lines), bool)
    faults, texts = [], []
    for number, line in enumerate(batch.lines):
        try:
            texts.append(compared_text(parse_line(line, batch.where(number))))
            good[number] = True
        except LineError as error:
            faults.append(error)
    hashes = np.array([shingles.text_hash(text) for text in texts], np.uint64)
    if near_too and texts:
        signature = near.signatures(shingles.shingles(shingles.tokens(texts)))
    else:
        signature = np.zeros((0, near.PERMUTATIONS), np.uint32)
    return Hashed(good, faults, hashes, near.band_hashes(signature), near.short(signature))


class Judged(NamedTuple):
    """What the rules say of the conversations of a batch.

    Attributes:
      broken: per conversation the first rule by which it falls out, or ''.
      domains: per conversation its domain.
      lengths: float32 (n,), bytes of the answers.
    """

    broken: list[str]
    domains: list[str]
    lengths: np.ndarray


def judge_batch(batch: Batch, rules: TextRules, field: str) -> Judged:
    """Holds a batch to the rules.

    Args:
      batch: lines that are conversations.
      rules: the rules' thresholds.
      field: the field that names the domain.
    """
    found: list[Conversation] = [parse_line(line, batch.where(i)) for i, line in enumerate(batch.lines)]
    return Judged(
        [first_broken(conversation, rules) for conversation in found],
        [domain_of(conversation, field) for conversation in found],
        scores.REGISTRY[scores.LENGTH].function(found, None),
    )
