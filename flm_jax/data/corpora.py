"""Corpora: where documents come from, as frozen dataclasses that gin can build.

A text corpus has three methods: `documents(split)` yields texts in one fixed order, `digest()` identifies names,
contents and split, and `describe()` returns a JSON-able description. Corpora of files are in `text.py`, those of TFDS
in `tfds.py`; this module adds seqio tasks and collects the names of all.

Importing this module is cheap: TensorFlow is loaded only when a `Tfds` or `SeqioTask` is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from flm_jax.data.hub_dataset import HubDataset
from flm_jax.data.rows import Jsonl, RowCorpus
from flm_jax.data.tables import Parquet, Records
from flm_jax.data.text import SPLITS, FileCorpus, SitePackages, StandardLibrary, TextFolder, describe_fields
from flm_jax.data.tfds import Tfds
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.records import recorded

__all__ = [
    "SPLITS",
    "Corpus",
    "Document",
    "FileCorpus",
    "HubDataset",
    "Jsonl",
    "Parquet",
    "Records",
    "RowCorpus",
    "SeqioTask",
    "SitePackages",
    "StandardLibrary",
    "TextCorpus",
    "TextFolder",
    "Tfds",
    "TokenCorpus",
    "TokenisedCorpus",
]


@runtime_checkable
class Corpus(Protocol):
    """What every corpus can report about itself without being read by TensorFlow."""

    def digest(self) -> str:
        """A sha256 (hex) that changes whenever the documents or their split do."""
        ...

    def describe(self) -> dict[str, Any]:
        """A JSON-able description for people: kind and fields."""
        ...


class TextCorpus(Corpus, Protocol):
    """A corpus of texts, without a vocabulary of its own."""

    def documents(self, split: str) -> Iterator[str]:
        """The documents of one split, in a fixed order."""
        ...


class Document(NamedTuple):
    """A document as tokens.

    Attributes:
      tokens: int32 (n,).
      weights: uint8 (n,), 1 for tokens that are trained on.
      text_bytes: UTF-8 bytes of the text that is trained on.
    """

    tokens: np.ndarray
    weights: np.ndarray
    text_bytes: int


@runtime_checkable
class TokenCorpus(Corpus, Protocol):
    """A corpus that writes its own tokens, for windows of a given length."""

    def documents(self, split: str) -> Iterator[str]:
        """The text of one split, to train a vocabulary on."""
        ...

    def tokenised(self, vocabulary: Vocabulary, context: int) -> TokenisedCorpus:
        """The corpus with a vocabulary, for windows of `context` tokens."""
        ...


class TokenisedCorpus(Protocol):
    """A `TokenCorpus` with a vocabulary and a length of windows; one pass over it gives the documents of all splits."""

    def describe(self) -> dict[str, Any]:
        """What else than the corpus and the vocabulary its tokens follow from, JSON-able."""
        ...

    def documents(self) -> Iterator[tuple[str, Document]]:
        """Split and tokens of each document, those of a split in a fixed order; together they fill whole windows."""
        ...

    def left_out(self) -> dict[str, Any]:
        """After reading: what was left out, as `left_out.LeftOut.record`."""
        ...

    def notes(self) -> list[str]:
        """After reading: sentences about what was left out."""
        ...


@dataclasses.dataclass(frozen=True)
@recorded
class SeqioTask:
    """A seqio task or mixture that `module` registers when imported; it has its own vocabulary."""

    name: str
    module: str | None = None
    train_split: str = "train"
    heldout_split: str = "validation"
    feature: str = "targets"

    def digest(self) -> str:
        """The sha256 over the fields and the source of `module`.

        What the task reads cannot be known without running it: if its data changes, change `module` or clear the cache.
        """
        try:
            spec = importlib.util.find_spec(self.module) if self.module else None
        except ModuleNotFoundError as error:
            raise ValueError(f"SeqioTask: the module {self.module!r} cannot be imported: {error}") from None
        source = Path(spec.origin).read_bytes() if spec and spec.origin and Path(spec.origin).is_file() else b""
        fields = [*dataclasses.asdict(self).items(), hashlib.sha256(source).hexdigest()]
        return hashlib.sha256(json.dumps(["SeqioTask", fields]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The kind and fields of the corpus."""
        return describe_fields(self)
