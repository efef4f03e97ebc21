"""Grows parameters and moving averages from old shapes to new ones, as pure functions of their signatures.

The same functions serve arrays on one device, arrays on a mesh (under jit, with the target's shardings) and a notebook:

    big = grown_config(small, target, Growth(method="zero"))
    params = grow(params, small, big, Growth(method="zero"), jax.random.key(0))

Two functions grow parameters, and two grow an optimizer's state:

- `grow` and `grow_optimizer` take the configurations before and after one growth, for use outside a run;
- `grow_params` and `grow_opt_state` take the `Lineage` of the grown model, as a run and a checkpoint record it.

`grow` calls `grow_params` with the lineage of that one growth. `grow_optimizer` must be told the rescalings in which
moments are stored (`rescaling`); `grow_opt_state` finds them from the lineage.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.config import ModelConfig
from flm_jax.growth.axis_map import AxisMap, Rule
from flm_jax.growth.leaf_map import GrownDim, LeafMap, make_leaf_map
from flm_jax.growth.lineage import Lineage, lineage_of
from flm_jax.growth.plan import Growth
from flm_jax.growth.rescaling import LeafRescaling, Rescaling, rescaling
from flm_jax.model import Params, declared
from flm_jax.optimizer import in_form, is_masked, map_average, map_parts
from flm_jax.signature import Signature, draw


def grow(params: Params, old: ModelConfig, new: ModelConfig, growth: Growth, key: jax.Array) -> Params:
    """Parameters of `new`, which compute what those of `old` did if the method preserves the function.

    Args:
      params: parameters of `old`.
      old: the configuration before growth.
      new: the configuration after growth, as returned by `grown_config`.
      growth: how to grow.
      key: for drawn entries; the same inputs give the same bytes.

    Returns:
      A tree with the shapes and dtypes of a fresh initialisation of `new`.

    Raises:
      ValueError: the parameters are not those of `old` (the message names the path and both shapes), or as `axis_maps`.
    """
    return grow_params(lineage_of(old, new, growth), params, key)


def grow_params(lineage: Lineage, params: Params, key: jax.Array) -> Params:
    """The parameters of a grown model, from those of the model before it; see `grow`."""

    def one(path: str, value: jax.Array, leaf: LeafMap) -> jax.Array:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        drawn = functools.partial(fresh, leaf, leaf_key, leaf.shape, lineage.cfg.std(leaf.signature))
        return leaf.grow(value, drawn, leaf_key)

    check_shapes(params, lineage.before.cfg)
    return jax.tree_util.tree_map_with_path(
        lambda path, value, leaf: one(jax.tree_util.keystr(path, simple=True, separator="/"), value, leaf),
        params,
        param_maps(lineage),
    )


def fresh(leaf: LeafMap, key: jax.Array, shape: tuple[int, ...], std: float, **offset: Any) -> jax.Array:
    """Fresh values for a parameter, or for a block of it that begins at some `offset`."""
    return draw(leaf.signature, key, shape, std=std, dtype=leaf.wide, **offset)


def param_maps(lineage: Lineage) -> Params:
    """How each parameter grows: a tree of `LeafMap`."""
    old, new = lineage.before.cfg, lineage.cfg

    def one(signature: Signature, like: jax.ShapeDtypeStruct) -> LeafMap:
        grown = _grown_axes(signature, lineage.maps)
        weights = [np.ones(1) for _ in signature.axes]
        for dim, span, rule in grown:
            weights[dim] = np.broadcast_to(rule.scale, span.new)
        return make_leaf_map(signature, like, grown, old.forward_mult(signature) / new.forward_mult(signature), weights)

    likes, signatures = declared(new)
    return jax.tree.map(one, signatures, likes)


def moment_maps(
    lineage: Lineage, power: int, before: Rescaling | None = None, after: Rescaling | None = None
) -> Params:
    """How moving averages of gradients to some power grow: a tree of `LeafMap`.

    Args:
      lineage: of the grown model.
      power: of the gradients.
      before: the rescaling that the old averages are stored in; None: none.
      after: the rescaling that the new averages are stored in; None: none.
    """
    old, new = lineage.before.cfg, lineage.cfg
    forget = lineage.last_growth.optimizer == "asymmetric"
    given = {"before": before, "after": after}
    given = {name: scaling for name, scaling in given.items() if scaling is not None}

    def one(signature: Signature, like: jax.ShapeDtypeStruct, *scalings: LeafRescaling) -> LeafMap:
        factors = {
            name: [np.ravel(f) ** float(power) for f in scaling.gradient]
            for name, scaling in zip(given, scalings, strict=True)
        }
        weights = factors.get("before", [np.ones(1) for _ in signature.axes])
        grown: list[GrownDim] = []
        for dim, span, rule in _grown_axes(signature, lineage.maps):
            unknown = forget or rule.fill != "copy" or rule.from_above
            grown.append((dim, span, Rule("zero" if unknown else "copy")))
            taken = span.take(np.broadcast_to(weights[dim], span.old))
            weights[dim] = taken * np.power(np.broadcast_to(rule.dual, span.new), float(power))
        if "after" in factors:
            weights = [w / f for w, f in zip(weights, factors["after"], strict=True)]
        fold = (new.forward_mult(signature) / old.forward_mult(signature)) ** power
        return make_leaf_map(signature, like, grown, fold, weights)

    likes, signatures = declared(new)
    return jax.tree.map(one, signatures, likes, *given.values())


def grow_moments(
    moments: Params,
    old: ModelConfig,
    new: ModelConfig,
    growth: Growth,
    power: int,
    before: Rescaling | None = None,
    after: Rescaling | None = None,
) -> Params:
    """A grown moving average of gradients to some power (Adam's first moment: 1, second: 2), by the dual of the maps.

    Copies take over the average of their source, scaled to what their own average would be. Where the method cannot
    tell what that would be, and for all new entries with ``growth.optimizer == "asymmetric"``, the average starts at 0.
    An average of parameters grows as parameters do, by `grow`.

    Args:
      moments: of the old model.
      old: the configuration before growth.
      new: the configuration after growth.
      growth: how to grow.
      power: of the gradients.
      before: the rescaling that the old moments are stored in (see `rescaling`).
      after: the rescaling that the new moments are stored in.

    Raises:
      ValueError: as `grow`.
    """
    return _grow_average(lineage_of(old, new, growth), moments, power, before, after)


def grow_optimizer(
    state: Any,
    old: ModelConfig,
    new: ModelConfig,
    growth: Growth,
    before: Rescaling | None = None,
    after: Rescaling | None = None,
) -> Any:
    """The optimizer state of the grown model: averages grown by `grow_moments`, counts unchanged.

    With ``growth.optimizer == "fresh"`` averages and counts are 0, as before a first step. Averages that the state
    lacks (`optimizer.is_masked`) are missing in the result too.

    Args:
      state: of the old model's optimizer.
      old: the configuration before growth.
      new: the configuration after growth.
      growth: how to grow.
      before: the rescaling that the old moments are stored in (see `rescaling`).
      after: the rescaling that the new moments are stored in.

    Raises:
      ValueError: a leaf of the state is not declared in `optimizer.AVERAGES`; or as `grow`.
    """
    return _grow_state(lineage_of(old, new, growth), state, before, after)


def grow_opt_state(lineage: Lineage, state: Any, like: Any = None) -> Any:
    """The optimizer state of a grown model, from that of the model before it, each in its own rescaling.

    Args:
      lineage: of the grown model.
      state: of the model before it.
      like: which averages the result has; those that `state` lacks are 0. None: those that `state` has.
    """
    grown = _grow_state(lineage, state, rescaling(lineage.before), rescaling(lineage))
    return grown if like is None else in_form(grown, like)


def _grow_state(lineage: Lineage, state: Any, before: Rescaling | None, after: Rescaling | None) -> Any:
    fresh_state = lineage.last_growth.optimizer == "fresh"

    def one(power: int | None, part: Any) -> Any:
        if power is None:
            return jnp.zeros_like(part) if fresh_state else part
        if fresh_state:
            return map_average(lambda _, like: jnp.zeros(like.shape, like.dtype), part, declared(lineage.cfg)[0])
        return _grow_average(lineage, part, power, before, after)

    return map_parts(one, state)


def _grow_average(
    lineage: Lineage, moments: Params, power: int, before: Rescaling | None, after: Rescaling | None
) -> Params:
    check_shapes(moments, lineage.before.cfg)
    return map_average(lambda value, leaf: leaf.grow(value), moments, moment_maps(lineage, power, before, after))


def check_shapes(tree: Params, cfg: ModelConfig) -> None:
    """Checks that a tree has the structure and shapes of a model's parameters; an average may leave some out.

    Raises:
      ValueError: it does not; the message names the first path that differs, and both shapes.
    """
    shapes, _ = declared(cfg)
    expected = {jax.tree_util.keystr(p): s.shape for p, s in jax.tree_util.tree_leaves_with_path(shapes)}
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
    absent = {jax.tree_util.keystr(p) for p, x in leaves if is_masked(x)}
    found = {jax.tree_util.keystr(p): jnp.shape(x) for p, x in leaves if not is_masked(x)}
    for path in sorted(expected.keys() | found.keys()):
        if path not in absent and expected.get(path) != found.get(path):
            raise ValueError(
                f"Parameter {path} has shape {found.get(path, 'none: it is missing')}, but the source configuration "
                f"gives it {expected.get(path, 'no place')}."
            )


def _grown_axes(signature: Signature, maps: Mapping[str, AxisMap]) -> list[GrownDim]:
    """The dimensions of an array that grow, last dimension first."""
    return [
        (dim, maps[axis].span, maps[axis].rules[signature.role(axis)])
        for dim, axis in reversed(list(enumerate(signature.axes)))
        if axis in maps
    ]
