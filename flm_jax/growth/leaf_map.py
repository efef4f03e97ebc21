"""How one parameter grows: for each new entry, its source index, its scale, and whether it is fresh.

The same function grows a whole array, on a device or on a mesh under jit, and a streamed block of it: a run of rows of
one layer. Both must have the same bits however they are compiled, so no rounding is left to the compiler: all factors
that are equal for every entry are merged into one, taken entries are multiplied once per dimension, in at least
float32, by the vectors that remain, and a product is rounded before it enters a sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.growth.axis_map import Rule, Span, along
from flm_jax.signature import Signature

# Standard deviation of the noise in copies, relative to that of an initialisation.
NOISE = 0.1
# Sources in more contiguous runs than this are gathered by index.
MAX_RUNS = 8

Vector = Any  # (size,), a NumPy array or a traced one
GrownDim = tuple[int, Span, Rule]


class EntryValues(NamedTuple):
    """The per-entry values of a leaf map; for a block, restricted to its rows and its layer.

    Attributes:
      fresh: by grown dimension, (new,) bool, the entries that did not exist before.
      weights: by dimension, (new,) factors on taken entries; None: no factor.
      scale: one factor on all taken entries; None: no factor.
    """

    fresh: tuple[Vector, ...]
    weights: tuple[Vector | None, ...]
    scale: Any = None


@dataclass(frozen=True, eq=False)
class LeafMap:
    """How one array grows. Made by `make_leaf_map`.

    Attributes:
      signature: the parameter's signature; a moment has that of its parameter.
      shape: after growth.
      dtype: after growth.
      grown: the dimensions that grow, each with its span and its rule, last dimension first; layers are grown last
        because the other dimensions may copy from the layer above.
      entries: the per-entry values of the whole array.
    """

    signature: Signature
    shape: tuple[int, ...]
    dtype: Any
    grown: tuple[GrownDim, ...]
    entries: EntryValues

    @property
    def before(self) -> tuple[int, ...]:
        """The shape before growth."""
        old = {dim: span.old for dim, span, _ in self.grown}
        return tuple(old.get(dim, size) for dim, size in enumerate(self.shape))

    @property
    def from_nothing(self) -> bool:
        """Whether the array before growth has no entries, as those of layers in a model without layers."""
        return 0 in self.before

    @property
    def wide(self) -> Any:
        """The dtype that growth computes in: at least float32."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def draws(self) -> bool:
        """Whether anything is drawn at random."""
        return any(rule.fill == "draw" or rule.noise is not None for _, _, rule in self.grown)

    @property
    def row_dim(self) -> int:
        """The first dimension that is not layers: blocks are runs along it."""
        return int(self.signature.stacked)

    @property
    def splits(self) -> bool:
        """Whether a run of rows can be grown without the other rows."""
        # Noise that cancels over copies, and a mean over rows, need all rows.
        return not any(
            dim == self.row_dim and (rule.noise is not None or rule.fill == "mean") for dim, _, rule in self.grown
        )

    @property
    def layers_above(self) -> int:
        """How many layers above its own a layer is grown from: one per dimension that copies from above."""
        return sum(rule.from_above and self.signature.stacked for _, _, rule in self.grown)

    def sources(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each new entry along a dimension, (new,) int, and whether that source is needed, (new,) bool.

        Drawn and zero entries need no source. The first new entry of each source always counts as needed, so that all
        of the old array is read.
        """
        index = np.arange(self.shape[dim])
        for grown, span, rule in self.grown:
            if grown == dim:
                needed = ~span.fresh if rule.fill in ("draw", "zero") else np.ones(span.new, bool)
                needed[np.unique(span.source, return_index=True)[1]] = True
                return span.source, needed
        return index, np.ones(len(index), bool)

    def block(self, layer: int, rows: slice) -> EntryValues:
        """The per-entry values of a run of rows of one layer; of a run of rows, if the array is not stacked."""
        restricted = {self.row_dim: rows} | ({0: slice(layer, layer + 1)} if self.signature.stacked else {})
        whole = slice(None)
        return EntryValues(
            tuple(
                fresh[restricted.get(dim, whole)]
                for (dim, _, _), fresh in zip(self.grown, self.entries.fresh, strict=True)
            ),
            tuple(
                None if weight is None else weight[restricted.get(dim, whole)]
                for dim, weight in enumerate(self.entries.weights)
            ),
            self.entries.scale,
        )

    def grow(
        self,
        value: jax.Array,
        draw: Callable[[], jax.Array] | None = None,
        key: jax.Array | None = None,
        entries: EntryValues | None = None,
        taken: Collection[int] = (),
    ) -> jax.Array:
        """The grown array, or a block of it.

        Args:
          value: the old array; for a block, the sources of its rows in its layer and, if the leaf map copies from
            above, in `layers_above` more layers.
          draw: returns drawn values in the shape of the result; called only if the leaf map draws.
          key: the key of the draw.
          entries: the per-entry values of the block; None: those of the whole array.
          taken: dimensions along which `value` already holds the source of every new entry, in order.
        """
        entries, ndim = entries or self.entries, len(self.shape)
        flags = [along(is_new, dim, ndim) for is_new, (dim, _, _) in zip(entries.fresh, self.grown, strict=True)]
        for is_new, (dim, span, rule) in zip(flags, self.grown, strict=True):
            source = (lambda x: x) if dim in taken else functools.partial(_take_sources, span=span, dim=dim)
            after = source(value) if dim or not self.signature.stacked or dim not in taken else value[:1]
            if rule.from_above and self.signature.stacked:
                after = jnp.where(is_new, source(jnp.concatenate([value[1:], value[-1:]])), after)
            if rule.fill == "mean":
                mean = jnp.mean(value.astype(self.wide), axis=dim, keepdims=True)
                after = jnp.where(is_new, mean, after.astype(self.wide))
            value = after
        if self.signature.stacked and 0 in taken:
            value = value[:1]
        value = value.astype(self.wide)
        if entries.scale is not None:
            value = value * jnp.asarray(entries.scale, self.wide)
        for dim, weight in enumerate(entries.weights):
            if weight is not None:
                value = value * along(weight, dim, ndim).astype(self.wide)
        fresh = draw() if draw is not None and self.draws else jnp.zeros((), self.wide)
        if self.from_nothing:
            # Every entry is new. One that is chosen among others may be rounded differently, so nothing is chosen.
            value = fresh if any(rule.fill == "draw" and not span.old for _, span, rule in self.grown) else value
        elif any(rule.noise is not None for _, _, rule in self.grown):
            assert key is not None
            value = _rounded(value, key) + self._cancelling(_rounded(fresh, key), key)
        # One vector per axis: their union is formed on the device, never as a full array on the host.
        drawn = () if self.from_nothing else (("draw", fresh),)
        for fill, content in (*drawn, ("zero", jnp.zeros((), self.wide))):
            for is_new, (_, _, rule) in zip(flags, self.grown, strict=True):
                if rule.fill == fill:
                    value = jnp.where(is_new, content, value)
        return value.astype(self.dtype)

    def _cancelling(self, fresh: jax.Array, key: jax.Array) -> jax.Array:
        """Noise that cancels over the copies of each entry: sum(c noise) = 0, with c from `Rule.noise`."""
        total = jnp.zeros((), fresh.dtype)
        for dim, span, rule in self.grown:
            if rule.noise is None:
                continue
            group = span.copy_group
            moved = jnp.moveaxis(fresh, dim, -1)
            size = np.bincount(group, weights=rule.noise**2)[group]
            vectors = (rule.noise, rule.noise / size)
            c, weight = (along(v, fresh.ndim - 1, fresh.ndim).astype(fresh.dtype) for v in vectors)
            sums = jnp.zeros((*moved.shape[:-1], int(group.max()) + 1), moved.dtype)
            sums = sums.at[..., group].add(_rounded(moved * c, key))
            noise = moved - _rounded(jnp.take(sums, group, axis=-1) * weight, key)
            total = total + _rounded(NOISE * jnp.moveaxis(noise, -1, dim), key)
        return total


def make_leaf_map(
    signature: Signature,
    like: jax.ShapeDtypeStruct,
    grown: Sequence[GrownDim],
    scale: float,
    weights: Sequence[np.ndarray],
) -> LeafMap:
    """The leaf map of one array.

    Args:
      signature: the parameter's signature.
      like: shape and dtype after growth.
      grown: the dimensions that grow, last dimension first.
      scale: factor on every taken entry.
      weights: by dimension, (new,) or (1,), further factors on taken entries.
    """
    found: list[np.ndarray | None] = [np.asarray(w, np.float64) for w in weights]
    # In a whole array the compiler would merge two constant vectors of equal entries into one factor; in a block, where
    # they are arguments, it would not. They are merged here, so that both round alike.
    for dim, w in enumerate(found):
        if w is not None and np.all(w == w[:1]):
            scale, found[dim] = scale * float(w[0] if w.size else 1), None
    for dim, w in enumerate(found):
        if w is not None:
            scale, found[dim] = 1.0, w * scale
            break
    fresh = tuple(span.fresh for _, span, _ in grown)
    entries = EntryValues(fresh, tuple(found), None if scale == 1 else scale)
    return LeafMap(signature, like.shape, like.dtype, tuple(grown), entries)


def _rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """`x`, rounded to its dtype before it enters a sum: compilers may otherwise fuse the product into the sum."""
    # Adds 0 to the bits in a form that no compiler simplifies: a number times its successor is even.
    word = jax.random.key_data(key).ravel()[0]
    unsigned = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    zero = ((word * (word + np.uint32(1))) & np.uint32(1)).astype(unsigned)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, unsigned) + zero, x.dtype)


def _take_sources(value: jax.Array, span: Span, dim: int) -> jax.Array:
    """The source of every new entry along one dimension.

    Runs of entries are sliced and concatenated: the partitioner then exchanges only the entries that move. For indices
    along a dimension that is split over devices it would gather the whole array. Entries without a source are zeros.
    """
    if not span.old:
        return jnp.zeros((*value.shape[:dim], span.new, *value.shape[dim + 1 :]), value.dtype)
    if span.parts is not None and span.group is None:
        outer, inner = span.parts
        shape = value.shape
        split = value.reshape(*shape[:dim], outer.old, inner.old, *shape[dim + 1 :])
        taken = _take_sources(_take_sources(split, outer, dim), inner, dim + 1)
        return taken.reshape(*shape[:dim], span.new, *shape[dim + 1 :])
    source = span.source
    starts = np.flatnonzero(np.diff(source, prepend=source[0] - 2) != 1)
    if len(starts) > MAX_RUNS:
        return jnp.take(value, source, axis=dim)
    ends = [*starts[1:], len(source)]
    runs = [
        jax.lax.slice_in_dim(value, int(source[a]), int(source[a]) + int(b - a), axis=dim)
        for a, b in zip(starts, ends, strict=True)
    ]
    return jnp.concatenate(runs, axis=dim) if len(runs) > 1 else runs[0]
