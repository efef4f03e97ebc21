"""Reads gin files and bindings into gin, statement by statement; an error says where it is and what to write instead.

gin itself parses; this module finds files, keeps where each binding stands, and puts gin's errors into sentences. It
uses private parts of gin, which have not changed since its first releases.
"""

from __future__ import annotations

import inspect
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gin
from gin import config_parser

from flm_jax.records import meant, meant_beside

Key = tuple[str, str, str]  # scope, full name of the configurable, parameter
MACRO = "gin.macro"
COMMAND_LINE = "--gin_bindings"
_INCLUDE = re.compile(r"""^include\s+['"]([^'"]+)['"]""", re.MULTILINE)
IN_CALL = "\n  In call to configurable '"  # gin adds the calls that it was in to the message of an error
LIST = "`python experiments/bindings.py` lists all"
# Where each binding that gin holds was written.
_PLACES: dict[Key, str] = {}
# Bindings in scopes that a value referred to which a later binding took the place of.
_LEFT_OUT: set[Key] = set()


class _Delegate(gin.config.ParserDelegate):
    """Makes gin's references, once their names are known to exist."""

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        """The reference to a configurable."""
        _configurable(scoped_selector.rsplit("/", 1)[-1], "@")
        return super().configurable_reference(scoped_selector, evaluate)


def read(files: Iterable[str], bindings: Iterable[str], shipped: Iterable[Path]) -> None:
    """Reads files, then bindings, into gin.

    Args:
      files: names of gin files; looked up from the current directory, then in `shipped`.
      bindings: gin statements.
      shipped: folders that hold `gin_configs/`.

    Raises:
      ValueError: a file does not exist, a statement does not parse, or a name does not exist.
    """
    shipped = tuple(shipped)
    _LEFT_OUT.clear()
    for name in files:
        _read_file(name, (), shipped)
    for binding in bindings:
        _read(binding, COMMAND_LINE, (), shipped)
    _check_macros()


def is_by_hand(key: Key) -> bool:
    """Whether a binding that gin holds was given on the command line."""
    return _PLACES.get(key) == COMMAND_LINE


def left_out() -> set[Key]:
    """The bindings in scopes that a value referred to, itself or through others, until a later one took its place."""
    return set(_LEFT_OUT)


def places(owner: str, field: str, value: Any) -> list[str]:
    """Where a field was bound: of several bindings, those that bind this value, if any does."""
    bound = [(key, parameters[field]) for key, parameters in gin.config._CONFIG.items() if field in parameters]
    mine = [(key, raw) for key, raw in bound if key[1].rsplit(".", 1)[-1] == owner]
    same = [key for key, raw in mine if raw is value or raw == value] or [key for key, _ in mine]
    return sorted({_PLACES[*key, field] for key in same if (*key, field) in _PLACES})


def raw_references(owner: str, field: str) -> list[str]:
    """The references to configurables, as text, that are bound to a field without parentheses."""
    return [
        str(reference)
        for (_, selector), parameters in gin.config._CONFIG.items()
        if selector.rsplit(".", 1)[-1] == owner and field in parameters
        for reference in gin.config.iterate_references([parameters[field]])
        if not reference.evaluate
    ]


def missing_macros() -> list[str]:
    """The names, in the order of their lines, that a file leaves for the command line: `name = %gin.REQUIRED`."""
    return [
        scope
        for (scope, selector), parameters in gin.config._CONFIG.items()
        if selector == MACRO
        for reference in gin.config.iterate_references(list(parameters.values()))
        if str(reference).strip("%@()").endswith("gin.REQUIRED")
    ]


def configurable_names() -> list[str]:
    """The names of everything that gin can bind."""
    return [name.rsplit(".", 1)[-1] for name, _ in gin.config._REGISTRY.items() if not name.startswith("gin.")]


def scopes() -> set[str]:
    """The scopes that bindings name."""
    return {scope for scope, selector in gin.config._CONFIG if scope and selector != MACRO}


def files_of(names: Iterable[str], shipped: Iterable[Path]) -> tuple[list[str], dict[str, Path]]:
    """The names of a recipe's gin files for another machine, one per given name, and all files by these names.

    The second holds the files that are included too.

    These names are relative to the current directory, or to the folder of `shipped` that holds the file. In a folder
    with the same files under these names, the recipe reads them there.

    Raises:
      ValueError: a file does not exist, or lies elsewhere.
    """
    shipped, found = tuple(shipped), {}
    bases = (Path.cwd(), *shipped)

    def add(name: str, within: tuple[Path, ...]) -> str:
        path = find(name, within, shipped)
        base = next((base.resolve() for base in bases if path.is_relative_to(base.resolve())), None)
        if base is None:
            raise ValueError(f"The gin file {path} lies outside of the current directory: start above it.")
        relative = str(path.relative_to(base))
        if relative not in found:
            found[relative] = path
            for included in _INCLUDE.findall(path.read_text(encoding="utf-8")):
                add(included, (*within, path))
        return relative

    given = [add(name, ()) for name in names]
    return given, {name: found[name] for name in [*given, *found]}


def find(name: str, within: tuple[Path, ...], shipped: tuple[Path, ...]) -> Path:
    """The whole path of a gin file.

    Args:
      name: as given.
      within: the files that include it, outermost first.
      shipped: folders that hold `gin_configs/`.

    Raises:
      ValueError: there is none.
    """
    given = Path(name).expanduser()
    # An included file lies beside the one that includes it, or in a folder further up, from which its name counts.
    bases = (*(within[-1].parents if within else ()), Path.cwd(), *shipped)
    path = next((base / given for base in bases if (base / given).is_file()), None)
    if path is None:
        asked = f", which {within[-1]} includes," if within else ""
        where = " nor in ".join(map(str, shipped))
        offered = {str(file.relative_to(base)) for base in shipped for file in base.glob("gin_configs/**/*.gin")}
        near = meant(name, offered) or meant_beside(given) or "."
        raise ValueError(f"There is no gin file {name!r}{asked} in the current directory nor in {where}{near}")
    return path.resolve()


def _read_file(name: str, within: tuple[Path, ...], shipped: tuple[Path, ...]) -> None:
    """Reads a file; `within` are the files that include it, outermost first."""
    path = find(name, within, shipped)
    if path in within:
        raise ValueError(f"The gin file {within[-1]} includes {name!r}, which includes it.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The gin file {path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    _read(text, name, (*within, path), shipped)


def _read(text: str, where: str, within: tuple[Path, ...], shipped: tuple[Path, ...]) -> None:
    with gin.config._parse_scope() as context:
        for statement in _statements(text, where):
            line = statement.location.line_num
            place = where if where == COMMAND_LINE else f"{where}, line {line}"
            if isinstance(statement, config_parser.IncludeStatement):
                _read_file(statement.filename, within, shipped)
                continue
            try:
                if isinstance(statement, config_parser.ImportStatement):
                    context.process_import(statement)
                elif isinstance(statement, config_parser.BlockDeclaration):
                    _configurable(statement.selector)
                else:
                    _bind(statement, place)
            except (ValueError, ImportError) as error:
                raise ValueError(f"{place}: {error}") from None
        gin.config._IMPORTS.update(context.imports)


def _statements(text: str, where: str) -> Iterator[Any]:
    """The statements of a text; whatever does not parse raises a ValueError that says what to write."""
    line, content = 1, text
    try:
        parser = config_parser.ConfigParser(io.StringIO(text), _Delegate())
        while (statement := parser.parse_statement()) is not None:
            yield statement
        return
    except SyntaxError as error:
        line, content, advice = error.lineno or 1, error.text or "", _advice(error.msg, error.text or "")
    except tokenize.TokenError as error:
        line, advice = error.args[1][0], "a bracket or a quote is not closed"
        content = text.splitlines()[0] if where == COMMAND_LINE else ""
    except ValueError as error:  # of the delegate; gin adds the place
        advice, _, rest = str(error).partition("\n  In ")
        found = re.search(r"line (\d+)\n\s*(.*)", rest)
        line, content = (int(found[1]), found[2]) if found else (1, "")
    place = where if where == COMMAND_LINE else f"{where}, line {line}"
    quoted = f", `{content.strip()}`" if content.strip() else ""
    end = "" if advice.endswith("?") else "."
    raise ValueError(f"The gin configuration does not parse: {place}{quoted}: {advice}{end}")


def _advice(message: str, line: str) -> str:
    """What to write instead of a line that gin's parser refuses."""
    value = line.partition("=")[2].strip() or line.strip()
    failed = re.search(r"Failed to parse token '(.*)'", message, re.DOTALL)
    if failed is None:
        if "expected ':' or '='" in message or "Unexpected token" in message:
            return "write a binding as Name.parameter = value"
        if "Expected ')'" in message:
            return "write nothing between the parentheses, and bind arguments by themselves, as Name.parameter = value"
        if "Expected ':'" in message:
            return "write entries in braces as 'name': value"
        if "Unable to parse value" in message or "Expected newline" in message:
            return "write one value: a text in quotes, a number without, a configurable as @Name()"
        return message.strip().rstrip(".")
    token = failed[1]
    found = re.search(rf"[\w./~*-]*{re.escape(token)}[\w./*-]*", value)
    name = (found[0] if found else token).rstrip("/.")
    if name.lower() in ("true", "false", "none", "null"):
        return f"write {'None' if name.lower() == 'null' else name.capitalize()}"
    names = configurable_names()
    if name.rsplit("/", 1)[-1] in names:
        return f"write @{name}(): @ before the name of a configurable, parentheses after it"
    if (name, MACRO) in gin.config._CONFIG:
        return f"write %{name}: % before the name of a macro"
    whole = value if re.fullmatch(r"[\w ./~*-]+", value) else name
    return f"write a text in quotes: {whole!r}{meant(name, names)}"


def _configurable(name: str, sign: str = "") -> Any:
    """The entry of a configurable in gin's registry.

    Raises:
      ValueError: there is none of this name.
    """
    found = gin.config._parse_context().get_configurable(name)
    if not found:
        near = meant(name.rsplit(".", 1)[-1], configurable_names())
        raise ValueError(f"there is no configurable {sign}{name}{near or f'; {LIST}.'}")
    return found


def _bind(statement: Any, place: str) -> None:
    scope, selector, parameter, value, _ = statement
    if not parameter:
        macro = f"{scope}/{selector}" if scope else selector
        if macro in configurable_names():
            raise ValueError(f"{macro} = ... sets nothing; write {macro}.parameter = value.")
        _bind_parameter((macro, MACRO, "value"), value, place)
        return
    found = _configurable(selector)
    names = list(inspect.signature(found.wrapped).parameters)
    if parameter not in names:
        near = meant(parameter, names) or f"; it has {', '.join(names)}."
        raise ValueError(f"{selector} doesn't have a parameter named {parameter!r}{near}")
    _bind_parameter((scope, found.selector, parameter), value, place)


def _bind_parameter(key: Key, value: Any, place: str) -> None:
    """Binds a parameter, and notes where, and what is left out if the value before it referred to scopes."""
    scope, selector, name = key
    if name in (before := gin.config._CONFIG.get((scope, selector), {})):
        scopes = _scopes_of(before[name])
        # What is bound from here on is meant to be used.
        held = gin.config._CONFIG.items()
        _LEFT_OUT.update((s, kind, n) for (s, kind), given in held if s in scopes for n in given)
    gin.bind_parameter(key, value)
    _PLACES[key] = place
    _LEFT_OUT.discard(key)


def _scopes_of(value: Any) -> set[str]:
    """The scopes that a value refers to, by itself or through what it refers to."""
    found: set[tuple[str, str]] = set()
    left = list(_referred(value))
    while left:
        if (key := left.pop()) not in found:
            found.add(key)
            left.extend(_referred(list(gin.config._CONFIG.get(key, {}).values())))
    return {scope for scope, selector in found if selector != MACRO} - {""}


def _referred(value: Any) -> Iterator[tuple[str, str]]:
    """Scopes and full names of the configurables that a value refers to."""
    for reference in gin.config.iterate_references(value):
        yield "/".join(reference.scopes), reference.configurable.selector


def _check_macros() -> None:
    """Raises ValueError if a macro is used that nothing defines."""
    defined = {scope for scope, selector in gin.config._CONFIG if selector == MACRO}
    for (scope, selector), parameters in gin.config._CONFIG.items():
        for name, value in parameters.items():
            for reference in gin.config.iterate_references([value]):
                macro = "/".join(reference.scopes)
                if reference.configurable.selector == MACRO and macro not in defined:
                    place = _PLACES.get((scope, selector, name), "gin")
                    near = meant(macro, defined) or f"; write {macro} = value."
                    raise ValueError(f"{place}: nothing defines the macro %{macro}{near}")
