"""Preparing: the same store whatever the number of processes, without duplicates; faults; a command that is killed."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flm_jax.chat.corpus import Conversations
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import SPLITS, Jsonl, SeqioTask
from flm_jax.data.dedup import EXACT, NEAR, STAYS, Dedup, decide
from flm_jax.data.mixture import Mixture, Source
from flm_jax.data.parts import divide
from flm_jax.data.preparation import prepare_data, report, sentence
from flm_jax.data.prepare import prepare, prepare_by
from flm_jax.data.source import open_data
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.data.workers import Workers
from flm_jax.duplicates import near
from tests.environment import as_user
from tests.preparing import PLANTED, SMALL, TEXTS, sums, write_corpora, write_lines

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Those of `write_corpora`."""
    return write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def pools():
    """Two and three processes, started once."""
    with Workers(2, SMALL) as two, Workers(3, SMALL) as three:
        yield two, three


def test_what_many_documents_add_at_once_is_what_each_adds(tmp_path):
    for name in ("one", "many"):
        with StoreWriter(tmp_path / name, ByteVocabulary(), "digest", {}, 1000) as writer:
            for split, texts in (("train", TEXTS[:50]), ("heldout", TEXTS[50:])):
                found = [[*ByteVocabulary().encode(text), 1] for text in texts]
                size = sum(len(text.encode()) for text in texts)
                if name == "many":
                    writer.extend(split, np.concatenate(found), [len(one) for one in found], size)
                    writer.extend(split, np.zeros(0, np.uint16), [], 0)
                else:
                    for one, text in zip(found, texts, strict=True):
                        writer.append(split, np.array(one), len(text.encode()))
            writer.close()
    assert sums(tmp_path / "one") == sums(tmp_path / "many") and len(sums(tmp_path / "one")) > 10


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([5, 1, 300, 1], [2, 2], r"documents 0 to 1 of 'train' has ids from 1 to 300"),
        ([5, 1, 6, 7], [2, 2], "does not end with the id 1"),
        ([5, 1], [2, 2], "are not those of 2 tokens"),
        ([5, 1], [2, 0], "are not those of 2 tokens"),
    ],
)
def test_documents_that_a_store_cannot_hold_are_refused(tmp_path, tokens, lengths, message):
    with (
        pytest.raises(ValueError, match=message),
        StoreWriter(tmp_path / "store", ByteVocabulary(), "digest", {}) as writer,
    ):
        writer.extend("train", np.array(tokens), lengths, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
@pytest.mark.parametrize("dedup", [None, Dedup(near=0.8)], ids=["all", "dedup"])
@pytest.mark.parametrize("kind", ["lines", "folder", "faulty"])
def test_any_number_of_processes_writes_the_same_bytes(corpora, pools, tmp_path, kind, dedup):
    expected = prepare(corpora[kind], Bytes(), tmp_path / "here", False, max_shard_tokens=999, dedup=dedup)
    wanted = sums(expected.path)
    assert len(wanted) > 10
    for runner in (Workers(1, SMALL), *pools):
        cache = tmp_path / f"by {runner.count}"
        made = prepare_by(runner, corpora[kind], Bytes(), cache, False, max_shard_tokens=999, dedup=dedup)
        assert made.made and sums(made.store.path) == wanted
        assert made.store.path.name == expected.path.name
        assert [path.name for path in cache.iterdir()] == [expected.path.name]  # parts were removed
        again = prepare_by(runner, corpora[kind], Bytes(), cache, False, dedup=dedup)
        assert not again.made and again.store.digest == expected.digest


@pytest.mark.integration
@pytest.mark.parametrize("limit", [0, 1, 6, None])
def test_too_many_faulty_lines_are_refused_alike_by_any_number_of_processes(corpora, pools, tmp_path, limit):
    most = corpora["faulty"].most_faulty
    corpus = dataclasses.replace(corpora["faulty"], most_faulty=most - 1 if limit is None else limit)
    said = set()
    for runner in (None, Workers(1, SMALL), Workers(1), *pools):
        with pytest.raises(ValueError, match=r"faulty/a\.jsonl:1 is not JSON") as error:
            prepare_by(runner, corpus, Bytes(), tmp_path, progress=False)
        said.add(str(error.value))
    assert len(said) == 1 and not list(tmp_path.glob("jsonl-*"))
    assert ("Jsonl.most_faulty = N leaves out up to N such lines" in said.pop()) == (limit == 0)


@pytest.mark.parametrize("kind", ["lines", "folder"])
def test_the_store_holds_what_the_corpus_yields(corpora, tmp_path, kind):
    corpus, vocabulary = corpora[kind], ByteVocabulary()
    store = prepare(corpus, Bytes(), tmp_path, progress=False)
    for split in SPLITS:
        found = [store.document(split, number).tolist() for number in range(store.num_documents(split))]
        assert found == [[*vocabulary.encode(text), vocabulary.eos_id] for text in corpus.documents(split)]


@pytest.mark.integration
def test_each_source_of_a_mixture_is_what_training_opens(corpora, pools, tmp_path):
    mixture = Mixture(tuple(Source(name, corpus) for name, corpus in corpora.items()))
    config = DataConfig(mixture, Bytes(), context=16, cache_dir=str(tmp_path / "many"), dedup=Dedup())
    found = dict(prepare_data(config, pools[0], progress=False))
    before = {name: sums(one.store.path) for name, one in found.items()}
    data = open_data(config, progress=False)
    assert {part.name: part.store.path for part in data.parts} == {n: one.store.path for n, one in found.items()}
    alone = open_data(dataclasses.replace(config, cache_dir=str(tmp_path / "one")), progress=False)
    assert {part.name: sums(part.store.path) for part in alone.parts} == before
    said = sentence(report("folder", found["folder"]))
    assert said.startswith("folder: 65 documents, 2 dropped as the same and 0 as nearly the same as earlier ones.")
    assert "prepared in" in said


@pytest.mark.parametrize("kind", ["lines", "folder"])
@pytest.mark.parametrize(
    ("dedup", "gone"),
    [
        (Dedup(), {60: EXACT, 62: EXACT}),
        (Dedup(near=0.8), {60: EXACT, 61: NEAR, 62: EXACT, 64: NEAR}),
        (Dedup(exact=False, near=0.8), {60: NEAR, 61: NEAR, 62: NEAR, 64: NEAR}),
        (Dedup(near=1.0), {60: EXACT, 62: EXACT, 64: NEAR}),
    ],
)
def test_planted_duplicates_fall_out_and_nothing_else(corpora, tmp_path, kind, dedup, gone):
    corpus = corpora[kind]
    store = prepare(corpus, Bytes(), tmp_path, progress=False, dedup=dedup)
    about = store.describe()["corpus"]["dedup"]
    every = [*TEXTS, *PLANTED, *(["no end of line"] if kind == "lines" else [])]
    kinds = list(gone.values())
    assert (about["documents"], about["dropped_exact"], about["dropped_near"]) == (
        len(every), kinds.count(EXACT), kinds.count(NEAR),
    )  # fmt: skip
    left = [text for number, text in enumerate(every) if number not in gone]
    found = [
        store.vocabulary.decode(store.document(split, number))
        for split in SPLITS
        for number in range(store.num_documents(split))
    ]
    assert sorted(found) == sorted(left)


def test_the_first_of_equal_documents_stays():
    texts = np.array([5, 3, 5, 9, 3, 5], np.uint64)
    kinds = decide(Dedup(), texts, lambda _: pytest.fail("bands"), lambda: pytest.fail("signatures"))
    assert kinds.tolist() == [STAYS, STAYS, EXACT, STAYS, EXACT, EXACT]


def test_a_chain_of_small_changes_does_not_drop_what_is_unlike_the_one_that_stays():
    signature = np.tile(np.arange(near.PERMUTATIONS, dtype=np.uint32), (3, 1))
    signature[1, :16] += 1000  # the second is like both its neighbours, which are not like each other
    signature[2, :32] += 1000
    bands, short = near.band_hashes(signature), near.short(signature)
    kinds = decide(Dedup(near=0.85), np.arange(3, dtype=np.uint64), lambda band: bands[band], lambda: short)
    assert kinds.tolist() == [STAYS, NEAR, STAYS]


@pytest.mark.integration
def test_faults_are_said_with_their_place(tmp_path, pools):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": 5}\n')
    number = (tmp_path / "a.jsonl").read_bytes().count(b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:{number}: the field 'text' is int, and should be text"):
        prepare_by(pools[0], Jsonl(str(tmp_path / "a.jsonl")), Bytes(), tmp_path / "cache", progress=False)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no document"):
        prepare_by(pools[0], Jsonl(str(tmp_path / "empty.jsonl")), Bytes(), tmp_path / "cache", progress=False)
    write_lines(tmp_path / "same.jsonl", ["same"] * 9)
    with pytest.raises(ValueError, match="the corpus has no document in its split"):
        prepare_by(pools[0], Jsonl(str(tmp_path / "same.jsonl")), Bytes(), tmp_path / "cache", False, dedup=Dedup())


def test_what_cannot_be_without_duplicates_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Conversations is none: .*chosen by select_sft\.py"):
        prepare(Conversations("talks"), Bytes(), tmp_path, dedup=Dedup())
    with pytest.raises(ValueError, match="DataConfig.dedup is for corpora of files"):
        prepare(SeqioTask("a"), Bytes(), tmp_path, dedup=Dedup())
    with pytest.raises(ValueError, match="Dedup drops nothing"):
        Dedup(exact=False)
    with pytest.raises(ValueError, match=r"set DataConfig\.streamed = False"):
        DataConfig(streamed=True, dedup=Dedup())
    with pytest.raises(ValueError, match="there is no store to prepare"):
        list(prepare_data(DataConfig(streamed=True), Workers(1)))


SLOW = """
import dataclasses, time
from flm_jax.cli.configure import register
from flm_jax.data.rows import Jsonl
from flm_jax.records import recorded


@dataclasses.dataclass(frozen=True)
@recorded
class SlowLines(Jsonl):
    def texts(self, path, span=None):
        for found in super().texts(path, span):
            time.sleep(0.002)
            yield found


register()
"""
RECIPE = """
import slow_lines
include 'gin_configs/recipes/minimal.gin'
DataConfig.corpus = @SlowLines()
SlowLines.path = 'lines.jsonl'
DataConfig.vocabulary = @Bytes()
DataConfig.cache_dir = 'cache'
"""


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_command_that_was_ended_goes_on_and_training_finds_its_store(tmp_path, number, monkeypatch):
    write_lines(tmp_path / "lines.jsonl", TEXTS * 5)
    (tmp_path / "slow_lines.py").write_text(SLOW)
    (tmp_path / "my.gin").write_text(RECIPE)
    command = [sys.executable, str(ROOT / "experiments/prepare_data.py"), "--gin_file=my.gin"]
    command += ["--workers=2", "--part_bytes=3000", "--json=found.json"]
    env = {**as_user(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    begun = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list(tmp_path.glob("cache/.*.parts/tokens-*")) and time.monotonic() < end:
        assert begun.poll() is None, begun.stderr.read()
        time.sleep(0.01)
    begun.send_signal(number)
    said = begun.communicate()[1]
    assert begun.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert said.endswith("Interrupted.\n") and "Traceback" not in said
    assert not list(tmp_path.glob("cache/slowlines-*"))
    kept = {path: path.stat().st_ino for path in tmp_path.glob("cache/.*.parts/tokens-*/record.json")}
    assert kept and len(kept) < len(divide(Jsonl(str(tmp_path / "lines.jsonl")), 3000))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())["sources"]
    monkeypatch.chdir(tmp_path)
    fast = dataclasses.make_dataclass("SlowLines", [], bases=(Jsonl,), frozen=True)
    expected = prepare(fast("lines.jsonl"), Bytes(), tmp_path / "here", progress=False)
    assert Path(found["store"]).name == expected.path.name and sums(Path(found["store"])) == sums(expected.path)
    assert done.stdout.startswith(f"{found['documents']} documents. train: ") and found["documents"] == 300
