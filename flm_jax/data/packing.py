"""How the documents of a window are kept apart, or not: what a batch says about them."""

from __future__ import annotations

import numpy as np

from flm_jax.data.batches import Batch, TokenBatches


def laid_out(batch: Batch, packing: str) -> Batch:
    """A batch of windows, as `DataConfig.packing` asks for it."""
    if packing == "joined":
        return batch._replace(segments_BT=None)
    return batch._replace(positions_BT=positions(batch.segments_BT)) if packing == "restarted" else batch


def positions(segments_BT: np.ndarray) -> np.ndarray:
    """The position of each token in its document, int32 (B, T); at the start of a window it is 0, as of a document."""
    time_T = np.arange(segments_BT.shape[1], dtype=np.int32)
    goes_on_BT = segments_BT[:, 1:] == segments_BT[:, :-1]
    begins_BT = np.pad(np.where(goes_on_BT, 0, time_T[None, 1:]), ((0, 0), (1, 0)))
    return (time_T - np.maximum.accumulate(begins_BT, axis=1)).astype(np.int32)


class PackedBatches:
    """A stream of batches, each laid out as `DataConfig.packing` asks for it."""

    def __init__(self, batches: TokenBatches, packing: str) -> None:
        """Wraps a stream; see `DataConfig` for `packing`."""
        self._batches, self._packing = batches, packing

    @property
    def position(self) -> int:
        """See TokenBatches."""
        return self._batches.position

    def rows_by_source(self, first: int, count: int) -> dict[str, int]:
        """See TokenBatches."""
        return self._batches.rows_by_source(first, count)

    def next(self, batch_size: int, rows: np.ndarray | None = None) -> Batch:
        """See TokenBatches."""
        return laid_out(self._batches.next(batch_size, rows), self._packing)

    def state(self) -> bytes:
        """See TokenBatches."""
        return self._batches.state()

    def mark(self) -> str:
        """See TokenBatches."""
        return self._batches.mark()

    def restore(self, state: bytes) -> None:
        """See TokenBatches."""
        self._batches.restore(state)
