"""The optimizer across a growth: exact continuation by a rescaling, and a separate learning rate for new entries.

A growth that weights its copies, W' = b W[source], scales their gradients, g' = a g[source]. AdamW continues exactly if
it sees parameters and gradients as they were before: parameters W' / b and gradients g' / a, with its updates
multiplied by b. This is the rescaling. It amounts to eps times a, learning rate times b, weight decay divided by b, and
moments that need no change.

Muon sees the same, and orthogonalises matrices in which every entry is copied. The copies must not change the singular
values, so entries are first multiplied by the roots of their shares, and divided by them afterwards
(`optimizer.directions.scale_by_muon`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.config import ModelConfig
from flm_jax.growth.axis_map import along
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.operators import REGISTRY, WIDTH, lookup
from flm_jax.growth.plan import Growth
from flm_jax.model import declared
from flm_jax.optimizer import Factors, OptimizerConfig, depth_mult, direction, is_masked, times, width_mult
from flm_jax.signature import KINDS, Kind, Signature


@dataclass(frozen=True, eq=False)
class LeafRescaling:
    """How the optimizer sees one parameter: factors on its weights, its gradients, and its part in sums of squares.

    Attributes:
      weight: b in W' = b W[source].
      gradient: a in g' = a g[source].
      share: part of each entry in sums of squares, such as the gradient norm; the shares of all copies of an entry add
        up to 1, so that it counts once.
      model: the model before the first rescaled growth, whose muP multipliers stay.
    """

    weight: Factors
    gradient: Factors
    share: Factors
    model: ModelConfig


Rescaling = Any  # A tree of `LeafRescaling`, with the structure of the parameters.


def rescaling(lineage: Lineage) -> Rescaling | None:
    """The rescaling in which the optimizer sees a model after its growths; None: it sees everything unchanged.

    Raises:
      ValueError: an axis grew in a way that does not scale gradients by known factors.
    """
    if lineage.growth is None or lineage.growth.optimizer != "exact":
        return None
    check_continues(lineage)
    old, new, maps = lineage.before.cfg, lineage.cfg, lineage.maps
    _, old_signatures = declared(old)
    _, signatures = declared(new)

    def one(sig: Signature, leaf: LeafRescaling) -> LeafRescaling:
        ndim = len(sig.axes)
        weight, gradient, share = ([*factors] for factors in (leaf.weight, leaf.gradient, leaf.share))
        for dim, axis in enumerate(sig.axes):
            if axis not in maps:
                continue
            span, rule = maps[axis].span, maps[axis].rules[sig.role(axis)]
            copied = rule.fill == "copy" and not rule.from_above
            # Entries that are drawn, zero, or in a new layer are not rescaled.
            known = ~span.fresh | (copied & (np.broadcast_to(rule.dual, span.new) != 0))
            count = np.where(known, np.bincount(span.source, weights=known)[span.source], 1)
            for factors, by in ((weight, rule.scale), (gradient, rule.dual), (share, 1 / np.maximum(count, 1))):
                taken = span.take(factors[dim], dim)
                scaled = taken * along(np.broadcast_to(by, span.new), dim, ndim)
                factors[dim] = np.where(along(known, dim, ndim), scaled, 1.0)
        fold = new.forward_mult(sig) / old.forward_mult(sig)
        weight[0], gradient[0] = weight[0] / fold, gradient[0] * fold
        return LeafRescaling(tuple(weight), tuple(gradient), tuple(share), leaf.model)

    start = rescaling(lineage.before)
    if start is None:
        start = jax.tree.map(lambda sig: _unscaled(sig, old), old_signatures)
    return jax.tree.map(one, signatures, start)


def check_continues(lineage: Lineage, optimizer: str = "adamw") -> None:
    """Checks that the optimizer can continue exactly through a model's last growth, if that growth asks for it.

    Args:
      lineage: of the grown model.
      optimizer: "muon" mixes the entries of a matrix, so all that are new must be copies.

    Raises:
      ValueError: an axis grew in a way that does not scale gradients by known factors.
    """
    if lineage.growth is None or lineage.growth.optimizer != "exact":
        return
    for axis, grown in lineage.outline.items():
        method, kind = lineage.last_growth.method_of(axis), KINDS[axis]
        if grown.active and not lookup(method).continues:
            known = ", ".join(
                sorted(
                    name
                    for name, operator in REGISTRY.items()
                    if kind in operator.kinds and operator.preserving and (operator.continues or kind not in WIDTH)
                )
            )
            name = "Muon" if optimizer == "muon" else "AdamW"
            raise ValueError(
                f"optimizer='exact': {name} cannot go on exactly where {axis} grows by {method!r}; {known} allow it."
            )
        if optimizer == "muon" and kind in (*WIDTH, Kind.PAIRED) and not lookup(method).continues:
            known = ", ".join(sorted(name for name, each in REGISTRY.items() if kind in each.kinds and each.continues))
            raise ValueError(
                f"optimizer='exact': Muon cannot go on exactly where {axis} grows by {method!r}, because it mixes old "
                f"and new entries of a matrix; {f'{known} allow it' if known else 'no method allows it'}. Or take "
                "optimizer='carry'."
            )
        if grown.span.group is not None:
            raise ValueError(
                f"optimizer='exact': {axis} are divided among their readers, {grown.span.old} to {grown.span.new}, and "
                "each part has only its own readers' gradient from now on; take optimizer='carry'."
            )


def _unscaled(sig: Signature, cfg: ModelConfig) -> LeafRescaling:
    ones = tuple(along(np.ones(cfg.sizes[axis]), dim, len(sig.axes)) for dim, axis in enumerate(sig.axes))
    return LeafRescaling(ones, ones, ones, cfg)


def rescaled_moments(moments: Any, scaling: Rescaling | None, power: int) -> Any:
    """Moving averages of gradients to some power, as the optimizer sees them in a rescaling."""
    if scaling is None:
        return moments
    return jax.tree.map(lambda m, leaf: times(m, leaf.gradient, -power), moments, scaling)


def rescaled_optimizer(
    cfg: OptimizerConfig, model: ModelConfig, signatures: Any, scaling: Rescaling | None = None
) -> optax.GradientTransformation:
    """The optimizer in a rescaling, after clipping by the global gradient norm, in which copies count once.

    Args:
      cfg: the optimizer's configuration.
      model: its sizes give muP's multipliers, unless there is a rescaling; Muon computes in its `compute_dtype`.
      signatures: of the model's parameters, as a tree.
      scaling: how the optimizer sees parameters and gradients; None: unchanged.
    """

    def mult(sig: Signature, leaf: LeafRescaling | None = None) -> float:
        before = model if leaf is None else leaf.model
        return width_mult(cfg, sig, before.sizes, before.base_sizes)

    def eps_mult(sig: Signature, leaf: LeafRescaling | None = None) -> float:
        return depth_mult(sig, model if leaf is None else leaf.model)

    given = [] if scaling is None else [scaling]
    mults, eps_mults = (jax.tree.map(one, signatures, *given) for one in (mult, eps_mult))
    shares = None if scaling is None else jax.tree.map(lambda leaf: leaf.share, scaling)
    inner = direction(cfg, signatures, mults, eps_mults, model.compute, shares)

    def clipped(grads: Any) -> Any:
        if not cfg.clip:
            return grads
        if scaling is None:
            return optax.clip_by_global_norm(cfg.clip).update(grads, optax.EmptyState())[0]
        squares = jax.tree.map(lambda g, leaf: jnp.sum(times(g * g, leaf.share)), grads, scaling)
        norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
        return jax.tree.map(lambda g: jnp.where(norm < cfg.clip, g, g / norm.astype(g.dtype) * cfg.clip), grads)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        seen = clipped(rescaled_moments(grads, scaling, 1))
        if scaling is None:
            return inner.update(seen, state, params)
        params = jax.tree.map(lambda p, leaf: times(p, leaf.weight, -1), params, scaling)
        steps, state = inner.update(seen, state, params)
        return jax.tree.map(lambda u, leaf: times(u, leaf.weight), steps, scaling), state

    return optax.GradientTransformation(inner.init, update)


def new_entries(lineage: Lineage) -> Any:
    """The fresh entries: a tree like the parameters, per grown dimension a (size,) bool vector shaped to broadcast."""
    maps = lineage.maps
    _, signatures = declared(lineage.cfg)

    def one(sig: Signature) -> Factors:
        ndim = len(sig.axes)
        return tuple(along(maps[axis].span.fresh, dim, ndim) for dim, axis in enumerate(sig.axes) if axis in maps)

    return jax.tree.map(one, signatures)


def scale_new(steps: Any, flags: Any, factor: jax.Array) -> Any:
    """Updates of the optimizer, with those of new entries multiplied by a factor."""

    def one(step: jax.Array, fresh: Factors) -> jax.Array:
        if not fresh:
            return step
        is_new: Any = functools.reduce(lambda a, b: a | jnp.asarray(b), fresh[1:], jnp.asarray(fresh[0]))
        return jnp.where(is_new, step * factor.astype(step.dtype), step)

    return jax.tree.map(one, steps, flags)


def rewarming(growth: Growth, step: jax.Array) -> jax.Array:
    """The part of the ordinary rate that new entries have: it rises from 0 to `rewarm_to` (2602.02472).

    Args:
      growth: an asymmetric growth.
      step: () int, steps since the growth, before this one.
    """
    return growth.rewarm_to * jnp.clip((jnp.float32(step) + 1) / max(growth.rewarm_steps, 1), 0.0, 1.0)


def rate_of_new(growth: Growth, step: jax.Array, count: jax.Array, b1: float, b2: float) -> jax.Array:
    """The factor on Adam's updates of new entries: the re-warming of their rate, times a correction for their age.

    Adam divides its averages by 1 - b^count, with one count for all entries. Averages that started at 0 with this stage
    need their own age there; without the correction their first update would be (1 - b1) / sqrt(1 - b2) times the rate:
    0.45 of it at b2 = 0.95, 3.2 times at 0.999. (eps is left as it is.) Muon's momentum has no bias correction, and the
    size of its updates does not follow that of the momentum: its new entries need the re-warming alone.

    Args:
      growth: an asymmetric growth.
      step: () int, steps since the growth, before this one.
      count: () int, Adam's count before this step.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
    """
    age, total = jnp.float32(step) + 1, jnp.float32(count) + 1
    first = (1 - b1**total) / (1 - b1**age)
    second = (1 - b2**age) / (1 - b2**total)
    return rewarming(growth, step) * first * jnp.sqrt(second)


def paced(cfg: OptimizerConfig, lineage: Lineage, steps: Any, step: jax.Array, count: jax.Array) -> Any:
    """Updates of the optimizer after an asymmetric growth, with those of new entries at their own rate.

    Args:
      cfg: the optimizer's settings.
      lineage: of the grown model.
      steps: the updates; it may leave parameters out.
      step: () int, steps since the growth, before this one.
      count: () int, Adam's count before this step.
    """
    growth, (_, signatures) = lineage.last_growth, declared(lineage.cfg)
    of_adam, of_muon = rate_of_new(growth, step, count, cfg.b1, cfg.b2), rewarming(growth, step)

    def one(sig: Signature, fresh: Factors, update: Any) -> Any:
        if is_masked(update):
            return update
        return scale_new(update, fresh, of_muon if cfg.name == "muon" and sig.is_matrix_like else of_adam)

    return jax.tree.map(one, signatures, new_entries(lineage), steps)
