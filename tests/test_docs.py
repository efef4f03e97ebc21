"""The README, docs and notebooks: what they name is there, links lead somewhere, and the code in them runs."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from flm_jax.growth import operators

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHECKED = [*PAGES, ROOT / "benchmarks/README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]
# These name files of earlier versions too; their links lead somewhere all the same.
LINKED = [*CHECKED, ROOT / "CHANGELOG.md", *sorted((ROOT / "dev").glob("*.md"))]


def text_of(page):
    if page.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"])
    return page.read_text()


def anchors(page):
    """What a link to a heading of a page may have after its '#', as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    # The second of equal headings gets a number.
    return {f"{anchor}-{n}" if n else anchor for anchor, last in found.items() for n in range(last + 1)}


def missing_links(page):
    for link in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                yield link


def missing_files(page):
    folders = "flm_jax|gin_configs|experiments|benchmarks|tests|docs|dev|notebooks"
    for file in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/]+\.(?:py|gin|md|ipynb)\b", text_of(page)):
        if not (ROOT / file).exists():
            yield file


def missing_modules(page):
    for name in re.findall(r"\bflm_jax((?:\.[a-z_]\w*)+)", text_of(page)):
        *modules, last = name[1:].split(".")
        if not is_there(last, ROOT.joinpath("flm_jax", *modules)):
            yield f"flm_jax{name}"


def is_there(name, package):
    """Whether a module of a package has this name; or whether a name is given to something in one or more modules."""
    if (package / f"{name}.py").exists() or (package / name).is_dir():
        return True
    files = [package.with_suffix(".py")] if package.with_suffix(".py").exists() else package.rglob("*.py")
    given = re.compile(rf"^ *(?:def|class) {name}\b|^{name}\b.*=|^from .* import .*\b{name}\b", re.MULTILINE)
    return any(given.search(file.read_text()) for file in files)


@pytest.mark.parametrize("page", CHECKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    missing = [*missing_files(page), *missing_modules(page)]
    assert not missing, f"{page.name} names what is not there: {missing}"


@pytest.mark.parametrize("page", LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    missing = [*missing_links(page)]
    assert not missing, f"{page.name} has links that lead nowhere: {missing}"


def test_the_changelog_says_where_things_are_now():
    rows = re.findall(r"^\| .* \| (.*) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1:]
    assert len(rows) > 10
    missing = []
    for row in rows:
        package = ROOT / "flm_jax"
        for name in re.findall(r"`([^`]+)`", re.sub(r"`[^`]+` is `", "`", row)):
            if name.endswith((".py", "/")):
                inside = (ROOT / "flm_jax" / name.removeprefix("flm_jax/"), package / name)
                place = next((place for place in inside if place.exists()), None)
                package = package if place is None else place if place.is_dir() else place.parent
                found = place is not None
            else:
                *modules, last = name.split(".")
                found = is_there(last, (ROOT / "flm_jax").joinpath(*modules) if modules else package)
            missing += [] if found else [name]
    assert not missing, f"CHANGELOG.md says that these are there: {missing}"


def test_every_benchmark_and_every_helper_of_tests_has_a_line():
    table = (ROOT / "benchmarks/README.md").read_text()
    programs = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", table)) == programs
    helpers = {path.name for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")}
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Tests")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`\w+\.py`.*?) \|", section, re.MULTILINE)
    assert set(re.findall(r"`(\w+\.py)`", " ".join(rows))) == helpers - {"conftest.py"}


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


# Pages whose Python prints how far logits differ; `test_docs_tutorial.py` runs that of others, `test_data_grain.py`
# that of token_store.md, python.md has none.
EXACT = ["README.md", "growth.md"]


def test_no_other_page_has_python():
    assert [page.name for page in PAGES if blocks(page)] == [
        *EXACT,
        "own_family.md",
        "own_parameter.md",
        "python.md",
        "token_store.md",
    ]


@pytest.mark.integration
@pytest.mark.parametrize("page", [page for page in PAGES if page.name in EXACT], ids=lambda p: p.name)
def test_the_python_of_the_docs_runs_and_is_exact(page, capsys, monkeypatch):
    monkeypatch.setattr(operators, "REGISTRY", dict(operators.REGISTRY))  # a page may register an operator
    for code in blocks(page):
        exec(compile(code, page.name, "exec"), {})
        assert float(capsys.readouterr().out) < 1e-5


def test_every_program_and_extra_is_named_where_a_newcomer_looks():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    guide, readme = ((ROOT / page).read_text() for page in ("docs/guide.md", "README.md"))
    assert not [name for name in project["scripts"] if f"`{name}`" not in guide]
    assert not [name for name in project["optional-dependencies"] if f"'.[{name}]'" not in readme]
