"""Configurations as JSON, and the record of what a work directory belongs to.

Every configuration class is registered under its name (`recorded`). A record carries these names, so that it can be
read back; a record of an earlier version is read with the defaults of the fields that its classes have gained since.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from flm_jax.distributed import is_primary
from flm_jax.files import atomic_write, write_json

RECIPE, DATA = "recipe.json", "data.json"
# What the process that writes to a directory holds.
LOCK = ".lock"
T = TypeVar("T")
_CLASSES: dict[str, type] = {}


def recorded(cls: type[T]) -> type[T]:
    """Registers a configuration's dataclass under its name.

    Raises:
      ValueError: another class is registered under this name.
    """
    known = _CLASSES.setdefault(cls.__name__, cls)
    if known is not cls:
        raise ValueError(f"{cls.__module__}.{cls.__name__} has the name of {known.__module__}.{known.__name__}.")
    return cls


def classes() -> list[type]:
    """Every configuration class that has been imported, in the order of their names."""
    return [_CLASSES[name] for name in sorted(_CLASSES)]


def as_dict(value: Any) -> Any:
    """A configuration as JSON-able data; dataclasses carry the name of their class.

    Fields with the metadata ``{"identity": False}``, such as where a cache is kept, are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if _identifies(f)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(k): as_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_dict(v) for v in value]
    return value


def from_dict(data: Any) -> Any:
    """The configuration that `as_dict` recorded; missing fields have their defaults.

    Raises:
      ValueError: the record names a class or a field that this version does not have.
    """
    if isinstance(data, list):
        return [from_dict(value) for value in data]
    if not isinstance(data, dict):
        return data
    values = {name: from_dict(value) for name, value in data.items() if name != "class"}
    if "class" not in data:
        return values
    if data["class"] not in _CLASSES:
        raise ValueError(
            f"A record names the configuration {data['class']!r}; this version knows {', '.join(sorted(_CLASSES))}."
        )
    cls = _CLASSES[data["class"]]
    if unknown := sorted(values.keys() - {f.name for f in dataclasses.fields(cls)}):
        raise ValueError(
            f"A record gives {data['class']} the fields {', '.join(unknown)}, which it does not have here."
        )
    return cls(**values)


def completed(record: Any) -> Any:
    """A record with the fields that its classes have gained since, at their defaults, which change nothing."""
    if isinstance(record, list):
        return [completed(value) for value in record]
    if not isinstance(record, dict):
        return record
    cls = _CLASSES.get(record.get("class", ""))
    gained = {
        f.name: as_dict(default)
        for f in (dataclasses.fields(cls) if cls else ())
        if _identifies(f) and (default := _default(f)) is not dataclasses.MISSING
    }
    return {**gained, **{name: completed(value) for name, value in record.items()}}


def _identifies(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("identity", True))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Yields where two such structures differ: ``stages.0.steps: 100 there, 200 here``."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}.{i}")
    elif a != b:
        yield f"{path}: {a!r} there, {b!r} here"


def check_identity(workdir: Path, file: str, mine: Any, what: str) -> None:
    """Checks that a work directory that is already in use was begun with `mine`.

    Raises:
      ValueError: it was begun with something else, and the message names what differs; or it is not a work directory.
    """
    if (workdir / file).exists():
        found = list(differences(completed(json.loads((workdir / file).read_text())), json.loads(json.dumps(mine))))
        if found:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            raise ValueError(
                f"{workdir} was begun with {what}: {'; '.join(found[:3])}{more}. Nothing was changed; use another "
                "--workdir for this one."
            )
    elif workdir.exists() and not (workdir / RECIPE).exists() and any(p.name != LOCK for p in workdir.iterdir()):
        raise ValueError(f"{workdir} holds files but no {RECIPE}, so it is not a work directory; use another one.")


def write_identity(workdir: Path, file: str, mine: Any) -> None:
    """Records `mine` atomically, in process 0, once `check_identity` has passed."""
    if not is_primary():
        return
    write_json(workdir / file, mine)


def write_record(workdir: Path, file: str, text: str) -> None:
    """Keeps a text about this start of the run; one that differs from those of earlier starts gets a number.

    Only process 0 writes it.
    """
    if not is_primary():
        return
    path, number = workdir / file, 1
    while path.exists() and path.read_text() != text:
        number += 1
        path = workdir / f"{Path(file).stem}.{number}{Path(file).suffix}"
    atomic_write(path, text)
