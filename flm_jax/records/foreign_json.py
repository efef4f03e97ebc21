"""The one parser for JSON from files: bounds on size, depth and numbers, no key twice, errors that name the file.

Whatever a file holds, the result is a value of the wanted type or a `JsonError`, which says where the fault is.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flm_jax.files import read_bounded

# Our files and those of models nest about ten levels deep. Python's parser and everything that walks its result would
# otherwise stop with RecursionError, at a depth that depends on the caller.
DEPTH = 64
# Only records that list very many files are larger; whoever reads those gives a bound of its own.
MOST_BYTES = 64 << 20

# A string (closed or not), or a bracket outside strings. Each byte is looked at once, whatever the input.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.?)*+"?|[\[{]|[\]}]', re.DOTALL)
_OTHERS = bytes(set(range(256)) - set(b'"[]{}'))
_STEPS = {ord(bracket): step for step, brackets in ((1, "[{"), (-1, "]}")) for bracket in brackets}
_TYPES = {dict: "object", list: "list", str: "text", int: "integer", float: "number", bool: "true or false"}


class JsonError(ValueError):
    """JSON that cannot be read or is not what it should be; the message names the file and the place in it."""


def parse_json(raw: bytes | str, where: str, kind: type | None = dict, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
      raw: the text, UTF-8 if it is bytes.
      where: names its file, for errors.
      kind: the type that the value must have, such as dict; None: any.
      finite: whether NaN and infinite numbers are refused, which JSON does not have but Python writes.

    Raises:
      JsonError: it is not JSON, nests too deep, has a key twice, or is of another type.
    """
    try:
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
    except UnicodeDecodeError as error:
        raise JsonError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    _check_depth(text, where)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise JsonError(f"{where} has {twice!r} twice in one object")
        return found

    def number(written: str) -> float:
        value = float(written)
        if finite and not math.isfinite(value):
            raise JsonError(f"{where} holds the number {written:.40}, and only finite numbers are allowed")
        return value

    try:
        # `number` also sees 1e999, which is infinite too. NaN and Infinity are constants, not numbers, to the parser.
        exact = number if finite else None
        value = json.loads(text, object_pairs_hook=once, parse_constant=number, parse_float=exact)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        raise JsonError(f"{where} is not JSON: {error.msg} at {_place(text, error.pos)}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, for example
        raise JsonError(f"{where} is not JSON that can be read: {error}") from None
    return value if kind is None else check(value, kind, where)


def read_json(path: Path, kind: type | None = dict, *, most: int = MOST_BYTES, finite: bool = True) -> Any:
    """The value of a JSON file; see `parse_json`.

    Raises:
      OSError: it cannot be read, for example because it does not exist.
      JsonError: as `parse_json`; or it is not a regular file, or has more than `most` bytes.
    """
    try:
        raw = read_bounded(path, most)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise JsonError(f"{path} cannot be read: {error.strerror}") from None
        raise
    return parse_json(raw, str(path), kind, finite=finite)


def check(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    """`value`, if it has the wanted JSON type; a boolean is no number, and an integer is a number.

    Raises:
      JsonError: it has another.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        right = bool in kinds
    else:
        right = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if right:
        return value
    wanted = " or ".join("null" if one is type(None) else _TYPES[one] for one in kinds)
    raise JsonError(f"{where} is {_shown(value)}; it must be: {wanted}")


def field(record: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a JSON object, checked as by `check`; `where` names the object.

    Raises:
      JsonError: it is missing or has another type.
    """
    if name not in record:
        raise JsonError(f"{where} lacks the field {name!r}")
    return check(record[name], kind, f"{where}: the field {name!r}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_depth(text: str, where: str) -> None:
    if text.count("[") + text.count("{") <= DEPTH:
        return
    # Texts of programs hold many brackets. What follows drops strings at the speed of memory: first what is escaped in
    # them, then all but quotes and brackets, then every second part between quotes.
    raw = text.encode("utf-8", "surrogatepass").replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHERS)
    outside = b"".join(raw.split(b'"')[::2])
    if max(itertools.accumulate(map(_STEPS.__getitem__, outside)), default=0) <= DEPTH:
        return
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        if (first := found[0][0]) in "[{":
            depth += 1
            if depth > DEPTH:
                raise JsonError(
                    f"{where} nests lists and objects more than {DEPTH} deep at {_place(text, found.start())}"
                )
        elif first != '"':
            depth -= 1


def _place(text: str, at: int) -> str:
    """A place in words; in a text of one line, as those of *.jsonl are, its column alone: `where` names the line."""
    text = text.rstrip()
    at = min(at, len(text))  # what is missing is missing at the end of what is there
    column = f"column {at - text.rfind(chr(10), 0, at)}"
    return f"line {text.count(chr(10), 0, at) + 1}, {column}" if "\n" in text else column
