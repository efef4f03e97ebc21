"""Features of conversations, in which similar ones have a large cosine: hidden states of a base, or hashed words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flm_jax.chat.conversation import Conversation
from flm_jax.duplicates import shingles
from flm_jax.selection.base import Base
from flm_jax.selection.config import Diversity
from flm_jax.selection.judge import Left
from flm_jax.selection.pool import Reader
from flm_jax.selection.steps import Step
from flm_jax.selection.work import compared_text


class Features:
    """Unit vectors of conversations, computed where they are asked for and kept in a step's shards.

    The mean of a sample is subtracted first: mean hidden states of any two texts have most of their direction in common
    (the cosine of unrelated texts is often above 0.9), and what tells them apart is the rest.

    Attributes:
      kind: 'hidden' or 'hashed'.
      sample: numbers of the conversations of the sample, evenly spaced.
    """

    def __init__(self, config: Diversity, step: Step, reader: Reader, left: Left, model: Base | None) -> None:
        """Computes the sample.

        Args:
          config: the configuration.
          step: where features are kept.
          reader: of the lines.
          left: the conversations.
          model: the checkpoint, if there is one.

        Raises:
          ValueError: hidden states are wanted, and there is no checkpoint.
        """
        self.kind = kind_of(config, model is not None)
        self._step, self._reader, self._left, self._model, self._width = step, reader, left, model, config.width
        count = min(config.sample, len(left.numbers))
        self.sample = np.linspace(0, len(left.numbers) - 1, count).round().astype(np.int64)
        raw = step.shard("sample", lambda: self._raw(self.sample)).astype(np.float32)
        readable = ~np.isnan(raw[:, 0])
        self._mean = raw[readable].mean(axis=0) if readable.any() else np.zeros(raw.shape[1], np.float32)
        self.of_sample = self._unit(raw)

    def block(self, number: int, conversations: np.ndarray) -> np.ndarray:
        """float32 (n, D): unit vectors of the conversations of a block of the choice; see `of`."""
        return self.of(conversations, f"block{number:06}")

    def of(self, conversations: np.ndarray, name: str) -> np.ndarray:
        """float32 (n, D): unit vectors; NaN where a conversation cannot be read.

        Args:
          conversations: their numbers.
          name: under which the features of exactly these are kept.
        """
        # Rounded to what is kept, so that a start that reads them goes on as the one that computed them.
        found = self._step.shard(name, lambda: self._unit(self._raw(conversations)).astype(np.float16))
        return found.astype(np.float32)

    def _raw(self, numbers: np.ndarray) -> np.ndarray:
        conversations = self._reader.conversations(self._left.places[numbers])
        if self.kind == "hidden":
            assert self._model is not None
            return self._model.hidden(conversations)
        return hashed(conversations, self._width)

    def _unit(self, raw: np.ndarray) -> np.ndarray:
        centred = raw - self._mean[None]
        norms = np.linalg.norm(centred, axis=1, keepdims=True)
        unit: np.ndarray = centred / np.where(norms > 0, norms, 1)
        return unit


def kind_of(config: Diversity, base: bool) -> str:
    """Which features are computed: 'hidden', 'hashed' or 'none'.

    Raises:
      ValueError: hidden states are wanted, and there is no checkpoint.
    """
    if config.features == "hidden" and not base:
        raise ValueError(
            "Diversity.features = 'hidden' needs a checkpoint: bind Selection.base = @ScoringBase() and "
            "ScoringBase.checkpoint, or take 'hashed'."
        )
    if config.features == "auto":
        return "hidden" if base else "hashed"
    return config.features


def hashed(conversations: Sequence[Conversation], width: int) -> np.ndarray:
    """float32 (n, width): counts of words and pairs of words without system turns."""
    return shingles.word_counts(shingles.tokens([compared_text(c) for c in conversations]), width)
