"""Mixtures: rows are windows of their sources' own runs, exact after a stop, on any number of hosts, with limits."""

import dataclasses
import json
import re
from pathlib import Path

import gin
import numpy as np
import pytest

from flm_jax.cli import configure
from flm_jax.data import text
from flm_jax.data.batches import StageNeed
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import TextFolder
from flm_jax.data.mixing import SupplyError
from flm_jax.data.mixture import Mixture, Source
from flm_jax.data.mixture_batches import MixtureBatches
from flm_jax.data.source import open_data, recorded_data
from flm_jax.data.supply import expected_supply
from flm_jax.data.survey import survey, survey_text
from flm_jax.data.train_vocabulary import SentencePiece
from flm_jax.planning.text import dry_run
from flm_jax.recipe import Recipe, Run, Stage, resolve
from tests import small
from tests.mixtures import CONTEXT, changed, unweighted, write

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("prose", "code", "numbers")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def data(config):
    return open_data(config, progress=False)


def equal(one, two):
    assert np.array_equal(one.sources.numbers_B, two.sources.numbers_B) and one.sources.count == two.sources.count
    return all(np.array_equal(x, y) for x, y in zip(one[:4], two[:4], strict=True))


def alone(config, data, source):
    """The batches of a run on one source alone, from its store, which is the same one."""
    single = open_data(dataclasses.replace(config, corpus=config.mixture.sources[source].corpus), progress=False)
    assert single.store.path == data.parts[source].store.path
    return single.train()


def test_rows_are_the_windows_of_runs_on_each_source_alone(config, data):
    batches = data.train()
    found = [batches.next(size) for size in (8, 5, 16)]
    numbers = np.concatenate([batch.sources.numbers_B for batch in found])
    inputs, targets, segments = (np.concatenate([batch[i] for batch in found]) for i in (0, 1, 3))
    assert np.bincount(numbers).tolist() == pytest.approx([14.5, 9.7, 4.8], abs=2)
    for source in range(3):
        own = alone(config, data, source).next(int((numbers == source).sum()))
        mine = numbers == source
        assert np.array_equal(inputs[mine], own.inputs_BT) and np.array_equal(targets[mine], own.targets_BT)
        assert np.array_equal(segments[mine], own.segments_BT)


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_reads_what_one_reads(data, hosts):
    one, many = data.train(), [data.train() for _ in range(hosts)]
    for size in (8, 16):
        whole = one.next(size)
        for host, own in enumerate(many):
            rows = np.arange(size).reshape(hosts, -1)[host]
            part = own.next(size, rows)
            assert np.array_equal(part.inputs_BT, whole.inputs_BT[rows])
            assert np.array_equal(part.sources.numbers_B, whole.sources.numbers_B[rows])
    assert {own.mark() for own in many} == {one.mark()} and {own.state() for own in many} == {one.state()}


def test_a_restored_stream_goes_on_bit_for_bit_past_the_end_of_a_source(data):
    one = data.train()
    states, found = [], []
    for _ in range(33):
        states.append(one.state())
        found.append(one.next(7))
    ended = data.parts[1].limit
    assert one.order.counts(one.position)[1] == ended, "the run must reach the limit"
    assert sum(int((batch.sources.numbers_B == 1).sum()) for batch in found) == ended
    for at in (0, 3, 32):
        again = data.train()
        again.restore(states[at])
        assert all(equal(again.next(7), batch) for batch in found[at:])


def test_weights_of_a_later_stage_begin_where_the_stage_before_stopped(data):
    first, counts = data.train(), np.zeros(3, int)
    counts += np.bincount(first.next(12).sources.numbers_B, minlength=3)
    later = {"numbers": 1.0, "prose": 1.0}
    second = data.train(later)
    second.restore(first.state())
    begun = second.state()
    sources, numbers = second.order.span(second.position, 20)
    for source in range(3):
        assert numbers[sources == source].tolist() == list(range(counts[source], counts[source] + [10, 0, 10][source]))
    kept = [second.next(10), second.next(10)]
    for state, batches in ((begun, kept), (first.state(), kept)):
        again = data.train(later)  # from the stage's first checkpoint, and from the last one of the stage before
        again.restore(state)
        assert all(equal(again.next(10), batch) for batch in batches)


def test_what_runs_out_is_said_once(data, capsys):
    batches = data.train()
    batches.next(10)
    said = capsys.readouterr().out
    while batches.order.counts(batches.position)[1] < data.parts[1].limit:
        batches.next(10)
    batches.next(10)
    said += capsys.readouterr().out
    ((at, _),) = batches.order.run_out
    assert said == (
        f"After {at} windows, code has been read as often as it may; the shares are now: prose 0.75, numbers 0.25.\n"
    )


def test_a_position_in_other_data_is_refused(config, data):
    state = data.train().state()
    for other in (
        changed(config, code={"epochs": 2.0}),
        changed(config, code={"name": "program"}),
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, context=8),
    ):
        with pytest.raises(ValueError, match="the saved data position|it cannot continue"):
            open_data(other, progress=False).train().restore(state)
    record = json.loads(state)
    for order in ({"weights": [1.0], "start": 0, "drawn": [0, 0, 0]}, {**record["order"], "drawn": [1, 0, 0]}):
        with pytest.raises(ValueError, match="the saved data position is damaged"):
            data.train().restore(json.dumps({**record, "order": order}).encode())


def test_the_digest_tells_mixtures_apart(config, data):
    others = [
        changed(config, code={"epochs": None}),
        changed(config, prose={"weight": 4.0}),
        changed(config, code={"name": "c"}),
    ]
    assert len({data.digest, *(open_data(other, progress=False).digest for other in others)}) == 4


def test_without_weights_sources_count_by_size_and_temperature(config):
    tokens = [part.store.num_tokens("train") for part in open_data(unweighted(config, 1.0), progress=False).parts]
    for temperature, expected in ((1.0, tokens), (2.0, np.sqrt(tokens)), (1e9, np.ones(3))):
        found = open_data(unweighted(config, temperature), progress=False)
        weights = np.array([part.weight for part in found.parts])
        assert weights / weights.sum() == pytest.approx(np.array(expected) / np.sum(expected))


def test_a_run_that_needs_more_than_there_is_is_refused_before_it_starts(config):
    limits = {"epochs": 1.0}
    data = open_data(changed(config, prose=limits, code=limits, numbers=limits), progress=False)
    total = sum(part.limit for part in data.parts)
    said = data.supply([StageNeed("one", total // 4, 4, None)])
    assert len(said) <= 2 and all(line.startswith("Stage 'one': ") for line in said)
    with pytest.raises(ValueError, match=rf"Stage 'two' needs {total} windows, and after {total - 8} of them"):
        data.supply([StageNeed("one", 2, 4, None), StageNeed("two", total, 1, None)])
    # Of what the second stage may read, the first one has read some.
    code = data.parts[1].limit
    with pytest.raises(ValueError, match=rf"Stage 'two' needs {code} windows.*raise Source.epochs"):
        data.supply([StageNeed("one", 2, 4, None), StageNeed("two", code, 1, {"code": 1.0})])
    batches = data.train()
    batches.next(total)
    with pytest.raises(SupplyError, match=f"after {total} windows every source"):
        batches.next(1)


def test_heldout_windows_are_those_of_each_source_weighted_to_the_mean_of_the_mixture(config, data):
    batches = list(data.heldout(4, 10))
    assert all(batch.inputs_BT.shape == (4, CONTEXT) for batch in batches) and len(batches) == 3
    sources = np.concatenate([batch.sources.numbers_B for batch in batches])[:10]
    inputs, weights = (np.concatenate([batch[i] for batch in batches]) for i in (0, 2))
    assert not weights[10:].any()
    for k, share in enumerate([3 / 6, 2 / 6, 1 / 6]):
        mine = np.flatnonzero(sources == k)
        (own,) = open_data(
            dataclasses.replace(config, corpus=config.mixture.sources[k].corpus), progress=False
        ).heldout(len(mine), len(mine))
        assert np.array_equal(inputs[mine], own.inputs_BT)
        assert weights[mine].sum() / weights.sum() == pytest.approx(share, rel=1e-6)
    with pytest.raises(ValueError, match="0 held-out windows"):
        next(iter(data.heldout(4, 0)))


def test_bits_per_byte_of_the_mixture_are_those_of_its_mean(data):
    sizes = list(data.sources.values())
    assert list(data.sources) == list(NAMES)
    assert data.bytes_per_token == pytest.approx(np.dot([3 / 6, 2 / 6, 1 / 6], sizes))


def test_a_checkpoint_records_where_the_stores_are(data, tmp_path):
    record = json.loads(json.dumps(data.describe()))
    again = recorded_data(record)
    assert again.digest == data.digest and again.vocabulary.digest == data.vocabulary.digest
    record["sources"]["code"]["digest"] = "0" * 64
    with pytest.raises(LookupError, match="holds other data"):
        recorded_data(record)
    record["sources"]["code"]["store"] = str(tmp_path)
    with pytest.raises(LookupError, match="no token store"):
        recorded_data(record)


def test_a_trained_vocabulary_is_one_for_all_sources(config, monkeypatch, tmp_path):
    from flm_jax.data import prepare
    from tests.mixtures import _missing

    monkeypatch.setattr(prepare, "load_tensorflow", _missing)
    both = dataclasses.replace(config, vocabulary=SentencePiece(280), cache_dir=str(tmp_path))
    data = open_data(both, progress=False)
    assert {part.store.vocabulary.digest for part in data.parts} == {data.vocabulary.digest}
    letters = "abcd(){}0123"
    assert data.vocabulary.decode(data.vocabulary.encode(letters)) == letters


def test_a_survey_counts_every_source(config):
    found = survey_text(survey(config))
    assert "Mixture of 3 sources" in found and "prose, weight 3" in found and "at most 2.5 passes" in found


def source(name="a", **fields):
    return Source(name, TextFolder("texts"), **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture(()), "Mixture.sources is empty"),
        (lambda: Mixture((source(), source())), "two sources named 'a'"),
        (lambda: Mixture((source(weight=1.0), source("b"))), "b without a weight"),
        (lambda: Mixture((source(weight=1.0),), temperature=2.0), "leave out one of the two"),
        (lambda: Mixture((source(weight=0.0),)), "all weights of sources are 0"),
        (lambda: Mixture((Source("m", Mixture((source(),))),)), "'m' is a Mixture"),
        (lambda: source("a/b"), "Source.name = 'a/b': use a text, letters, digits"),
        (lambda: source(weight=-1.0), "Source.weight = -1.0: use a number, at least 0"),
        (lambda: source(epochs=0), "Source.epochs = 0: use a number, greater than 0"),
    ],
)
def test_wrong_mixtures_are_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_weights_of_a_stage_are_refused_in_a_sentence(config):
    def check(corpus, weights):
        stage = Stage("one", small.shape(), 2, 4, source_weights=weights)
        resolve(Recipe((stage,), DataConfig(corpus, context=CONTEXT)))

    check(config.corpus, {"code": 1})
    with pytest.raises(ValueError, match="Stage 'one': source_weights: there is no source 'cod'.*'code'"):
        check(config.corpus, {"cod": 1})
    with pytest.raises(ValueError, match="Stage 'one': source_weights: all weights"):
        check(config.corpus, {"code": 0})
    with pytest.raises(ValueError, match="DataConfig.corpus is a TextFolder"):
        check(TextFolder("a"), {"code": 1})


def test_errors_of_a_source_name_it(config):
    with pytest.raises(FileNotFoundError, match="Source 'code': TextFolder: there is no folder"):
        open_data(changed(config, code={"corpus": TextFolder("nowhere")}), progress=False)
    with pytest.raises(ValueError, match=r"Source 'code': Source.epochs = 0.001 of \d+ windows"):
        open_data(changed(config, code={"epochs": 0.001}), progress=False)
    with pytest.raises(ValueError, match="Source 'prose': .* fewer than"):
        open_data(dataclasses.replace(config, context=100_000), progress=False)
    with pytest.raises(ValueError, match=r"set DataConfig.streamed = False"):
        open_data(dataclasses.replace(config, streamed=True), progress=False)


def given(*files, bindings=()):
    gin.clear_config()
    try:
        configure.parse([str(ROOT / "gin_configs" / file) for file in files], list(bindings))
        return configure.configured(configure.train)[0]
    finally:
        gin.clear_config()


def test_the_shares_of_the_series_are_the_published_ones():
    mixture = given("recipes/tele_flm_52b.gin", "data/tele_flm_mixture.gin").data.mixture
    said = (ROOT / "docs/facts.md").read_text().partition("In per cent: ")[2].partition("Bits")[0]
    published = [float(number) for number in re.findall(r"\d+\.\d+", said)]
    assert len(published) == 11 and [source.weight for source in mixture.sources] == published
    assert mixture.sources[-1].corpus.path == "texts/classical_chinese"


def test_the_small_mixture_is_the_data_of_any_recipe(monkeypatch, tmp_path):
    recipe = given("recipes/demo.gin", "data/small_mixture.gin")
    assert recipe.data.mixture.names == ("python", "text", "headers") and recipe.data.context == 128
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"SitePackages: no file in .* matches the pattern '\*\*/\*.txt'"):
        recipe.data.mixture.sources[1].corpus.digest()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert [name for name, _, _ in recipe.data.mixture.sources[1].corpus.contents()] == ["a.txt"]


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("Mixture.sources = @python/Source()", "Mixture.sources = .*: use a list, each entry a Source; write brackets"),
        (
            "Mixture.sources = [@python/Source(), @pyton/Source()]",
            "pyton/Source lacks corpus, name: .*did you mean 'python'",
        ),
        ("python/Source.weight = 'two'", "Source.weight = 'two': use a number, at least 0, or None"),
        ("text/Source.weight = None", "Mixture.sources: text without a weight"),
        ("first/Stage.source_weights = {'python': -1}", r"Stage.source_weights\['python'\] = -1: use a number"),
    ],
)
def test_wrong_gin_is_answered_in_a_sentence(binding, message):
    with pytest.raises(ValueError, match=message):
        given("recipes/demo.gin", "data/small_mixture.gin", bindings=[binding])


def test_a_batch_has_no_window_of_a_source_without_weight(config):
    data = open_data(changed(config, code={"weight": 0.0}), progress=False)
    batches = data.train()
    assert isinstance(batches, MixtureBatches)
    assert not (batches.next(32).sources.numbers_B == 1).any()


def test_a_dry_run_says_what_the_run_will_say_of_sources_that_run_out(config, data):
    found = survey(config)
    tokens = [own.splits["train"]["tokens"] for own in found.sources]
    stages = [StageNeed("one", 60, 4, None)]
    said = expected_supply(config.mixture, tokens, CONTEXT, stages)
    assert said == data.supply(stages) and "code will have been read as often as it may" in said[0]
    short = changed(config, prose={"epochs": 0.1}, code={"epochs": 0.1}, numbers={"epochs": 0.1}).mixture
    with pytest.raises(ValueError, match="Stage 'one' needs 240 windows"):
        expected_supply(short, tokens, CONTEXT, stages)
    assert "known once every source" in expected_supply(config.mixture, [None, *tokens[1:]], CONTEXT, stages)[0]
    without = changed(config, code={"epochs": None}).mixture
    assert expected_supply(without, [None, None, None], CONTEXT, stages) == []


def test_the_dry_run_of_a_recipe_asks_for_its_supply(config):
    stage = Stage("one", small.shape(), 200, 4)
    limits = {"epochs": 1.0}
    short = changed(config, prose=limits, code=limits, numbers=limits)
    with pytest.raises(ValueError, match="Stage 'one' needs 800 windows"):
        list(dry_run(Recipe((stage,), short), Run()))
