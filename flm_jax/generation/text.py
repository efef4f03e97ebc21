"""Tokens to text while they are made: whole characters only, spaces kept, and stop strings cut off before they show."""

from __future__ import annotations

from collections.abc import Sequence

from flm_jax.data.vocabulary import REPLACEMENT, Vocabulary

# Tokens that are decoded again with every new one, so that what a token's text is after others comes out right.
CONTEXT = 8
# A character has at most four bytes, each perhaps a token: after so many tokens it will not become whole any more.
MOST_OF_A_CHARACTER = 4


class TextStream:
    """The text of tokens that arrive one after the other.

    The tokens before, those of the prompt included, are the context: a tokenizer may drop a space at the beginning of
    what it decodes, so a text is what a decoded sequence adds to its beginning.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = ()) -> None:
        """Begins after the tokens `before`, whose text is known already."""
        self._vocabulary = vocabulary
        self._ids = list(before[-CONTEXT:])
        self._shown = vocabulary.decode(self._ids).rstrip(REPLACEMENT)
        self._waiting = 0

    def push(self, token: int) -> str:
        """The text that this token completes. A model may have more ids than its vocabulary: they have no text."""
        if token >= self._vocabulary.size:
            return ""
        self._ids.append(token)
        self._waiting += 1
        text = self._vocabulary.decode(self._ids)
        ready = text if self._waiting >= MOST_OF_A_CHARACTER else text.rstrip(REPLACEMENT)
        new = ready[len(self._shown) :]
        self._shown += new
        if ready == text:
            self._waiting = 0
        elif new:
            self._waiting = 1
        if new and ready == text and len(self._ids) > 4 * CONTEXT:
            self._ids = self._ids[-CONTEXT:]
            self._shown = self._vocabulary.decode(self._ids)
        return new

    def end(self) -> str:
        """The text that is left, whole characters or not."""
        new = self._vocabulary.decode(self._ids)[len(self._shown) :]
        self._shown += new
        return new


class StopStrings:
    """A text up to the first of some strings. What may be the beginning of one is held back until it is known."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Looks for `stops`; none of them may be empty."""
        if not all(stops):
            raise ValueError("A stop string is empty: it would end every answer at once.")
        self._stops, self._held = tuple(stops), ""
        self.found = False

    def push(self, text: str, last: bool = False) -> str:
        """What can be shown after this text; with `last`, all that is left. `found` says whether a string was met."""
        if self.found:
            return ""
        held = self._held + text
        starts = [start for stop in self._stops if (start := held.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return held[: min(starts)]
        back = 0 if last else max((self._overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - back :]
        return held[: len(held) - back]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The length of the longest end of `text` that `stop` begins with."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
