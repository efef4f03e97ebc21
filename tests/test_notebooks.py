"""Every notebook is as its script writes it and readable anywhere, runs to its end, and keeps what it promises.

All cells of all notebooks are run in their short form (`SHORT`); what training brings is tested in the full form alone.
"""

import ast
import base64
import gc
import importlib
import re
import subprocess
import sys

import pytest
from jupyter_client import AsyncKernelClient

from dev import notebooks
from tests.notebooks import SHORT, code, executed, faults, found, pictures, printed, shape, stored

NAMES = sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb"))
ADVICE = "run `python dev/notebooks.py NAME`"
# The place of a machine: outputs hold none.
PLACE = re.compile(r"/(?:root|home|Users|tmp|usr|opt|work|var)/[\w./-]*|site-packages")


def python_of(notebook):
    """The code as one program, without lines for the shell."""
    return "\n".join(re.sub(r"^[!%].*$", "", cell.source, flags=re.MULTILINE) for cell in code(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_as_its_script_writes_it(name):
    notebook, path = stored(name), notebooks.FOLDER / f"{name}.ipynb"
    assert not notebooks.common(notebook, path), "run `python dev/notebooks.py`"
    assert notebook.cells[0].id == "badge" and f"/notebooks/{name}.ipynb)" in notebook.cells[0].source
    assert code(notebook)[0].id == "install"
    assert notebook.cells[1].source.startswith("# ")
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_imports_is_there(name):
    for node in ast.walk(ast.parse(python_of(stored(name)))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & set(notebooks.EXTRAS)


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_whole_small_and_of_no_machine(name):
    notebook, path = stored(name), notebooks.FOLDER / f"{name}.ipynb"
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1)), ADVICE
    assert not list(faults(notebook))
    assert path.stat().st_size < 300_000
    assert all(len(base64.b64decode(picture)) < 60_000 for picture in pictures(notebook))
    text = path.read_text().replace('"image/png"', "")
    text = re.sub(r'": "iVBOR[^"]*"', '": ""', text)
    assert not PLACE.findall(text), PLACE.findall(text)


def test_the_readme_lists_every_notebook():
    rows = re.findall(
        r"^\| \[\w+\]\(notebooks/(\w+)\.ipynb\)", (notebooks.ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(rows) == NAMES


def test_the_first_cell_installs_only_where_nothing_is_found(tmp_path, monkeypatch):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setenv("PYTHONPATH", "before")
    exec(notebooks.INSTALL, {})
    assert not ran  # it can be imported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(notebooks.INSTALL, {})
    assert ran == [[sys.executable, "-m", "pip", "install", "--quiet", f"flm_jax @ git+{notebooks.REPOSITORY}"]]
    clone = tmp_path / "clone"
    for folder in ("flm_jax", "notebooks"):
        (clone / folder).mkdir(parents=True)
    (clone / "flm_jax" / "config.py").touch()
    monkeypatch.chdir(clone / "notebooks")
    exec(notebooks.INSTALL, {})
    assert len(ran) == 1 and sys.path[0] == str(clone)


def test_a_notebook_that_fails_says_so_sees_no_extra_and_leaves_no_channels(tmp_path):
    path = tmp_path / "a.ipynb"
    cells = ["x = 1\nprint(x)", "import torch"]
    notebook = notebooks.nbformat.v4.new_notebook(cells=[notebooks.nbformat.v4.new_code_cell(cell) for cell in cells])
    notebooks.write(notebook, path)
    with pytest.raises(Exception, match="No module named 'torch': notebooks do without"):
        notebooks.run(path, {})
    clients = [found for found in gc.get_objects() if isinstance(found, AsyncKernelClient)]
    assert not any(client.channels_running for client in clients)  # their finalizers would log warnings, at any time


def test_other_sizes_are_taken_and_unknown_ones_refused():
    cells = ["LESS_STEPS = 5\nSTEPS = 5  # of each\nAXES = (\n    1,\n    2,\n)", "STEPS = 5"]
    notebook = notebooks.nbformat.v4.new_notebook(cells=[notebooks.nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].id = "sizes"
    notebooks.with_sizes(notebook, {"STEPS": 2, "AXES": ("a",)})
    assert notebook.cells[0].source == "LESS_STEPS = 5\nSTEPS = 2  # of each\nAXES = ('a',)"
    assert notebook.cells[1].source == "STEPS = 5"
    with pytest.raises(ValueError, match="does not assign STAPS; it assigns LESS_STEPS, STEPS, AXES"):
        notebooks.with_sizes(notebook, {"STAPS": 2})


@pytest.mark.parametrize("name", NAMES)
def test_what_decides_the_length_stands_at_the_top_and_has_a_short_form(name):
    assert code(stored(name))[2].id == "sizes"  # after the installation and the imports
    assert set(notebooks.sizes(stored(name))) == set(SHORT[name])


def short_form(name):
    """What a notebook printed in its short form, after every cell ran."""
    now = executed(name, short=True)
    assert not list(faults(now))
    assert [cell.execution_count for cell in code(now)] == list(range(1, len(code(stored(name))) + 1))
    assert len(pictures(now)) == len(pictures(stored(name)))
    return printed(now)


def keeps_the_function(text):
    """That the growths of growth_and_training did what their promises say; returns their records."""
    first, second = text.split("angle at the growth")
    spike = dict(re.findall(r"^(zero|copy|fresh|none) {2,}(\d\S+ +\S+)", first, re.MULTILINE))
    spike = {name: list(map(float, rest.split())) for name, rest in spike.items()}
    assert set(spike) == {"zero", "copy", "fresh", "none"}
    assert all((before == after) == (name != "fresh") for name, (before, after) in spike.items())
    angles = dict(re.findall(r"^(copy|uneven|noise|copy, asymmetric) {2,}(\d.*)$", second, re.MULTILINE))
    angles = {name: list(map(float, rest.split())) for name, rest in angles.items()}
    assert angles["copy"][:3] == [0, 0, 0]
    assert angles["noise"][0] > 1
    assert angles["uneven"][:2] == [0, 0]
    assert angles["copy, asymmetric"][0] == 0
    assert angles["copy, asymmetric"][1] > 0.05
    return spike, angles


def goes_in_and_out(text):
    """That the model of grow_your_own is the same after its growth, and after its export."""
    assert text.count("greedy continuation of 64 tokens: equal") == 2
    assert "HOLDS\nexit status 0" in text
    assert text.count(": the same\n") >= 4


def plans(text):
    """That plan_1t says what the series costs, and what would be right."""
    assert found(r"52b +(\S+)% of the FLOPs", text) == pytest.approx(69.4, abs=1)
    assert "the nearest sizes that work" in text
    assert "did you mean 'tensor'?" in text


def examines(text):
    """That chat_and_tune asks all questions, before and after."""
    before, after = (re.findall(rf"^{which} wording +\d+ +(\S+)", text, re.MULTILINE) for which in ("seen", "new"))
    assert before[0] == after[0] == "0.0"
    return float(before[1]), float(after[1])


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "promise"),
    [
        ("growth_and_training", keeps_the_function),
        ("grow_your_own", goes_in_and_out),
        ("plan_1t", plans),
        ("chat_and_tune", examines),
    ],
)
def test_every_cell_runs_in_the_short_form(name, promise):
    promise(short_form(name))


def kept(name):
    """What a notebook printed when it was run now; its stored outputs have the same form."""
    now = executed(name)
    assert not list(faults(now))
    assert shape(stored(name)) == shape(now), f"The stored outputs are stale: {ADVICE}."
    return printed(now)


@pytest.mark.slow
def test_growth_and_training():
    text = kept("growth_and_training")
    spike, angles = keeps_the_function(text)
    last = dict(re.findall(r"^(zero|copy|fresh|none) {2,}\d.* (\S+)$", text.split("angle at")[0], re.MULTILINE))
    assert spike["fresh"][1] > spike["fresh"][0] + 0.2
    assert float(last["copy"]) == pytest.approx(float(last["none"]), abs=0.01)  # copies: the model that did not grow
    assert angles["uneven"][2] > 0.1
    assert found(r"fresh: first update (\S+);", text) > 2 * found(r"carry: first update (\S+);", text)
    assert found(r"fresh: first .*highest loss (\S+)", text) > 0.01 > found(r"carry: first .*highest loss (\S+)", text)
    hump = found(r"mask, over .*above zero by (\S+) at most", text)
    assert 0 < hump < found(r"fresh: no ramp .*above zero by (\S+) at most", text) / 2


@pytest.mark.slow
def test_grow_your_own():
    text = kept("grow_your_own")
    goes_in_and_out(text)
    before, after = map(float, re.search(r"^(\d\S+) -> (\d\S+) nats per token$", text, re.MULTILINE).groups())
    given = float(re.findall(r"^  loss: (\S+) -> ", text, re.MULTILINE)[0])
    assert before == pytest.approx(given, abs=0.2)  # on other windows of the same text
    assert after < before - 0.05


@pytest.mark.slow
def test_plan_1t():
    text = kept("plan_1t")
    plans(text)
    assert re.search(r"^64 x 1 x 16 .* fits ", text, re.MULTILINE)


@pytest.mark.slow
def test_chat_and_tune():
    text = kept("chat_and_tune")
    seen, new = examines(text)
    assert seen > 85
    assert new > 50
    base, tuned = re.findall(r"^runs/\w+ +(\S+) bits per byte of code", text, re.MULTILINE)
    assert float(tuned) > float(base) + 0.1
