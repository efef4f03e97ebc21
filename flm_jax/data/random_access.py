"""A token store as a sequence of windows, for other input pipelines than that of flm_jax, such as grain's."""

from __future__ import annotations

import dataclasses
import operator
from typing import SupportsIndex

import numpy as np

from flm_jax.data.batches import read_batch
from flm_jax.data.store import TokenStore


@dataclasses.dataclass(frozen=True, repr=False)
class StoreWindows:
    """The windows of a split in order, by number: a `RandomAccessDataSource` of grain, which need not be installed.

    It can be pickled: another process opens the store by its path, and refuses another store that lies there.

    Attributes:
      store: an open store.
      split: 'train' or 'heldout'.
      context: tokens per window, T.
    """

    store: TokenStore
    split: str
    context: int

    def __post_init__(self) -> None:
        """Raises ValueError if the split has no window of this context."""
        len(self)

    def __repr__(self) -> str:
        # grain keeps it with a position, and refuses to continue there with a source that has another.
        return f"StoreWindows({self.store.digest}, split={self.split!r}, context={self.context})"

    def __len__(self) -> int:
        """The number of windows."""
        return self.store.num_windows(self.split, self.context)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """A window.

        Returns:
          The fields of a `Batch` of one row, each (T,): 'inputs' and 'targets' int32, 'weights' float32, and
          'segments' int32, how many documents have ended before each input.

        Raises:
          IndexError: an index outside [0, len).
          ValueError: the store is damaged there; the message names file and bytes.
        """
        windows = np.array([operator.index(index)], np.int64)
        batch = read_batch(self.store, self.split, windows, self.context)
        return {
            "inputs": batch.inputs_BT[0],
            "targets": batch.targets_BT[0],
            "weights": batch.weights_BT[0],
            "segments": batch.segments_BT[0],
        }
