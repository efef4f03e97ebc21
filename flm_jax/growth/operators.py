"""The growth operators: what fresh entries hold. One function and one registry entry each.

Registering an operator enrols it in the property tests, which hold it to what its entry says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flm_jax.growth.axis_map import AxisMap, Rule, Span
from flm_jax.signature import KINDS, Kind, Role


@dataclass(frozen=True)
class Operator:
    """A registry entry.

    Attributes:
      name: what a growth plan calls it.
      map: from a span to an axis map.
      preserving: whether the grown model computes what the old one did.
      kinds: the kinds of axes that it grows.
      source: where it is described.
    """

    name: str
    map: Callable[[Span], AxisMap]
    preserving: bool
    kinds: frozenset[Kind]
    source: str


REGISTRY: dict[str, Operator] = {}
GROWABLE = frozenset({Kind.RESIDUAL, Kind.INNER, Kind.STACK})


def register(
    name: str, *, preserving: bool, source: str, kinds: frozenset[Kind] = GROWABLE
) -> Callable[[Callable[[Span], AxisMap]], Callable[[Span], AxisMap]]:
    """Enters an operator into the registry."""

    def enter(function: Callable[[Span], AxisMap]) -> Callable[[Span], AxisMap]:
        REGISTRY[name] = Operator(name, function, preserving, kinds, source)
        return function

    return enter


def lookup(name: str, axis: str | None = None) -> Operator:
    """The operator of this name, which must grow `axis` if one is given.

    Raises:
        ValueError: there is none, or it does not grow this axis.
    """
    if name not in REGISTRY:
        raise ValueError(f"Unknown growth operator {name!r}; the registry has {', '.join(sorted(REGISTRY))}.")
    operator = REGISTRY[name]
    if axis is not None and KINDS[axis] not in operator.kinds:
        raise ValueError(f"Growth operator {name!r} does not grow axis {axis!r} ({KINDS[axis].value}).")
    return operator


@register(
    "zero",
    preserving=True,
    source="Net2Net-style zero initialisation (cf. 2305.02869, 2310.07999), exact under RMSNorm",
)
def zero(span: Span) -> AxisMap:
    """New capacity starts silent; one side is zero, the other drawn, so that every entry learns from the first steps.

    On the residual axis the writers are zero, so the stream's new entries are 0 and the sum of squares is unchanged:
    norms keep dividing by the width from before. On inner axes the readers are zero. A new layer is a copy of its
    source whose writers into the residual stream are zero: the identity.
    """
    kind = KINDS[span.axis]
    if kind is Kind.STACK:
        rules = {Role.READER: Rule("copy"), Role.WRITER: Rule("zero"), Role.GAIN: Rule("copy")}
        return AxisMap(span, rules)
    residual = kind is Kind.RESIDUAL
    rules = {
        Role.READER: Rule("draw" if residual else "zero"),
        Role.WRITER: Rule("zero" if residual else "draw"),
        Role.GAIN: Rule("draw"),
    }
    return AxisMap(span, rules, keeps_norm_width=residual)


@register("mask", preserving=True, source="MSG, 2305.02869: the growth of FLM-101B and Tele-FLM")
def mask(span: Span) -> AxisMap:
    """New capacity is ordinary, behind a mask that ramps from 0 to 1; exact at 0, whatever the new weights are."""
    fill = Rule("copy" if KINDS[span.axis] is Kind.STACK else "draw")
    return AxisMap(span, dict.fromkeys(Role, fill), masked=True)
