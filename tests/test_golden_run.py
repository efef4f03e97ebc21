"""A work directory written by version 0.1.0 is read, resumed, grown and streamed to the numbers that it gave then."""

import json

import jax
import pytest

from tests import golden_run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("compiled_as_in_use")]

EXPECTED = json.loads(golden_run.EXPECTED.read_text())
# Sums are rounded in the order of the processor's vectors, and another XLA fuses others: there training is held to its
# losses, and not to every bit. Growing gives the same bits everywhere.
SAME_PROGRAMS = (golden_run.machine(), jax.__version__) == (EXPECTED["machine"], EXPECTED["jax"])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return golden_run.found(tmp_path_factory.mktemp("golden"))


def losses_match(found, expected):
    assert [e[:2] for e in found] == [e[:2] for e in expected]
    return [e[2] for e in found] == pytest.approx([e[2] for e in expected], abs=1e-4)


def test_its_checkpoints_are_read_and_have_the_digests_they_were_saved_with(found):
    assert found["saved"] == EXPECTED["saved"]


def test_resumed_inside_its_ramp_it_ends_as_it_did(found):
    assert losses_match(found["resumed"]["losses"], EXPECTED["resumed"]["losses"])
    assert not SAME_PROGRAMS or found["resumed"] == EXPECTED["resumed"]


@pytest.mark.parametrize("name", golden_run.GROWTHS)
def test_it_grows_to_the_same_bytes_in_memory_and_block_by_block(name, found):
    in_memory, streamed = found["grown"][name]
    assert in_memory == streamed == EXPECTED["grown"][name][0]


@pytest.mark.parametrize("name", EXPECTED["started"])
def test_runs_that_begin_with_it_grown_end_as_they_did(name, found):
    mine, expected = found["started"][name], EXPECTED["started"][name]
    assert losses_match(mine["losses"], expected["losses"])
    assert not SAME_PROGRAMS or mine == expected
