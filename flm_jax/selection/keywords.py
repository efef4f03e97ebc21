"""Patterns of keywords, searched only where one of some fixed texts occurs: most conversations have none."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Keywords:
    """A pattern that needs one of some texts; in lower case, as is what it is searched in.

    Attributes:
      texts: every match contains one of them.
      pattern: what is searched for.
    """

    texts: tuple[str, ...]
    pattern: re.Pattern[str]

    def __post_init__(self) -> None:
        if any(text != text.lower() for text in self.texts):
            raise ValueError(f"keywords are in lower case: {self.texts}")

    def found(self, lowered: str) -> bool:
        """Whether the pattern matches somewhere in a text in lower case."""
        # A pattern of many words takes 50 times as long as looking for a word.
        return any(text in lowered for text in self.texts) and self.pattern.search(lowered) is not None
