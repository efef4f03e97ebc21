"""Scores of windows, also in chunks and on meshes; windows of long texts; and texts in parts."""

import jax
import numpy as np
import pytest

from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.evaluation import scoring
from flm_jax.evaluation.scoring import Scorer, Window, bits_per_byte_of_text, rolling_windows
from flm_jax.sharding import MeshConfig
from tests import small
from tests.scores import EIGHT, ONE, assert_same_scores, mesh_of

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("context", [1, 5, 16, 17])
def test_rolling_windows_are_those_of_lm_eval(context):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length in (0, 1, context - 1, context, context + 1, 3 * context, 3 * context + 2):
        tokens = list(range(100, 100 + length))
        expected = [make_disjoint_window(w) for w in get_rolling_token_windows(tokens, 7, context, 1)]
        assert [tuple(w) for w in rolling_windows(tokens, 7, context)] == expected


@pytest.mark.parametrize("mesh", [ONE, EIGHT, MeshConfig(data=2, sequence=2, tensor=2)], ids=["1", "8", "sequence"])
def test_scores_are_those_computed_directly(mesh, monkeypatch):
    """Also with the head in chunks, and on a mesh that splits positions."""
    cfg = small.shape(init_std_vector=1.0)
    params, rng = small.params(cfg), np.random.default_rng(0)
    windows = [
        Window(rng.integers(0, cfg.vocab, before).tolist(), rng.integers(0, cfg.vocab, after).tolist())
        for before, after in ((1, 1), (30, 3), (4, 20), (1, 24), (90, 24))
    ]
    expected = []
    for before, after in windows:
        ids = (before + after)[-25:]
        log_probs = jax.nn.log_softmax(small.apply(cfg, params, np.array([ids[:-1]], np.int32))[0])[-len(after) :]
        greedy = np.argmax(log_probs, -1).tolist() == after
        expected.append((sum(float(row[t]) for row, t in zip(log_probs, after, strict=True)), greedy))
    for at_once in (scoring.LOGITS_AT_ONCE, 4 * 24 * cfg.vocab):
        monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
        assert_same_scores(Scorer(cfg, params, mesh_of(mesh), 24, rows=3).score(windows), expected)


def test_few_shapes_are_compiled():
    scorer = Scorer(small.shape(), None, mesh_of(ONE), 100)
    assert [scorer.bucket(n) for n in (1, 16, 17, 33, 65, 100)] == [16, 16, 32, 64, 112, 112]
    assert next(scorer.batches([3, 9, 1, 7])) == [1, 3, 0, 2]
    assert Scorer(small.shape(), None, mesh_of(EIGHT), 100, rows=5).rows == 8


def test_many_documents_are_scored_in_parts():
    """The same sum, whatever is scored together."""
    cfg = small.shape()
    params, vocabulary, texts = small.params(cfg), ByteVocabulary(), [f"text {i}" for i in range(70)]
    whole = bits_per_byte_of_text(cfg, params, vocabulary, texts, 8, mesh_of(ONE), rows=1)
    parts = [bits_per_byte_of_text(cfg, params, vocabulary, [text], 8, mesh_of(ONE), rows=1) for text in texts[:60:20]]
    assert whole.documents == 70 and whole.tokens == sum(map(len, texts))
    alike = bits_per_byte_of_text(cfg, params, vocabulary, texts[:60:20], 8, mesh_of(ONE), rows=4)
    assert alike.nats == pytest.approx(sum(part.nats for part in parts), rel=1e-5)
