"""Hugging Face tokenizers as vocabularies: the ids of the library itself, special tokens as the files say."""

import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_jax.data import tasks
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import TextFolder
from flm_jax.data.prepare import prepare, store_path
from flm_jax.data.source import open_data
from flm_jax.data.streaming import SeqioBatches
from flm_jax.data.train_vocabulary import Pretrained, build_vocabulary
from flm_jax.data.vocabulary import REPLACEMENT, TokenizerVocabulary
from flm_jax.data.vocabulary_files import from_spec
from tests import small
from tests.hub import END, TEXT, write_tokenizer

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {begin: write_tokenizer(root / str(begin), begin) for begin in (False, True)}


@pytest.fixture(scope="module")
def vocabulary(folders):
    return TokenizerVocabulary.from_directory(folders[True])


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders[True], tmp_path / "changed")


def write(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("begin", [False, True])
def test_ids_are_those_of_transformers(folders, begin):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folders[begin]), TokenizerVocabulary.from_directory(folders[begin])
    assert (ours.size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    assert ours.special.prefix_id == (theirs.bos_token_id if begin else theirs.eos_token_id)
    for text in (TEXT, "", "  two\n", f"a{END}b"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert [*ours.special.begin, *ours.encode(text), *ours.special.end] == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


@given(st.text())
def test_text_comes_back(vocabulary, text):
    if END not in text and "<s>" not in text:
        assert vocabulary.decode(vocabulary.encode(text)) == text


@given(st.lists(st.integers(-5, 400)))
def test_any_ids_decode(vocabulary, ids):
    unknown = sum(not 0 <= i < vocabulary.size for i in ids)
    assert vocabulary.decode(ids).count(REPLACEMENT) >= unknown


def test_ids_between_two_pieces_are_none(folder):
    record = json.loads((folder / "tokenizer.json").read_text())
    record["model"]["vocab"]["zz"] = 350
    (folder / "tokenizer.json").write_text(json.dumps(record))
    found = TokenizerVocabulary.from_directory(folder)
    assert found.size == 351
    assert found.decode([350, 349, *found.encode("x"), 351]) == "zz" + REPLACEMENT + "x" + REPLACEMENT


def test_special_tokens_are_as_the_files_say(folder, vocabulary):
    read = TokenizerVocabulary.from_directory
    bos, eos = vocabulary.special.prefix_id, vocabulary.eos_id
    assert vocabulary.special.begin == (bos,) and vocabulary.special.end == ()
    assert (vocabulary.special.prefix, vocabulary.special.eos) == ("<s>", END)
    write(folder, "generation_config.json", eos_token_id=[eos, 7])
    write(folder, "config.json", eos_token_id=9)
    assert read(folder).special.stop_ids == (eos, 7)
    write(folder, "tokenizer_config.json", bos_token=None)
    assert read(folder).eos_id == read(folder).special.prefix_id == eos
    write(folder, "special_tokens_map.json", eos_token={"content": "g"})
    assert read(folder).eos_id == read(folder).encode("g")[0]
    assert read(folder, eos_id=12).special.stop_ids == (12, eos, 7)
    write(folder, "generation_config.json", eos_token_id=0)
    assert read(folder).special.stop_ids[1:] == (0,)
    (folder / "special_tokens_map.json").unlink()
    (folder / "generation_config.json").unlink()
    assert read(folder).eos_id == 9


FLAGS = ("absent", None, True, False)


@pytest.mark.integration
@pytest.mark.parametrize("adds", [True, False], ids=["the file adds <s>", "the file adds nothing"])
def test_flags_beside_the_tokenizer_mean_what_they_mean_to_transformers(tmp_path, adds):
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path / "hub", begin=True)
    if not adds:
        record = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**record, "post_processor": None}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for values in itertools.product(FLAGS, FLAGS):
        flags = dict(zip(("add_bos_token", "add_eos_token"), values, strict=True))
        flags = {name: value for name, value in flags.items() if value != "absent"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **flags}))
        ours = TokenizerVocabulary.from_directory(folder)
        found = [*ours.special.begin, *ours.encode("It grows"), *ours.special.end]
        assert found == AutoTokenizer.from_pretrained(folder)("It grows").input_ids, flags


def test_what_cannot_be_read_is_named(folder):
    read = TokenizerVocabulary.from_directory
    write(folder, "tokenizer_config.json", eos_token="<nowhere>")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json calls '<nowhere>' the eos token, and .* has no such"):
        read(folder)
    write(folder, "tokenizer_config.json")
    with pytest.raises(ValueError, match="nothing says which token .* or give eos_id"):
        read(folder)
    with pytest.raises(ValueError, match=r"has no token 5000 .*: its ids are below 300"):
        read(folder, eos_id=5000)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged"):
        read(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        read(folder)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in"):
        read(folder / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json, and is no checkpoint"):
        Pretrained(str(folder / "nowhere")).load()


def test_spec_stands_on_its_own(folder):
    write(folder, "generation_config.json", eos_token_id=[1, 7])
    vocabulary = TokenizerVocabulary.from_directory(folder)
    spec = json.loads(json.dumps(vocabulary.spec()))
    shutil.rmtree(folder)
    again = from_spec(spec)
    assert (again.digest, again.special, again.encode(TEXT)) == (
        vocabulary.digest,
        vocabulary.special,
        vocabulary.encode(TEXT),
    )
    with pytest.raises(ValueError, match="sha256"):
        from_spec({**spec, "digest": "0"})


def test_a_file_that_cuts_or_fills_texts_does_so_for_others(folder):
    import tokenizers

    before = TokenizerVocabulary.from_directory(folder).encode(TEXT)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert TokenizerVocabulary.from_directory(folder).encode(TEXT) == before


@pytest.fixture
def corpus(tmp_path):
    small.write_corpus(tmp_path / "corpus")
    return TextFolder(str(tmp_path / "corpus"), heldout_percent=30)


def test_a_store_is_of_the_tokenizers_content_and_not_of_its_place(folder, corpus, tmp_path):
    config = Pretrained(str(folder))
    store = prepare(corpus, config, tmp_path, progress=False)
    vocabulary = build_vocabulary(config, corpus, tmp_path)
    assert store.vocabulary.digest == vocabulary.digest
    documents = [store.document("train", i).tolist() for i in range(store.num_documents("train"))]
    assert documents == [[*vocabulary.encode(text), vocabulary.eos_id] for text in corpus.documents("train")]
    moved = Pretrained(str(folder.rename(tmp_path / "moved")))
    assert store_path(corpus, moved, tmp_path) == store.path
    data = open_data(DataConfig(corpus, moved, context=8, cache_dir=str(tmp_path)))
    assert data.digest == store.digest and data.vocabulary.special == vocabulary.special
    # Another tokenizer, or another end of documents, in the same place is another store.
    assert store_path(corpus, Pretrained(moved.path, eos_id=12), tmp_path) != store.path
    write_tokenizer(tmp_path / "moved", True, size=290)
    assert store_path(corpus, moved, tmp_path) != store.path


def test_a_stream_reads_what_the_store_holds_and_resumes_exactly(folder, corpus, tmp_path):
    store = prepare(corpus, Pretrained(str(folder)), tmp_path, progress=False)
    stream = lambda: SeqioBatches(corpus, store.vocabulary, "train", 8, seed=1, shuffle_buffer=3)  # noqa: E731
    whole = stream()
    first = [whole.next(2) for _ in range(3)]
    again = stream()
    again.next(2)
    state = again.state()
    resumed = stream()
    resumed.restore(state)
    for batch in first[1:]:
        np.testing.assert_array_equal(resumed.next(2).inputs_BT, batch.inputs_BT)
    assert tasks.from_seqio(tasks.to_seqio(store.vocabulary), "x") is store.vocabulary
    theirs, text = tasks.to_seqio(store.vocabulary), "été 1"
    assert (
        theirs.decode_tf(np.array(theirs.encode(text))).numpy().decode() == theirs.decode(theirs.encode(text)) == text
    )
