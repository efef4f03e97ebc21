"""List what gin files and --gin_bindings can set: every configurable, its fields, types, defaults and meanings.

  python experiments/bindings.py                    # all of them, one line per field
  python experiments/bindings.py Growth Stage       # these, with the meaning of each field

In a gin file and in --gin_bindings, `Name.field = value` sets a field, and `Name.field = @Other()` makes an object for
it. A default that says "required" must be set wherever the object is made.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import gin
from absl import app

from flm_jax.cli.flags import parse

# Shown as the default of a field that has none.
REQUIRED = "required"


def fields_of(configurable: Callable[..., Any]) -> list[tuple[str, str, str]]:
    """Name, what it may hold, and default of every field or parameter."""
    from flm_jax.records.fields import hints, says

    if dataclasses.is_dataclass(configurable):
        defaults = {f.name: _default(f) for f in dataclasses.fields(configurable)}
    else:
        defaults = {
            name: REQUIRED if parameter.default in (inspect.Parameter.empty, gin.REQUIRED) else repr(parameter.default)
            for name, parameter in inspect.signature(configurable).parameters.items()
        }
    return [(name, says(hints(configurable)[name]), default) for name, default in defaults.items()]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is dataclasses.MISSING:
        return REQUIRED
    made = field.default_factory()
    return f"@{type(made).__name__}()" if dataclasses.is_dataclass(made) else repr(made)


def meanings_of(configurable: Callable[..., Any]) -> dict[str, str]:
    """The description of each field or argument in the docstring, by name."""
    text = inspect.getdoc(configurable) or ""
    section = re.search(r"^(?:Attributes|Args):\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in section[1].splitlines() if section else ():
        begun = re.match(r"  (\w+): (.*)", line)  # what a field means may have lines of this form, further in
        if begun:
            name, found[begun[1]] = begun[1], begun[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def table(configurable: Callable[..., Any], meanings: bool) -> str:
    """A configurable as text: its name and first docstring line, and a line per field."""
    lines = [f"{configurable.__name__}: {(inspect.getdoc(configurable) or '').splitlines()[0]}"]
    said = meanings_of(configurable) if meanings else {}
    for name, kind, default in fields_of(configurable):
        lines.append(f"  {configurable.__name__}.{name} = {default}: {kind}")
        if name in said:
            lines.append(f"      {said[name]}")
    return "\n".join(lines)


def run(argv: list[str]) -> None:
    """Prints the configurables that are named in `argv`, or all of them."""
    from flm_jax.cli import configure  # Imported here, so that --help is fast.
    from flm_jax.records import meant

    known = {configurable.__name__: configurable for configurable in configure.configurables()}
    if unknown := sorted(set(argv[1:]) - known.keys()):
        near = meant(unknown[0], known) or "."
        print(f"error: gin knows no {', '.join(unknown)}; it knows {', '.join(known)}{near}", file=sys.stderr)
        sys.exit(1)
    print("\n\n".join(table(known[name], bool(argv[1:])) for name in argv[1:] or known))


def main() -> None:
    """Runs the program."""
    sys.modules["__main__"].__doc__ = __doc__
    app.run(run, flags_parser=parse)


if __name__ == "__main__":
    main()
