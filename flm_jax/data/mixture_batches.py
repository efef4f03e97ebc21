"""Batches of a mixture: the rows of each are windows of the token stores of its sources.

The n-th window that is read of a source is the n-th that a run on this source alone would read, whatever the others do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flm_jax.data.batches import Batch, RowSources, StoreBatches, check_rows, pack_state, read_batch, unpack_state
from flm_jax.data.mixing import Order
from flm_jax.data.store import TokenStore
from flm_jax.distributed import print0
from flm_jax.records.foreign_json import field


class Part(NamedTuple):
    """A source of a mixture, with its token store.

    Attributes:
      name: of the source.
      store: its tokens.
      weight: in proportion to those of the other sources.
      limit: training windows that are read of it at most; None: any number.
    """

    name: str
    store: TokenStore
    weight: float
    limit: int | None


class MixtureBatches:
    """Endless batches of a mixture: which window of which source a row is follows from seed, weights and position."""

    def __init__(self, parts: Sequence[Part], context: int, seed: int, weights: Sequence[float] | None = None) -> None:
        """Starts at position 0.

        Args:
          parts: the sources.
          context: tokens per row.
          seed: of the order of each source's windows.
          weights: of each source, from here on, and from a restored position on; None: those of the parts.

        Raises:
          ValueError: a source has no window of this context.
        """
        self._parts, self._context, self._seed = parts, context, seed
        self._each = [StoreBatches(part.store, "train", context, seed) for part in parts]
        self._weights = tuple(part.weight for part in parts) if weights is None else tuple(weights)
        self.order = Order(self._weights, tuple(part.limit for part in parts))
        self.position = 0

    def next(self, batch_size: int, rows: np.ndarray | None = None) -> Batch:
        """The next global batch, (batch_size, context) each, or the given rows of it; no other rows are read.

        Args:
          batch_size: windows of the global batch.
          rows: int (n,), the rows of the global batch to return; None: all.

        Raises:
          SupplyError: every source has been read as often as it may.
          ValueError: batch_size is below 1, or the batch has no such rows.
        """
        rows = check_rows(batch_size, rows)
        sources, numbers = self.order.span(self.position, batch_size)
        windows = [each.order(numbers[rows][sources[rows] == k]) for k, each in enumerate(self._each)]
        batch = read_rows(self._parts, "train", sources[rows], windows, self._context)
        self._say_what_runs_out(batch_size)
        self.position += batch_size
        return batch

    def rows_by_source(self, first: int, count: int) -> dict[str, int]:
        """See TokenBatches."""
        numbers = np.bincount(self.order.span(first, count)[0], minlength=len(self._parts))
        return {part.name: int(n) for part, n in zip(self._parts, numbers, strict=True) if n}

    def _say_what_runs_out(self, batch_size: int) -> None:
        for at, ended in self.order.run_out:
            if self.position < at <= self.position + batch_size:
                shares = zip(self._parts, self.order.shares(at), strict=True)
                others = ", ".join(f"{part.name} {share:.3g}" for part, share in shares if share)
                names = " and ".join(self._parts[k].name for k in ended)
                print0(f"After {at:,} windows, {names} has been read as often as it may; the shares are now: {others}.")

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": "mixture",
            "stores": {part.name: part.store.digest for part in self._parts},
            "limits": [part.limit for part in self._parts],
            "context": self._context,
            "seed": self._seed,
        }

    def state(self) -> bytes:
        """The position, since when the weights hold and what was read before; the same in every process."""
        order = self.order
        since = {"weights": list(order.weights), "start": order.start, "drawn": list(order.drawn)}
        return pack_state(self._identity(), position=self.position, order=since)

    def mark(self) -> str:
        """The position, and how many windows of each source have been read."""
        return f"{self.position}: {', '.join(map(str, self.order.counts(self.position)))}"

    def restore(self, state: bytes) -> None:
        """Moves to a saved position; if other weights were in force there, those of this object hold from there on.

        Raises:
          ValueError: the state belongs to other sources, limits, context or seed, or is not a state.
        """
        record = unpack_state(state, self._identity())
        where = "the saved data position"
        position, since = field(record, "position", int, where), field(record, "order", dict, where)
        weights, drawn = (field(since, name, list, where) for name in ("weights", "drawn"))
        start = field(since, "start", int, where)
        whole = len(weights) == len(drawn) == len(self._parts) and all(isinstance(n, int) and n >= 0 for n in drawn)
        if not (whole and 0 <= start <= position and sum(drawn) == start):
            raise ValueError(f"{where} is damaged: {position} windows, {start} of them before {since}")
        order = Order(tuple(float(w) for w in weights), tuple(part.limit for part in self._parts), start, tuple(drawn))
        self.order, self.position = order.weighed(self._weights, position), position


def read_rows(
    parts: Sequence[Part], split: str, sources: np.ndarray, windows: Sequence[np.ndarray], context: int
) -> Batch:
    """A batch of windows of several sources.

    Args:
      parts: the sources.
      split: name of the split.
      sources: int (n,), the source of each row.
      windows: of each source, the numbers of its windows, in the order of the rows.
      context: tokens per row.
    """
    shape = (len(sources), context)
    whole = Batch(
        np.empty(shape, np.int32),
        np.empty(shape, np.int32),
        np.empty(shape, np.float32),
        np.empty(shape, np.int32),
        RowSources(sources.astype(np.int32), len(parts)),
    )
    for k, part in enumerate(parts):
        if len(windows[k]):
            read = read_batch(part.store, split, windows[k], context)
            for all_rows, some in zip(whole[:4], read[:4], strict=True):
                all_rows[sources == k] = some
    return whole


def heldout_rows(parts: Sequence[Part], context: int, batch_size: int, windows: int) -> Iterator[Batch]:
    """The same held-out windows each time, about as many of each source, spread evenly over its held-out split.

    The weights of tokens are such that the mean over all batches is that of the sources in proportion to their weights,
    however few windows a source with a small weight would have by its share.

    Args:
      parts: the sources.
      context: tokens per row.
      batch_size: rows of every batch; the last is filled up with rows of weight 0.
      windows: how many of all sources together, at least one of each; fewer if a source holds fewer.

    Raises:
      ValueError: a source has no held-out window of this context, or windows or batch_size is below 1.
    """
    if windows < 1 or batch_size < 1:
        raise ValueError(f"{windows} held-out windows in batches of {batch_size}: both must be at least 1")
    chosen = []
    for k, part in enumerate(parts):
        held = part.store.num_windows("heldout", context)
        wanted = min(max((windows + k) // len(parts), 1), held)
        chosen.append(np.arange(wanted, dtype=np.int64) * held // wanted)
    # Taking turns, so that the first batch, which a growth is verified on, has rows of many sources.
    place = np.concatenate([(np.arange(len(own)) + 0.5) / len(own) for own in chosen])
    turns = np.argsort(place, kind="stable")
    source = np.repeat(np.arange(len(parts)), [len(own) for own in chosen])[turns]
    number = np.concatenate(chosen)[turns]
    total = sum(part.weight for part in parts)
    scale = np.array(
        [
            part.weight / total * len(number) * context / max(_weight(part, own, context), 1)
            for part, own in zip(parts, chosen, strict=True)
        ],
        np.float32,
    )
    for at in range(0, len(number), batch_size):
        sources, numbers = source[at : at + batch_size], number[at : at + batch_size]
        each = [numbers[sources == k] for k in range(len(parts))]
        batch = read_rows(parts, "heldout", sources, each, context)
        batch.weights_BT[:] *= scale[sources][:, None]
        yield filled_up(batch, batch_size)


def _weight(part: Part, windows: np.ndarray, context: int) -> float:
    """The sum of the weights of the targets of some held-out windows."""
    positions = windows[:, None] * context + np.arange(context)
    return float(part.store.weights("heldout", positions + 1).sum()) if part.store.weighted else float(positions.size)


def filled_up(batch: Batch, rows: int) -> Batch:
    """A batch with rows of weight 0 at its end, such that it has `rows`."""
    assert batch.sources is not None
    missing = rows - len(batch.inputs_BT)
    return Batch(
        np.pad(batch.inputs_BT, ((0, missing), (0, 0))),
        np.pad(batch.targets_BT, ((0, missing), (0, 0))),
        np.pad(batch.weights_BT, ((0, missing), (0, 0))),
        np.pad(batch.segments_BT, ((0, missing), (0, 0))),
        RowSources(np.pad(batch.sources.numbers_B, (0, missing)), batch.sources.count),
    )
