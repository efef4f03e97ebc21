"""The points of a sweep: which bindings each has, and the name that it gets from what differs."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flm_jax.records import counted
from flm_jax.sweeps.config import Range, Sweep

SEED = "Recipe.seed"
# The column and the axis of a picture that named points have.
POINT = "point"
# Bytes; longer names of directories are cut, and end with a digest. File systems take 255, with every ending.
LONGEST = 150
# Digits of a number that is drawn: more would only lengthen names.
DIGITS = 3


@dataclass(frozen=True)
class Candidate:
    """A choice of all that a sweep varies except seeds and rungs.

    Attributes:
      name: from what differs: ``learning_rate=0.001,warmup_steps=20``.
      values: what differs, by its short name.
      bindings: the gin bindings, by their full name.
    """

    name: str
    values: Mapping[str, Any]
    bindings: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its directories and files.
      candidate: what it is a run of.
      rung: of `Halving.rungs`; 0 without.
      seed: its `Recipe.seed`; None: the recipe's own.
      bindings: all its gin bindings, by their full name.
    """

    name: str
    candidate: Candidate
    rung: int
    seed: int | None
    bindings: Mapping[str, Any]

    @property
    def statements(self) -> list[str]:
        """The bindings as lines of a gin file."""
        return [f"{name} = {literal(value, name)}" for name, value in self.bindings.items()]


def literal(value: Any, name: str) -> str:
    """A value as a gin file writes it; a text that begins with @ or % is a reference.

    Raises:
      ValueError: it is no value that can be written.
    """
    if isinstance(value, str):
        return value if value[:1] in ("@", "%") else repr(value)
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{literal(k, name)}: {literal(v, name)}' for k, v in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(literal(item, name) for item in value)}]"
    what = type(value).__name__
    raise ValueError(f"The sweep gives {name} a {what} itself; write the reference in quotes, such as '@{what}()'.")


def short_names(bindings: Iterable[str]) -> dict[str, str]:
    """A short name for each binding: the parameter, with the scope, then with all of it, where two would be one."""
    full = list(dict.fromkeys(bindings))

    def forms(name: str) -> tuple[str, ...]:
        scope, _, rest = name.rpartition("/")
        parameter = rest.rpartition(".")[2]
        return parameter, f"{scope}-{parameter}".lstrip("-"), rest, name.replace("/", "-")

    found = {}
    for name in full:
        others = [form for other in full if other != name for form in forms(other)]
        found[name] = next((form for form in forms(name) if form not in others and form != POINT), forms(name)[-1])
    return found


def short_of(sweep: Sweep) -> dict[str, str]:
    """The short names of all that varies in a sweep, besides its named points."""
    return short_names([*sweep.axes, *(sweep.halving.rungs[0] if sweep.halving else ()), *([SEED] * bool(sweep.seeds))])


def shown(value: Any) -> str:
    """A value as part of a name: letters, digits, points and signs."""
    if isinstance(value, Mapping):
        return "-".join(f"{shown(k)}-{shown(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "-".join(shown(item) for item in value)
    if not isinstance(value, str):
        return repr(value)  # with its sign
    return re.sub(r"[^\w.+-]+", "-", value).strip("-.") or "empty"


def name_of(values: Mapping[str, Any]) -> str:
    """The name of a point from what differs; a long one is cut and ends with a digest of the whole."""
    parts = [shown(value) if key == POINT else f"{key}={shown(value)}" for key, value in values.items()]
    whole = ",".join(parts) or "all"
    if len(whole.encode()) <= LONGEST:
        return whole
    cut = whole.encode()[: LONGEST - 9].decode(errors="ignore")  # without a part of a character
    return f"{cut}~{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def candidates(sweep: Sweep) -> list[Candidate]:
    """All candidates of a sweep, in the order of its points, then of its axes.

    Raises:
      ValueError: two would have one name, or more draws are asked for than there are combinations.
    """
    combined = _drawn(sweep) if sweep.draws else _grid(sweep)
    short = short_of(sweep)
    found = []
    for name, bindings in sweep.points.items() or (("", {}),):
        for axes in combined:
            values = {short[binding]: value for binding, value in axes.items()}
            values = {POINT: name, **values} if name else values
            found.append(Candidate(name_of(values), values, {**bindings, **axes}))
    _check_names([(candidate.name, candidate.bindings) for candidate in found])
    return found


def points(sweep: Sweep, chosen: Sequence[Candidate], rung: int = 0) -> list[Point]:
    """The runs of some candidates in a rung: each candidate with each seed.

    Raises:
      ValueError: two would have one name.
    """
    budget = sweep.halving.rungs[rung] if sweep.halving else {}
    short = short_of(sweep)
    found = []
    for candidate in chosen:
        for seed in sweep.seeds or (None,):
            spent = {short[name]: value for name, value in budget.items()}
            own = {} if seed is None else {SEED: seed}
            name = name_of({**spent, **candidate.values, **{short[name]: value for name, value in own.items()}})
            found.append(Point(name, candidate, rung, seed, {**candidate.bindings, **budget, **own}))
    _check_names([(point.name, point.bindings) for point in found])
    return found


def rungs(sweep: Sweep) -> int:
    """The number of rungs; 1 without halving."""
    return len(sweep.halving.rungs) if sweep.halving else 1


def _grid(sweep: Sweep) -> list[dict[str, Any]]:
    lists = [values for values in sweep.axes.values() if not isinstance(values, Range)]
    return [dict(zip(sweep.axes, row, strict=True)) for row in itertools.product(*lists)]


def _drawn(sweep: Sweep) -> list[dict[str, Any]]:
    """Different random combinations; the first of them do not depend on how many are drawn."""
    rng = random.Random(sweep.draw_seed)
    found: dict[str, dict[str, Any]] = {}
    tries = 0  # since the last new one
    while len(found) < sweep.draws:
        tries += 1
        if tries > 100 * len(found) + 1000:
            raise ValueError(
                f"Sweep.draws={sweep.draws}, but Sweep.axes have no more than about "
                f"{counted(len(found), 'combination')}: draw fewer, or set it to 0 for all of them."
            )
        drawn = {name: _draw(values, rng.random()) for name, values in sweep.axes.items()}
        if repr(drawn) not in found:
            found[repr(drawn)], tries = drawn, 0
    return list(found.values())


def _draw(values: Range | Sequence[Any], u: float) -> Any:
    """The value of an axis for a number that is uniform in [0, 1)."""
    if not isinstance(values, Range):
        return values[int(u * len(values))]
    if values.scale == "log":
        at = math.exp(math.log(values.low) + u * (math.log(values.high) - math.log(values.low)))
    else:
        at = values.low + u * (values.high - values.low)
    if values.whole:
        return min(max(round(at), math.ceil(values.low)), math.floor(values.high))
    return min(max(float(f"{at:.{DIGITS}g}"), values.low), values.high)


def _check_names(named: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    seen: dict[str, Mapping[str, Any]] = {}
    for name, bindings in named:
        if name in seen:
            a, b = (", ".join(f"{k} = {literal(v, k)}" for k, v in each.items()) for each in (seen[name], bindings))
            what = f"{a}, twice" if a == b else f"{a}; and {b}"
            raise ValueError(
                f"Two points of the sweep would have one work directory, points/{name}: {what}. Leave one of them out, "
                "or tell them apart by names in Sweep.points."
            )
        seen[name] = bindings
