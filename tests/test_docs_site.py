"""The site and the pages that follow from the code: navigation, reference, sources of values."""

import ast
import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from dev import reference
from flm_jax import config

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "gin_configs/recipes").glob("tele_flm_*.gin"))
FACTS = (ROOT / "docs/facts.md").read_text()
MARKS = re.compile(r"\b[PCDRO]\b|not given for the series|^as `")


def test_every_page_has_a_place_in_the_navigation():
    named = [page for pages in runpy.run_path(str(ROOT / "docs/conf.py"))["NAVIGATION"].values() for page in pages]
    assert len(named) == len(set(named))
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages |= {path.name for path in ROOT.glob("*.md")} - {"README.md"}
    assert not pages - set(named), f"name these in NAVIGATION of docs/conf.py: {sorted(pages - set(named))}"


def test_every_page_of_results_is_in_their_index():
    index = (ROOT / "docs/results/README.md").read_text()
    pages = {path.name for path in (ROOT / "docs/results").glob("*.md")} - {"README.md"}
    assert not [name for name in pages if f"]({name})" not in index]


@pytest.mark.parametrize("name", ["programs.md", "python.md", "settings.md"])
def test_the_reference_is_what_the_code_says(name):
    written = getattr(reference, f"{name.removesuffix('.md')}_page")()
    assert (reference.FOLDER / name).read_text() == written, "`make reference` writes it"


def test_every_program_is_in_the_reference_and_has_a_command():
    page = (reference.FOLDER / "programs.md").read_text()
    programs = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == programs
    assert "| `--dry_run` |  | Open the data, print" in page


def bindings(path):
    """(name, value) of every binding of a gin file, without comments; a value of several lines is its first one."""
    for name, value in re.findall(r"^([\w/]+\.\w+) = (.*)$", path.read_text(), re.MULTILINE):
        yield name, value.partition("  #")[0].strip()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_value_of_a_full_size_recipe_has_its_source(path):
    rows = {row[0]: row[1:] for row in re.findall(r"^\| `([\w/.]+)` \| (.*?) \| (.*) \|$", FACTS, re.MULTILINE)}
    structure = r"train\.\w+|Recipe\.(stages|data)|.*Stage\.(name|model|optimizer|growth)|Run\.mesh(es)?"
    found = [(name, value) for name, value in bindings(path) if not re.fullmatch(structure, name)]
    assert len(found) >= 9
    for name, value in found:
        assert name in rows, f"docs/facts.md has no row for {name}"
        said, source = rows[name]
        assert value == "{" or said == value, f"docs/facts.md says {name} = {said}; {path.name} has {value}"
        assert MARKS.search(source), f"docs/facts.md names no source of {name}"


@pytest.mark.parametrize("name", ["gin_configs/sft/tele_flm_chat.gin", "gin_configs/sft/select.gin", "docs/sft.md"])
def test_what_is_recalled_of_the_tuning_is_called_so(name):
    """In every sentence of these files that names such a value."""
    marks = dict(re.findall(r"^\| (.+?) \| ([PCDRO])\b.* \|$", FACTS.partition("## Tuning")[2], re.MULTILINE))
    recalled = {
        "2.7e-5 linearly": "rate from 2.7e-5 linearly to 1e-9",
        "maths, code and dialogues": "emphasis on maths",
        "1.03 in a chat": "repetition penalty 1.03",
    }
    text = " ".join((ROOT / name).read_text().replace("\n#", " ").split())
    found = [word for word in recalled if word in text]
    assert found
    for word in found:
        assert [mark for value, mark in marks.items() if value.startswith(recalled[word])] == ["R"]
        for sentence in (part for part in text.split(". ") if word in part):
            assert "recalled" in sentence.lower(), sentence


def test_the_shapes_of_the_series_are_those_of_the_code():
    models = [config.tele_flm_52b(), config.tele_flm_102b(), config.tele_flm_1t()]
    row = re.compile(r"^\| `?([\w ]+)`? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", re.MULTILINE)
    rows = {found[0]: found[1:] for found in row.findall(FACTS)}
    heads, effective = rows.pop("head width"), rows.pop("effective multiplier of logits")
    assert [float(value) for value in effective] == [model.logits_mult for model in models]
    assert [int(value) for value in heads] == [model.h_dim for model in models]
    assert {"embed", "layers", "heads", "mlp", "vocab", "output_mult"} == set(rows)
    for field, values in rows.items():
        assert [ast.literal_eval(value) for value in values] == [getattr(model, field) for model in models], field
    # What the table leaves out is what every model has by default.
    plain = {f.name: f.default for f in dataclasses.fields(config.ModelConfig)} | {"remat": "full", "attention": "auto"}
    others = plain.keys() - rows.keys() - {"kv_heads", "head_dim"}
    for model in models:
        assert {name: getattr(model, name) for name in others} == {name: plain[name] for name in others}
