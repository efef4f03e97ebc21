"""Growing: old shapes to new shapes, for parameters, moments and masks, as pure functions of signatures.

One function serves arrays on one device, arrays on a mesh (under jit, with the target's shardings) and a notebook:

    big = grown_config(small, target, Growth(method="zero"))
    params = grow(params, small, big, Growth(method="zero"), jax.random.key(0))
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.config import ModelConfig
from flm_jax.growth import depth, operators
from flm_jax.growth.axis_map import AxisMap, Span, append, nested
from flm_jax.growth.masks import FIELDS
from flm_jax.model import Params, declared
from flm_jax.signature import Signature, draw

AXES = ("embed", "heads", "kv_heads", "mlp", "layers")
# What may differ between two stages besides the axes: numerics and multipliers, which growth accounts for.
MULTIPLIERS = ("norm_width", "output_mult", "input_mult", "init_std", "init_std_vector")
NUMERICS = ("compute_dtype", "remat", "attention", "scan_unroll")
FREE_FIELDS = frozenset(MULTIPLIERS + NUMERICS)


@dataclass(frozen=True)
class Growth:
    """How to grow.

    Attributes:
      method: operator for every axis that `methods` does not name.
      methods: operator by axis.
      depth: where new layers go: interleave, top or stack.
      ramp_steps: steps over which masks rise from 0 to 1 (methods that mask).
      optimizer: carry (old entries keep Adam's moments, new ones start at 0) or fresh (all start at 0).
    """

    method: str = "zero"
    methods: Mapping[str, str] = field(default_factory=dict)
    depth: str = "interleave"
    ramp_steps: int = 0
    optimizer: str = "carry"

    def __post_init__(self) -> None:
        if self.optimizer not in ("carry", "fresh"):
            raise ValueError(f"Growth.optimizer={self.optimizer!r}: use carry or fresh.")
        for axis in self.methods:
            if axis not in AXES:
                raise ValueError(f"Growth.methods names axis {axis!r}; the axes that grow are {', '.join(AXES)}.")
        for name in (self.method, *self.methods.values()):
            operators.lookup(name)

    def method_of(self, axis: str) -> str:
        """The operator that grows `axis`."""
        return self.methods.get(axis, self.method)

    @property
    def name(self) -> str:
        """The method in one line, for reports: ``mask``, or ``zero, layers by mask``."""
        others = [f"{axis} by {name}" for axis, name in self.methods.items() if name != self.method]
        return ", ".join([self.method, *others])


def axis_maps(old: ModelConfig, new: ModelConfig, growth: Growth) -> dict[str, AxisMap]:
    """The map of every axis whose size changes, by its name.

    Raises:
        ValueError: something changes that growth does not cover, an axis shrinks, or query heads cannot be regrouped.
    """
    for f in dataclasses.fields(ModelConfig):
        before, after = getattr(old, f.name), getattr(new, f.name)
        if f.name not in (*AXES, *FREE_FIELDS) and before != after:
            raise ValueError(
                f"ModelConfig.{f.name} changes from {before!r} to {after!r}; growth covers {', '.join(AXES)}, "
                f"so {f.name} must stay as it is."
            )
    spans = {axis: append(axis, old.sizes[axis], new.sizes[axis]) for axis in ("embed", "kv_heads", "mlp")}
    spans["layers"] = depth.place(old.layers, new.layers, growth.depth)
    spans["heads"] = _query_heads(old, new, spans["kv_heads"])
    return {
        axis: operators.lookup(growth.method_of(axis), axis).map(span)
        for axis, span in spans.items()
        if span.new != span.old
    }


def _query_heads(old: ModelConfig, new: ModelConfig, kv_heads: Span) -> Span:
    before, after = old.heads // old.k_heads, new.heads // new.k_heads
    append("heads", old.heads, new.heads)
    if after < before:
        raise ValueError(
            f"Growing heads {old.heads} -> {new.heads} with kv_heads {old.k_heads} -> {new.k_heads} would leave "
            f"{after} queries a key head where there were {before}: some would lose the key head they read. Keep at "
            f"least {before} a key head, such as heads={before * new.k_heads} or kv_heads={new.heads // before}."
        )
    return nested("heads", kv_heads, append("queries a key head", before, after))


def grown_config(old: ModelConfig, target: ModelConfig, growth: Growth) -> ModelConfig:
    """The configuration that the grown model really has: `target`, with the norm width that the method keeps.

    Raises:
        ValueError: tied embeddings whose effective multipliers would change, since no parameter could absorb that.
    """
    embed = axis_maps(old, target, growth).get("embed")
    if embed is None or embed.keeps_norm_width:
        kept = old.effective_norm_width
        target = target.replace(norm_width=None if kept == target.embed else kept)
    for name, before, after in (
        ("input_mult", old.input_mult, target.input_mult),
        ("output_mult", old.logits_mult, target.logits_mult),
    ):
        if target.tied and not np.isclose(before, after, rtol=1e-12, atol=0):
            right = getattr(target, name) * before / after
            raise ValueError(
                f"Tied embeddings: the effective {name} changes from {before:g} to {after:g}, and no parameter can "
                f"absorb that alone; set {name}={right:g} in the grown model."
            )
    return target


def mask_flags(old: ModelConfig, new: ModelConfig, growth: Growth) -> dict[str, np.ndarray]:
    """By axis, (size,) bool: the fresh entries that start behind a mask."""
    return {axis: m.span.fresh for axis, m in axis_maps(old, new, growth).items() if m.masked and axis in FIELDS}


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
        return _grow_leaf(value, signature, maps, fresh, lambda rule: rule.scale, fold).astype(like.dtype)

    return _map_params(one, params, old, new)


def grow_moments(moments: Params, old: ModelConfig, new: ModelConfig, growth: Growth, power: int) -> Params:
    """A moving average of gradients to some power (Adam's first moment: 1, second: 2), by the dual of the same maps.

    Fresh entries, copied layers among them, start at 0.
    """
    maps = axis_maps(old, new, growth)

    def one(path: str, value: jax.Array, signature: Signature, like: jax.ShapeDtypeStruct) -> jax.Array:
        del path
        fold = (new.forward_mult(signature) / old.forward_mult(signature)) ** power
        nothing = jnp.zeros(like.shape, value.dtype)
        return _grow_leaf(value, signature, maps, nothing, lambda rule: rule.dual**power, fold, copies=False)

    return _map_params(one, moments, old, new)


def grow_optimizer(state: Any, old: ModelConfig, new: ModelConfig, growth: Growth) -> Any:
    """The optimizer's state for the grown model: Adam's moments by `grow_moments`, its count as it was.

    With ``growth.optimizer == "fresh"`` moments and count are those of a first step.
    """

    def one(part: Any) -> Any:
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        if growth.optimizer == "fresh":
            shapes, _ = declared(new)
            zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)
            return part._replace(count=jnp.zeros_like(part.count), mu=zeros, nu=zeros)
        return part._replace(
            mu=grow_moments(part.mu, old, new, growth, power=1),
            nu=grow_moments(part.nu, old, new, growth, power=2),
        )

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))


def _map_params(function: Any, tree: Params, old: ModelConfig, new: ModelConfig) -> Params:
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


def _grow_leaf(
    value: jax.Array,
    signature: Signature,
    maps: Mapping[str, AxisMap],
    fresh: jax.Array,
    weight: Any,
    fold: float,
    copies: bool = True,
) -> jax.Array:
    """One array along all its grown axes: taken and weighted where old, `fresh` or 0 where new."""
    drawn: list[np.ndarray] = []
    silent: list[np.ndarray] = []
    value = value if fold == 1 else value * fold
    for dim, axis in enumerate(signature.axes):
        if axis not in maps:
            continue
        span, rule = maps[axis].span, maps[axis].rules[signature.role(axis)]
        along = (1,) * dim + (span.new,) + (1,) * (len(signature.axes) - dim - 1)
        value = jnp.take(value, span.source, axis=dim)
        scale = weight(rule)
        if not np.all(scale == 1):
            value = value * np.broadcast_to(scale, span.new).reshape(along).astype(value.dtype)
        if rule.fill == "zero":
            silent.append(span.fresh.reshape(along))
        elif rule.fill == "draw" or not copies:
            drawn.append(span.fresh.reshape(along))
    # One vector an axis: what is new in any of them is combined on the device, never as a whole array on the host.
    value = functools.reduce(lambda x, is_new: jnp.where(is_new, fresh, x), drawn, value)
    return functools.reduce(lambda x, is_new: jnp.where(is_new, jnp.zeros((), x.dtype), x), silent, value)
