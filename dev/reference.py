"""Write docs/reference/: the Python interface, everything that gin can bind, and the flags of every program.

  python -m dev.reference

All of it is read from the code: docstrings, signatures, configurables, definitions of flags. `make reference` runs
this, and a test compares the pages with what it would write now.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from flm_jax import records
from flm_jax.cli import bindings, configure

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/reference"
SCRIPTS = re.compile(r'^(flm-[\w-]+) = "flm_jax\.cli\.(\w+):main"', re.MULTILINE)
COMMANDS = dict(SCRIPTS.findall((ROOT / "pyproject.toml").read_text()))  # installed command -> program
# What a user imports: the packages whose `__all__` is their interface, in the order of the page.
MODULES = (
    "flm_jax",
    "flm_jax.growth",
    "flm_jax.checkpoint",
    "flm_jax.checkpoint_care",
    "flm_jax.checkpoint_growth",
    "flm_jax.generation",
    "flm_jax.evaluation",
    "flm_jax.selection",
)
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n", re.MULTILINE)
WRITTEN = "This page is written by `make reference`; edit the docstrings that it comes from."


@contextlib.contextmanager
def defined(program: str) -> Iterator[Any]:
    """The flags of one program alone, defined and not yet parsed; those of others are put back afterwards."""
    values = flags.FLAGS
    others = {values[name].name: values[name] for name in values}  # a short name leads to the same flag
    _forget(values)
    try:
        define = getattr(importlib.import_module(f"flm_jax.cli.{program}"), "define", None)
        if define is not None:
            define()
        yield values
    finally:
        _forget(values)
        values.unparse_flags()
        for name, flag in others.items():
            values[name] = flag


def _forget(values: Any) -> None:
    for name in list(values):
        if name in values:
            delattr(values, name)


def programs_page() -> str:
    """The page of programs: the text of --help of each, and a table of its flags."""
    places = "A program is a file in `experiments/` of a checkout, started by `python`, and an installed command."
    parts = [f"# Programs\n\n{WRITTEN}\n{places}"]
    for command, program in sorted(COMMANDS.items(), key=lambda item: item[1]):
        text = inspect.getdoc(importlib.import_module(f"flm_jax.cli.{program}")) or ""
        parts.append(f"## {program}\n\nInstalled: `{command}`.\n\n```text\n{text}\n```")
        with defined(program) as values:
            rows = [_flag_row(values[name]) for name in sorted(values)]
        if rows:
            parts.append("\n".join(["| flag | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _flag_row(flag: Any) -> str:
    kind = "" if flag.boolean else f"={'|'.join(getattr(flag.parser, 'enum_values', ())) or flag.flag_type().upper()}"
    default = "" if flag.default in (None, [], "", False) else f"`{flag.default}`"
    return f"| {_code('--' + flag.name + kind)} | {default} | {_cell(flag.help)} |"


def settings_page() -> str:
    """The page of settings: every configurable, with the type, default and meaning of its fields."""
    text = "What gin files and `--gin_bindings` can set. `python experiments/bindings.py NAME` prints one entry."
    parts = [f"# Settings\n\n{WRITTEN}\n{text}"]
    for configurable in sorted(configure.configurables(), key=lambda c: c.__name__.lower()):
        said = bindings.meanings_of(configurable)
        rows = [
            f"| `{name}` | {_cell(kind)} | {_code(default)} | {_cell(said.get(name, ''))} |"
            for name, kind, default in bindings.fields_of(configurable)
        ]
        parts.append(f"## {configurable.__name__}\n\n{_escaped(_first(configurable))}")
        if rows:
            parts.append("\n".join(["| field | what it holds | default | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def python_page() -> str:
    """The page of the Python interface: what each of `MODULES` offers, each name once."""
    parts = [f"# Python interface\n\n{WRITTEN}\nShapes stand in names: `x_BTD` is batch, time, embed."]
    shown: dict[int, str] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"## {name}\n\n{_escaped(_first(module))}")
        again = []
        for public in module.__all__:
            value = getattr(module, public)
            home = shown.setdefault(id(value), name) if callable(value) else name
            if home != name:
                again.append(f"`{public}`")
                continue
            parts.append(_entry(public, value))
        if again:
            parts.append(f"Also here, described above: {', '.join(again)}.")
    return "\n\n".join(parts) + "\n"


def _entry(name: str, value: Any) -> str:
    if not isinstance(value, (type, types.FunctionType)):
        return f"### {name}\n\nA value of type `{type(value).__name__}`."
    if isinstance(value, type) and issubclass(value, Exception):
        return f"### {name}\n\n{_described(value)}"
    if value in records.classes():
        return f"### {name}\n\n{_escaped(_first(value))} Its fields: [settings](settings.md#{name.lower()})."
    kind, result = ("class", "") if isinstance(value, type) else ("def", _result(value))
    text = f"### {name}\n\n```python\n{kind} {name}({_parameters(value)}){result}\n```\n\n{_described(value)}"
    methods = inspect.getmembers(value, inspect.isfunction) if isinstance(value, type) else []
    rows = [
        f"- `{method}({', '.join(list(inspect.signature(function).parameters)[1:])})`: {_escaped(_first(function))}"
        for method, function in methods
        if not method.startswith("_") and function.__module__.startswith("flm_jax") and function.__doc__
    ]
    return text + ("\n\n**Methods:**\n\n" + "\n".join(rows) if rows else "")


def _first(value: Any) -> str:
    return " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())


def _parameters(value: Any) -> str:
    """The parameters, one per line, as text that does not differ between versions of Python, nor between runs."""
    lines, starred = [], False
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = "*" * ((parameter.kind is parameter.VAR_POSITIONAL) + 2 * (parameter.kind is parameter.VAR_KEYWORD))
        said = getattr(parameter.annotation, "__forward_arg__", parameter.annotation)  # a NamedTuple's are references
        typed = "" if said is parameter.empty else f": {said}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{stars}{parameter.name}{typed}{' = ...' if '<' in default else default}")
    return "".join(f"\n    {line}," for line in lines) + ("\n" if lines else "")


def _result(value: Any) -> str:
    result = inspect.signature(value).return_annotation
    return "" if result is inspect.Signature.empty else f" -> {result}"


def _described(value: Any) -> str:
    """A docstring in Google's style as Markdown: its sections become lists."""
    head, *sections = SECTION.split(inspect.getdoc(value) or "")
    parts = [_prose(head)]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        ours, rest = re.match(r"((?:  .*\n?|\n(?=  ))*)([\s\S]*)", body).groups()  # type: ignore[union-attr]
        entries = re.split(r"^  (?=\S)", ours, flags=re.MULTILINE)[1:]
        if title in ("Returns", "Yields"):
            parts.append(f"**{title}:** {_escaped(' '.join(ours.split()))}")
        else:
            parts.append(f"**{title}:**\n\n" + "\n".join(f"- {_named(' '.join(entry.split()))}" for entry in entries))
        parts.append(_prose(inspect.cleandoc(rest)))
    return "\n\n".join(part for part in parts if part)


def _named(entry: str) -> str:
    name, colon, meaning = entry.partition(": ")
    return f"`{name}`: {_escaped(meaning)}" if colon else _escaped(entry)


def _prose(text: str) -> str:
    """Paragraphs of a docstring; examples and indented ones become code."""
    parts = []
    for paragraph in text.strip().split("\n\n"):
        if paragraph.startswith((">>>", "  ")):
            parts.append(f"```text\n{paragraph}\n```")
        else:
            parts.append(_escaped(" ".join(paragraph.split())))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    """Text whose `*` and `<` are not markup, outside of code in backticks."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if n % 2 else re.sub(r"([*<])", r"\\\1", piece) for n, piece in enumerate(pieces))


def _cell(text: str) -> str:
    return _escaped(" ".join(text.split())).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def pages() -> dict[str, str]:
    """The text of every page by its file's name."""
    return {"programs.md": programs_page(), "python.md": python_page(), "settings.md": settings_page()}


def main() -> None:
    """Writes the pages."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
