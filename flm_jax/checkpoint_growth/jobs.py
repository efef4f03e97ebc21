"""The work of a streamed growth: the leaves that grow, and their blocks, each of which is grown by itself.

A block is a run of rows of one layer of one leaf, contiguous in the leaf; `streaming` reads, grows and writes them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax import costs
from flm_jax.checkpoint.manifest import leaf_paths
from flm_jax.growth.grow import fresh, moment_maps, param_maps
from flm_jax.growth.leaf_map import EntryValues, LeafMap
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.rescaling import rescaling
from flm_jax.optimizer import is_masked, map_average, map_parts
from flm_jax.sharding import mesh_axes

# A block is stored in at most PIECES pieces of at least PIECE_BYTES each, split along an axis that meshes split: each
# device then reads little more than its own part.
PIECES, PIECE_BYTES = 8, 4 << 20


@dataclass(frozen=True, eq=False)
class Job:
    """One leaf of the target.

    Attributes:
      path: in the target's state.
      source: path of the leaf that it grows from; None: it is zero.
      leaf_map: how it grows.
      param: path of the parameter that it is, or is a moment of.
      std: standard deviation of drawn entries.
      rows: rows per block.
      chunks: shape of a stored chunk.
    """

    path: str
    source: str | None
    leaf_map: LeafMap
    param: str
    std: float
    rows: int
    chunks: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether the leaf has layers."""
        return self.leaf_map.signature.stacked

    def groups(self) -> Iterator[BlockGroup]:
        """Yields its block groups, ordered by the old layer that they come from."""
        total = self.leaf_map.shape[self.leaf_map.row_dim]
        sources = self.leaf_map.sources(0)[0] if self.stacked else np.zeros(1, int)
        for old in sorted({int(i) for i in sources}):
            layers = tuple(int(i) for i in np.flatnonzero(sources == old))
            for start in range(0, total, self.rows):
                yield BlockGroup(self, old, layers, start, min(start + self.rows, total))

    @property
    def row_bytes(self) -> int:
        """Size of one row after growth."""
        row = self.leaf_map.shape[self.leaf_map.row_dim + 1 :]
        return math.prod(row) * jnp.dtype(self.leaf_map.dtype).itemsize


@dataclass(frozen=True, eq=False)
class BlockGroup:
    """A run of rows in all new layers that come from one old layer: blocks that are grown from the same bytes.

    Attributes:
      job: the leaf.
      old: the old layer.
      layers: the new layers.
      start: the first row.
      stop: the row after the last.
    """

    job: Job
    old: int
    layers: tuple[int, ...]
    start: int
    stop: int

    @property
    def name(self) -> tuple[str, int, int]:
        """Its name in the journal: path of the leaf, old layer, first row."""
        return self.job.path, self.old, self.start

    @property
    def nbytes(self) -> int:
        """How many bytes are written for it."""
        return len(self.layers) * (self.stop - self.start) * self.job.row_bytes


def jobs(lineage: Lineage, states: tuple[Any, Any], chunk_bytes: int) -> tuple[list[Job], dict[str, str | None]]:
    """The leaves that grow, and, by path, the source of each small leaf that is kept as it is (None: it is 0).

    Args:
      lineage: of the grown model.
      states: the abstract states before and after growth.
      chunk_bytes: the largest block.
    """
    labels = [_labels(state) for state in states]
    found: list[Job] = []
    kept: dict[str, str | None] = {labels[1].step: None}
    fresh_state = lineage.last_growth.optimizer == "fresh"
    known = {path: sig for path, _, sig in costs.leaves(lineage.cfg)}

    def add(leaf_maps: Any, sources: Any, targets: Any) -> None:
        trees = (jax.tree.leaves(tree, is_leaf=is_masked) for tree in (leaf_maps, sources, targets))
        for (param, sig), leaf_map, source, target in zip(known.items(), *trees, strict=True):
            # Arrays without entries are not stored, and some parameters have no such average.
            if not is_masked(target) and math.prod(leaf_map.shape):
                given = None if is_masked(source) else source
                found.append(_job(target, given, leaf_map, param, lineage.cfg.std(sig), chunk_bytes))

    add(param_maps(lineage), labels[0].params, labels[1].params)
    scalings = rescaling(lineage.before), rescaling(lineage)
    for (power, source), (_, target) in zip(_parts(states[0], labels[0]), _parts(states[1], labels[1]), strict=True):
        if power is None:
            kept[target] = None if fresh_state else source
        else:
            sources = map_average(lambda _: optax.MaskedNode(), source) if fresh_state else source
            add(moment_maps(lineage, power, *scalings), sources, target)
    return found, kept


def _parts(state: Any, labels: Any) -> list[tuple[int | None, Any]]:
    """The averages of an optimizer's state as trees of paths, each with its power; and its counts, with None.

    Raises:
      ValueError: a leaf is not declared, see `optimizer.map_parts`.
    """
    found: list[tuple[int | None, Any]] = []
    map_parts(lambda _, part: part, state.opt_state)  # Refuses undeclared leaves.
    map_parts(lambda power, part: found.append((power, part)), labels.opt_state)
    return found


def _labels(state: Any) -> Any:
    """A tree like `state` that holds the path of each leaf in its place."""
    return jax.tree.unflatten(jax.tree.structure(state), list(leaf_paths(state)))


def _job(path: str, source: str | None, leaf_map: LeafMap, param: str, std: float, chunk_bytes: int) -> Job:
    dim, size = leaf_map.row_dim, jnp.dtype(leaf_map.dtype).itemsize
    total, trailing = leaf_map.shape[dim], list(leaf_map.shape[dim + 1 :])
    largest = size * max(math.prod(trailing), math.prod(leaf_map.before[dim + 1 :]) * (1 + leaf_map.layers_above))
    parts = -(-total // max(chunk_bytes // largest, 1)) if leaf_map.splits else 1
    # Blocks of one size need one program: take a nearby number of parts that divides the rows, if there is one.
    parts = next((n for n in range(parts, min(2 * parts, total) + 1) if total % n == 0), parts)
    rows = -(-total // parts)
    for at, axis in enumerate(leaf_map.signature.axes[dim + 1 :]):
        if mesh_axes(axis):
            most = rows * math.prod(trailing) * size // PIECE_BYTES
            trailing[at] //= max((n for n in (1, 2, 4, PIECES) if n <= most and trailing[at] % n == 0), default=1)
            break
    return Job(path, source, leaf_map, param, std, rows, (*(1,) * dim, rows, *trailing))


class BlockProgram:
    """The static argument of `grow_block`: a leaf map, as far as the compiled program depends on it.

    Instances are equal if their blocks can share a program, whatever the per-entry values are.
    """

    def __init__(self, leaf_map: LeafMap, std: float) -> None:
        self.leaf_map, self.std = leaf_map, std
        grown = []
        for dim, span, rule in leaf_map.grown:
            taken = (dim == 0 and leaf_map.signature.stacked) or (dim == leaf_map.row_dim and leaf_map.splits)
            sources = None if taken else span.source.tobytes()
            noise = None if rule.noise is None else (rule.noise.tobytes(), span.copy_group.tobytes())
            grown.append((dim, sources, rule.fill, rule.from_above, noise))
        self._key = (
            (leaf_map.signature.stacked, bool(leaf_map.signature.gains), leaf_map.from_nothing),
            leaf_map.shape[leaf_map.row_dim + 1 :],
            leaf_map.before[leaf_map.row_dim + 1 :],
            str(leaf_map.dtype),
            tuple(grown),
            leaf_map.entries.scale is None,
            tuple(weight is None for weight in leaf_map.entries.weights),
            std if leaf_map.draws else 0.0,
        )

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockProgram) and self._key == other._key

    @property
    def taken(self) -> tuple[int, ...]:
        """The dimensions along which blocks are read in the order of the target."""
        rows = (self.leaf_map.row_dim,) if self.leaf_map.splits else ()
        return (0, *rows) if self.leaf_map.signature.stacked else rows


@functools.partial(jax.jit, static_argnums=(0, 1))
def grow_block(
    program: BlockProgram,
    shape: tuple[int, ...],
    value: jax.Array,
    entries: EntryValues,
    key: jax.Array,
    offset: jax.Array,
) -> jax.Array:
    """Grows one block.

    Args:
      program: of its leaf map.
      shape: after growth.
      value: the sources of its rows, in order: (layers, rows, entries of a row), or (rows, entries of a row).
      entries: its per-entry values.
      key: of the parameter.
      offset: uint32[2], the high word first: how many entries of the leaf stand before it.

    Returns:
      (1, rows, entries of a row), or (rows, entries of a row).
    """
    leaf_map = program.leaf_map
    draw = functools.partial(fresh, leaf_map, key, shape, program.std, offset=offset)
    value = value.reshape(*value.shape[:-1], *leaf_map.before[leaf_map.row_dim + 1 :])
    block = leaf_map.grow(value, draw, key, entries, program.taken)
    return block.reshape(*shape[: leaf_map.row_dim + 1], -1)
