"""Choosing instruction data: from a large pool of conversations to a small one, step by step."""

from flm_jax.selection.config import (
    Diversity,
    Domains,
    Duplicates,
    SampleScore,
    ScoringBase,
    Selection,
    TextRules,
)
from flm_jax.selection.select import select

__all__ = ["Diversity", "Domains", "Duplicates", "SampleScore", "ScoringBase", "Selection", "TextRules", "select"]
