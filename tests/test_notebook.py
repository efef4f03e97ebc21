"""The notebook runs from top to bottom, shows what it says, and its stored outputs are those of its code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

from flm_jax.growth import REGISTRY
from tests.environment import as_user

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "growth_verification.ipynb"
NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?"


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """All that was printed, as one text; tracebacks and warnings are no part of a good run."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    return "".join(o.text for o in outputs if o.output_type == "stream")


def pictures(notebook):
    return sum("image/png" in o.get("data", {}) for cell in code(notebook) for o in cell.outputs)


def found(pattern, text):
    """The one number that a pattern captures."""
    (value,) = re.findall(pattern, text)
    return float(value)


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A copy, run elsewhere by this interpreter, whatever kernels the machine has."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(shutil.copy(NOTEBOOK, folder), as_version=4)
    kernels = KernelSpecManager(kernel_dirs=[])
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels),
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        timeout=600,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        environment = {**as_user(), "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
        environment.pop("MPLBACKEND", None)
        client.execute(env=environment)
    return notebook


def test_every_promise_in_the_table_is_kept(executed):
    rows = re.findall(r"^(\w+) +(\w+(?:, \w+)*) +(yes|no) +(\S+)(?: +(\S+))?$", printed(executed), re.MULTILINE)
    assert {name for name, *_ in rows} == set(REGISTRY)
    for name, axes, promised, single, double in rows:
        assert (promised == "yes") == REGISTRY[name].preserving
        if promised == "yes":
            assert float(single) < 1e-5, f"{name} on {axes}"
            assert not double or float(double) < 1e-12, f"{name} on {axes}"
        assert bool(double) == (axes == "embed")
    assert max(float(single) for name, _, promised, single, _ in rows if promised == "no") > 0.1


def test_rules_left_out_are_seen(executed):
    bars = re.findall(r"^(.+?) +(exact|broken) +(\S+)$", printed(executed), re.MULTILINE)
    assert len(bars) == 8
    for name, label, value in bars:
        assert (float(value) < 1e-5) if label == "exact" else (float(value) > 1e-3), name
    assert "layer 2 of the grown model is the first that differs" in printed(executed)


def test_masks_begin_exact_and_end_without_a_trace(executed):
    text = printed(executed)
    assert found(r"mask 0: (\S+)", text) < 1e-5
    assert found(r"mask 1: (\S+),", text) == pytest.approx(found(r"without masks: (\S+)", text), rel=1e-2)


def test_adamw_goes_on_exactly(executed):
    assert found(r"exact: after 10 steps the parameters differ by (\S+)", printed(executed)) < 1e-11
    assert found(r"carry: after 10 steps the parameters differ by (\S+)", printed(executed)) > 1e-3


def test_stored_outputs_are_those_of_the_code(stored, executed):
    """Up to the numbers themselves, which rounding changes from machine to machine."""
    advice = "run `jupyter execute --inplace notebooks/growth_verification.ipynb`"
    assert [cell.execution_count for cell in code(stored)] == list(range(1, len(code(stored)) + 1)), advice
    shape = [re.sub(NUMBER, "#", printed(notebook)).split() for notebook in (stored, executed)]
    assert shape[0] == shape[1], f"The notebook's stored outputs are stale: {advice}."
    assert pictures(stored) == pictures(executed) == 4
    assert NOTEBOOK.stat().st_size < 400_000


def test_outside_a_clone_it_installs_what_the_reader_names(stored, tmp_path, monkeypatch):
    """The first cell, where flm_jax cannot be imported: it asks for a repository, clones it and installs."""
    text, ran = code(stored)[0].source, []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    with pytest.raises(ValueError, match="set REPOSITORY"):
        exec(text, {})
    assert not ran
    exec(text.replace('REPOSITORY = ""', 'REPOSITORY = "somewhere"'), {})
    clone = str(tmp_path / "flm_jax_clone")
    assert ran[0] == ["git", "clone", "--depth", "1", "somewhere", clone]
    assert ran[1][1:] == ["-m", "pip", "install", "--quiet", "-r", f"{clone}/requirements.txt"]
    assert sys.path[0] == clone
    monkeypatch.chdir(ROOT / "notebooks")
    exec(text, {})
    assert len(ran) == 2
    assert sys.path[0] == str(ROOT)
