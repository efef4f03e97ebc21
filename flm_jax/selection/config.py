"""What gin can set of a selection: how many conversations, and how each step chooses among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from flm_jax.records import recorded
from flm_jax.records.fields import Count, Fraction, NonNegative, Size, one_of
from flm_jax.sharding import MeshConfig

ORDERS = ("", "high", "low")
FEATURES = ("auto", "hidden", "hashed", "none")


@dataclass(frozen=True)
@recorded
class Duplicates:
    """Which conversations count as duplicates; of each group the first of the pool stays.

    Attributes:
      near: whether near duplicates fall out too; exact ones, equal up to case, spaces and system turns, always do.
      threshold: the share of common shingles, estimated by MinHash, from which two conversations are near duplicates.
        Pairs to compare are found by 16 bands of 8 rows, which find 61 % of the pairs at 0.7, and 95 % at 0.8.
    """

    near: bool = True
    threshold: Fraction = 0.7


@dataclass(frozen=True)
@recorded
class TextRules:
    """The thresholds of the rules, in characters where nothing else is said, and which rules are off.

    Attributes:
      off: names of rules that are not applied.
      least_question: a user's turn must be this long.
      most_question: no user's turn may be longer.
      least_answer: the answers together must be this long.
      most_answer: no answer may be longer.
      most_turns: the most turns of user and assistant together.
      scripts: the scripts whose letters count as known: latin, greek, cyrillic, han, kana, hangul, arabic, hebrew,
        devanagari, thai. The language within a script is not looked at.
      least_known: the share of letters that must be of these scripts.
      least_letters: the share of letters and digits among the characters of the answers that are not spaces.
      least_compressed: a stretch of at most 1,000 bytes of an answer that is compressed to 30 bytes and less than this
        share of its size is a loop.
    """

    off: tuple[str, ...] = ()
    least_question: Count = 3
    most_question: Size = 20_000
    least_answer: Count = 20
    most_answer: Size = 20_000
    most_turns: Size = 40
    scripts: tuple[str, ...] = ("latin", "greek", "han")
    least_known: Fraction = 0.9
    least_letters: Fraction = 0.3
    least_compressed: Fraction = 0.1


@dataclass(frozen=True)
@recorded
class ScoringBase:
    """The checkpoint that scores conversations and whose hidden states say how similar they are.

    Attributes:
      checkpoint: a step, a stage's directory or a work directory.
      tokenizer: another vocabulary than the checkpoint's own, as in `Pretrained.path`; '': its own.
      template: the chat template: tele_flm, telechat, chatml, tokenizer (the vocabulary's own) or a jinja2 file.
      max_length: the longest sequence that the model reads, in tokens, where conversations are cut; None: what the
        model was made for, at most 4096.
      rows: rows per batch, on all devices together.
      dtype: what the model computes in; '': the dtype of the checkpoint's parameters.
      mesh: how devices are laid out.
    """

    checkpoint: str = dataclasses.field(metadata={"identity": False})
    tokenizer: str = dataclasses.field(default="", metadata={"identity": False})
    template: str = "tele_flm"
    max_length: Size | None = None
    rows: Size = 8
    dtype: Annotated[str, one_of(("", "float32", "bfloat16", "float16"))] = ""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig, metadata={"identity": False})


@dataclass(frozen=True)
@recorded
class SampleScore:
    """By what conversations are ordered, and which scores fall out.

    Attributes:
      name: of a registered score: length (of the answers, in bytes), ifd, perplexity; the last two need a base.
      order: 'high' or 'low': which end is taken first; '': as the score is registered.
      least: lower scores fall out; None: none.
      most: higher scores fall out; None: as the score is registered, which for ifd is 1.
    """

    name: str = "length"
    order: Annotated[str, one_of(ORDERS)] = ""
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
@recorded
class Diversity:
    """How similar two chosen conversations may be.

    Attributes:
      threshold: the cosine of their features from which the one with the lower score falls out.
      features: 'hidden' (mean of the base's hidden states over the conversation), 'hashed' (counts of words and pairs
        of words), 'none', or 'auto': hidden with a base, hashed without.
      width: number of hashed features.
      sample: how many conversations of what is left, evenly spaced, give the mean that features are taken relative
        to, and the background of the picture.
    """

    threshold: NonNegative = 0.9
    features: Annotated[str, one_of(FEATURES)] = "auto"
    width: Size = 512
    sample: Size = 2000


@dataclass(frozen=True)
@recorded
class Domains:
    """How many conversations come from each domain.

    Attributes:
      field: the field of a line that names its domain; lines without it, and all with '', are assigned by keywords:
        multi-turn, code, maths, chat, in this order.
      fractions: of the chosen conversations, per domain; all other domains share what is missing from 1.
        Without any, domains are not looked at.
      fill: whether other domains fill the places of one that has too few; False: fewer are chosen.
    """

    field: str = "domain"
    fractions: Mapping[str, Fraction] = dataclasses.field(default_factory=dict)
    fill: bool = True

    def __post_init__(self) -> None:
        total = sum(self.fractions.values())
        if total > 1 + 1e-9:
            parts = ", ".join(f"{name} {value:g}" for name, value in self.fractions.items())
            raise ValueError(
                f"Domains.fractions add up to {total:.4g}, more than 1: {parts}; lower them by "
                f"{total - 1:.4g} together."
            )


@dataclass(frozen=True)
@recorded
class Selection:
    """A selection of conversations from a pool: everything that determines what is chosen.

    Attributes:
      count: how many are chosen, if so many are left.
      duplicates: which count as duplicates.
      rules: which fall out by what their text looks like.
      score: by what the rest is ordered.
      precut: how many conversations are scored at most, those with the longest answers of each domain; None: all.
      domains: how many come from each domain.
      diversity: how similar two of them may be.
      base: the checkpoint for scores and features; None: only length and hashed features are possible.
      most_faulty: the most lines that may be left out because they are no conversations; None: any number.
      processes: how many processes read the pool; 0: one per core. The result does not depend on it.
    """

    count: Size = 30_735
    duplicates: Duplicates = dataclasses.field(default_factory=Duplicates)
    rules: TextRules = dataclasses.field(default_factory=TextRules)
    score: SampleScore = dataclasses.field(default_factory=SampleScore)
    precut: Size | None = None
    domains: Domains = dataclasses.field(default_factory=Domains)
    diversity: Diversity = dataclasses.field(default_factory=Diversity)
    base: ScoringBase | None = None
    most_faulty: Count | None = dataclasses.field(default=1000, metadata={"identity": False})
    processes: Count = dataclasses.field(default=0, metadata={"identity": False})
