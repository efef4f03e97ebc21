"""Vocabularies of mixtures: a sample in proportion to weights, of training text alone, the same for the same seed."""

import dataclasses
import json

import pytest

from flm_jax.data.corpora import Jsonl, SeqioTask, TextFolder
from flm_jax.data.mixture import Mixture, Source
from flm_jax.data.sentencepiece_training import SentencePiece, chunks, draw, parts, train
from flm_jax.data.train_vocabulary import build_vocabulary, identity, load_vocabulary, model_file, sample_of

# Each source has letters of its own, so that a piece says where it comes from.
LETTERS = {"large": "ab cd ef", "small": "01 23 45", "tiny": "(){}[]"}
BYTES = {"large": 60_000, "small": 12_000, "tiny": 1_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for name, letters in LETTERS.items():
        texts = [(letters * 100)[n : n + 99] + "\n" for n in range(7)]
        lines = [json.dumps({"text": texts[n % 7]}) + "\n" for n in range(BYTES[name] // 100)]
        (root / f"{name}.jsonl").write_text("".join(lines))
    return root


def mixture(folder, *weights, **fields):
    corpora = {name: Jsonl(str(folder / f"{name}.jsonl"), heldout_percent=20) for name in LETTERS}
    return Mixture(tuple(Source(name, corpora[name], w) for name, w in zip(LETTERS, weights, strict=True)), **fields)


def shares(config, corpus):
    """How many bytes the sample holds of each source, and as its record says."""
    pieces, drawn = draw(config, corpus)
    found = {name: sum(len(p) for p in pieces if set(p.strip()) <= set(LETTERS[name])) for name in LETTERS}
    assert found == {name: drawn[name]["drawn"] for name in LETTERS}
    return list(found.values())


def test_a_source_gives_its_share_and_at_most_what_it_has():
    assert parts([1000, 1000], [3, 1], 400) == [300, 100]
    # The second has less than its share: what is missing comes from the others, in proportion.
    assert parts([1000, 10, 1000], [2, 1, 1], 400) == [260, 10, 130]
    assert parts([100, 10], [1, 1], 1000) == [100, 10]
    assert parts([100, 100, 0], [1, 0, 1], 50) == [50, 0, 0]
    assert parts([1000, 1000], [1, 1e-9], 100) == [99, 1]


def test_a_sample_has_the_proportions_of_the_weights(folder):
    config = SentencePiece(sample_bytes=8_000)
    assert shares(config, mixture(folder, 1.0, 3.0, 0.0)) == [2000, 6000, 0]
    large, small, tiny = shares(config, mixture(folder, 2.0, 1.0, 1.0))
    assert tiny < 1000 and large == pytest.approx(2 * small, abs=100) and 7800 <= large + small + tiny <= 8000
    by_size = shares(config, mixture(folder, None, None, None))
    assert by_size == pytest.approx([8000 * n / 73_000 for n in BYTES.values()], rel=0.15, abs=100)
    raised = shares(config, mixture(folder, None, None, None, temperature=3.0))
    assert raised[1] > by_size[1] and raised[0] < by_size[0]
    named = dataclasses.replace(config, source_weights={"tiny": 1, "small": 9})
    assert shares(named, mixture(folder, 1.0, 1.0, 1.0))[0] == 0


def test_heldout_text_is_never_in_a_sample(folder):
    everything = SentencePiece(sample_bytes=10**9)
    corpus = mixture(folder, 1.0, 1.0, 1.0)
    pieces, drawn = draw(everything, corpus)
    assert sorted(pieces) == sorted(chunks(corpus.documents("train")))
    held = sum(len(text) for text in corpus.documents("heldout"))
    assert held and sum(part["drawn"] for part in drawn.values()) == sum(BYTES.values()) - held


def test_the_sample_follows_from_the_seed(folder, tmp_path):
    corpus, config = mixture(folder, 1.0, 1.0, 1.0), SentencePiece(300, sample_bytes=4000)
    other = dataclasses.replace(config, seed=1)
    assert draw(config, corpus) == draw(config, corpus) != draw(other, corpus)
    assert model_file(config, corpus, tmp_path) != model_file(other, corpus, tmp_path)
    single = TextFolder("texts")
    assert identity(config) != identity(other)
    # What was cached before there was a seed is found.
    assert identity(SentencePiece()) == [1, "SentencePiece", {"size": 2048, "sample_bytes": 8_000_000}]
    assert single.heldout_percent == 5.0


def test_weights_decide_which_vocabulary_it_is(folder, tmp_path):
    config = SentencePiece(300, sample_bytes=4000)
    files = {
        model_file(config, mixture(folder, *weights), tmp_path).name
        for weights in ((1.0, 2.0, 1.0), (2.0, 4.0, 2.0), (1.0, 1.0, 2.0), (None, None, None))
    }
    assert len(files) == 3, "only the proportion counts"
    corpus = mixture(folder, 1.0, 2.0, 1.0)
    vocabulary = build_vocabulary(config, corpus, tmp_path)
    assert build_vocabulary(config, corpus, tmp_path).digest == vocabulary.digest
    drawn = sample_of(config, corpus, tmp_path)
    assert drawn["small"]["drawn"] == pytest.approx(2 * drawn["large"]["drawn"], rel=0.1)
    assert load_vocabulary(model_file(config, corpus, tmp_path)).digest == vocabulary.digest


def test_what_cannot_be_trained_is_refused_in_a_sentence(folder, tmp_path):
    corpus = mixture(folder, 1.0, 1.0, 1.0)
    for wrong, message in (
        (SentencePiece(source_weights={"tin": 1}), r"SentencePiece.source_weights: there is no source 'tin'.*'tiny'"),
        (SentencePiece(source_weights={"tiny": 0}), "SentencePiece.source_weights: all weights"),
        (SentencePiece(50_000), r"no SentencePiece vocabulary of 50000 ids from .*supports at most \d+; lower"),
        (SentencePiece(262), r"the characters first, which are \d+ together; raise SentencePiece.size"),
    ):
        with pytest.raises(ValueError, match=message):
            build_vocabulary(wrong, corpus, tmp_path)
    with pytest.raises(ValueError, match="the corpus is a Jsonl; leave them out"):
        build_vocabulary(SentencePiece(source_weights={"tiny": 1}), corpus.sources[0].corpus, tmp_path)
    own = Mixture((Source("a", corpus.sources[0].corpus, 1.0), Source("task", SeqioTask("t"), 1.0)))
    with pytest.raises(ValueError, match="'task' is a SeqioTask"):
        draw(SentencePiece(), own)
    with pytest.raises(ValueError, match="no training text"):
        train(SentencePiece(), [" \n"])
