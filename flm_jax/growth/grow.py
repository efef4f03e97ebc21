"""Growing: old shapes to new shapes, for parameters and moving averages, as pure functions of signatures.

One function serves arrays on one device, arrays on a mesh (under jit, with the target's shardings) and a notebook:

    big = grown_config(small, target, Growth(method="zero"))
    params = grow(params, small, big, Growth(method="zero"), jax.random.key(0))
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.config import ModelConfig
from flm_jax.growth.axis_map import AxisMap, Rule, Span, along
from flm_jax.growth.frame import Frame, into_frame, out_of_frame
from flm_jax.growth.plan import Growth, axis_maps
from flm_jax.model import Params, declared
from flm_jax.signature import Signature, draw

# Noise in copies, in standard deviations of an initialisation.
NOISE = 0.1
# More runs of entries than this are looked up by index.
MAX_RUNS = 8


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
    maps = axis_maps(old, new, growth)

    def one(path: str, value: jax.Array, signature: Signature, like: jax.ShapeDtypeStruct) -> jax.Array:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        fresh = draw(signature, leaf_key, like.shape, std=new.std(signature), dtype=like.dtype)
        fold = old.forward_mult(signature) / new.forward_mult(signature)
        value = _take(value if fold == 1 else value * fold, signature, maps, lambda rule: rule.scale)
        value = value + _cancelling(fresh, signature, maps)
        drawn = _where(signature, maps, lambda rule: rule.fill == "draw")
        silent = _where(signature, maps, lambda rule: rule.fill == "zero")
        # One vector an axis: what is new in any of them is combined on the device, never as an array on the host.
        value = functools.reduce(lambda x, is_new: jnp.where(is_new, fresh, x), drawn, value)
        value = functools.reduce(lambda x, is_new: jnp.where(is_new, jnp.zeros((), x.dtype), x), silent, value)
        return value.astype(like.dtype)

    return map_params(one, params, old, new)


def grow_moments(moments: Params, old: ModelConfig, new: ModelConfig, growth: Growth, power: int) -> Params:
    """A moving average of gradients to some power (Adam's first moment: 1, second: 2), by the dual of the same maps.

    Copies take over the average of their source, which is what theirs would be. Where the method cannot say what it
    would be, and everywhere new with ``growth.optimizer == "asymmetric"``, it starts at 0. An average of parameters
    grows as parameters do, by `grow`.

    Raises:
        ValueError: as `grow`.
    """
    maps = axis_maps(old, new, growth)
    forget = growth.optimizer == "asymmetric"

    def one(path: str, value: jax.Array, signature: Signature, like: jax.ShapeDtypeStruct) -> jax.Array:
        del path, like
        fold = (new.forward_mult(signature) / old.forward_mult(signature)) ** power
        value = _take(value if fold == 1 else value * fold, signature, maps, lambda rule: np.power(rule.dual, power))
        unknown = _where(signature, maps, lambda rule: forget or rule.fill != "copy" or rule.from_above)
        return functools.reduce(lambda x, is_new: jnp.where(is_new, jnp.zeros((), x.dtype), x), unknown, value)

    return map_params(one, moments, old, new)


def grow_optimizer(
    state: Any,
    old: ModelConfig,
    new: ModelConfig,
    growth: Growth,
    before: Frame | None = None,
    after: Frame | None = None,
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
        moments = out_of_frame(moments, before, power)
        return into_frame(grow_moments(moments, old, new, growth, power), after, power)

    def one(part: Any) -> Any:
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        if growth.optimizer == "fresh":
            shapes, _ = declared(new)
            zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)
            return part._replace(count=jnp.zeros_like(part.count), mu=zeros, nu=zeros)
        return part._replace(mu=moved(part.mu, 1), nu=moved(part.nu, 2))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))


def fold_norm_width(params: Params, cfg: ModelConfig) -> tuple[Params, ModelConfig]:
    """The same function with ordinary norms, which divide by the model's own width, for other implementations.

    With d the kept width and D the model's: scale sqrt(d / D) and eps d / D, since x / sqrt(s / d + eps) is
    sqrt(d / D) x / sqrt(s / D + eps d / D). In bfloat16 the scales would be rounded: keep them in float32.
    """
    ratio = cfg.effective_norm_width / cfg.embed
    _, signatures = declared(cfg)
    folded = jax.tree.map(lambda x, sig: x * ratio**0.5 if sig.gains else x, params, signatures)
    return folded, cfg.replace(norm_width=None, norm_eps=cfg.norm_eps * ratio)


def map_params(function: Any, tree: Params, old: ModelConfig, new: ModelConfig) -> Params:
    """Maps (path, leaf, signature, target shape) over the parameters, after checking that they are those of `old`."""
    shapes, signatures = declared(old)
    likes, _ = declared(new)
    expected = {jax.tree_util.keystr(p): s.shape for p, s in jax.tree_util.tree_leaves_with_path(shapes)}
    found = {jax.tree_util.keystr(p): jnp.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            raise ValueError(
                f"Parameter {path} has shape {found.get(path, 'none: it is missing')}, but the source configuration "
                f"gives it {expected.get(path, 'no place')}."
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves),
        tree,
        signatures,
        likes,
    )


def _grown_axes(signature: Signature, maps: Mapping[str, AxisMap]) -> list[tuple[int, Span, Rule]]:
    """The dimensions of an array that grow, the last one first: layers, which others may look up, come last."""
    return [
        (dim, maps[axis].span, maps[axis].rules[signature.role(axis)])
        for dim, axis in reversed(list(enumerate(signature.axes)))
        if axis in maps
    ]


def _entries(value: jax.Array, span: Span, dim: int) -> jax.Array:
    """The source of every new entry along one dimension.

    Runs of entries are sliced and joined, which the partitioner does by exchanging what moves, where it would gather
    the whole array for indices along a dimension that is split over devices.
    """
    if span.parts is not None and span.group is None:
        outer, inner = span.parts
        shape = value.shape
        split = value.reshape(*shape[:dim], outer.old, inner.old, *shape[dim + 1 :])
        taken = _entries(_entries(split, outer, dim), inner, dim + 1)
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


def _take(
    value: jax.Array,
    signature: Signature,
    maps: Mapping[str, AxisMap],
    weight: Callable[[Rule], float | np.ndarray],
) -> jax.Array:
    """An array at its new shape: every entry taken from its source and weighted."""
    ndim = value.ndim
    for dim, span, rule in _grown_axes(signature, maps):
        is_new = along(span.fresh, dim, ndim)
        taken = _entries(value, span, dim)
        if rule.from_above and signature.stacked:
            above = jnp.concatenate([value[1:], value[-1:]])
            taken = jnp.where(is_new, _entries(above, span, dim), taken)
        if rule.fill == "mean":
            taken = jnp.where(is_new, jnp.mean(value, axis=dim, keepdims=True), taken)
        scale = weight(rule)
        if not np.all(scale == 1):
            taken = taken * along(np.broadcast_to(scale, span.new), dim, ndim).astype(taken.dtype)
        value = taken
    return value


def _where(signature: Signature, maps: Mapping[str, AxisMap], holds: Callable[[Rule], bool]) -> list[np.ndarray]:
    """By grown dimension whose rule `holds`: which entries are fresh, shaped to broadcast."""
    ndim = len(signature.axes)
    return [along(span.fresh, dim, ndim) for dim, span, rule in _grown_axes(signature, maps) if holds(rule)]


def _cancelling(fresh: jax.Array, signature: Signature, maps: Mapping[str, AxisMap]) -> jax.Array | float:
    """Noise that the copies of each entry cancel, given the sizes c of what they meet: sum(c noise) = 0 over copies."""
    total: jax.Array | float = 0.0
    for dim, span, rule in _grown_axes(signature, maps):
        if rule.noise is None:
            continue
        group = span.alike
        moved = jnp.moveaxis(fresh, dim, -1)
        size = np.bincount(group, weights=rule.noise**2)[group]
        c, weight = (along(v, fresh.ndim - 1, fresh.ndim).astype(fresh.dtype) for v in (rule.noise, rule.noise / size))
        met = jnp.zeros((*moved.shape[:-1], int(group.max()) + 1), moved.dtype).at[..., group].add(moved * c)
        noise = moved - jnp.take(met, group, axis=-1) * weight
        total = total + NOISE * jnp.moveaxis(noise, -1, dim)
    return total
