"""Configurations as JSON.

A record carries the names of the classes, so that it can be read back; a record of an earlier version is read with the
defaults of the fields that its classes have gained since.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flm_jax.records.fields import classes


def as_dict(value: Any) -> Any:
    """A configuration as JSON-able data; dataclasses carry the name of their class.

    Fields with the metadata ``{"identity": False}``, such as where a cache is kept, are left out. For those that are
    recorded and may still change, see `compared`.
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
    known = {cls.__name__: cls for cls in classes()}
    if not isinstance(data["class"], str) or data["class"] not in known:
        raise ValueError(f"A record names the configuration {data['class']!r}; this version knows {', '.join(known)}.")
    cls = known[data["class"]]
    if unknown := sorted(values.keys() - {f.name for f in dataclasses.fields(cls)}):
        raise ValueError(
            f"A record gives {data['class']} the fields {', '.join(unknown)}, which it does not have here."
        )
    try:
        return cls(**values)
    except TypeError as error:  # a field is missing
        raise ValueError(f"A record of {data['class']} cannot be read: {error}") from error


def completed(record: Any) -> Any:
    """A record with the fields that its classes have gained since, at their defaults, which change nothing."""
    if isinstance(record, list):
        return [completed(value) for value in record]
    if not isinstance(record, dict):
        return record
    cls = {cls.__name__: cls for cls in classes()}.get(str(record.get("class", "")))
    return {**_defaults(cls), **{name: completed(value) for name, value in record.items()}}


def reduced(record: Any) -> Any:
    """A record without the fields that are at their defaults, so that a class may gain fields without changing it."""
    if isinstance(record, list):
        return [reduced(value) for value in record]
    if not isinstance(record, dict):
        return record
    cls = {cls.__name__: cls for cls in classes()}.get(str(record.get("class", "")))
    defaults = _defaults(cls)
    kept = {name: value for name, value in record.items() if name not in defaults or value != defaults[name]}
    return {name: reduced(value) for name, value in kept.items()}


def _defaults(cls: type | None) -> dict[str, Any]:
    """The record of each field of a class that has a default and is part of the identity."""
    return {
        f.name: as_dict(default)
        for f in (dataclasses.fields(cls) if cls else ())
        if _identifies(f) and (default := _default(f)) is not dataclasses.MISSING
    }


def flattened(record: Any, path: str = "") -> dict[str, Any]:
    """The values inside a record by their paths, such as ``stages.first.model.embed``, without names of classes.

    An entry of a list is called by its field `name`, if it has one, or by its number.
    """
    if isinstance(record, Mapping):
        found: dict[str, Any] = {}
        for name, value in record.items():
            if name != "class":
                found |= flattened(value, f"{path}.{name}" if path else str(name))
        return found
    if isinstance(record, list) and any(isinstance(entry, Mapping) for entry in record):
        names = [entry.get("name", i) if isinstance(entry, Mapping) else i for i, entry in enumerate(record)]
        found = {}
        for name, entry in zip(names, record, strict=True):
            found |= flattened(entry, f"{path}.{name}" if path else str(name))
        return found
    return {path: record}


def compared(record: Any) -> Any:
    """A record without the fields that may change within a work directory: metadata ``{"compared": False}``."""
    if isinstance(record, list):
        return [compared(value) for value in record]
    if not isinstance(record, dict):
        return record
    cls = {cls.__name__: cls for cls in classes()}.get(str(record.get("class", "")))
    free = {f.name for f in (dataclasses.fields(cls) if cls else ()) if not f.metadata.get("compared", True)}
    return {name: compared(value) for name, value in record.items() if name not in free}


def _identifies(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("identity", True))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
