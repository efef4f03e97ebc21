"""Where data is read on after a change: each source after its last window, whatever stands beside it now."""

import dataclasses
import json

import numpy as np
import pytest

from flm_jax.data.batches import StageNeed
from flm_jax.data.carrying import carried, small_position
from flm_jax.data.mixture import Mixture
from flm_jax.data.mixture_batches import MixtureBatches
from flm_jax.data.source import open_data
from tests.mixtures import CONTEXT, changed, write

NAMES = ("prose", "code", "numbers")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def data(config):
    return open_data(config, progress=False)


@pytest.fixture(scope="module")
def read(data):
    """A position after 21 windows, by other weights from the eighth on, and how many of each source these are."""
    batches = data.train()
    batches.next(8)
    later = data.train({"prose": 1.0, "numbers": 4.0})
    later.restore(batches.state())
    later.next(13)
    return later.state(), later.order.counts(21)


def opened(config, *names):
    """The data of a mixture of some of the sources, in this order; of one source alone, if it is named as a text."""
    sources = {source.name: source for source in config.mixture.sources}
    if isinstance(names[0], str) and len(names) == 1:
        return open_data(dataclasses.replace(config, corpus=sources[names[0]].corpus), progress=False)
    mixture = Mixture(tuple(sources[name] for name in names))
    return open_data(dataclasses.replace(config, corpus=mixture), progress=False)


def next_windows(batches, state):
    """By place of a source, the numbers of the windows that are read first."""
    batches.restore(state)
    sources, numbers = batches.order.span(batches.position, 12)
    return {int(k): numbers[sources == k].tolist() for k in np.unique(sources)}


def test_other_weights_go_on_after_each_sources_last_window(data, read):
    state, counts = read
    found = carried(state, data.train({"code": 1.0, "prose": 1.0}))
    assert found.state == state
    assert found.note == "The data goes on after the 21 windows that were read: none is left out or comes twice."
    read_on = next_windows(data.train({"code": 1.0, "prose": 1.0}), found.state)
    assert read_on == {k: list(range(counts[k], counts[k] + 6)) for k in (0, 1)}


def test_sources_that_come_and_go_leave_the_others_where_they_are(config, data, read):
    state, counts = read
    fewer = opened(config, "numbers", "prose")
    found = carried(state, fewer.train())
    assert found.note == (
        f"Of the data, numbers goes on after {counts[2]} windows, prose goes on after {counts[0]} windows, "
        "code is no longer read."
    )
    numbers, prose = (next_windows(fewer.train(), found.state)[k] for k in (0, 1))
    assert (numbers[0], prose[0]) == (counts[2], counts[0])
    # And back: the source that was left out begins again, as nothing is known of it any more.
    again = carried(found.state, data.train())
    assert "code starts from its beginning" in again.note
    batches = data.train()
    batches.restore(again.state)
    assert batches.order.drawn == (counts[0], 0, counts[2])


def test_a_single_corpus_and_a_mixture_with_it_are_the_same_text(config, data):
    alone = opened(config, "code").train()
    alone.next(5)
    found = carried(alone.state(), data.train())
    batches = data.train()
    batches.restore(found.state)
    assert (batches.position, batches.order.drawn) == (5, (0, 5, 0))
    assert "prose starts from its beginning, code goes on after 5 windows" in found.note
    batches.next(7)
    back = opened(config, "code").train()
    one = carried(batches.state(), back)
    back.restore(one.state)
    assert back.position == batches.order.counts(12)[1] > 5
    assert "the corpus goes on after" in one.note and "prose is no longer read" in one.note


def test_sources_in_another_order_keep_their_counts(config, read):
    """Their stores are the same, so only the order tells that the counts have to move."""
    state, counts = read
    turned = opened(config, "numbers", "code", "prose").train()
    turned.restore(carried(state, turned).state)
    assert turned.order.drawn == tuple(reversed(counts))


def test_another_seed_other_windows_and_other_text_begin_at_the_start(config, data, read):
    state, _ = read
    for fields, note in (
        (dict(seed=1), "its order is another one (seed 0 -> 1)"),
        (dict(context=CONTEXT // 2), "(context 16 -> 8)"),
    ):
        found = carried(state, open_data(dataclasses.replace(config, **fields), progress=False).train())
        assert found.state is None and note in found.note
    alone = opened(config, "code").train()
    alone.next(4)
    found = carried(alone.state(), opened(config, "prose").train())
    assert found == (None, "The data is other data, and starts from its beginning.")


def test_a_limit_counts_what_was_read_before(config, data, read):
    """Of code, 5 windows were read: with a limit of 6 one more comes."""
    state, counts = read
    limited = open_data(changed(config, code={"epochs": 0.3, "weight": 9.0}), progress=False)
    limit = limited.parts[1].limit
    assert limit is not None
    found = carried(state, limited.train())
    batches = limited.train()
    batches.restore(found.state)
    sources, _ = batches.order.span(batches.position, 40)
    assert int((sources == 1).sum()) == max(limit - counts[1], 0)


def test_supply_is_counted_from_the_position(data, read):
    state, counts = read
    limit = data.parts[1].limit
    only = StageNeed("one", 10**6, 4, {"code": 1.0}, since=3)
    left = limit - counts[1]
    with pytest.raises(ValueError, match=rf"after {left} of them \(step {3 + left // 4}\)"):
        data.supply([only], state)


def test_a_position_that_is_damaged_is_refused(data):
    with pytest.raises(ValueError, match="the saved data position is not JSON"):
        carried(b"{", data.train())
    record = json.loads(data.train().state())
    record["identity"]["seed"] = 0
    record["identity"]["limits"] = [None]
    with pytest.raises(ValueError, match="the saved data position is damaged"):
        carried(json.dumps(record).encode(), data.train())
    assert small_position(None) is None
    assert small_position(data.train().state())["position"] == 0
    assert isinstance(data.train(), MixtureBatches)
