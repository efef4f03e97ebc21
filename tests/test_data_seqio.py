"""Reading through seqio: every kind of corpus, in a store and on the fly, and streams that resume exactly."""

import functools
import importlib.resources
import importlib.resources.abc
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from flm_jax.data import prepare as preparing
from flm_jax.data import reading, streaming, tasks
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import Jsonl, Records, SeqioTask, TextFolder, Tfds
from flm_jax.data.prepare import prepare, store_path
from flm_jax.data.source import StoreData, StreamData, open_data
from flm_jax.data.streaming import SeqioBatches
from flm_jax.data.text import SPLITS
from flm_jax.data.train_vocabulary import Bytes, SentencePiece, build_vocabulary

pytestmark = pytest.mark.integration

TEXTS = [f"document {i}:\n\tdef f{i}(x):\n        return 'é' * {i}\n" * (1 + i % 5) for i in range(40)]
BPE = SentencePiece(size=300)
CONTEXT = 16

TASK_MODULE = """
import seqio
import tensorflow as tf

TEXTS = {"train": [f"task text {i} " * (i % 4 + 1) for i in range(30)], "validation": ["held out " * 30]}
VOCABULARY = @VOCABULARY


def read(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"targets": TEXTS[split]})


for name in ("one_@SUFFIX", "two_@SUFFIX"):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(read, splits=["train", "validation"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary=VOCABULARY, add_eos=True)},
    )
seqio.MixtureRegistry.add("both_@SUFFIX", [("one_@SUFFIX", 1), ("two_@SUFFIX", 3)])
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A module that registers tasks over a SentencePiece model with extra ids, and another over bytes."""
    root = tmp_path_factory.mktemp("modules")
    vocabulary = build_vocabulary(BPE, TextFolder(str(_texts(root / "texts"))), root)
    (root / "own.model").write_bytes(vocabulary.model)
    for suffix, code in {
        "pieces": f"seqio.SentencePieceVocabulary({str(root / 'own.model')!r}, extra_ids=10)",
        "bytes": "seqio.ByteVocabulary(extra_ids=0)",
        "passed": "seqio.PassThroughVocabulary(100)",
    }.items():
        content = TASK_MODULE.replace("@VOCABULARY", code).replace("@SUFFIX", suffix)
        if suffix == "passed":
            content = content.replace("seqio.preprocessors.tokenize, seqio.preprocessors.append_eos", "")
        (root / f"registered_{suffix}.py").write_text(content)
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))


def _texts(root):
    root.mkdir()
    for i, text in enumerate(TEXTS):
        (root / f"{i}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, module):
    """One corpus of each kind, over the same texts where it can be."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("corpora")
    folder = TextFolder(str(_texts(root / "texts")), heldout_percent=20)
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (root / "lines.jsonl").write_text(lines)
    tf, _ = reading.load_tensorflow()
    with pytest.MonkeyPatch.context() as patch:
        # TFDS asks for this backport when it writes (not when it reads), and does not declare it.
        patch.setitem(sys.modules, "importlib_resources", importlib.resources)
        tfds.dataset_builders.store_as_tfds_dataset(
            name="little",
            version="1.0.0",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": tf.int64}),
            split_datasets={
                split: tf.data.Dataset.from_tensor_slices({"text": part, "n": list(range(len(part)))})
                for split, part in (("train", TEXTS[:30]), ("validation", TEXTS[30:]))
            },
            data_dir=root / "tfds",
        )
    return {
        "folder": folder,
        "jsonl": Jsonl(str(root / "lines.jsonl"), field="body", heldout_percent=20),
        "tfds": Tfds("little", data_dir=str(root / "tfds")),
        "task": SeqioTask("one_pieces", "registered_pieces"),
        "mixture": SeqioTask("both_bytes", "registered_bytes"),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


KINDS = ("folder", "jsonl", "tfds", "task", "mixture")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [Bytes(), BPE], ids=["bytes", "pieces"])
def test_store_holds_the_documents(corpora, cache, kind, config):
    corpus = corpora[kind]
    store = prepare(corpus, config, cache, progress=False, max_shard_tokens=500)
    vocabulary = store.vocabulary
    for split in ("train", "heldout"):
        documents = [store.document(split, i).tolist() for i in range(store.num_documents(split))]
        if hasattr(corpus, "documents"):
            texts = list(corpus.documents(split))
            # TFDS was tokenised by seqio in C++: the same ids as our own, document by document, in the same order
            assert documents == [[*vocabulary.encode(text), vocabulary.eos_id] for text in texts]
        else:
            texts = [vocabulary.decode(document) for document in documents]
            assert len(texts) == {"task": 1, "mixture": 2}[kind] * (30 if split == "train" else 1)
        total = sum(len(text.encode()) for text in texts)
        assert store.text_bytes_per_token(split) == pytest.approx(total / store.num_tokens(split))
    again = prepare(corpus, config, cache, progress=False)
    assert again.digest == store.digest and again.path == store.path == store_path(corpus, config, cache)
    if kind in ("folder", "jsonl", "tfds"):
        assert Counter(TEXTS) == Counter([*corpus.documents("train"), *corpus.documents("heldout")])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_resumes_exactly(corpora, cache, kind):
    vocabulary = build_vocabulary(BPE, corpora[kind], cache)
    fresh = functools.partial(SeqioBatches, corpora[kind], vocabulary, "train", CONTEXT, seed=5, shuffle_buffer=7)
    one = fresh()
    for size in (4, 8, 4, 2, 4, 4, 4):
        one.next(size)
    state = one.state()
    expected = [one.next(size) for size in (4, 2, 400, 8, 4)]  # 400 windows: over the end of an epoch
    two = fresh()
    two.next(6)  # where it was before does not matter
    two.restore(state)
    assert two.position == 30
    for batch, size in zip(expected, (4, 2, 400, 8, 4), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(two.next(size), batch, strict=True))
    one.restore(state)  # and back in the same object
    assert np.array_equal(one.next(4).inputs_BT, expected[0].inputs_BT)
    assert not np.array_equal(fresh().next(4).inputs_BT, expected[0].inputs_BT)


def test_a_stream_reads_what_the_store_holds(corpora, cache):
    corpus = corpora["folder"]
    store = prepare(corpus, BPE, cache, progress=False)
    stream = SeqioBatches(corpus, store.vocabulary, "train", CONTEXT, seed=0)
    needed = store.num_tokens("train")
    batches = [stream.next(3) for _ in range(needed // CONTEXT // 3 + 1)]
    tokens = np.concatenate([batch.inputs_BT.ravel() for batch in batches])[:needed]
    targets = np.concatenate([batch.targets_BT.ravel() for batch in batches])[: needed - 1]
    assert np.array_equal(tokens[1:], targets)  # one epoch: windows follow one another without gap or overlap
    split = np.split(tokens, np.flatnonzero(tokens == store.eos_id) + 1)[:-1]
    stored = [store.document("train", i) for i in range(store.num_documents("train"))]
    assert Counter(map(bytes, split)) == Counter(map(bytes, stored))
    assert [bytes(document) for document in split] != [bytes(document) for document in stored]  # shuffled


@pytest.mark.parametrize("kind", ["folder", "mixture"])
def test_the_seed_is_the_order(corpora, kind):
    vocabulary = build_vocabulary(Bytes(), corpora[kind], "")
    one, again, other = (SeqioBatches(corpora[kind], vocabulary, "train", CONTEXT, seed) for seed in (3, 3, 4))
    first = one.next(50).inputs_BT
    assert np.array_equal(first, again.next(50).inputs_BT)
    assert not np.array_equal(first, other.next(50).inputs_BT)


def test_rows_of_a_stream_are_kept_and_all_of_it_is_read(corpora):
    vocabulary = build_vocabulary(Bytes(), corpora["folder"], "")
    whole, some = (SeqioBatches(corpora["folder"], vocabulary, "train", CONTEXT, 0) for _ in range(2))
    for rows in ([4, 5], [0, 3]):
        expected = whole.next(6)
        assert np.array_equal(some.next(6, np.array(rows)).inputs_BT, expected.inputs_BT[rows])
        assert some.mark() == whole.mark()
    again = SeqioBatches(corpora["folder"], vocabulary, "train", CONTEXT, 0)
    again.restore(some.state())
    assert again.mark() == some.mark()
    whole.next(6)
    assert again.mark() != whole.mark()
    with pytest.raises(ValueError, match="rows 3 to 6 of a batch of 6 windows"):
        some.next(6, np.array([3, 6]))


def test_positions_that_version_0_1_0_saved_are_read(corpora):
    stream = SeqioBatches(corpora["folder"], build_vocabulary(Bytes(), corpora["folder"], ""), "train", CONTEXT, 0)
    assert json.loads(stream.state())["identity"]["host"] == "0 of 1"


def test_a_stream_refuses(corpora):
    corpus, vocabulary = corpora["folder"], build_vocabulary(Bytes(), corpora["folder"], "")
    stream = SeqioBatches(corpus, vocabulary, "train", CONTEXT, 0)
    for name, theirs in {
        "seed": SeqioBatches(corpus, vocabulary, "train", CONTEXT, 1),
        "split": SeqioBatches(corpus, vocabulary, "heldout", CONTEXT, 0),
        "context": SeqioBatches(corpus, vocabulary, "train", CONTEXT + 1, 0),
    }.items():
        with pytest.raises(ValueError, match=f"taken with {name} = "):
            stream.restore(theirs.state())
    state = json.loads(stream.state())
    for broken in (
        {"rest": "AAAA"},
        {"iterator": {}},
        {"iterator": {"position.index": "eA=="}},
        {"iterator": 5},
    ):
        with pytest.raises(ValueError, match="data position"):
            stream.restore(json.dumps({**state, **broken}).encode())
    with pytest.raises(ValueError, match="a batch of 0 windows"):
        stream.next(0)
    stream._iterator = iter(())
    with pytest.raises(ValueError, match="has no document to train on"):
        stream.next(1)
    with pytest.raises(ValueError, match="needs a vocabulary"):
        SeqioBatches(corpus, None, "train", CONTEXT, 0)


def test_seqio_tasks_bring_their_vocabulary(corpora, cache):
    _, seqio = reading.load_tensorflow()
    for corpus in (corpora["task"], corpora["mixture"]):
        source = tasks.resolve(corpus)
        theirs = source.task.output_features["targets"].vocabulary
        assert source.vocabulary.size == theirs.vocab_size and source.vocabulary.eos_id == theirs.eos_id
        assert source.vocabulary.encode(TEXTS[7]) == list(theirs.encode(TEXTS[7]))
        assert build_vocabulary(BPE, corpus, cache).digest == source.vocabulary.digest
    for vocabulary in (build_vocabulary(Bytes(), corpora["folder"], cache), source.vocabulary):
        assert tasks.from_seqio(tasks.to_seqio(vocabulary), "x").digest == vocabulary.digest
    assert tasks.to_seqio(source.vocabulary) == seqio.ByteVocabulary()


def test_unknown_names_are_answered_with_what_is_known(corpora, module):
    for corpus, message in {
        SeqioTask("one_piece", "registered_pieces"): "registered by registered_pieces; did you mean .*'one_pieces'",
        SeqioTask("one_pieces", "no_such_module"): "'no_such_module' cannot be imported",
        SeqioTask("one_pieces", "registered_pieces", feature="inputs"): "no feature 'inputs': it has targets",
        SeqioTask("one_passed", "registered_passed"): "has a PassThroughVocabulary",
        SeqioTask("one_pieces", "registered_pieces", heldout_split="test"): "no split 'test': it has train, valid",
        Tfds("littel", data_dir=corpora["tfds"].data_dir): "no dataset 'littel'",
        Tfds("little", field="body", data_dir=corpora["tfds"].data_dir): "no field 'body': it has",
        Tfds("little", heldout_split="test", data_dir=corpora["tfds"].data_dir): "no split 'test' .* slice",
    }.items():
        with pytest.raises(ValueError, match=message):
            prepare(corpus, Bytes(), module / "cache", progress=False)
    assert not (module / "cache").exists() or not list((module / "cache").iterdir())


def test_tfds_digest_needs_no_tensorflow_and_agrees_with_it(corpora, monkeypatch):
    corpus = corpora["tfds"]
    by_record = corpus.digest()
    monkeypatch.setattr(Tfds, "_recorded", lambda _: [])
    assert corpus.digest() == by_record
    assert Tfds("little", data_dir=corpus.data_dir, train_split="train[:50%]").digest() != by_record


def test_jsonl_keeps_every_byte(tmp_path):
    texts = ["ends in nul\0", "\0", "line\r\n", "\u2028 é \U0001f600", " "]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\r\n" for text in texts))
    corpus = Jsonl(str(tmp_path), heldout_percent=40)
    store = prepare(corpus, Bytes(), tmp_path / "cache", progress=False)
    for split in ("train", "heldout"):
        stored = [store.vocabulary.decode(store.document(split, i)) for i in range(store.num_documents(split))]
        assert stored == list(corpus.documents(split))


def test_records_of_examples(tmp_path):
    tf, _ = reading.load_tensorflow()
    examples = [
        tf.train.Example(
            features=tf.train.Features(
                feature={"body": tf.train.Feature(bytes_list=tf.train.BytesList(value=[f"text {i}".encode()]))}
            )
        ).SerializeToString()
        for i in range(4)
    ]
    path = tmp_path / "a.tfrecord-00000-of-00001"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            writer.write(example)
    assert [text for _, text in Records(str(tmp_path), "body").lines()] == [f"text {i}" for i in range(4)]
    with pytest.raises(ValueError, match="record 1, has no feature 'text': found body"):
        list(Records(str(tmp_path)).lines())
    twice = tf.train.Example.FromString(examples[3])
    twice.features.feature["body"].bytes_list.value.append(b"another")
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in (examples[0], b"no example", twice.SerializeToString(), examples[2]):
            writer.write(example)
    corpus = Records(str(tmp_path), "body", most_faulty=2)
    left_out = corpus.left_out()
    assert [text for _, text in corpus.lines(left_out)] == ["text 0", "text 2"]
    assert left_out.reasons == {"no Example": 1, "no text": 1} and "record 2, is no tf.train" in left_out.first[0]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cannot be read as TFRecord"):
        list(corpus.lines())


@pytest.mark.parametrize("streamed", [False, True])
def test_front_door(corpora, cache, streamed):
    config = DataConfig(corpora["jsonl"], BPE, context=CONTEXT, streamed=streamed, cache_dir=str(cache))
    data = open_data(config, progress=False)
    assert isinstance(data, StreamData if streamed else StoreData)
    batch = data.train().next(4)
    assert batch.inputs_BT.shape == (4, CONTEXT) and batch.inputs_BT.max() < data.vocabulary.size
    one, two = list(data.heldout(3, 7)), list(data.heldout(3, 7))
    assert [part.weights_BT[:, 0].sum() for part in one] == [3, 3, 1]
    assert all(np.array_equal(a.inputs_BT, b.inputs_BT) for a, b in zip(one, two, strict=True))
    assert json.loads(json.dumps(data.describe()))["digest"] == data.digest
    store = prepare(corpora["jsonl"], BPE, cache)
    assert data.bytes_per_token == store.text_bytes_per_token("heldout") and data.vocabulary.digest
    if streamed:  # in order from the first held-out token on, as the store would number them
        first = store.windows("heldout", np.arange(3), CONTEXT)
        assert np.array_equal(one[0].inputs_BT, first[:, :-1]) and np.array_equal(one[0].targets_BT, first[:, 1:])
        with pytest.raises(ValueError, match="fewer than"):
            streaming.heldout_stream(tasks.resolve(corpora["jsonl"], data.vocabulary), 10**6, 2, 2)


WITHOUT_TENSORFLOW = """
import sys
for name in ("tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"):
    sys.modules[name] = None  # importing it now fails
from flm_jax.data import batches, corpora, prepare, reading, source, store, streaming, tasks, text
from flm_jax.data import train_vocabulary
data = source.open_data(source.DataConfig(corpora.{corpus!r}, {config}, context=16, cache_dir={cache!r}))
reader = data.train()
reader.next(4)
reader.restore(reader.state())
print(data.digest, reader.next(4).inputs_BT.sum(), len(list(data.heldout(2, 4))), data.vocabulary.size)
"""


@pytest.mark.parametrize("kind", ["folder", "tfds", "task"])
def test_a_prepared_store_needs_no_tensorflow(corpora, cache, module, kind):
    store = prepare(corpora[kind], BPE, cache, progress=False)
    code = WITHOUT_TENSORFLOW.format(
        corpus=corpora[kind], config="train_vocabulary.SentencePiece(size=300)", cache=str(cache)
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{module}:."},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == store.digest


@pytest.mark.parametrize("kind", ["folder", "single", "jsonl"])
@pytest.mark.parametrize("config", [Bytes(), BPE], ids=["bytes", "pieces"])
def test_where_tensorflow_is_missing_text_is_prepared_to_the_same_store(corpora, tmp_path, monkeypatch, kind, config):
    odd = "\r\n\0 \t￾ e\u0301 \u2581 \U0001f600  two  spaces \n\n" * 40 + "end"
    (tmp_path / "one.txt").write_bytes(odd.encode())
    corpus = TextFolder(str(tmp_path / "one.txt"), heldout_percent=30) if kind == "single" else corpora[kind]
    seqio = tasks.resolve(corpus, build_vocabulary(config, corpus, tmp_path))
    expected = {split: [(tokens.tolist(), size) for tokens, size in seqio.documents(split)] for split in SPLITS}

    def missing():
        raise reading.MissingExtraError("it is not installed")

    monkeypatch.setattr(preparing, "load_tensorflow", missing)
    monkeypatch.setattr(tasks, "resolve", lambda *given: pytest.fail("seqio was asked"))
    found = prepare(corpus, config, tmp_path / "without", progress=False)
    for split, documents in expected.items():
        tokens = [found.document(split, number).tolist() for number in range(found.num_documents(split))]
        assert tokens == [own for own, _ in documents]
        assert found.describe()["splits"][split]["text_bytes"] == sum(size for _, size in documents)
    with pytest.raises(reading.MissingExtraError):
        prepare(corpora["task"], config, tmp_path / "without", progress=False)


def test_a_damaged_store_is_refused_and_not_made_again(corpora, tmp_path):
    store = prepare(corpora["folder"], Bytes(), tmp_path, progress=False)
    shard = store.path / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train-00000\.bin is [\d,]+ bytes long and should be"):
        prepare(corpora["folder"], Bytes(), tmp_path)
    (store.path / "store.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no store\.json"):
        prepare(corpora["folder"], Bytes(), tmp_path)
