"""The configuration of a growth: the operator of each axis, the axis maps, and the configuration of the grown model.

Nothing here touches parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from flm_jax.config import ModelConfig
from flm_jax.growth import depth, operators
from flm_jax.growth.axis_map import AxisMap, Span, append, divided, nested
from flm_jax.growth.masks import SHAPES, Ramp
from flm_jax.records import counted, recorded
from flm_jax.records.fields import Count, Positive, one_of
from flm_jax.signature import KINDS

AXES = tuple(KINDS)
Axis = Annotated[str, one_of(AXES)]
OPTIMIZER = ("carry", "exact", "fresh", "asymmetric")
# What may differ between two stages besides the axes: multipliers, which growth accounts for, the deviations of drawn
# entries, and numerics.
MULTIPLIERS = ("norm_width", "head_width", "output_mult", "input_mult", "residual_mult", "base_layers")
INITIALISATION = ("init_std", "init_std_vector")
NUMERICS = ("compute_dtype", "remat", "attention", "scan_unroll")
FREE_FIELDS = frozenset(MULTIPLIERS + INITIALISATION + NUMERICS)


@dataclass(frozen=True)
@recorded
class Growth:
    """How to grow a model.

    Attributes:
      method: operator for every axis that `methods` does not name; None: each axis that grows must be named.
      methods: operator by axis.
      depth: where new layers go: interleave, top, middle, stack, distance, or how many copies follow each old layer.
      distance: what "distance" measures between a layer's input and output: angular, cosine or relative_l2.
      ramp_steps: steps over which masks rise from 0 to 1 (methods that mask).
      ramp_delay: steps before masks start to rise.
      ramp_shape: linear or cosine.
      ramps: the ramp of single axes, where it differs.
      norm: keep (norms keep dividing by the width from before, where the method allows it) or ramp (that width rises to
        the new one, as masks do, so that the model ends with ordinary norms).
      optimizer: carry (moments follow their entries, by the dual of the axis maps; those of drawn entries start at 0),
        exact (the same, and the optimizer continues as if nothing had grown, see `rescaling`), asymmetric (old entries
        keep their moments; those of all new entries, copies included, start at 0, and new entries have their own
        learning rate: SPARKLING, 2602.02472), or fresh (all moments start at 0).
      rewarm_steps: steps over which the learning rate of new entries rises from 0 (asymmetric).
      rewarm_to: the multiple of the ordinary learning rate at which new entries then stay (asymmetric; 1.3 in
        SPARKLING).
    """

    method: str | None = "zero"
    methods: Mapping[Axis, str] = field(default_factory=dict)
    depth: Annotated[str, one_of(depth.PLACES)] | Sequence[Count] = "interleave"
    distance: Annotated[str, one_of(depth.METRICS)] = "angular"
    ramp_steps: Count = 0
    ramp_delay: Count = 0
    ramp_shape: Annotated[str, one_of(SHAPES)] = "linear"
    ramps: Mapping[Axis, Ramp] = field(default_factory=dict)
    norm: Annotated[str, one_of(("keep", "ramp"))] = "keep"
    optimizer: Annotated[str, one_of(OPTIMIZER)] = "carry"
    rewarm_steps: Count = 0
    rewarm_to: Positive = 1.0

    def __post_init__(self) -> None:
        for method in (self.method, *self.methods.values()):
            if method is not None:
                operators.lookup(method)
        if (self.rewarm_steps or self.rewarm_to != 1.0) and self.optimizer != "asymmetric":
            raise ValueError(f"Growth.rewarm_steps and rewarm_to belong to 'asymmetric', not {self.optimizer!r}.")

    def method_of(self, axis: str) -> str:
        """The name of the operator that grows `axis`.

        Raises:
          ValueError: it has none.
        """
        name = self.methods.get(axis, self.method)
        if name is None:
            raise ValueError(f"Axis {axis!r} grows, but Growth gives it no method: set Growth.methods[{axis!r}].")
        return name

    def ramp_of(self, axis: str) -> Ramp:
        """The mask ramp of `axis`."""
        return self.ramps.get(axis, Ramp(self.ramp_steps, self.ramp_delay, self.ramp_shape))

    @property
    def name(self) -> str:
        """The method in one line, for reports: ``mask``, or ``zero, layers by mask``."""
        others = [f"{axis} by {name}" for axis, name in self.methods.items() if name != self.method]
        return ", ".join([*([self.method] if self.method else []), *others])

    def settled(self, distances: Sequence[float], layers: int) -> Growth:
        """This growth, with copies of layers placed by measured distances if it asks for that."""
        if self.depth != "distance":
            return self
        if not distances:  # of a model without layers, above which there is one place
            return dataclasses.replace(self, depth="top")
        return dataclasses.replace(self, depth=depth.by_distance(distances, layers))


def axis_maps(old: ModelConfig, new: ModelConfig, growth: Growth) -> dict[str, AxisMap]:
    """The map of each axis whose size changes, by axis name.

    Raises:
      ValueError: a field changes that growth does not cover, an axis shrinks, an axis has no method, or heads cannot be
        regrouped.
    """
    for f in dataclasses.fields(ModelConfig):
        before, after = getattr(old, f.name), getattr(new, f.name)
        if f.name not in (*AXES, *FREE_FIELDS) and before != after:
            raise ValueError(
                f"ModelConfig.{f.name} changes from {before!r} to {after!r}; growth covers {', '.join(AXES)}, "
                f"so {f.name} must stay as it is."
            )
    spans = {axis: append(axis, old.sizes[axis], new.sizes[axis]) for axis in ("embed", "mlp", "vocab")}
    spans["kv_heads"], spans["heads"] = _heads(old, new)
    spans["head_dim"] = _rotary_pairs(old.h_dim, new.h_dim)
    spans["layers"] = depth.place(old.layers, new.layers, growth.depth)
    maps = {axis: _operator(growth, axis, new).map(spans[axis]) for axis in AXES if spans[axis].new != spans[axis].old}
    if "layers" in maps and not old.layers and any(rule.fill == "copy" for rule in maps["layers"].rules.values()):
        raise ValueError(
            f"A model without layers has none that {growth.method_of('layers')!r} could copy: grow its layers by mask, "
            "zero, identity or fresh, which draw them (Growth.methods)."
        )
    if new.qk_norm and "head_dim" in maps and not maps["head_dim"].masked:
        operator = operators.lookup(growth.method_of("head_dim"))
        if operator.preserving:
            raise ValueError(
                f"head_dim grows by {operator.name!r}, but queries and keys go through norms, whose mean squares its "
                "new entries would change: grow head_dim by 'mask', which hides them there (Growth.methods)."
            )
    both = [growth.method_of(axis) for axis in ("heads", "kv_heads") if axis in maps]
    if len(set(both)) > 1 and (maps["heads"].active or maps["kv_heads"].active):
        raise ValueError(
            f"Heads grow by {both[0]!r} and the key heads that they read by {both[1]!r}: copies of a head must find "
            "copies of its key head, with the same sources and shares. Grow both by one of the two."
        )
    return maps


def _operator(growth: Growth, axis: str, new: ModelConfig) -> operators.Operator:
    """The operator that grows an axis.

    Raises:
      ValueError: the axis has no method, or one that does not grow it.
    """
    name, kind = growth.method_of(axis), KINDS[axis]
    operator = operators.lookup(name)
    if kind not in operator.kinds:
        able = ", ".join(sorted(other.name for other in operators.REGISTRY.values() if kind in other.kinds))
        right = "mask" if axis == "head_dim" and new.qk_norm else "zero"
        raise ValueError(
            f"Growth operator {name!r} does not grow axis {axis!r}; these do: {able}: bind "
            f"Growth.methods = {dict(growth.methods) | {axis: right}}."
        )
    return operator


def outline_maps(old: ModelConfig, new: ModelConfig, growth: Growth) -> dict[str, AxisMap]:
    """Like `axis_maps`, but also before distances are measured: the places of new layers are then provisional.

    Raises:
      ValueError: as `axis_maps`.
    """
    anywhere = dataclasses.replace(growth, depth="interleave") if growth.depth == "distance" else growth
    return axis_maps(old, new, anywhere)


def _heads(old: ModelConfig, new: ModelConfig) -> tuple[Span, Span]:
    """The spans of key heads and of query heads; each query head stays with the key head that it reads.

    With fewer queries per key head than before, key heads are first divided among their queries, which changes nothing;
    then key heads, and queries per key head, are added.
    """
    before, after = old.heads // old.k_heads, new.heads // new.k_heads
    append("heads", old.heads, new.heads)
    append("kv_heads", old.k_heads, new.k_heads)
    parts = 1
    if after < before:
        parts = before // after
        if before % after:
            raise ValueError(
                f"Growing heads {old.heads} -> {new.heads} with kv_heads {old.k_heads} -> {new.k_heads} would leave "
                f"{counted(after, 'query', 'queries')} per key head where there were {before}: some would "
                "lose the key head they read. Keep "
                f"{before} or more per key head, such as heads={before * new.k_heads}; or divide the key heads among "
                f"their queries, which needs a number per key head that divides {before}."
            )
        before = after
    kv_heads = append("kv_heads", old.k_heads * parts, new.k_heads)
    heads = nested("heads", kv_heads, append("queries per key head", before, after))
    return divided(kv_heads, parts), heads


def _rotary_pairs(old: int, new: int) -> Span:
    """The span of a head's entries, where i and i + H/2 are one rotary pair: new pairs follow the old ones."""
    halves = append("halves", 2, 2)
    append("head_dim", old, new)
    return nested("head_dim", halves, append("pairs", old // 2, new // 2))


def grown_config(old: ModelConfig, target: ModelConfig, growth: Growth) -> ModelConfig:
    """The configuration of the grown model: `target`, with the norm and head widths that the method keeps.

    Raises:
      ValueError: tied embeddings whose effective multipliers would change, since no parameter could absorb that.
    """
    maps = outline_maps(old, target, growth)
    embed = maps.get("embed")
    squares = 1.0 if embed is None else embed.squares
    if squares is not None and growth.norm == "keep":
        kept = old.effective_norm_width * squares
        target = target.replace(norm_width=None if np.isclose(kept, target.embed, rtol=1e-12) else kept)
    kept = old.effective_head_width
    target = target.replace(head_width=None if kept == target.h_dim else kept)
    for name, before, after in (
        ("input_mult", old.input_mult, target.input_mult),
        ("output_mult", _kept_logits_mult(old, target, maps), target.logits_mult),
    ):
        if target.tied and not np.isclose(before, after, rtol=1e-12, atol=0):
            right = getattr(target, name) * before / after
            raise ValueError(
                f"Tied embeddings: the effective {name} would be {after:g} and must be {before:g}, since no parameter "
                f"can absorb that alone; set {name}={right:g} in the grown model."
            )
    return target


def changed(old: ModelConfig, changes: Mapping[str, Any], growth: Growth) -> ModelConfig:
    """A target that differs from `old` in the given fields; logits keep their multiplier, unless it is changed too.

    Raises:
      ValueError: there is no such field, or as `axis_maps`.
    """
    target = old.changed({"norm_width": None, **changes})
    if "output_mult" in changes or "base_width" in changes:
        return target
    kept = _kept_logits_mult(old, target, outline_maps(old, target, growth))
    return target.replace(output_mult=kept * target.embed / target.base_width)


def _kept_logits_mult(old: ModelConfig, target: ModelConfig, maps: Mapping[str, AxisMap]) -> float:
    """The multiplier of logits with which the head stays as it is.

    A tied embedding is a writer that also serves as the head, without a reader's weights: where copies increase the
    stream's sum of squares, logits increase by the same factor.
    """
    embed = maps.get("embed")
    increase = embed.squares if target.tied and embed is not None and embed.active else None
    return old.logits_mult / (increase or 1.0)
