"""Recipes: what is computed and how it is run (`settings`), and the stages that follow from it (`resolved`)."""

from flm_jax.recipe.resolved import ResolvedStage, begin, check_vocabulary, resolve
from flm_jax.recipe.settings import Recipe, Run, Stage

__all__ = ["Recipe", "ResolvedStage", "Run", "Stage", "begin", "check_vocabulary", "resolve"]
