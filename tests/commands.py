"""The commands of pages: found in their blocks, taken apart, checked without being run, or run in this process."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gin

from dev.reference import COMMANDS, defined
from flm_jax.cli import configure

ROOT = Path(__file__).resolve().parent.parent
SHELL = ("", "sh", "bash", "shell", "console")
HEREDOC = re.compile(r"<<'(\w+)'")


@dataclass(frozen=True)
class Block:
    """A block of code of a page: fenced, with its language, or indented."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page):
    """The blocks of a page; an indented one begins after an empty line and may hold empty lines."""
    lines, number, found = page.read_text().splitlines(), 0, []
    while number < len(lines):
        start = number
        if fence := re.match(r"```(\w*)", lines[number]):
            while not lines[number := number + 1].startswith("```"):
                pass
            found.append(Block(page, start + 1, fence[1], "\n".join(lines[start + 1 : number])))
        elif lines[number].startswith("    ") and not lines[number - 1].strip():
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            text = "\n".join(line[4:] for line in lines[start:number]).rstrip()
            found.append(Block(page, start + 1, "", text))
            continue
        number += 1
    return found


def commands(script):
    """The lines of a script, with those that a backslash or a here-document continues joined; comments are left out.

    Where a prompt begins one of them, the others are what was printed.
    """
    found, lines = [], iter(script.splitlines())
    for line in lines:
        if script.startswith("$ "):
            if not line.startswith("$ "):
                continue
            line = line[2:]
        while line.endswith("\\"):
            line = line[:-1] + " " + next(lines, "").strip()
        if end := HEREDOC.search(line):
            body = []
            while (text := next(lines)) != end[1]:
                body.append(text)
            line = "\n".join([line, *body, end[1]])
        if line.strip() and not line.lstrip().startswith("#"):
            found.append(line.strip())
    return found


def simple(command):
    """The simple commands of a line as words, split at pipes and the like; keywords are left out, a variable is 0."""
    lexer = shlex.shlex(re.sub(r"\$\w+", "0", command.partition("\n")[0]), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words, found = iter(lexer), [[]]
    for word in words:
        if set(word) <= set("<>"):
            next(words)  # the file that is read or written
        elif set(word) <= set(";&|()") or word in ("do", "done", "then", "fi"):
            found.append([])
        elif found[-1] or not re.match(r"\w+=", word):
            found[-1].append(word)
    return [words for words in found if words]


def launched(words):
    """The program and the arguments of a command that starts a launcher; None: it starts something else."""
    if words[0] in COMMANDS:
        return COMMANDS[words[0]], words[1:]
    path = re.fullmatch(r"(?:\S*/)?python3? experiments/(\w+)\.py", " ".join(words[:2]))
    return (path[1], words[2:]) if path else None


@contextlib.contextmanager
def parsed(program, arguments):
    """The values of a launcher's flags, parsed as it parses them; wrong ones raise absl's error."""
    with defined(program) as values:
        rest = values([program, *arguments])
        positional = "positional=" in (ROOT / f"flm_jax/cli/{program}.py").read_text()
        if not positional and program != "bindings" and len(rest) > 1:
            raise ValueError(f"{program}: unexpected argument {rest[1]!r}")
        yield values


def check_gin(program, files, given):
    """Parses gin files and bindings, builds what the program takes from them, and refuses bindings that nothing uses.

    Recipes that ask a checkpoint for its model are only parsed.
    """
    gin.clear_config()
    try:
        configure.parse(files, given)
        configurable = {"plan": "train"}.get(program, program)
        if hasattr(configure, configurable) and not re.search("model_of", "".join(gin.config_str())):
            configure.configured(getattr(configure, configurable))
            configure.check_used()
    finally:
        gin.clear_config()


def run_page(page, folder, each=lambda command: command, after=lambda: None):
    """Runs every command of a page's `sh` blocks in a folder: launchers in this process, the rest by bash.

    Args:
      page: the page.
      folder: where; it should be empty.
      each: changes the words of a launcher's command, for example to make it shorter.
      after: called after every block.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    count = 0
    with contextlib.chdir(folder):
        for block in blocks(page):
            if block.language not in SHELL[1:]:
                continue
            for command in commands(block.text):
                count += 1
                words = simple(command)
                if "\n" not in command and len(words) == 1 and launched(words[0]):
                    program, arguments = launched(words[0])
                    run_here(program, each([program, *arguments])[1:])
                    continue
                done = subprocess.run(["bash", "-ec", command], env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{block}: {command}\n{done.stderr}"
            after()
    return count


def run_here(program, arguments):
    """Runs a launcher in this process, as its command would be run."""
    module = __import__(f"flm_jax.cli.{program}", fromlist=["run"])
    gin.clear_config()
    try:
        with parsed(program, arguments) as values:
            module.run(values)
    finally:
        gin.clear_config()
