"""Documents in a window: attention within them or across, positions that go on or begin again."""

import dataclasses

import jax
import numpy as np
import pytest

from flm_jax import model
from flm_jax.data.batches import Batch
from flm_jax.data.packing import laid_out, positions
from flm_jax.data.source import open_data, recorded_data
from flm_jax.loss import hidden
from tests import mixtures, small

# Three documents of 5, 1 and 6 tokens; one of 4 and one of 8.
SEGMENTS = np.array([[0] * 5 + [1] + [2] * 6, [0] * 4 + [1] * 8], np.int32)
CFG = small.config(kv_heads=1, sliding_window=7)
logits = jax.jit(
    lambda params, batch: model.Transformer(CFG).apply(
        {"params": params}, hidden(CFG, params, batch)[0], method="logits"
    )
)


def batch() -> Batch:
    ids = small.tokens((2, 13))
    return Batch(ids[:, :-1], ids[:, 1:], np.ones((2, 12), np.float32), SEGMENTS)


def documents() -> list[tuple[int, int, int]]:
    """Row, first and last position (exclusive) of each document."""
    return [(0, 0, 5), (0, 5, 6), (0, 6, 12), (1, 0, 4), (1, 4, 12)]


def test_positions_count_from_the_first_token_of_a_document():
    found = positions(SEGMENTS)
    assert found.dtype == np.int32
    assert found.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("packing", ["separate", "restarted"])
def test_packed_documents_have_the_logits_that_each_has_alone(packing):
    params, rows = small.params(CFG), batch()
    packed = logits(params, laid_out(rows, packing))
    # Each document first in a row of its own: what follows it there has no effect on it.
    alone = np.zeros((6, 12), np.int32)
    for k, (row, first, last) in enumerate(documents()):
        alone[k, : last - first] = rows.inputs_BT[row, first:last]
    apart = small.apply(CFG, params, alone)
    for k, (row, first, last) in enumerate(documents()):
        np.testing.assert_allclose(packed[row, first:last], apart[k, : last - first], rtol=1e-4, atol=1e-5)


def test_joined_documents_are_one():
    params, rows = small.params(CFG), batch()
    joined = logits(params, laid_out(rows, "joined"))
    np.testing.assert_allclose(joined, small.apply(CFG, params, rows.inputs_BT), rtol=1e-5, atol=1e-6)
    assert np.abs(joined - logits(params, rows))[0, 6:].max() > 1e-3


def test_data_are_read_as_their_configuration_says_and_as_a_checkpoint_records(tmp_path):
    data = mixtures.write(tmp_path)
    plain = open_data(data, progress=False)
    for packing in ("joined", "restarted"):
        opened = open_data(dataclasses.replace(data, packing=packing), progress=False)
        assert opened.digest == plain.digest
        for found in (opened, recorded_data(opened.describe())):
            held = next(iter(found.heldout(4, 4)))
            assert (held.segments_BT is None, held.positions_BT is None) == (packing == "joined", packing == "joined")
        trained, own = opened.train(), plain.train()
        trained.next(4)
        again = opened.train()
        again.restore(trained.state())
        own.restore(trained.state())
        assert np.array_equal(again.next(4).inputs_BT, own.next(4).inputs_BT)
    assert "packing" not in plain.describe()
    with pytest.raises(LookupError, match="an unknown packing, 'mixed'"):
        recorded_data({**plain.describe(), "packing": "mixed"})
    with pytest.raises(ValueError, match="packing.*separate, restarted, joined"):
        dataclasses.replace(data, packing="mixed")
