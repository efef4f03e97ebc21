"""Scores of conversations. Each is one function and one registry entry, so that others can be added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flm_jax.chat.conversation import Conversation
from flm_jax.records import meant

# From conversations, and the loaded base or None, to float32 (n,); NaN where there is no score.
Function = Callable[[Sequence[Conversation], Any], np.ndarray]


@dataclass(frozen=True)
class Scored:
    """A registry entry.

    Attributes:
      name: its name in `SampleScore.name`, and in the lines that are chosen.
      function: computes it.
      base: whether it needs a checkpoint.
      order: 'high' or 'low': which end is taken first.
      most: higher scores fall out; None: none does.
      source: where it is described.
    """

    name: str
    function: Function
    base: bool
    order: str
    most: float | None
    source: str

    @property
    def meaning(self) -> str:
        """What it is, in a few words: the first line of its function."""
        line = (self.function.__doc__ or self.source).strip().splitlines()[0].rstrip(".")
        return line[:1].lower() + line[1:]


REGISTRY: dict[str, Scored] = {}
LENGTH = "length"


def register(
    name: str, *, source: str, base: bool = True, order: str = "high", most: float | None = None
) -> Callable[[Function], Function]:
    """Adds the decorated function to the registry as a score."""

    def enter(function: Function) -> Function:
        REGISTRY[name] = Scored(name, function, base, order, most, source)
        return function

    return enter


def lookup(name: str, base: bool) -> Scored:
    """The score of this name.

    Args:
      name: its name.
      base: whether there is a checkpoint to score with.

    Raises:
      ValueError: there is no such score, or it needs a checkpoint.
    """
    if name not in REGISTRY:
        near = meant(name, REGISTRY) or "."
        raise ValueError(f"SampleScore.name = {name!r}: the scores are {', '.join(REGISTRY)}{near}")
    if REGISTRY[name].base and not base:
        without = ", ".join(scored.name for scored in REGISTRY.values() if not scored.base)
        raise ValueError(
            f"SampleScore.name = {name!r} needs a checkpoint: bind Selection.base = @ScoringBase() and "
            f"ScoringBase.checkpoint, or take one that needs none: {without}."
        )
    return REGISTRY[name]


@register(
    LENGTH, base=False, source="the longest answers, 2402.04833; in UTF-8 bytes, as a Chinese character says more"
)
def length(conversations: Sequence[Conversation], base: Any) -> np.ndarray:
    """Bytes of the answers."""
    del base
    return np.array([sum(len(a.encode()) for a in c.answers) for c in conversations], np.float32)


@register("ifd", most=1.0, source="instruction-following difficulty, 2308.12032: above 1 the prompt does not help")
def ifd(conversations: Sequence[Conversation], base: Any) -> np.ndarray:
    """Loss of the answers after their prompts, divided by their loss alone."""
    losses = base.losses(conversations)
    return (losses.after_prompt / losses.alone).astype(np.float32)


@register(
    "perplexity", order="low", source="exp of the loss of the answers after their prompts; compared in 2402.00530"
)
def perplexity(conversations: Sequence[Conversation], base: Any) -> np.ndarray:
    """Perplexity per token of the answers after their prompts."""
    return np.exp(base.losses(conversations, alone=False).after_prompt).astype(np.float32)
