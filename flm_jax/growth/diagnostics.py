"""Diagnostics of a growth: slices that would never learn, copies that would stay identical, content of new entries."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.distributed import fetch
from flm_jax.growth.axis_map import Rule, Span, along
from flm_jax.growth.lineage import Lineage
from flm_jax.loss import loss_sum
from flm_jax.model import Params, declared
from flm_jax.records import counted
from flm_jax.signature import KINDS, Kind, Role, Signature


def grown_dimensions(
    tree: Params, lineage: Lineage
) -> Iterator[tuple[str, str, int, Signature, Span, Rule, jax.Array]]:
    """Yields each dimension of `tree` that grew: path, axis, dimension, signature, span, rule, and the whole array.

    Arrays without entries, those of layers where there are none, are left out.
    """
    maps, (_, signatures) = lineage.maps, declared(lineage.cfg)
    paths = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), sig)
        for path, sig in jax.tree_util.tree_leaves_with_path(signatures)
    ]
    for (path, sig), value in zip(paths, jax.tree.leaves(tree), strict=True):
        for dim, axis in enumerate(sig.axes):
            if axis in maps and value.size:
                yield path, axis, dim, sig, maps[axis].span, maps[axis].rules[sig.role(axis)], value


def fresh_entries(params: Params, lineage: Lineage) -> dict[str, dict[str, str]]:
    """By parameter path and grown axis: how many of its slices are new, and what they hold, as in '16 of 80, zero'."""
    found: dict[str, dict[str, str]] = {}
    for path, axis, _, _, span, rule, _ in grown_dimensions(params, lineage):
        found.setdefault(path, {})[axis] = f"{int(span.fresh.sum())} of {span.new}, {rule.fill}"
    return found


def dead_slices(params: Params, lineage: Lineage, tokens_BT: jax.Array, rate: float = 0.1, steps: int = 2) -> list[str]:
    """New slices that received no gradient during some steps of plain gradient descent: they would never learn.

    Args:
      params: of the grown model, at the growth.
      lineage: of the grown model.
      tokens_BT: int32 token ids; each is also the target of the one before it.
      rate: step size along the normalised gradient.
      steps: number of descent steps; one more gradient is taken after them.

    Returns:
      One line per dimension that has dead slices, naming the parameter and the axis; an empty list is the expected
      result. Embedding rows of new tokens are not checked: no text contains these tokens yet.
    """
    # One token less than a window: kernels that want blocks of positions cannot take it.
    cfg = lineage.cfg.for_comparison

    def loss(params: Params, tokens_BT: jax.Array, masks: Any) -> jax.Array:
        x, y = tokens_BT[:, :-1], tokens_BT[:, 1:]
        return loss_sum(cfg, params, x, y, jnp.ones(x.shape), jnp.zeros_like(x), masks) / x.size

    where = jax.tree.map(lambda x: x.sharding, params)

    # Where what it returns lives is said, or the second call would compile it again.
    @functools.partial(jax.jit, out_shardings=(where, None), donate_argnums=0)
    def descend(params: Params, tokens_BT: jax.Array, masks: Any) -> tuple[Params, list[jax.Array]]:
        """The parameters after a step, and how much gradient the slices of each grown dimension received."""
        grads = jax.grad(loss)(params, tokens_BT, masks)
        felt = [
            jnp.sum(jnp.abs(total), axis=tuple(i for i in range(total.ndim) if i != dim))
            for _, _, dim, _, _, _, total in grown_dimensions(grads, lineage)
        ]
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        return jax.tree.map(lambda w, g: (w - rate * g / norm).astype(w.dtype), params, grads), felt

    moved, seen = jax.tree.map(jnp.copy, params), []
    # Run from the start of the ramp to its end: entries whose mask rises last have gradients only there.
    for step in range(steps + 1):
        masks = lineage.masks(step * lineage.ramp_steps // steps)
        moved, felt = descend(moved, tokens_BT, masks)
        seen.append(fetch(felt))
    total = [sum(parts) for parts in zip(*seen, strict=True)]

    found = []
    for (path, axis, _, sig, span, _, _), felt_A in zip(grown_dimensions(params, lineage), total, strict=True):
        if KINDS[axis] is Kind.OUTSIDE and sig.role(axis) is Role.READER:
            continue
        dead = int(np.sum(felt_A[span.fresh] == 0))
        if dead:
            found.append(f"{path}: {dead} of {counted(int(span.fresh.sum()), 'new slice')} on {axis}")
    return found


def copies_apart(params: Params, lineage: Lineage) -> float | None:
    """The largest difference between copies, each divided by its scale, relative to the parameter's largest entry.

    0: copies are identical; with identical optimizer state they stay identical (the symmetry is not broken). None:
    nothing was copied.
    """
    maps = lineage.maps

    @jax.jit
    def measured(params: Params) -> list[jax.Array]:
        found = []
        for _, axis, dim, sig, span, rule, value in grown_dimensions(params, lineage):
            if rule.fill != "copy" or KINDS[axis] is Kind.STACK or rule.from_above:
                continue
            # On the other axes only old entries are compared: drawn ones have no source.
            for other, name in enumerate(sig.axes):
                if name in maps and other != dim:
                    value = jnp.take(value, np.flatnonzero(~maps[name].span.fresh), axis=other)
            if not value.size:
                continue
            seen = value / along(np.broadcast_to(rule.scale, span.new), dim, value.ndim).astype(value.dtype)
            _, first, group = np.unique(span.copy_group, return_index=True, return_inverse=True)
            apart = jnp.max(jnp.abs(seen - jnp.take(seen, first[group], axis=dim))) / jnp.max(jnp.abs(seen))
            found.append(apart)
        return found

    return max((float(apart) for apart in fetch(measured(params))), default=None)
