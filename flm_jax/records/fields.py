"""Configuration classes: their registry, and the check of every field against its annotation when one is made.

An annotation says what a field may hold: a type, with limits where it has any, such as ``Annotated[int, at_least(1)]``.
The same annotation gives the sentence for a wrong value, and the types that `experiments/bindings.py` lists.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from flm_jax.records.nearest import meant

T = TypeVar("T")
_CLASSES: dict[str, type] = {}


class FieldError(ValueError):
    """A field or an argument was given a value that it cannot hold.

    Attributes:
      owner: name of the class or the function.
      field: name of the field or the argument.
      value: what it was given.
      wrong: the part of that which does not fit.
      classes: names of the configuration classes that would fit.
    """

    def __init__(self, message: str, owner: str, field: str, value: Any, wrong: Any, classes: Sequence[str]) -> None:
        super().__init__(message)
        self.owner, self.field, self.value, self.wrong, self.classes = owner, field, value, wrong, tuple(classes)


@dataclass(frozen=True)
class Limit:
    """A limit in an annotation.

    Attributes:
      says: the limit in words, after those of the type: "at least 1".
      holds: whether a value of that type keeps it.
      names: all values that keep it, where these are a few names.
    """

    says: str
    holds: Callable[[Any], bool]
    names: tuple[str, ...] = ()


def at_least(least: float) -> Limit:
    """The limit of values from `least` on."""
    return Limit(f"at least {least}", lambda value: value >= least)


def above(border: float) -> Limit:
    """The limit of values greater than `border`."""
    return Limit(f"greater than {border}", lambda value: value > border)


def between(least: float, most: float) -> Limit:
    """The limit of values from `least` to `most`, both included."""
    return Limit(f"from {least} to {most}", lambda value: least <= value <= most)


def one_of(names: Sequence[str]) -> Limit:
    """The limit of texts that are one of some names."""
    return Limit(f"one of {', '.join(names)}", lambda value: value in names, tuple(names))


Size = Annotated[int, at_least(1)]
Count = Annotated[int, at_least(0)]
Seed = Annotated[int, between(-(2**63), 2**63 - 1)]
Positive = Annotated[float, above(0)]
NonNegative = Annotated[float, at_least(0)]
Fraction = Annotated[float, between(0, 1)]
PositiveFraction = Annotated[float, Limit("greater than 0 and at most 1", lambda value: 0 < value <= 1)]
# A part of something of which something is left.
Share = Annotated[float, Limit("greater than 0 and less than 1", lambda value: 0 < value < 1)]
# Names of directories; Orbax takes them for patterns.
Name = Annotated[
    str, Limit("not empty and without any of / \\ * ? [ ]", lambda v: v != "" and not set(v) & {*"/\\*?[]"})
]


def recorded(cls: type[T]) -> type[T]:
    """Registers a configuration's class under its name, and has its fields checked whenever one is made.

    It stands below ``@dataclass``, which calls the check as the first part of ``__post_init__``. Values of a close
    type are converted: NumPy's scalars, whole numbers for a float, lists for a tuple, paths for a text.

    Raises:
      ValueError: another class is registered under this name.
      TypeError: the class is a dataclass already.
    """
    if "__dataclass_fields__" in vars(cls):
        raise TypeError(f"{cls.__name__}: write @recorded below @dataclass.")
    known = _CLASSES.setdefault(cls.__name__, cls)
    if known is not cls:
        raise ValueError(f"{cls.__module__}.{cls.__name__} has the name of {known.__module__}.{known.__name__}.")
    own, made = getattr(cls, "__post_init__", None), cast(Any, cls)

    def __post_init__(self: Any) -> None:  # noqa: N807
        for name, kind in hints(made).items():
            value = getattr(self, name)
            fitting = fit(kind, value, cls.__name__, name)
            if fitting is not value:
                object.__setattr__(self, name, fitting)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


def classes() -> list[type]:
    """Every configuration class that has been imported, in the order of their names."""
    return [_CLASSES[name] for name in sorted(_CLASSES)]


@functools.cache
def hints(owner: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of every field of a class, or of every argument of a function, by name."""
    found = get_type_hints(owner, include_extras=True)
    if is_dataclass(owner):
        return {name: found[name] for name in owner.__dataclass_fields__}
    return {name: kind for name, kind in found.items() if name != "return"}


def fitted(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a function, each checked against its annotation and converted if its type is close.

    Raises:
      FieldError: as `fit`.
    """
    kinds = hints(function)
    return {name: fit(kinds[name], value, function.__name__, name) for name, value in values.items()}


class _Misfit(Exception):  # noqa: N818  # It never leaves this module.
    """Where in a value something does not fit, what stands there, and what would be right."""

    def __init__(self, path: str, value: Any, right: str, hint: str = "") -> None:
        self.path, self.value, self.right, self.hint = path, value, right, hint


def fit(kind: Any, value: Any, owner: str, field: str) -> Any:
    """A value as its annotation wants it.

    Raises:
      FieldError: it does not fit; the message names owner, field and value, and says what would be right.
    """
    try:
        return _fit(kind, value, "")
    except _Misfit as misfit:
        wrong = misfit.value
        text = getattr(wrong, "__name__", None) or repr(wrong)
        text = text if len(text) <= 80 else f"{text[:77]}..."
        end = misfit.hint if misfit.hint.endswith("?") else f"{misfit.hint}."
        message = f"{owner}.{field}{misfit.path} = {text}: use {misfit.right}{end}"
        raise FieldError(message, owner, field, value, wrong, class_names(kind)) from None


def _fit(kind: Any, value: Any, path: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = _fit_inner(kind, inner[0], value, path)
        for limit in inner[1:]:
            if not limit.holds(found):
                raise _Misfit(path, value, says(kind), meant(found, limit.names))
        return found
    if origin in (Union, types.UnionType):
        return _fit_union(kind, inner, value, path)
    if origin in (tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise _Misfit(path, value, says(kind), _hint(kind, value))
        return tuple(_fit(inner[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _Misfit(path, value, says(kind), _hint(kind, value))
        return {_fit(inner[0], k, f"{path}[key]"): _fit(inner[1], v, f"{path}[{k!r}]") for k, v in value.items()}
    if kind is Any:
        return value
    convert = _CONVERSIONS.get(kind)
    found = (
        convert(value) if convert else value if isinstance(value, kind) and not isinstance(value, type) else _NOTHING
    )
    if found is _NOTHING:
        raise _Misfit(path, value, says(kind), _hint(kind, value))
    return found


def _fit_inner(whole: Any, kind: Any, value: Any, path: str) -> Any:
    """Like `_fit`, where a misfit is told what the whole annotation wants, limits included."""
    try:
        return _fit(kind, value, path)
    except _Misfit as wrong:
        raise (_Misfit(path, value, says(whole), wrong.hint) if wrong.path == path else wrong) from None


def _fit_union(kind: Any, options: Iterable[Any], value: Any, path: str) -> Any:
    wrong = []
    for option in options:
        try:
            return _fit(option, value, path)
        except _Misfit as misfit:
            wrong.append(misfit)
    deepest = max(wrong, key=lambda misfit: len(misfit.path))
    if deepest.path != path:
        raise deepest
    raise _Misfit(path, value, says(kind), next((misfit.hint for misfit in wrong if misfit.hint), ""))


_NOTHING: Any = object()


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return _NOTHING
    try:
        return float(value) if math.isfinite(value) else _NOTHING
    except OverflowError:
        return _NOTHING


_CONVERSIONS: dict[Any, Callable[[Any], Any]] = {
    # The same type exactly is returned as it is, so that it need not be set again.
    int: lambda v: int(v) if isinstance(v, int | np.integer) and not isinstance(v, bool) else _NOTHING,
    float: _number,
    bool: lambda v: bool(v) if isinstance(v, bool | np.bool_) else _NOTHING,
    str: lambda v: str(os.fspath(v)) if isinstance(v, str | os.PathLike) else _NOTHING,
    type(None): lambda v: v if v is None else _NOTHING,
}


def _hint(kind: Any, value: Any) -> str:
    """The end of the sentence about a misfit: what to write instead, where that can be known."""
    if kind in (int, float, bool) and isinstance(value, str):
        try:
            literal = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return ""
        return f"; write it without quotes: {value.strip()}" if isinstance(literal, int | float) else ""
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if get_origin(kind) in (tuple, Sequence) and not isinstance(value, str | Mapping):
        return "; write brackets around a single one"
    return ""


_WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


def says(kind: Any) -> str:
    """An annotation in words: "an integer, at least 1"."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [limit.says for limit in inner[1:]]
        return limits[0] if inner[1].names else ", ".join([says(inner[0]), *limits])
    if origin in (Union, types.UnionType):
        words = [says(option) for option in inner]
        return (", or " if any("," in word for word in words) else " or ").join(words)
    if origin in (tuple, Sequence):
        return "a list" if inner[0] is Any else f"a list, each entry {says(inner[0])}"
    if origin is Mapping:
        return "a dict" if inner[1] is Any else f"a dict, each value {says(inner[1])}"
    return _WORDS.get(kind) or " or ".join(f"a{'n' * (name[0] in 'AEIOU')} {name}" for name in class_names(kind))


def class_names(kind: Any) -> list[str]:
    """The names of the configuration classes that an annotation allows, at its top or inside a container."""
    if getattr(kind, "_is_protocol", False):
        return [cls.__name__ for cls in classes() if issubclass(cls, kind)]
    if get_args(kind):
        return [name for inner in get_args(kind) for name in class_names(inner)]
    return [kind.__name__] if is_dataclass(kind) and isinstance(kind, type) else []
