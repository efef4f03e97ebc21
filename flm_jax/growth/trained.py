"""What of a model trains: everything, or only the entries that its last growth added.

A parameter in which nothing is new is left out of everything that a train step computes and keeps: it has no gradient,
no update and no moments. In trees like the parameters, `optax.MaskedNode()` stands in its place. A parameter that is
new in part takes part as a whole, and its old entries are put back after the step.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.growth.axis_map import along
from flm_jax.growth.lineage import Lineage
from flm_jax.model import declared
from flm_jax.optimizer import is_masked, joined, map_parts, only
from flm_jax.signature import Signature

TRAINED = ("all", "new")


@dataclass(frozen=True, eq=False)
class NewEntries:
    """Which entries of one parameter the last growth added: those that are new along at least one dimension.

    Attributes:
      shape: of the parameter.
      by_dim: by grown dimension, (size,) bool.
    """

    shape: tuple[int, ...]
    by_dim: dict[int, np.ndarray]

    @property
    def count(self) -> int:
        """How many there are."""
        old = [int(np.sum(~self.by_dim[dim])) if dim in self.by_dim else size for dim, size in enumerate(self.shape)]
        return math.prod(self.shape) - math.prod(old)

    def mask(self) -> jax.Array:
        """Bool, in a shape that broadcasts to that of the parameter."""
        # One vector per dimension: their union is formed on the device, never as a full array on the host.
        flags = [jnp.asarray(along(new, dim, len(self.shape))) for dim, new in self.by_dim.items()]
        return functools.reduce(jnp.logical_or, flags)


@dataclass(frozen=True, eq=False)
class Trained:
    """The entries of a model that train, and the trees of a train step as they follow from them.

    Attributes:
      lineage: the model.
      what: all, or new: the entries that its last growth added.
    """

    lineage: Lineage
    what: str = "all"

    def check(self) -> None:
        """Checks that something trains.

        Raises:
          ValueError: the model has not grown, or its last growth added nothing.
        """
        if self.what == "all":
            return
        wrong = f"train={self.what!r} trains the entries that the last growth added, and "
        right = ": give the stage a Growth, let it follow a stage that has one, or take train='all'."
        if self.lineage.growth is None:
            raise ValueError(f"{wrong}its model has not grown{right}")
        if not self.count:
            raise ValueError(f"{wrong}its growth added none{right}")

    @property
    def count(self) -> int:
        """The number of entries that train."""
        if self.what == "all":
            return sum(math.prod(like.shape) for like in jax.tree.leaves(declared(self.lineage.cfg)[0]))
        return sum(new.count for new in jax.tree.leaves(self._outline))

    @functools.cached_property
    def leaves(self) -> Any:
        """A tree like the parameters, of bool: whether anything of each trains."""
        if self.what == "all":
            return jax.tree.map(lambda _: True, declared(self.lineage.cfg)[0])
        return jax.tree.map(lambda new: new.count > 0, self._outline)

    def part(self, tree: Any) -> Any:
        """`tree`, which is like the parameters, without the parameters of which nothing trains."""
        return only(self.leaves, tree)

    def whole(self, part: Any, tree: Any) -> Any:
        """`part`, as `part()` returns it, with the parameters that it leaves out from `tree`."""
        return joined(self.leaves, part, tree)

    def select(self, part: Any, other: Any = None) -> Any:
        """`part`, with the entries that do not train taken from `other`; None: 0.

        Entries are selected and not multiplied, so that those of `other` stay as they are, bit for bit.
        """
        if self.what == "all":
            return part
        others = () if other is None else (other,)

        def one(new: NewEntries, value: Any, *old: Any) -> Any:
            if is_masked(value):
                return value
            return jnp.where(new.mask(), value, old[0] if old else jnp.zeros((), value.dtype))

        return jax.tree.map(one, self._entries, part, *others)

    def only(self, tree: Any) -> Any:
        """`part(tree)`, with 0 in place of the entries that do not train."""
        return self.select(self.part(tree))

    def select_moments(self, state: Any, *other: Any) -> Any:
        """An optimizer's state, with the moments of entries that do not train from another one; without one: 0."""
        if self.what == "all":
            return state
        return map_parts(lambda power, *parts: parts[0] if power is None else self.select(*parts), state, *other)

    @functools.cached_property
    def _entries(self) -> Any:
        return self._new(self.lineage.maps)

    @functools.cached_property
    def _outline(self) -> Any:
        """As `_entries`, also before layers are placed by distance: how many are new along an axis is known before."""
        return self._new(self.lineage.outline)

    def _new(self, maps: Any) -> Any:
        def one(sig: Signature, like: jax.ShapeDtypeStruct) -> NewEntries:
            grown = {dim: maps[axis].span.fresh for dim, axis in enumerate(sig.axes) if axis in maps}
            return NewEntries(like.shape, {dim: fresh for dim, fresh in grown.items() if fresh.any()})

        shapes, signatures = declared(self.lineage.cfg)
        return jax.tree.map(one, signatures, shapes)
