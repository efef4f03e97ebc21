"""The README and docs: links lead somewhere, and the code in them runs."""

import re
from pathlib import Path

import pytest

from flm_jax.growth import operators

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = re.findall(r"(?:flm_jax|gin_configs|experiments|benchmarks|tests)/[\w/]+\.(?:py|gin)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [file for file in files if not (ROOT / file).exists()]
    assert not missing, f"{page.name} names what is not there: {missing}"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_and_the_page_about_growth_have_python():
    assert [page.name for page in PAGES if blocks(page)] == ["README.md", "growth.md"]


@pytest.mark.integration
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda p: p.name)
def test_the_python_of_the_docs_runs_and_is_exact(page, capsys, monkeypatch):
    monkeypatch.setattr(operators, "REGISTRY", dict(operators.REGISTRY))  # a page may register an operator
    for code in blocks(page):
        exec(compile(code, page.name, "exec"), {})
        assert float(capsys.readouterr().out) < 1e-5
