"""What a streamed growth has to do: the leaves that grow, and the blocks of them, each grown by itself.

A block is a run of rows of one layer of one leaf, contiguous in the leaf; `flow` says how they are used.
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
from flm_jax.growth.leaf_map import Entries, LeafMap
from flm_jax.recipe import ResolvedStage
from flm_jax.sharding import make_mesh, mesh_axes
from flm_jax.step import StageProgram

# Pieces that a block is stored in, so that devices which share out its columns read little besides their own.
PIECES, PIECE_BYTES = 8, 4 << 20


@dataclass(frozen=True, eq=False)
class Job:
    """One leaf of the target.

    Attributes:
      path: in the target's state.
      source: the leaf that it grows from; None: it is zero.
      way: how.
      param: the parameter that it is, or is a moment of.
      std: of what is drawn.
      rows: in a block.
      chunks: shape of a stored chunk.
    """

    path: str
    source: str | None
    way: LeafMap
    param: str
    std: float
    rows: int
    chunks: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether it has layers."""
        return self.way.signature.stacked

    def units(self) -> Iterator[Unit]:
        """Its blocks, by the old layer that they come from."""
        total = self.way.shape[self.way.row_dim]
        sources = self.way.sources(0)[0] if self.stacked else np.zeros(1, int)
        for old in sorted({int(i) for i in sources}):
            layers = tuple(int(i) for i in np.flatnonzero(sources == old))
            for start in range(0, total, self.rows):
                yield Unit(self, old, layers, start, min(start + self.rows, total))

    @property
    def block_bytes(self) -> int:
        """Of one row, after."""
        row = self.way.shape[self.way.row_dim + 1 :]
        return math.prod(row) * jnp.dtype(self.way.dtype).itemsize


@dataclass(frozen=True, eq=False)
class Unit:
    """A run of rows, in all the layers that come from one old layer."""

    job: Job
    old: int
    layers: tuple[int, ...]
    start: int
    stop: int

    @property
    def name(self) -> tuple[str, int, int]:
        """What the journal calls it."""
        return self.job.path, self.old, self.start

    @property
    def nbytes(self) -> int:
        """What is written."""
        return len(self.layers) * (self.stop - self.start) * self.job.block_bytes


def jobs(
    before: ResolvedStage, after: ResolvedStage, states: tuple[Any, Any], chunk_bytes: int
) -> tuple[list[Job], dict[str, str | None]]:
    """What there is to do: leaves that grow, and small ones that are kept as they are (or, None, are 0).

    Args:
      before: the stage that grows.
      after: what it becomes.
      states: the shapes of theirs.
      chunk_bytes: the largest block.
    """
    growth = after.stage.growth
    assert growth is not None
    labels = [_labels(state) for state in states]
    found: list[Job] = []
    anew = growth.optimizer == "fresh"
    known = {path: sig for path, _, sig in costs.leaves(after.cfg)}

    def add(ways: Any, sources: Any, targets: Any) -> None:
        for (param, sig), way, source, target in zip(
            known.items(), *(jax.tree.leaves(tree) for tree in (ways, sources, targets)), strict=True
        ):
            found.append(_job(target, source, way, param, after.cfg.std(sig), chunk_bytes))

    add(param_maps(before.cfg, after.cfg, growth), labels[0].params, labels[1].params)
    kept: dict[str, str | None] = {labels[1].step: None}
    parts = [
        jax.tree.leaves(label.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)) for label in labels
    ]
    for old, new in zip(*parts, strict=True):
        if isinstance(old, optax.ScaleByAdamState):
            kept[new.count] = None if anew else old.count
            for power, name in ((1, "mu"), (2, "nu")):
                ways = moment_maps(before.cfg, after.cfg, growth, power, before.frame, after.frame)
                sources = jax.tree.map(lambda path: "" if anew else path, getattr(old, name))
                add(ways, sources, getattr(new, name))
        else:
            kept[new] = old
    return found, kept


def _labels(state: Any) -> Any:
    """A state whose leaves are their paths."""
    return jax.tree.unflatten(jax.tree.structure(state), list(leaf_paths(state)))


def abstract_state(stage: ResolvedStage, trained: bool = True) -> Any:
    """Shapes of a stage's state; of weights alone, without the optimizer's."""
    state = StageProgram(stage, make_mesh(devices=jax.devices()[:1]), 1).abstract_state
    return state if trained else state.replace(opt_state=())


def _job(path: str, source: str, way: LeafMap, param: str, std: float, chunk_bytes: int) -> Job:
    dim, size = way.row_dim, jnp.dtype(way.dtype).itemsize
    total, trailing = way.shape[dim], list(way.shape[dim + 1 :])
    largest = size * max(math.prod(trailing), math.prod(way.before[dim + 1 :]) * (1 + way.layers_above))
    parts = -(-total // max(chunk_bytes // largest, 1)) if way.splits else 1
    # Blocks of one size need one program, where there is such a size nearby.
    parts = next((n for n in range(parts, min(2 * parts, total) + 1) if total % n == 0), parts)
    rows = -(-total // parts)
    for at, axis in enumerate(way.signature.axes[dim + 1 :]):
        if mesh_axes(axis):
            most = rows * math.prod(trailing) * size // PIECE_BYTES
            trailing[at] //= max((n for n in (1, 2, 4, PIECES) if n <= most and trailing[at] % n == 0), default=1)
            break
    return Job(path, source or None, way, param, std, rows, (*(1,) * dim, rows, *trailing))


class Form:
    """A way as the compiler sees it: ways of one form share a program, whatever their entries are."""

    def __init__(self, way: LeafMap, std: float) -> None:
        self.way, self.std = way, std
        grown = []
        for dim, span, rule in way.grown:
            taken = (dim == 0 and way.signature.stacked) or (dim == way.row_dim and way.splits)
            where = None if taken else span.source.tobytes()
            noise = None if rule.noise is None else (rule.noise.tobytes(), span.copy_group.tobytes())
            grown.append((dim, where, rule.fill, rule.from_above, noise))
        self._is = (
            (way.signature.stacked, bool(way.signature.gains)),
            way.shape[way.row_dim + 1 :],
            way.before[way.row_dim + 1 :],
            str(way.dtype),
            tuple(grown),
            way.entries.scale is None,
            tuple(weight is None for weight in way.entries.weights),
            std if way.draws else 0.0,
        )

    def __hash__(self) -> int:
        return hash(self._is)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self._is == other._is

    @property
    def taken(self) -> tuple[int, ...]:
        """The dimensions along which blocks are read in the order of the target."""
        rows = (self.way.row_dim,) if self.way.splits else ()
        return (0, *rows) if self.way.signature.stacked else rows


@functools.partial(jax.jit, static_argnums=(0, 1))
def grow_block(
    form: Form, shape: tuple[int, ...], value: jax.Array, entries: Entries, key: jax.Array, offset: jax.Array
) -> jax.Array:
    """Grows one block.

    Args:
      form: of its way.
      shape: after.
      value: what its rows come from, in their order: (layers, rows, entries of a row), or (rows, entries of a row).
      entries: of the block.
      key: of the parameter.
      offset: uint32[2], how many entries of the leaf stand before it.

    Returns:
      (1, rows, entries of a row), or (rows, entries of a row).
    """
    way = form.way
    draw = functools.partial(fresh, way, key, shape, form.std, offset=offset)
    value = value.reshape(*value.shape[:-1], *way.before[way.row_dim + 1 :])
    block = way.grow(value, draw, key, entries, form.taken)
    return block.reshape(*shape[: way.row_dim + 1], -1)
