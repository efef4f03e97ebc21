"""The notebook about verification runs from top to bottom and shows what it says; its outputs are those of its code."""

import re

import pytest

from flm_jax.growth import REGISTRY
from tests import notebooks
from tests.notebooks import code, faults, found, pictures, printed, shape

pytestmark = pytest.mark.integration

NAME = "growth_verification"


@pytest.fixture(scope="module", params=["short", pytest.param("full", marks=pytest.mark.slow)])
def executed(request):
    return notebooks.executed(NAME, short=request.param == "short")


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
    assert found(r"exact: after \d+ steps the parameters differ by (\S+)", printed(executed)) < 1e-11
    assert found(r"carry: after \d+ steps the parameters differ by (\S+)", printed(executed)) > 1e-3


def test_every_cell_runs_and_stored_outputs_are_those_of_the_code(executed, request):
    """Up to the numbers themselves, which rounding changes from machine to machine."""
    assert not list(faults(executed))
    assert [cell.execution_count for cell in code(executed)] == list(range(1, len(code(executed)) + 1))
    if "full" in request.node.name:  # the short form measures on fewer axes
        assert shape(notebooks.stored(NAME)) == shape(executed), f"Stale outputs: run `python dev/notebooks.py {NAME}`."
    assert len(pictures(executed)) == 4
