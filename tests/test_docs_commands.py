"""Every command on every page: its program, flags, files and bindings exist; what is not run has a reason."""

import re
import tomllib

import pytest
from absl import flags

from dev.reference import defined
from tests.commands import ROOT, SHELL, blocks, check_gin, commands, launched, parsed, simple

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "dev").glob("*.md")),
    ROOT / "benchmarks/README.md",
]
# What a page calls a file that the reader has, and the shipped one that its command is checked with.
STAND_INS = {
    ("train", "my.gin"): "gin_configs/recipes/demo.gin",
    ("launch_tpu", "my.gin"): "gin_configs/recipes/demo.gin",
    ("grow", "..."): "gin_configs/growth/zero_small.gin",
}
# Programs that are no launchers, and why a test does not run their commands; what can be checked of each is, below.
NOT_RUN = {
    "make": "installs, trains or measures for minutes; that the target exists is checked",
    "benchmark": "measures for minutes; that its flags exist is checked",
    "pip": "installs from a package index; that the extra exists is checked",
    "pytest": "the tests themselves; that its files exist is checked",
    "module": "writes files of the repository; that the module exists is checked",
    "python": "a line of Python; that it compiles is checked",
    "gcloud": "needs TPUs; the command that it carries is checked",
    "srun": "needs a cluster; the command that it carries is checked",
    "hook": "changes the checkout's git hooks",
    "shell": "a word of the shell",
}
WORDS = {"cd", "cat", "cp", "echo", "export", "for", "mkdir", "sh", "wait", ".", "git"}
# Blocks without a language that hold no commands, by page and beginning.
OTHER = {
    "docs/chat.md": ["/help lists"],
    "docs/distillation.md": ["second/Stage.teacher = @Teacher()", "(1 - w) * cross-entropy"],
    "docs/growth.md": ["plan = Growth", "plan = plan.settled"],
    "docs/growth_math.md": ["norm(x)_i = g_i", "g' = g", "c_i = sqrt", "norm(x)_i = m_i", "m' = a m"],
    "docs/mixtures.md": ["first/Stage.source_weights"],
    "docs/muon.md": ["0.2 sqrt", "bytes per device"],
    "docs/sft.md": ["category     n"],
    "docs/smollm2.md": ['"The capital'],
}
TARGETS = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def check_launcher(program, arguments):
    with parsed(program, [word for word in arguments if not word.startswith("--flagfile=")]) as values:
        if "gin_file" not in values:
            return
        files = [STAND_INS.get((program, file), file) for file in values.gin_file]
        given = values.gin_bindings
    missing = [file for file in files if not (ROOT / file).exists()]
    if missing and all(file in made_by_pages() for file in missing):
        return  # the page that makes this file is run whole
    check_gin(program, files, given)


def made_by_pages():
    """The files that pages make by here-documents."""
    texts = (block.text for page in PAGES for block in blocks(page) if block.language in SHELL)
    return {name for text in texts for name in re.findall(r"^cat > (\S+) <<", text, re.MULTILINE)}


def kind_of(words):
    """Checks a command that starts no launcher as far as that is possible, and says of which kind it is."""
    name = words[0].rpartition("/")[2]
    if name in ("gcloud", "srun"):
        found = re.search(r"experiments/(\w+)\.py(.*)", " ".join(words))
        check_launcher(found[1], found[2].split())
        return name
    if name == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert set(targets) <= TARGETS, f"the Makefile has no {set(targets) - TARGETS}"
        return "make"
    if name == "pip" or words[1:3] == ["-m", "pip"]:
        extras = re.findall(r"\.\[([\w,]+)\]", " ".join(words))
        assert {extra for group in extras for extra in group.split(",")} <= EXTRAS, f"there is no extra {extras}"
        return "pip"
    if name == "pytest" or words[1:3] == ["-m", "pytest"]:
        files = [word for word in words if word.startswith("tests/")]
        assert all(list(ROOT.glob(re.sub(r"\{.*?\}", "*", file))) for file in files), files
        return "pytest"
    if re.fullmatch(r"python3?", name):
        if words[1] == "-c":
            compile(words[2], "-c", "exec")
            return "python"
        if words[1:3] == ["-m", "venv"]:
            return "shell"
        if words[1] == "-m":
            assert (ROOT / (words[2].replace(".", "/") + ".py")).exists(), words
            return "module"
        if words[1] in made_by_pages():
            return "python"
        program = ROOT / words[1]
        assert program.parent.name == "benchmarks" and program.exists(), words
        given = {match[1] for word in words[2:] if (match := re.match(r"--(\w+)", word))}
        texts = [program.read_text(), *(path.read_text() for path in (ROOT / "benchmarks/parts").glob("*.py"))]
        known = {
            flag for text in texts for flag in re.findall(r'(?:DEFINE_\w+\(|add_argument\()\s*"(?:--)?(\w+)"', text)
        }
        assert given <= known, f"{words[1]} has no flags {given - known}"
        return "benchmark"
    if name == "pre-commit":
        return "hook"
    assert name in WORDS, f"unknown command {words}: name it in tests/test_docs_commands.py, with a reason"
    return "shell"


def check(command):
    """Checks every simple command of a line; a line of flags alone belongs to some launcher."""
    if command.startswith("--"):
        given = re.findall(r"--gin_bindings=(.*)", "\n".join(words for line in simple(command) for words in line))
        check_gin("", [], [binding for binding in given if not re.match(r"(base|conversations) =", binding)])
        return
    for words in simple(command):
        if found := launched(words):
            check_launcher(*found)
        elif words[0].startswith("--"):
            raise AssertionError(f"flags without a program: {words}")
        else:
            assert kind_of(words) in NOT_RUN


def try_to_check(where, command):
    try:
        check(command)
    except (AssertionError, flags.Error, ValueError, SyntaxError) as error:
        raise AssertionError(f"{where}: {command.partition(chr(10))[0]}\n{error}") from error


def paragraphs(block):
    """The parts of a block between empty lines; those of here-documents are not cut."""
    if "<<'" in block.text:
        return [block.text]
    return re.split(r"\n\s*\n", block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_page_names_what_is_there(page, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        if block.language not in SHELL:
            continue
        for part in paragraphs(block):
            if any(part.startswith(begun) for begun in OTHER.get(str(page.relative_to(ROOT)), ())):
                continue
            if re.match(r"[\w./]+ = |include ", part):
                (tmp_path / "page.gin").write_text(part)
                check_gin("", [str(tmp_path / "page.gin")], [])
                continue
            for command in commands(part):
                try_to_check(block, command)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "LOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_whole_command_in_a_sentence_names_what_is_there(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    start = r"(?:python (?:experiments|benchmarks)/|python -m |make |flm-\w+ )"
    for command in re.findall(rf"(?<!`)`({start}[^`\n]+)`(?!`)", page.read_text()):
        if not re.search(r"=FILE|/(NAME|X)\.py|\.\.\.$", command) and not command.endswith(
            " NAME"
        ):  # a form, no command
            try_to_check(page, command)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python experiments/train.py --gin_fil=x", "gin_fil"),
        ("flm-plan --gin_file=gin_configs/recipes/demo.gin", "topology"),
        ("flm-train --gin_file=gin_configs/recipes/none.gin", "There is no gin file"),
        ("flm-train --gin_file=gin_configs/recipes/demo.gin --gin_bindings='Stage.stepps = 1'", "stepps"),
        ("python benchmarks/bench.py --nothing=1", "has no flags"),
        ("make nothing", "has no"),
        ("pip install -e '.[nothing]'", "no extra"),
        ("curl example", "unknown command"),
        ("make demo && flm-grow", "source"),
    ],
)
def test_a_wrong_command_is_found(command, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, flags.Error, ValueError), match=said):
        check(command)


def test_blocks_and_lines_are_taken_apart(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A\n\n    make x \\\n        y\n\n    z\n\n```sh\ncat > f <<'END'\n\na\nEND\nb | c # d\n```\n")
    indented, fenced = blocks(page)
    assert (indented.line, commands(indented.text)) == (3, ["make x  y", "z"])
    assert commands(fenced.text) == ["cat > f <<'END'\n\na\nEND", "b | c # d"]
    assert simple("A=1 b | c --d='e f' & done; wait # no") == [["b"], ["c", "--d=e f"], ["wait"]]


def test_flags_of_other_programs_are_put_back():
    before = {name: flags.FLAGS[name] for name in flags.FLAGS}
    with defined("train") as values:
        assert "workdir" in values and "prompt" not in values
    assert {name: flags.FLAGS[name] for name in flags.FLAGS} == before
