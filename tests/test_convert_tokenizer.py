"""Exported tokenizers: transformers gives the ids that the model was trained with, and the same text back."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_jax.convert import tokenizer
from flm_jax.convert.exporting import export_model
from flm_jax.convert.importing import import_model
from flm_jax.data.train_vocabulary import SentencePiece, load_vocabulary, train
from flm_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary
from flm_jax.data.vocabulary_files import to_files
from flm_jax.source_checkpoint import read_source
from tests import hub, small
from tests.test_evaluate import saved

pytestmark = pytest.mark.integration

TEXTS = [hub.TEXT, "def f(x):\n    if x:\n        return  x + 1\n\n" * 3, "Größe, naïve, 中文 and émigré. " * 4]
# Spaces, tabs, line ends, scripts that no training text had, composed and decomposed letters, names of special tokens.
HARD = [
    *tokenizer.PROBES,
    " a",
    "a  b ",
    "\t\n\r\n",
    "\U0001f600\u200d\U0001f680",
    "\u10d0\u10d1 \u0e01\u0e34",
    "e\u0301 \xe9",
    "</s>",
]


def sentencepiece(**changes):
    """A SentencePiece model of another program, with its usual settings."""
    from sentencepiece import SentencePieceTrainer

    writer = io.BytesIO()
    options = dict(vocab_size=100, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False)
    SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 9), model_writer=writer, **{**options, **changes})
    return SentencePieceVocabulary(model=writer.getvalue())


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    folder = hub.write_tokenizer(tmp_path_factory.mktemp("hub") / "hub", begin=True)
    return {
        "bytes": ByteVocabulary(),
        "sentencepiece": SentencePieceVocabulary(model=train(SentencePiece(400), TEXTS)),
        "unigram": sentencepiece(model_type="unigram"),
        "tokenizer": load_vocabulary(folder),
    }


def of_transformers(folder, vocabulary):
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.tokenizer_files(vocabulary).items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram", "tokenizer"])
def test_ids_and_text_are_those_of_the_training(kind, vocabularies, tmp_path):
    ours = vocabularies[kind]
    theirs = of_transformers(tmp_path, ours)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos_id, ours.special.prefix_id)
    assert theirs.pad_token_id == tokenizer.special_ids(ours)["pad_token_id"]
    for text in (*HARD, *TEXTS):
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [*ours.special.begin, *ids, *ours.special.end]
        if kind in ("bytes", "sentencepiece"):  # others drop what is unknown, or special
            assert ours.decode(ids) == text
        if kind != "unigram":
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_any_text_has_the_same_ids(kind, vocabularies):
    import tokenizers

    ours = vocabularies[kind]
    theirs = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_files(ours)["tokenizer.json"].decode())

    @given(st.text() | st.text("ab \u2581\n"))
    def same(text):
        assert theirs.encode(text).ids == ours.encode(text)

    same()


def test_what_a_tokenizer_json_cannot_express_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="BPE and unigram pieces only"):
        tokenizer.tokenizer_files(sentencepiece(model_type="char"))
    monkeypatch.setattr(tokenizer, "_bytes", lambda: tokenizer._sentencepiece(train(SentencePiece(400), TEXTS)))
    with pytest.raises(ValueError, match=r"cannot express this bytes vocabulary: ' leading, two"):
        tokenizer.tokenizer_files(ByteVocabulary())


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_run_from_scratch_is_written_with_its_ids_and_its_tokenizer(kind, vocabularies, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, shape = vocabularies[kind], small.config(vocab=400)
    export_model(saved(tmp_path / "run", shape, small.params(shape), to_files(ours)), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 1, 0)
    assert not (tmp_path / "out/vocabulary.json").exists()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("a  b\n")["input_ids"] == ours.encode("a  b\n")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == 1


def test_after_training_on_another_tokenizer_the_ids_are_the_new_ones(vocabularies, tmp_path):
    hub.write_tokenizer(tmp_path / "hub", begin=True)
    _, converted, cfg, params = hub.llama(tmp_path / "hub")
    export_model(converted, tmp_path / "same")
    before = json.loads((tmp_path / "hub/config.json").read_text())
    after = json.loads((tmp_path / "same/config.json").read_text())
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [after[name] for name in ids] == [before[name] for name in ids]
    assert (tmp_path / "same/tokenizer_config.json").read_bytes() == (
        tmp_path / "hub/tokenizer_config.json"
    ).read_bytes()
    other = load_vocabulary(hub.write_tokenizer(tmp_path / "other", size=290), eos_id=4)
    files = read_source(converted).files_with(other)
    export_model(saved(tmp_path / "run", cfg, params, files), tmp_path / "out")
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert [after[name] for name in ids] == [4, 4, 0]
    import_model(tmp_path / "out", tmp_path / "again")
    assert read_source(tmp_path / "again").vocabulary.digest == other.digest
