"""Looking after the checkpoints of a work directory: list, describe, compare, prune and copy them."""

from flm_jax.checkpoint_care.copying import copy_checkpoint
from flm_jax.checkpoint_care.description import Description, describe
from flm_jax.checkpoint_care.differences import ArrayDifference, Difference, difference
from flm_jax.checkpoint_care.listing import Entry, Listing, list_checkpoints
from flm_jax.checkpoint_care.pruning import Fate, Pruning, prune

__all__ = [
    "ArrayDifference",
    "Description",
    "Difference",
    "Entry",
    "Fate",
    "Listing",
    "Pruning",
    "copy_checkpoint",
    "describe",
    "difference",
    "list_checkpoints",
    "prune",
]
