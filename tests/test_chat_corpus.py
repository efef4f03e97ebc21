"""Conversations as a corpus: packed whole, weights on answers, gradients only from them, faults by file and line."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_jax.chat import conversation
from flm_jax.chat.conversation import Message
from flm_jax.chat.corpus import Conversations
from flm_jax.chat.packing import Packer
from flm_jax.chat.template import TELE_FLM, ChatEncoder
from flm_jax.data.batches import StoreBatches, heldout_batches, read_batch
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import Document
from flm_jax.data.json_lines import LineError
from flm_jax.data.prepare import prepare
from flm_jax.data.source import open_data
from flm_jax.data.store import TokenStore
from flm_jax.data.survey import survey, survey_text
from flm_jax.data.train_vocabulary import Bytes, Pretrained, SentencePiece
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.loss import loss_sum
from flm_jax.model import init_params
from tests import hub, small

CONTEXT = 96
VOCABULARY = ByteVocabulary()


def talk(*texts, **fields):
    roles = ("user", "assistant")
    return {**fields, "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def write(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def pack(documents, context, pad_id, *most_open):
    packer = Packer(context, pad_id, *most_open)
    for document in documents:
        yield from packer.add(document)
    yield from packer.close()


def pool(count):
    """Conversations of one to three exchanges, of different lengths."""
    return [talk(*(f"q{i}" * (1 + i % 3), f"a{i}") * (1 + i % 3)) for i in range(count)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    corpus = Conversations(str(write(folder / "pool.jsonl", pool(60))), heldout_percent=20)
    return prepare(corpus, Bytes(), folder / "cache", progress=False, context=CONTEXT, max_shard_tokens=500)


documents = st.lists(st.integers(1, 20), max_size=60).map(
    lambda sizes: [
        Document(np.full(n, 10 + i, np.int32), np.array([0, *[1] * (n - 1)], np.uint8), n) for i, n in enumerate(sizes)
    ]
)


@given(documents, st.integers(1, 5))
def test_packing_keeps_every_document_whole_within_a_window(given_, most_open):
    packed = list(pack(given_, 20, 3, most_open))
    tokens = np.concatenate([d.tokens for d in packed]) if packed else np.zeros(0)
    weights = np.concatenate([d.weights for d in packed]) if packed else np.zeros(0)
    assert len(tokens) % 20 == (1 if packed else 0)
    assert not weights[tokens == 3].any()
    assert sum(d.text_bytes for d in packed) == sum(d.text_bytes for d in given_)
    starts = np.cumsum([0, *(len(d.tokens) for d in packed)])
    for start, document in zip(starts[:-1], packed, strict=True):
        size = int((document.tokens != 3).sum())
        (original,) = (d for d in given_ if d.tokens[0] == document.tokens[0])
        assert size == len(original.tokens)
        assert start // 20 == (start + size - 1) // 20
    assert sorted(d.tokens[0] for d in packed) == [d.tokens[0] for d in given_]


def test_first_fit_fills_windows():
    sizes = [12, 12, 8, 8, 12, 8]
    given_ = [Document(np.full(n, i + 10, np.int32), np.zeros(n, np.uint8), 0) for i, n in enumerate(sizes)]
    packed = list(pack(given_, 20, 3))
    assert [int(d.tokens[0]) - 10 for d in packed] == [0, 2, 1, 3, 4, 5]
    assert sum(len(d.tokens) for d in packed) == 61
    with pytest.raises(ValueError, match="a document of 12 tokens does not fit into windows of 10"):
        list(pack(given_, 10, 3))
    with pytest.raises(ValueError, match="nothing to predict it from"):
        list(pack([Document(np.ones(2, np.int32), np.ones(2, np.uint8), 0)], 10, 3))


def test_a_store_of_conversations_holds_their_tokens_and_weights(store, tmp_path):
    encoder = ChatEncoder(TELE_FLM, VOCABULARY)
    expected = {}
    for record in pool(60):
        encoded = encoder.encode([Message(**m) for m in record["messages"]])
        expected[tuple(encoded.ids)] = encoded.weights
    found = 0
    for split in ("train", "heldout"):
        positions = np.arange(store.num_tokens(split))
        tokens, weights = store.tokens(split, positions), store.weights(split, positions)
        numbers = store.document_numbers(split, positions)
        for number in range(store.num_documents(split)):
            ids = tokens[numbers == number]
            size = int((ids != VOCABULARY.special.pad_id).sum())
            assert np.array_equal(weights[numbers == number][:size], expected[tuple(ids[:size])])
            found += 1
        assert weights.sum() == store.describe()["splits"][split]["weighted_tokens"]
    assert found == len(expected) == 60
    assert store.describe()["corpus"]["template"]["name"] == "tele_flm"
    assert TokenStore.open(store.path).digest == store.digest


def test_weights_lie_on_targets_and_attention_stays_within_a_conversation(store):
    windows = np.arange(store.num_windows("train", CONTEXT))
    batch = read_batch(store, "train", windows, CONTEXT)
    assert len(windows) * CONTEXT == store.num_tokens("train") - 1
    for inputs, targets, weights, segments in zip(*batch[:4], strict=True):
        assert np.array_equal(inputs[1:], targets[:-1])
        text = VOCABULARY.decode(targets[weights > 0])
        assert "q" not in text
        assert text.replace("a", "").isdigit()
        starts = np.flatnonzero(np.diff(segments, prepend=-1))
        assert segments[0] == 0
        for start in starts:
            assert VOCABULARY.decode(inputs[start : start + 7]) == "<_user>"
    assert sum(segments[-1] + 1 for segments in batch.segments_BT) == store.num_documents("train")
    ends = batch.targets_BT[batch.weights_BT > 0] == VOCABULARY.eos_id
    assert ends.sum() == sum(1 + i % 3 for i in range(60)) - held_answers(store)


def held_answers(store):
    positions = np.arange(store.num_tokens("heldout"))
    return int((store.tokens("heldout", positions) == VOCABULARY.eos_id).sum())


def test_batches_of_training_and_of_the_held_out_side_have_weights(store):
    batches = StoreBatches(store, "train", CONTEXT, seed=0)
    first = batches.next(4)
    assert 0 < first.weights_BT.mean() < 1
    padded = list(heldout_batches(store, CONTEXT, 64, 1000))
    assert len(padded) == 1
    held = store.describe()["splits"]["heldout"]["weighted_tokens"]
    assert padded[0].weights_BT.sum() == held
    assert padded[0].inputs_BT.shape == (64, CONTEXT)


def test_prompts_get_no_gradient_and_answers_do():
    """The loss depends on what follows each position in an answer, and on nothing that follows it elsewhere."""
    cfg = small.config(vocab=264)
    params = init_params(cfg, jax.random.key(0))
    encoded = ChatEncoder(TELE_FLM, VOCABULARY).encode([Message("user", "one"), Message("assistant", "two")])
    ids, weights = encoded.ids[None], encoded.weights[None].astype(np.float32)

    def gradient_by_target(weights_BT):
        """Of each position's logits, in the embedding of the head: which targets have a gradient."""

        def loss(shift_BTV):
            from flm_jax.loss import cross_entropy
            from flm_jax.model import Transformer

            x, _ = Transformer(cfg).apply({"params": params}, ids[:, :-1], np.zeros_like(ids[:, :-1]), method="hidden")
            logits = Transformer(cfg).apply({"params": params}, x, method="logits") + shift_BTV
            return (cross_entropy(logits, ids[:, 1:]) * weights_BT[:, 1:]).sum()

        return np.abs(jax.grad(loss)(np.zeros((1, ids.shape[1] - 1, cfg.vocab), np.float32))).sum((0, -1)) > 0

    text = [VOCABULARY.decode([i]) for i in ids[0, 1:]]
    touched = gradient_by_target(weights)
    assert "".join(t for t, yes in zip(text, touched, strict=True) if yes) == "two"  # and the end, which has no text
    assert list(np.flatnonzero(touched)) == list(range(len(text) - 4, len(text)))
    total = loss_sum(cfg, params, ids[:, :-1], ids[:, 1:], weights[:, 1:], np.zeros_like(ids[:, :-1]))
    alone = loss_sum(cfg, params, ids[:, :-1], ids[:, 1:], np.ones_like(weights[:, 1:]), np.zeros_like(ids[:, :-1]))
    assert float(total) < float(alone)


def test_what_does_not_fit_is_cut_by_whole_exchanges_or_named(tmp_path):
    long = "x" * 80
    path = write(tmp_path / "p.jsonl", [talk("a", "b", long, long), talk(long, long), *pool(10)])
    with pytest.raises(LineError, match=r"p\.jsonl:2: longer than the context: up to its first answer it has"):
        prepare(Conversations(str(path)), Bytes(), tmp_path / "cache", progress=False, context=CONTEXT)
    corpus = Conversations(str(path), most_faulty=1)
    found = corpus.tokenised(VOCABULARY, CONTEXT)
    texts = [VOCABULARY.decode(document.tokens) for _, document in found.documents()]
    assert "<_user>a<_bot>b" in texts
    assert (found.cut, found.skipped.counts) == (1, {"longer than the context": 1})
    assert found.notes() == [
        "1 line left out: longer than the context (1)",
        "1 conversation was longer than 96 tokens, and lost the turns at the end.",
    ]


def test_a_broken_line_counts_once_and_up_to_a_limit(tmp_path, caplog):
    path = write(tmp_path / "p.jsonl", [*pool(20), "{", talk("q")])
    with pytest.raises(
        LineError, match=r"p\.jsonl:21: a broken line.*; none may be left out by Conversations.most_faulty"
    ):
        prepare(Conversations(str(path)), Bytes(), tmp_path / "cache", progress=False, context=CONTEXT)
    corpus = Conversations(str(path), most_faulty=2)
    found = corpus.tokenised(VOCABULARY, CONTEXT)
    assert len(list(found.documents())) == 20
    assert sum(found.skipped.counts.values()) == 2
    assert [message.split("p.jsonl:")[1][:2] for message in caplog.messages] == ["21", "22"], "each is said once"
    stored = prepare(corpus, Bytes(), tmp_path / "cache", progress=False, context=CONTEXT).describe()["corpus"]
    assert stored["left_out"] == found.left_out() and found.left_out()["reasons"] == {
        "a broken line": 1,
        "no answer": 1,
    }


def test_one_conversation_cannot_be_trained_on_and_held_out(tmp_path):
    path = write(tmp_path / "p.jsonl", [talk("q", "a")] * 3)
    with pytest.raises(ValueError, match=r"p\.jsonl holds one conversation only, copies not counted; it takes two"):
        survey(DataConfig(Conversations(str(path)), Bytes(), CONTEXT))


def test_equal_conversations_are_held_out_together(tmp_path):
    path = write(tmp_path / "p.jsonl", pool(10) * 3)
    corpus = Conversations(str(path), heldout_percent=30)
    train, heldout = (set(corpus.documents(split)) for split in ("train", "heldout"))
    assert train
    assert heldout
    assert not train & heldout


def test_a_system_turn_and_the_last_answer_alone(tmp_path):
    path = write(tmp_path / "p.jsonl", [talk("q", "one", "q", "two"), *pool(9)])
    corpus = Conversations(str(path), system="Be brief.", answers="last")
    found = [document for _, document in corpus.tokenised(VOCABULARY, CONTEXT).documents()]
    texts = {VOCABULARY.decode(d.tokens): VOCABULARY.decode(d.tokens[d.weights > 0]) for d in found}
    assert texts["Be brief.<_user>q<_bot>one<_user>q<_bot>two"] == "two"


def test_whoever_takes_another_template_than_the_vocabularys_own_is_told(tmp_path):
    vocabulary = hub.write_tokenizer(tmp_path / "tokenizer")
    (vocabulary / "chat_template.jinja").write_text(TELE_FLM.source.replace("_bot", "_me"))

    def said(template):
        corpus = Conversations(str(write(tmp_path / "p.jsonl", pool(10))), template=template)
        return survey_text(survey(DataConfig(corpus, Pretrained(str(vocabulary)), CONTEXT, cache_dir=str(tmp_path))))

    assert "Conversations.template = 'tokenizer' takes its own" in said("tele_flm")
    assert "takes its own" not in said("tokenizer")


def test_the_first_token_of_a_conversation_is_not_trained_on(tmp_path):
    """A template may leave questions out; then nothing precedes the answer that it could be predicted from."""
    (tmp_path / "answers.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    corpus = Conversations(str(write(tmp_path / "p.jsonl", pool(10))), template=str(tmp_path / "answers.jinja"))
    for _, document in corpus.tokenised(VOCABULARY, CONTEXT).documents():
        assert document.weights[0] == 0
        assert document.weights[1] == 1


def test_the_store_depends_on_template_context_and_content_but_not_on_the_folder(tmp_path):
    def key(folder, context=CONTEXT, **fields):
        corpus = Conversations(str(write(folder / "p.jsonl", pool(10))), **fields)
        return prepare(corpus, Bytes(), tmp_path / "cache", progress=False, context=context).path

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    base = key(tmp_path / "a")
    assert key(tmp_path / "b") == base
    others = {key(tmp_path / "a", context=128), key(tmp_path / "a", answers="last"), key(tmp_path / "a", system="s")}
    assert len({base, *others, key(tmp_path / "a", template="telechat")}) == 5


def test_opening_trains_a_vocabulary_on_messages_and_refuses_streams(tmp_path):
    path = write(tmp_path / "p.jsonl", pool(60))
    config = DataConfig(Conversations(str(path)), SentencePiece(size=272), 64, cache_dir=str(tmp_path / "cache"))
    data = open_data(config, progress=False)
    assert "<_user>" in data.vocabulary.decode(data.train().next(2).inputs_BT[0])
    assert data.bytes_per_token > 0.5
    with pytest.raises(ValueError, match=r"Conversations is read from a token store: set DataConfig\.streamed = False"):
        open_data(DataConfig(Conversations(str(path)), Bytes(), 32, streamed=True), progress=False)


def test_a_survey_counts_windows_and_what_is_trained_on(tmp_path):
    path = write(tmp_path / "p.jsonl", pool(60))
    text = survey_text(survey(DataConfig(Conversations(str(path)), Bytes(), CONTEXT)))
    assert "train: " in text
    assert f"windows of {CONTEXT} tokens; " in text
    config = DataConfig(Conversations(str(path)), Bytes(), CONTEXT, cache_dir=str(tmp_path / "cache"))
    assert survey(config).store is None
    before = survey(config)
    prepared = open_data(config, progress=False).store.path
    after = survey(config)
    assert after.store == prepared
    assert (after.splits, after.notes) == (before.splits, before.notes), "read from the store, and the same"
    assert "documents" in survey_text(survey(DataConfig(Conversations(str(path)), SentencePiece(size=272), CONTEXT)))


def test_a_pool_is_parsed_twice_while_it_is_prepared_and_holds_out_the_same_conversations(tmp_path, monkeypatch):
    parsed = []
    parse = conversation.parse
    monkeypatch.setattr(conversation, "parse", lambda *given: parsed.append(1) or parse(*given))
    path = write(tmp_path / "p.jsonl", pool(60))
    corpus = Conversations(str(path), heldout_percent=20)
    prepared = prepare(corpus, Bytes(), tmp_path / "cache", progress=False, context=CONTEXT)
    assert len(parsed) == 2 * 60
    texts = set(corpus.documents("heldout"))
    assert prepared.num_documents("heldout") == len(texts) < 30
    parsed.clear()
    survey(DataConfig(corpus, Bytes(), CONTEXT, cache_dir=str(tmp_path / "cache")))
    assert not parsed, "a survey reads the store where there is one"
