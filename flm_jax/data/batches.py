"""Batches by position: which windows a batch holds is a pure function of seed and position.

The position is the number of windows consumed so far, by all processes together. Nothing else needs saving, the batch
size may change between calls, and any number of processes together see the batches that one would have seen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from flm_jax.data.permutation import permute
from flm_jax.data.store import TokenStore
from flm_jax.records import counted
from flm_jax.records.foreign_json import field, parse_json


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSources:
    """Which source of a mixture each row of a batch is a window of.

    Attributes:
      numbers_B: int32, the place of the source in the mixture.
      count: number of sources of the mixture; programs are compiled for it.
    """

    numbers_B: Any
    count: int = dataclasses.field(metadata={"static": True})


class Batch(NamedTuple):
    """Rows of T = context tokens and what follows each, as NumPy or JAX arrays (or their shapes).

    Attributes:
      inputs_BT: int32 token ids.
      targets_BT: int32, the token after each input.
      weights_BT: float32, 1 where the target counts, 0 in rows that only fill up a batch.
      segments_BT: int32, how many documents have ended before each input in its row; attention stays within equal
        numbers. None: it crosses the borders of documents.
      sources: of a mixture, the source of each row; None: the rows are windows of one corpus.
      positions_BT: int32, the position of each input in its document; None: positions run over the row.
    """

    inputs_BT: Any
    targets_BT: Any
    weights_BT: Any
    segments_BT: Any
    sources: RowSources | None = None
    positions_BT: Any = None


class StageNeed(NamedTuple):
    """What a stage reads: `steps` batches of `batch_size` windows, with weights of its own or those of the mixture.

    `since` are steps of the stage that are over.
    """

    name: str
    steps: int
    batch_size: int
    weights: Mapping[str, float] | None
    since: int = 0


class TokenBatches(Protocol):
    """The interface between data and training: an endless stream of batches that can save its position."""

    @property
    def position(self) -> int:
        """Windows that have been read, in all processes together."""
        ...

    def rows_by_source(self, first: int, count: int) -> dict[str, int]:
        """Of a mixture, how many of `count` windows from position `first` on are of each source, if any; else {}."""
        ...

    def next(self, batch_size: int, rows: np.ndarray | None = None) -> Batch:
        """The next global batch of `batch_size` windows, or only the given `rows` of it."""
        ...

    def state(self) -> bytes:
        """Everything needed to continue exactly here."""
        ...

    def mark(self) -> str:
        """A short summary of what has been read, equal for streams that have read the same global batches."""
        ...

    def restore(self, state: bytes) -> None:
        """Continues where `state()` was taken; raises ValueError if that was with other data, seed or context."""
        ...


def make_batch(windows: np.ndarray, eos_id: int, rows: int | None = None) -> Batch:
    """A batch from windows.

    Args:
      windows: int32 (n, context + 1).
      eos_id: the id that ends a document.
      rows: fill up to this number of rows with padding of weight 0.
    """
    real = len(windows)
    if rows is not None and rows > real:
        windows = np.concatenate([windows, np.zeros((rows - real, windows.shape[1]), np.int32)])
    inputs_BT, targets_BT = windows[:, :-1], windows[:, 1:]
    ends_BT = inputs_BT == eos_id
    weights_BT = np.ones(inputs_BT.shape, np.float32)
    weights_BT[real:] = 0
    segments_BT = (np.cumsum(ends_BT, axis=1) - ends_BT).astype(np.int32)  # an end belongs to its document
    return Batch(np.ascontiguousarray(inputs_BT), np.ascontiguousarray(targets_BT), weights_BT, segments_BT)


def read_batch(store: TokenStore, split: str, windows: np.ndarray, context: int, rows: int | None = None) -> Batch:
    """A batch of windows of a store, by number.

    In a weighted store the weights are those of the targets, and documents are told apart by the store's index: an end
    of document may also stand within a conversation.

    Args:
      store: an open store.
      split: name of the split.
      windows: int (n,), their numbers.
      context: tokens per row.
      rows: fill up to this number of rows with padding of weight 0.
    """
    batch = make_batch(store.windows(split, windows, context), store.eos_id, rows)
    if not store.weighted:
        return batch
    positions = np.asarray(windows, np.int64)[:, None] * context + np.arange(context)
    batch.weights_BT[: len(windows)] = store.weights(split, positions + 1)
    numbers = store.document_numbers(split, positions)
    batch.segments_BT[: len(windows)] = numbers - numbers[:, :1]
    return batch


def check_rows(batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    """The rows of a global batch that are asked for, int (n,); None stands for all of them.

    Raises:
      ValueError: the batch has no window, or does not have these rows.
    """
    if batch_size < 1:
        raise ValueError(f"a batch of {batch_size} windows: it must have at least 1")
    if rows is None:
        return np.arange(batch_size)
    if len(rows) and not 0 <= rows.min() <= rows.max() < batch_size:
        raise ValueError(f"rows {rows.min()} to {rows.max()} of a batch of {counted(batch_size, 'window')}")
    return rows


def pack_state(identity: dict[str, Any], **rest: Any) -> bytes:
    """A position as JSON bytes, with the identity of the data that it belongs to."""
    return json.dumps({"identity": identity, **rest}).encode()


def unpack_state(state: bytes, identity: dict[str, Any]) -> dict[str, Any]:
    """Reads a state back.

    Raises:
      ValueError: it is not a state, or has another identity; the message names what differs.
    """
    try:
        record: dict[str, Any] = parse_json(state, "it")
        theirs = field(record, "identity", dict, "it")
    except ValueError:
        raise ValueError(f"not the state of a data iterator: {bytes(state)[:40]!r}") from None
    for key in sorted(identity.keys() | theirs.keys()):
        if theirs.get(key) != identity.get(key):
            raise ValueError(
                f"the saved data position was taken with {key} = {theirs.get(key)!r}, "
                f"and this run has {key} = {identity.get(key)!r}: it cannot continue there"
            )
    return record


class StoreBatches:
    """Endless shuffled batches from a store: every epoch holds each window once, in an order of its own."""

    def __init__(self, store: TokenStore, split: str, context: int, seed: int) -> None:
        """Starts at position 0.

        Args:
          store: an open store.
          split: 'train' or 'heldout'.
          context: tokens per row.
          seed: of the order of windows.

        Raises:
          ValueError: the split has no window of this context.
        """
        self._store, self._split, self._context, self._seed = store, split, context, seed
        self._windows = store.num_windows(split, context)
        self.position = 0

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return self.position // self._windows

    def order(self, positions: np.ndarray) -> np.ndarray:
        """The window read at each position, int64: the pure function that determines everything else."""
        epochs, within = np.divmod(np.asarray(positions, np.int64), self._windows)
        chosen = np.empty(within.shape, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = permute(within[here], self._windows, self._seed, int(epoch))
        return chosen

    def next(self, batch_size: int, rows: np.ndarray | None = None) -> Batch:
        """The next global batch, (batch_size, context) each, or the given rows of it; no other rows are read.

        Args:
          batch_size: windows of the global batch.
          rows: int (n,), the rows of the global batch to return; None: all.

        Raises:
          ValueError: batch_size is below 1, or the batch has no such rows.
        """
        rows = check_rows(batch_size, rows)
        indices = self.order(self.position + rows)
        batch = read_batch(self._store, self._split, indices, self._context)
        self.position += batch_size
        return batch

    def rows_by_source(self, first: int, count: int) -> dict[str, int]:
        """See TokenBatches; none."""
        del first, count
        return {}

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": "store",
            "store": self._store.digest,
            "split": self._split,
            "context": self._context,
            "seed": self._seed,
        }

    def state(self) -> bytes:
        """The position and the identity of the data; the same in every process, and valid for any number of them."""
        return pack_state(self._identity(), position=self.position)

    def mark(self) -> str:
        """The position, which alone determines what has been read."""
        return str(self.position)

    def restore(self, state: bytes) -> None:
        """Moves to a saved position.

        Raises:
          ValueError: the state belongs to another store, split, context or seed, or is not a state.
        """
        position = unpack_state(state, self._identity()).get("position")
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"the saved data position is {position!r}, and should be a count of windows")
        self.position = position


def in_batches(windows: Iterable[np.ndarray], batch_size: int, eos_id: int) -> Iterator[Batch]:
    """Yields batches of windows (context + 1,) in order, the last one filled up with rows of weight 0."""
    if batch_size < 1:
        raise ValueError(f"a batch of {batch_size} windows")
    gathered: list[np.ndarray] = []
    for window in windows:
        gathered.append(window)
        if len(gathered) == batch_size:
            yield make_batch(np.stack(gathered), eos_id)
            gathered = []
    if gathered:
        yield make_batch(np.stack(gathered), eos_id, rows=batch_size)


def heldout_batches(
    store: TokenStore, context: int, batch_size: int, windows: int, split: str = "heldout"
) -> Iterator[Batch]:
    """The same held-out windows each time, in order, spread evenly over the split.

    Args:
      store: an open store.
      context: tokens per row.
      batch_size: rows of every batch; the last is filled up with rows of weight 0.
      windows: how many; all of them if the split holds fewer.
      split: name of the split.

    Raises:
      ValueError: the split has no window of this context, or windows or batch_size is below 1.
    """
    total = store.num_windows(split, context)
    if windows < 1 or batch_size < 1:
        raise ValueError(f"{windows} held-out windows in batches of {batch_size}: both must be at least 1")
    wanted = min(windows, total)
    indices = np.arange(wanted, dtype=np.int64) * total // wanted
    starts = range(0, wanted, batch_size)
    return (read_batch(store, split, indices[at : at + batch_size], context, batch_size) for at in starts)
