"""The optimizer's state: which parts of it are moving averages, trees in which some are missing, shapes, shardings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flm_jax.sharding import param_shardings, replicated

# For each class of state: its fields that are moving averages, and of which power of the gradient. They grow by the
# duals of the parameters' maps. Its other fields are counts. A new optimizer adds the class of its state here.
#
# An average is a tree like the parameters. Where a parameter has no such average, the tree has `optax.MaskedNode()`
# in place of an array: it costs no memory, and no checkpoint has a leaf for it. `only` makes such trees, `map_average`
# maps over them, and all that handles averages goes through it.
AVERAGES: dict[type, dict[str, int]] = {optax.ScaleByAdamState: {"mu": 1, "nu": 2}}


def only(flags: Any, tree: Any) -> Any:
    """A tree like the parameters, with `optax.MaskedNode()` where `flags`, a tree of bools, is False."""
    return jax.tree.map(lambda on, leaf: leaf if on else optax.MaskedNode(), flags, tree)


def joined(flags: Any, a: Any, b: Any) -> Any:
    """A tree like the parameters: that of `a` where `flags` is True, that of `b` where it is False."""
    return jax.tree.map(lambda on, x, y: x if on else y, flags, a, b)


def is_masked(node: Any) -> bool:
    """Whether a node of a tree like the parameters says that there is nothing for one of them, such as a moment."""
    return isinstance(node, optax.MaskedNode)


def in_form(state: Any, like: Any) -> Any:
    """An optimizer's state with the moments that `like` has: those that `state` lacks are 0, others are left out.

    Args:
      state: an optimizer's state, in which moments may be missing (`is_masked`).
      like: arrays or `jax.ShapeDtypeStruct`s; where one has a sharding, new moments get it.
    """

    def one(wanted: Any, found: Any) -> Any:
        if is_masked(wanted):
            return wanted
        if is_masked(found):
            return jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding)
        return found

    return jax.tree.map(one, like, state, is_leaf=is_masked)


def map_average(one: Callable[..., Any], average: Any, *rest: Any) -> Any:
    """`jax.tree.map` over an average and trees like the parameters; it leaves out parameters that have no average."""
    return jax.tree.map(
        lambda leaf, *others: leaf if is_masked(leaf) else one(leaf, *others), average, *rest, is_leaf=is_masked
    )


def map_parts(one: Callable[..., Any], state: Any, *others: Any) -> Any:
    """An optimizer's state with every moving average and every count replaced by the result of `one`.

    Args:
      one: called with the power of the gradient and the average (a tree like the parameters, in which moments may be
        missing, see `is_masked`), or with None and a count; and with the same part of each of `others`.
      state: the optimizer's state; its leaves may be anything in the place of arrays.
      others: states of the same optimizer.

    Raises:
      ValueError: the state has an array with dimensions that `AVERAGES` does not declare; the message names its path.
    """

    def part(path: Any, node: Any, *nodes: Any) -> Any:
        powers = AVERAGES.get(type(node))
        if powers is not None:
            return node._replace(
                **{
                    name: one(powers.get(name), value, *(getattr(other, name) for other in nodes))
                    for name, value in node._asdict().items()
                }
            )
        if getattr(node, "ndim", 0):
            raise ValueError(
                f"The optimizer's state holds {jax.tree_util.keystr(path)}, {node.dtype}{list(node.shape)}, and it is "
                "not declared how it grows: add the class of its state to flm_jax.optimizer.AVERAGES, with the power "
                "of the gradient that each of its fields averages."
            )
        return node

    return jax.tree_util.tree_map_with_path(part, state, *others, is_leaf=lambda node: type(node) in AVERAGES)


def state_shardings(tx: optax.GradientTransformation, signatures: Any, shapes: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The optimizer state's shapes and shardings: moments are sharded like their parameters, counts replicated.

    Where `signatures` and `shapes` leave a parameter out (`is_masked`), it has no moments.
    """
    state, where = jax.eval_shape(tx.init, shapes), param_shardings(signatures, shapes, mesh)

    def place(power: int | None, part: Any) -> Any:
        return replicated(mesh) if power is None else map_average(lambda _, place: place, part, where)

    return state, map_parts(place, state)
