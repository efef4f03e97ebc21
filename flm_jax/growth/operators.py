"""The growth operators: what fresh entries hold. Each is one function and one registry entry.

A registered operator is automatically part of the property tests, which check what its entry claims, and of the table
of measured errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from flm_jax.growth.axis_map import AxisMap, Rule, Span, resampled
from flm_jax.records import meant
from flm_jax.signature import KINDS, Kind, Role

Map = Callable[[Span], AxisMap]


@dataclass(frozen=True)
class Operator:
    """A registry entry.

    Attributes:
      name: its name in `Growth.method` and `Growth.methods`.
      map: from a span to an axis map.
      preserving: whether the grown model computes what the old one did.
      continues: whether the optimizer with `optimizer="exact"` then takes the same steps as without the growth.
      kinds: the kinds of axes that it grows.
      source: where it is described.
    """

    name: str
    map: Map
    preserving: bool
    continues: bool
    kinds: frozenset[Kind]
    source: str


REGISTRY: dict[str, Operator] = {}
# Second names, under which plans may call an operator too; it is tested and measured under its own.
ALIASES = {"fpi": "net2net"}
EVERYWHERE = frozenset(Kind)
INSIDE = frozenset({Kind.RESIDUAL, Kind.INNER, Kind.PAIRED, Kind.STACK})
WIDTH = frozenset({Kind.RESIDUAL, Kind.INNER})
STACK = frozenset({Kind.STACK})


def register(
    name: str, *, preserving: bool, source: str, kinds: frozenset[Kind], continues: bool = False
) -> Callable[[Map], Map]:
    """Adds the decorated function to the registry as an operator."""

    def enter(function: Map) -> Map:
        REGISTRY[name] = Operator(name, function, preserving, continues, kinds, source)
        return function

    return enter


def lookup(name: str) -> Operator:
    """The operator of this name, or of its alias.

    Raises:
      ValueError: there is no such operator.
    """
    own = ALIASES.get(name, name)
    if own not in REGISTRY:
        known = ", ".join(sorted({*REGISTRY, *ALIASES}))
        near = meant(name, [*REGISTRY, *ALIASES]) or "."
        raise ValueError(f"Unknown growth operator {name!r}; the registry has {known}{near}")
    return REGISTRY[own]


@register(
    "zero",
    preserving=True,
    kinds=EVERYWHERE,
    source="zero padding (cf. Net2Net 1511.05641, 2310.07999), exact under RMSNorm by the kept norm width",
)
def zero(span: Span) -> AxisMap:
    """New entries have no effect: one side is zero, the other drawn, so that every entry learns from the first steps.

    On the residual axis the writers are zero: the stream's new entries are 0 and its sum of squares is unchanged, so
    norms keep dividing by the width from before. On inner axes the readers are zero. A new layer is a copy of its
    source whose writers into the residual stream are zero, which makes it the identity; without any layer to copy it is
    drawn, as by `identity`. A new token is drawn, and its logit is 0.
    """
    kind = KINDS[span.axis]
    if kind is Kind.STACK:
        return _layers(span, reader="copy" if span.old else "draw", writer="zero")
    silent = Role.WRITER if kind in (Kind.RESIDUAL, Kind.OUTSIDE) else Role.READER
    rules = {role: Rule("zero" if role is silent else "draw") for role in Role}
    return AxisMap(span, rules, squares=1.0)


@register("mask", preserving=True, kinds=INSIDE, source="MSG, 2305.02869: the growth of FLM-101B and Tele-FLM")
def mask(span: Span) -> AxisMap:
    """New entries are initialised as usual, behind a mask that ramps from 0 to 1; exact at 0 for any new weights."""
    if KINDS[span.axis] is Kind.STACK and span.old:
        return replace(_layers(span), masked=True)
    return AxisMap(span, dict.fromkeys(Role, Rule("draw")), masked=True)


def _copies(span: Span, unevenness: float = 0.0) -> AxisMap:
    """Weighted duplication: each new entry copies its source, and all copies of one source together have its effect.

    Let p be shares that sum to 1 over the copies of an entry. On inner axes readers are weighted by p. On the residual
    axis, which grows from width d to D, the stream holds c = sqrt(p D/d) times the old entries: its mean square is
    unchanged at any ratio, and so are RMSNorm and the effect of its eps. Writers are weighted by c, readers by p / c.
    Gradients follow by the chain rule, through the norm too, in the same proportions.
    """
    p = span.shares(unevenness)
    if KINDS[span.axis] is Kind.RESIDUAL:
        ratio = span.new / span.old
        c = np.sqrt(p * ratio)
        rules = {
            Role.READER: Rule("copy", scale=p / c, dual=c),
            Role.WRITER: Rule("copy", scale=c, dual=p / c),
            Role.GAIN: Rule("copy", dual=p),
        }
        return AxisMap(span, rules, squares=ratio)
    rules = {
        Role.READER: Rule("copy", scale=p),
        Role.WRITER: Rule("copy", dual=p),
        Role.GAIN: Rule("copy", dual=p),
    }
    return AxisMap(span, rules)


@register(
    "copy",
    preserving=True,
    continues=True,
    kinds=WIDTH,
    source="weighted duplication at any ratio; generalises Net2Net and HyperCloning to RMSNorm",
)
def copy(span: Span) -> AxisMap:
    """New entries copy old ones, in turn, with equal shares: all of them take effect, but copies get equal updates."""
    return _copies(span)


@register(
    "uneven",
    preserving=True,
    continues=True,
    kinds=WIDTH,
    source="LEMON, 2310.07999: copies with uneven shares; here 1 : 2 : 3 ...",
)
def uneven(span: Span) -> AxisMap:
    """Like `copy`, with uneven shares: copies have different gradients, so an ordinary optimizer separates them."""
    return _copies(span, unevenness=1.0)


@register(
    "noise",
    preserving=True,
    kinds=WIDTH,
    source="HyperCloning, 2409.12903, its noise variant: random weights in the null space of the copies",
)
def noise(span: Span) -> AxisMap:
    """Like `copy`, with noise in the readers that cancels over the copies: exact, and no two copies stay identical."""
    whole = _copies(span)
    sizes = np.sqrt(span.shares()) if KINDS[span.axis] is Kind.RESIDUAL else np.ones(span.new)
    return replace(whole, rules={**whole.rules, Role.READER: replace(whole.rules[Role.READER], noise=sizes)})


@register(
    "hypercloning",
    preserving=True,
    continues=True,
    kinds=WIDTH,
    source="HyperCloning, 2409.12903: whole multiples, tiled, even",
)
def hypercloning(span: Span) -> AxisMap:
    """Like `copy`, for integer multiples only, as published.

    Raises:
      ValueError: the new size is not a multiple of the old one.
    """
    if len(set(span.copies)) > 1:
        raise ValueError(
            f"HyperCloning grows axis {span.axis!r} by whole multiples, not from {span.old} to {span.new}; take "
            "'copy', which is the same at any ratio."
        )
    return _copies(span)


@register(
    "net2net",
    preserving=True,
    continues=True,
    kinds=WIDTH,
    source="Net2Net, 1511.05641; bert2BERT's FPI, 2110.07143: random sources; weighted so that RMSNorm is exact",
)
def net2net(span: Span) -> AxisMap:
    """Like `copy`, with sources chosen at random, the same for every parameter."""
    return _copies(resampled(span))


@register("aki", preserving=False, kinds=WIDTH, source="AKI: bert2BERT, 2110.07143")
def aki(span: Span) -> AxisMap:
    """Like `net2net`, but fresh entries are copied from the layer above. It does not preserve the function."""
    whole = _copies(resampled(span))
    return replace(whole, rules={role: replace(rule, from_above=True) for role, rule in whole.rules.items()})


@register("fresh", preserving=False, kinds=EVERYWHERE, source="random initialisation of whatever is new: a baseline")
def fresh(span: Span) -> AxisMap:
    """New entries are initialised as usual, and nothing hides them. It does not preserve the function."""
    return AxisMap(span, dict.fromkeys(Role, Rule("draw")), squares=span.new / max(span.old, 1))


@register("mean", preserving=True, kinds=frozenset({Kind.OUTSIDE}), source="the usual start of added tokens")
def mean(span: Span) -> AxisMap:
    """A new token's embedding is the mean of the old ones, and so is its logit; logits of old tokens are unchanged."""
    return AxisMap(span, dict.fromkeys(Role, Rule("mean")))


@register("stack", preserving=False, kinds=STACK, source="G_stack, 2405.15319: plain copies of whole layers")
def stack(span: Span) -> AxisMap:
    """A new layer is a copy of its source and takes effect at once. It does not preserve the function."""
    return _layers(span)


@register(
    "identity",
    preserving=True,
    kinds=STACK,
    source="LLaMA-Pro's silent blocks, 2401.02415, with fresh content (cf. 2511.04981)",
)
def identity(span: Span) -> AxisMap:
    """A new layer is drawn, except for its writers into the residual stream, which are zero."""
    return _layers(span, reader="draw", writer="zero")


def _layers(span: Span, reader: str = "copy", writer: str = "copy") -> AxisMap:
    """New layers with the given content, which take over no moments."""
    # The gradients of a new layer are not those of its source.
    carried = np.where(span.fresh, 0.0, 1.0)
    fills = {Role.READER: reader, Role.WRITER: writer, Role.GAIN: reader}
    return AxisMap(span, {role: Rule(fill, dual=carried) for role, fill in fills.items()})  # type: ignore[arg-type]
