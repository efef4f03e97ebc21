"""Which documents of a corpus are dropped because an earlier one is the same, or nearly so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from flm_jax.duplicates import near
from flm_jax.records import as_dict, recorded
from flm_jax.records.fields import PositiveFraction

STAYS, EXACT, NEAR = range(3)
# Part of the digest of a corpus without duplicates: increase it when other documents are dropped.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
@recorded
class Dedup:
    """Leaves out documents that repeat an earlier one of the same corpus; of each group the first stays.

    Attributes:
      exact: whether a document falls out whose text is that of an earlier one, byte for byte.
      near: the share of common shingles (five words in a row) from which a document falls out as nearly the same as an
        earlier one that stays; case, width and spaces make no difference, and only the first 100,000 characters count.
        Shares are estimated by MinHash, which finds 61 % of the pairs at 0.7, and 95 % at 0.8. None: none falls out.
    """

    exact: bool = True
    near: PositiveFraction | None = None

    def __post_init__(self) -> None:
        if not self.exact and self.near is None:
            raise ValueError(
                "Dedup drops nothing with exact = False and near = None: set one of them, or leave DataConfig.dedup "
                "out."
            )

    def identity(self) -> list[Any]:
        """JSON-able: what determines which documents are dropped."""
        return [FORMAT, as_dict(self)]


def decide(
    config: Dedup, texts: np.ndarray, bands: Callable[[int], np.ndarray], short: Callable[[], np.ndarray]
) -> np.ndarray:
    """uint8 (documents,): STAYS, or EXACT or NEAR for a document that is dropped; depends on the order alone.

    It takes about 40 bytes of memory per document.

    Args:
      config: what counts as a duplicate.
      texts: uint64 (documents,), hashes of the whole texts in the order of the corpus; of 64 bits, by which one of 100
        million different texts is taken for another one with a probability of 1 in 4,000.
      bands: the hashes of a band of all signatures, uint64 (documents,).
      short: the short signatures, uint8 (documents, 128), perhaps a map of a file.
    """
    kinds = np.zeros(len(texts), np.uint8)
    if config.exact:
        kinds[near.first_of_equal(texts) != np.arange(len(texts))] = EXACT
    if config.near is None:
        return kinds
    packed = np.zeros(0, np.uint64)  # bands find most pairs more than once
    for pairs in near.near_pairs(np.flatnonzero(kinds == STAYS), bands, near.comparison(short, config.near)):
        words = pairs.astype(np.uint64)
        packed = np.union1d(packed, (words[:, 0] << np.uint64(32)) | words[:, 1])
    found = np.stack([packed >> np.uint64(32), packed & np.uint64(0xFFFFFFFF)], axis=1).astype(np.int64)
    kinds[near.drop(found, len(kinds)) != np.arange(len(kinds))] = NEAR
    return kinds
