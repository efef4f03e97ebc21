"""Growing: old shapes to new shapes, for parameters and moving averages, as pure functions of signatures.

One function serves arrays on one device, arrays on a mesh (under jit, with the target's shardings) and a notebook:

    big = grown_config(small, target, Growth(method="zero"))
    params = grow(params, small, big, Growth(method="zero"), jax.random.key(0))
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.config import ModelConfig
from flm_jax.growth.axis_map import AxisMap, Rule
from flm_jax.growth.exact_adamw import LeafRescaling, Rescaling
from flm_jax.growth.leaf_map import Grown, LeafMap, make_leaf_map
from flm_jax.growth.plan import Growth, axis_maps
from flm_jax.model import Params, declared
from flm_jax.signature import Signature, draw


def grow(params: Params, old: ModelConfig, new: ModelConfig, growth: Growth, key: jax.Array) -> Params:
    """Parameters of `new` that compute what those of `old` did, where the method preserves.

    Args:
      params: parameters of `old`.
      old: the configuration before.
      new: the configuration after: what `grown_config` returned.
      growth: how.
      key: for what is drawn; the same inputs give the same bytes.

    Returns:
      A tree like a fresh initialisation of `new`, in shapes and dtypes.

    Raises:
      ValueError: the parameters are not those of `old` (the path and both shapes are named), or see `axis_maps`.
    """

    def one(path: str, value: jax.Array, way: LeafMap) -> jax.Array:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return way.grow(value, functools.partial(fresh, way, leaf_key, way.shape, new.std(way.signature)), leaf_key)

    check_shapes(params, old)
    return jax.tree_util.tree_map_with_path(
        lambda path, value, way: one(jax.tree_util.keystr(path, simple=True, separator="/"), value, way),
        params,
        param_maps(old, new, growth),
    )


def fresh(way: LeafMap, key: jax.Array, shape: tuple[int, ...], std: float, **offset: Any) -> jax.Array:
    """What is drawn for a parameter, or for a block of it that begins at some `offset`."""
    return draw(way.signature, key, shape, std=std, dtype=way.wide, **offset)


def param_maps(old: ModelConfig, new: ModelConfig, growth: Growth) -> Params:
    """How every parameter grows: a tree of `LeafMap`."""
    maps = axis_maps(old, new, growth)

    def one(signature: Signature, like: jax.ShapeDtypeStruct) -> LeafMap:
        grown = _grown_axes(signature, maps)
        weights = [np.ones(1) for _ in signature.axes]
        for dim, span, rule in grown:
            weights[dim] = np.broadcast_to(rule.scale, span.new)
        return make_leaf_map(signature, like, grown, old.forward_mult(signature) / new.forward_mult(signature), weights)

    likes, signatures = declared(new)
    return jax.tree.map(one, signatures, likes)


def moment_maps(
    old: ModelConfig,
    new: ModelConfig,
    growth: Growth,
    power: int,
    before: Rescaling | None = None,
    after: Rescaling | None = None,
) -> Params:
    """How moving averages of gradients to some power grow, in the frames that they are in: a tree of `LeafMap`."""
    maps = axis_maps(old, new, growth)
    forget = growth.optimizer == "asymmetric"

    def one(signature: Signature, like: jax.ShapeDtypeStruct, *views: LeafRescaling) -> LeafMap:
        seen = dict(zip([f for f in ("before", "after") if frames[f] is not None], views, strict=True))
        factors = {name: [np.ravel(f) ** float(power) for f in view.gradient] for name, view in seen.items()}
        weights = factors.get("before", [np.ones(1) for _ in signature.axes])
        grown: list[Grown] = []
        for dim, span, rule in _grown_axes(signature, maps):
            unknown = forget or rule.fill != "copy" or rule.from_above
            grown.append((dim, span, Rule("zero" if unknown else "copy")))
            taken = np.broadcast_to(weights[dim], span.old)[span.source]
            weights[dim] = taken * np.power(np.broadcast_to(rule.dual, span.new), float(power))
        if "after" in factors:
            weights = [w / f for w, f in zip(weights, factors["after"], strict=True)]
        fold = (new.forward_mult(signature) / old.forward_mult(signature)) ** power
        return make_leaf_map(signature, like, grown, fold, weights)

    frames = {"before": before, "after": after}
    likes, signatures = declared(new)
    return jax.tree.map(one, signatures, likes, *(f for f in frames.values() if f is not None))


def grow_moments(
    moments: Params,
    old: ModelConfig,
    new: ModelConfig,
    growth: Growth,
    power: int,
    before: Rescaling | None = None,
    after: Rescaling | None = None,
) -> Params:
    """A moving average of gradients to some power (Adam's first moment: 1, second: 2), by the dual of the same maps.

    Copies take over the average of their source, which is what theirs would be. Where the method cannot say what it
    would be, and everywhere new with ``growth.optimizer == "asymmetric"``, it starts at 0. An average of parameters
    grows as parameters do, by `grow`.

    Args:
      moments: of the old model.
      old: the configuration before.
      new: the configuration after.
      growth: how.
      power: of the gradients.
      before: the frame that the old moments are in (see `frame`).
      after: the frame that the new ones shall be in.

    Raises:
        ValueError: as `grow`.
    """
    check_shapes(moments, old)
    ways = moment_maps(old, new, growth, power, before, after)
    return jax.tree.map(lambda value, way: way.grow(value), moments, ways)


def grow_optimizer(
    state: Any,
    old: ModelConfig,
    new: ModelConfig,
    growth: Growth,
    before: Rescaling | None = None,
    after: Rescaling | None = None,
) -> Any:
    """The optimizer's state for the grown model: Adam's moments by `grow_moments`, its count as it was.

    With ``growth.optimizer == "fresh"`` moments and count are those of a first step.

    Args:
      state: of the old model's optimizer.
      old: the configuration before.
      new: the configuration after.
      growth: how.
      before: the frame that the old moments are in (see `frame`).
      after: the frame that the new ones shall be in.
    """

    def moved(moments: Params, power: int) -> Params:
        return grow_moments(moments, old, new, growth, power, before, after)

    def one(part: Any) -> Any:
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        if growth.optimizer == "fresh":
            shapes, _ = declared(new)
            zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)
            return part._replace(count=jnp.zeros_like(part.count), mu=zeros, nu=zeros)
        return part._replace(mu=moved(part.mu, 1), nu=moved(part.nu, 2))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))


def check_shapes(tree: Params, cfg: ModelConfig) -> None:
    """Checks that these are parameters, or averages, of a model.

    Raises:
        ValueError: names the first path that is not, and both shapes.
    """
    shapes, _ = declared(cfg)
    expected = {jax.tree_util.keystr(p): s.shape for p, s in jax.tree_util.tree_leaves_with_path(shapes)}
    found = {jax.tree_util.keystr(p): jnp.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise ValueError(
                f"Parameter {path} has shape {found.get(path, 'none: it is missing')}, but the source configuration "
                f"gives it {expected.get(path, 'no place')}."
            )


def _grown_axes(signature: Signature, maps: Mapping[str, AxisMap]) -> list[Grown]:
    """The dimensions of an array that grow, the last one first."""
    return [
        (dim, maps[axis].span, maps[axis].rules[signature.role(axis)])
        for dim, axis in reversed(list(enumerate(signature.axes)))
        if axis in maps
    ]
