"""The generator: batches and streams give the same answers, on one device and on eight, without compiling again."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flm_jax import model
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.generation import Answer, Generator, Sampling, decode
from flm_jax.generation.layers import layers_apart, worth_apart
from flm_jax.sharding import param_shardings
from tests import small
from tests.scores import EIGHT, ONE, mesh_of

VOCABULARY = ByteVocabulary()
PROMPTS = [VOCABULARY.encode(text) for text in ("It grows, and", "a", "Nothing is gone", "lost", "12 345")]
SAMPLED = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=3)


@pytest.fixture(scope="module")
def one():
    cfg = small.shape(init_std_vector=1.0)
    return Generator(cfg, small.params(cfg), VOCABULARY, mesh_of(ONE), rows=4)


@pytest.fixture(scope="module")
def eight(one):
    shapes, signatures = model.declared(one.cfg)
    params = jax.device_put(one.params, param_shardings(signatures, shapes, mesh_of(EIGHT)))
    return Generator(one.cfg, params, VOCABULARY, mesh_of(EIGHT), rows=3)


def test_an_answer_depends_neither_on_the_batch_nor_on_the_number_of_devices(one, eight):
    whole = one.generate(PROMPTS, SAMPLED, 20, ends=())
    assert [len(answer.ids) for answer in whole] == [20] * 5
    assert len({answer.text for answer in whole}) == 5
    assert eight.rows == 4 and eight.generate(PROMPTS, SAMPLED, 20, ends=()) == whole
    assert one.generate(PROMPTS[3:], SAMPLED, 20, ends=(), numbers=[3, 4]) == whole[3:]
    assert one.generate(PROMPTS[3:], SAMPLED, 20, ends=()) != whole[3:]
    other = dataclasses.replace(SAMPLED, seed=4)
    assert one.generate(PROMPTS, other, 20, ends=()) != whole


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_stream_is_the_answer_token_by_token(one, eight, sampling):
    (answer,) = one.generate(PROMPTS[:1], sampling, 20, ends=(), numbers=[7])
    for generator in (one, eight):
        pieces = list(generator.stream(PROMPTS[0], sampling, 20, ends=(), number=7))
        assert len(pieces) == 20 and all(piece.answer is None for piece in pieces[:-1])
        assert pieces[-1].answer == answer and "".join(piece.text for piece in pieces) == answer.text


def test_each_answer_has_a_length_of_its_own_and_the_longest_prompts_come_first(one):
    whole = one.generate(PROMPTS, max_tokens=20, ends=())
    lengths = [20, 1, 7, 20, 3]
    found = list(one.answers(PROMPTS, max_tokens=lengths, ends=()))
    assert [i for i, _ in found] == [2, 0, 4, 3, 1]
    assert all(answer.ids == whole[i].ids[: lengths[i]] and not answer.ended for i, answer in found)


def test_a_stream_can_be_left_early(one):
    stream = one.stream(PROMPTS[0], max_tokens=1000, ends=())
    assert [next(stream).answer for _ in range(3)] == [None] * 3


def test_one_program_serves_all_lengths_of_a_bucket_and_all_numbers_of_a_sampling(one):
    def compiled():
        return decode.read._cache_size(), decode.extend._cache_size()

    sampling = Sampling(temperature=1.0, top_p=0.9)
    one.generate([[5] * 17], sampling, 24, ends=())
    before = compiled()
    for length, most, top_p, ends in ((18, 20, 0.5, ()), (31, 32, 0.8, (1, 2)), (32, 7, 0.9, None)):
        one.generate([[6] * length], dataclasses.replace(sampling, top_p=top_p, seed=length), most, ends=ends)
        list(one.stream([7] * length, sampling, most, ends=ends))
    assert compiled() == before
    one.generate([[5] * 33], sampling, 24, ends=())
    assert compiled() > before, "another bucket is another program"


def scripted(monkeypatch, one, *texts, size=1):
    """Has the model write these texts, `size` bytes at a time; 1 ends a row."""
    rows = [[*VOCABULARY.encode(text), 1] for text in texts]
    length = max(map(len, rows))
    tokens = np.array([row + [decode.ENDED] * (length - len(row)) for row in rows], np.int32)
    monkeypatch.setattr(one, "_tokens", lambda *_: iter(tokens[:, i : i + size] for i in range(0, length, size)))


@pytest.mark.parametrize("size", [1, 3, 64])
def test_what_ends_an_answer(one, monkeypatch, size):
    scripted(monkeypatch, one, "One.\n\nUser: x", "über 語", "Two.\n", "0123456789abcdef", size=size)
    found = one.generate(PROMPTS[:1] * 4, max_tokens=11, stops=["\n\nUser", "語é"])
    ids = [VOCABULARY.encode(text) for text in ("One.\n\nUser", "über 語", "Two.\n", "0123456789a")]
    assert found == [
        Answer(ids[0], "One.", "stop"),
        Answer(ids[1], "über 語", "end"),
        Answer(ids[2], "Two.\n", "end"),
        Answer(ids[3], "0123456789a", "length"),
    ]


def test_a_stream_holds_back_what_may_become_a_stop_string_or_a_character(one, monkeypatch):
    scripted(monkeypatch, one, "é\n\nUs and\n\nUser")
    pieces = list(one.stream(PROMPTS[0], max_tokens=99, stops=["\n\nUser"]))
    assert [piece.text for piece in pieces if piece.text] == ["é", "\n\nUs ", "a", "n", "d"]
    assert pieces[-1].answer == Answer(VOCABULARY.encode("é\n\nUs and\n\nUser"), "é\n\nUs and", "stop")


def test_speed_counts_the_tokens_that_were_computed(one):
    assert one.generate(PROMPTS, max_tokens=9, ends=())[0].reason == "length"
    speed = one.speed
    assert speed.prompt_tokens == sum(map(len, PROMPTS)) and speed.tokens == 5 * 8
    assert speed.tokens_per_second == pytest.approx(40 / speed.seconds)
    one.generate(PROMPTS[:1], max_tokens=1)
    assert one.speed.tokens_per_second is None


def test_what_cannot_be_asked_is_said(one):
    for arguments, message in (
        (([[]],), "A prompt has no tokens"),
        (([[5]], Sampling(), 0), "an answer has at least 1 token"),
        (([[5]], Sampling(), 3, [""]), "A stop string is empty"),
        (([[5]], Sampling(), [3], (), None, [-1]), "The number of a prompt is from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            one.generate(*arguments)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_layers_apart_give_the_same_answers_and_streams(one, sampling):
    apart = Generator(one.cfg, one.params, VOCABULARY, one.mesh, rows=4, apart=True)
    assert apart.generate(PROMPTS, sampling, 20, ends=()) == one.generate(PROMPTS, sampling, 20, ends=())
    streams = [[piece.text for piece in x.stream(PROMPTS[1], sampling, 9, ends=())] for x in (apart, one)]
    assert streams[0] == streams[1]


def test_layers_apart_lie_in_the_memory_of_the_stacked_ones():
    params, mesh = small.params(small.shape(embed=16)), mesh_of(ONE)
    for index, layer in enumerate(layers_apart(params, mesh)):
        for mine, stacked in zip(jax.tree.leaves(layer), jax.tree.leaves(params["blocks"]), strict=True):
            np.testing.assert_array_equal(mine, stacked[index])
            assert mine.unsafe_buffer_pointer() == stacked.unsafe_buffer_pointer() + index * mine.nbytes
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(stacked)
    np.testing.assert_array_equal(2 * mine, doubled[-1], "what is donated meanwhile is not written over")


def test_layers_are_apart_on_one_cpu_alone_and_where_it_saves_more_than_it_costs(monkeypatch):
    cfg, mesh = small.shape(embed=16), mesh_of(ONE)
    params = small.params(cfg)
    layer = sum(x.nbytes for x in jax.tree.leaves(params["blocks"])) // cfg.layers
    monkeypatch.setattr("flm_jax.generation.layers.WORTH_BYTES", 50 * layer)
    assert [worth_apart(params, mesh, steps) for steps in (49, 50)] == [False, True]
    assert not worth_apart(params, mesh_of(EIGHT), 50)
    gpu = SimpleNamespace(size=1, devices=np.array([SimpleNamespace(platform="gpu")]))
    assert not worth_apart(params, gpu, 50)
    with pytest.raises(ValueError, match="a mesh of one CPU, .*'cpu', 8 in number; leave apart=None"):
        layers_apart(params, mesh_of(EIGHT))
    for other in (dict(layers=0), dict(embed=18)):  # no layers; parts that would have to be copied
        assert not worth_apart(small.params(small.shape(**other)), mesh, 10**6)


def test_a_call_counts_the_tokens_of_all_its_batches(one, monkeypatch):
    asked = []
    monkeypatch.setattr("flm_jax.generation.engine.worth_apart", lambda params, mesh, steps: asked.append(steps))
    one.generate(PROMPTS, max_tokens=[1, 2, 3, 4, 5], ends=())
    list(one.stream(PROMPTS[0], max_tokens=7, ends=()))
    # Batches of four, the longest prompts first: 3, 1, 5 and 4 tokens (or 2), then the rest.
    assert asked == [7, 7]
