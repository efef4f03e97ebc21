"""lm-eval on our models: the answers of its own HFLM on the same model and tokenizer."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flm_jax import model
from flm_jax.data.vocabulary import ByteVocabulary, TokenizerVocabulary
from flm_jax.evaluation.scoring import Scorer, Window, bits_per_byte_of_text
from flm_jax.sharding import param_shardings
from tests import small
from tests.hub import BEGIN, END, TEXT, llama, write_tokenizer
from tests.scores import EIGHT, ONE, assert_same_scores, mesh_of

pytestmark = pytest.mark.integration

CONTEXT = 40
WORDS = TEXT.split()


def requests(*arguments):
    return [SimpleNamespace(args=args, task_name=None) for args in arguments]


PAIRS = requests(
    ("The small model", " grows"),
    ("", "It grows, and"),
    ("", END + " grows"),  # begins with the prefix, where that is the end of a document
    ("Nothing that it knew ", "is lost"),  # the space goes to the continuation
    (" ".join(WORDS * 4), " and a longer one"),  # loses its beginning
    ("one", " one"),
    (BEGIN + "one", " one"),  # the text has its beginning already
    ("ways", " " + " ".join(WORDS[:6])),
)
TEXTS = requests((TEXT,), ("",), ("a",), (" ".join(WORDS[:14]),), (TEXT * 2,))


@pytest.fixture(scope="module", params=[False, True], ids=["no token begins", "a token begins"])
def pair(request, tmp_path_factory):
    """lm-eval's model, and ours on one device, of the same weights and tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from flm_jax.evaluation.lm_eval_model import LmEvalModel

    folder = write_tokenizer(tmp_path_factory.mktemp("hub"), request.param)
    vocabulary = TokenizerVocabulary.from_directory(folder)
    theirs, _, cfg, params = llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=3, max_length=CONTEXT, device="cpu")
    ours = LmEvalModel(Scorer(cfg.for_comparison, params, mesh_of(ONE), CONTEXT, 3), vocabulary, progress=False)
    return hf, ours


@pytest.fixture(scope="module")
def on_eight(pair):
    from flm_jax.evaluation.lm_eval_model import LmEvalModel

    _, ours = pair
    cfg, mesh = ours.scorer.cfg, mesh_of(EIGHT)
    shapes, signatures = model.declared(cfg)
    params = jax.device_put(ours.scorer.params, param_shardings(signatures, shapes, mesh))
    return LmEvalModel(Scorer(cfg, params, mesh, CONTEXT, 3), ours.vocabulary, progress=False)


def greedy_pairs(ours):
    """Continuations that are the likeliest, and the same with another last token."""
    before = [[7, token] for token in (50, 60, 70)]
    found = []
    for context, after in zip(before, likeliest(ours, before, 3), strict=True):
        found += [(("", ""), context, after), (("", ""), context, [*after[:2], (after[2] + 1) % 290])]
    return found


def likeliest(ours, prompts, steps):
    """Token by token, what the model holds for likeliest, without its cache."""
    rows = np.array(prompts, np.int32)
    for _ in range(steps):
        padded = np.pad(rows, ((0, 0), (0, 8 - rows.shape[1])))
        logits = small.apply(ours.scorer.cfg, ours.scorer.params, padded)[:, rows.shape[1] - 1]
        rows = np.concatenate([rows, np.argmax(logits, -1).astype(np.int32)[:, None]], axis=1)
    return rows[:, -steps:].tolist()


def test_log_likelihoods_are_those_of_hflm(pair, on_eight):
    hf, ours = pair
    expected = hf.loglikelihood(PAIRS, disable_tqdm=True)
    assert_same_scores(ours.loglikelihood(PAIRS), expected)
    assert_same_scores(on_eight.loglikelihood(PAIRS), expected)


def test_greedy_is_said_of_the_likeliest_tokens(pair, on_eight):
    hf, ours = pair
    asked = greedy_pairs(ours)
    expected = hf._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in expected] == [True, False] * 3
    for found in (ours, on_eight):
        assert_same_scores(found._loglikelihood_tokens(asked), expected)


def test_rolling_log_likelihoods_are_those_of_hflm(pair, on_eight):
    hf, ours = pair
    expected = hf.loglikelihood_rolling(TEXTS, disable_tqdm=True)
    assert expected[1] == 0 or ours.vocabulary.special.begin
    for found in (ours, on_eight):
        np.testing.assert_allclose(found.loglikelihood_rolling(TEXTS), expected, rtol=2e-5, atol=2e-4)


def test_generation_is_that_of_hflm(pair, on_eight):
    hf, ours = pair
    # None is written with its beginning: whether HFLM then adds another depends on the first prompt of a batch.
    prompts = ["It", "Nothing that it knew", " ".join(WORDS * 4), "the large one.\n", "12 345"]
    free = hf.generate_until(requests(*[(p, {"until": [], "max_gen_toks": 20}) for p in prompts]), disable_tqdm=True)
    assert len({*free}) == len(prompts) and all(free)
    # Texts that stop are taken from what is generated without them, so that they are met in the midst of it.
    until = [text[len(text) // 2 :][:3] for text in free]
    asked = requests(
        *[(p, {"until": [], "max_gen_toks": 20}) for p in prompts],
        *[(p, {"until": [stop], "max_gen_toks": 20}) for p, stop in zip(prompts, until, strict=True)],
        *[(p, {"until": until[0], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0}) for p in prompts[:2]],
    )
    expected = hf.generate_until(asked, disable_tqdm=True)
    assert expected[: len(prompts)] == free and expected[len(prompts) : 2 * len(prompts)] != free
    assert ours.generate_until(asked) == expected
    assert on_eight.generate_until(asked) == expected


def test_generation_stops_at_an_end_and_at_a_special_token_that_a_task_names(pair, monkeypatch):
    _, ours = pair
    asked = requests(("It grows", {"until": [], "max_gen_toks": 20}))
    (expected,) = ours.generate_until(asked)
    ((first,),) = likeliest(ours, [ours.tok_encode("It grows")[-7:]], 1)
    with monkeypatch.context() as patch:
        patch.setattr(ours, "_special", dataclasses.replace(ours._special, stop_ids=(first,)))
        assert ours.generate_until(asked) == [""]
    assert ours.generate_until(asked) == [expected] != [""]
    # Were that token special, and named by a task: it is not written out, and stops all the same.
    encode, decode = ours.vocabulary.encode, ours.vocabulary.decode
    monkeypatch.setattr(ours.vocabulary, "encode", lambda text: [first] if text == "<halt>" else encode(text))
    monkeypatch.setattr(ours.vocabulary, "decode", lambda ids: decode(i for i in ids if i != first))
    assert ours.generate_until(requests(("It grows", {"until": ["<halt>"], "max_gen_toks": 20}))) == [""]


def test_sampling_has_a_seed_and_a_temperature(pair):
    from flm_jax.evaluation.lm_eval_model import LmEvalModel

    _, ours = pair
    asked = requests(("It", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 3.0}))
    one, same, other = (
        LmEvalModel(ours.scorer, ours.vocabulary, seed, progress=False).generate_until(asked) for seed in (0, 0, 1)
    )
    assert one == same != other
    greedy = requests(("It", {"until": [], "max_gen_toks": 8}))
    assert ours.generate_until(greedy) != one
    # Of one token nothing is left to sample; 0 tokens stand for all of them, as in transformers.
    for top_k, same in ((1, ours.generate_until(greedy)), (0, one)):
        filtered = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 3.0, "top_k": top_k}
        assert ours.generate_until(requests(("It", filtered))) == same


def test_what_a_task_may_not_ask_is_said(pair):
    _, ours = pair
    for asked, message in (
        ({"num_beams": 4}, "generate with num_beams; supported are"),
        ({"do_sample": True, "temperature": 1.0, "typical_p": 0.9}, "generate with typical_p"),
        ({"do_sample": True, "top_p": 7.0}, "Sampling.top_p = 7.0: use a number, greater than 0 and at most 1"),
        ({"max_gen_toks": CONTEXT}, "asks for 40 generated tokens, but the model's context is 40"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.generate_until(requests(("It", asked)))
    with pytest.raises(ValueError, match="1 token of context and 41 to predict"):
        ours.scorer.score([Window([1], [2] * 41)])


def test_bits_a_byte_are_the_rolling_sum(pair, monkeypatch):
    _, ours = pair
    scorer, texts = ours.scorer, [request.args[0] for request in TEXTS]
    found = bits_per_byte_of_text(scorer.cfg, scorer.params, ours.vocabulary, texts, CONTEXT, scorer.mesh)
    # What a tokenizer puts before a text is no part of it.
    with_begin = -sum(ours.loglikelihood_rolling(TEXTS))
    assert (found.nats == pytest.approx(with_begin, rel=1e-6)) == (not ours.vocabulary.special.begin)
    monkeypatch.setattr(ours, "_special", dataclasses.replace(ours._special, begin=()))
    nats = -sum(ours.loglikelihood_rolling(TEXTS))
    assert found.nats == pytest.approx(nats, rel=1e-6)
    size = sum(len(text.encode()) for text in texts)
    assert (found.documents, found.bytes) == (4, size)
    assert found.bits_per_byte == pytest.approx(nats / size / math.log(2), rel=1e-6)
    with pytest.raises(ValueError, match="there is no text"):
        bits_per_byte_of_text(scorer.cfg, scorer.params, ours.vocabulary, [""], CONTEXT, scorer.mesh)
    with pytest.raises(ValueError, match="has 359 ids, and the model only 304"):
        bits_per_byte_of_text(scorer.cfg, scorer.params, ByteVocabulary(100), texts, CONTEXT, scorer.mesh)
    with pytest.raises(ValueError, match="has 359 ids, and the model only 304"):
        type(ours)(scorer, ByteVocabulary(100))
