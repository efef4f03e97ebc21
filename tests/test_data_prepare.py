"""Preparing by parts: the same store whatever the number of processes, without duplicates, through kills and faults."""

import dataclasses
import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flm_jax.chat.corpus import Conversations
from flm_jax.data import part_work, prepare_text, workers
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import SPLITS, Jsonl, SeqioTask, TextFolder
from flm_jax.data.dedup import EXACT, NEAR, STAYS, Dedup, decide
from flm_jax.data.mixture import Mixture, Source
from flm_jax.data.part_files import PartFolder, PartResult, result, result_name
from flm_jax.data.parts import divide, documents, hashed, tokenised
from flm_jax.data.preparation import prepare_data, report, sentence
from flm_jax.data.prepare import prepare, prepare_by
from flm_jax.data.source import open_data
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.data.workers import Workers
from flm_jax.duplicates import near
from tests.environment import as_user
from tests.preparing import PLANTED, SMALL, TEXTS, arm, deadly, sums, write_lines

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A corpus of lines in several files, one of them compressed, and a folder of texts; both with duplicates."""
    root = tmp_path_factory.mktemp("corpora")
    for name in ("lines", "folder"):
        (root / name).mkdir()
    write_lines(root / "lines" / "a.jsonl", TEXTS[:40])
    write_lines(root / "lines" / "b.jsonl.gz", TEXTS[40:50], gzip.open)
    (root / "lines" / "c.jsonl").write_text("")
    write_lines(root / "lines" / "d.jsonl", [*TEXTS[50:], *PLANTED])
    with (root / "lines" / "d.jsonl").open("a") as file:
        file.write(json.dumps({"text": "no end of line"}))
    for number, text in enumerate([*TEXTS, *PLANTED, ""]):
        (root / "folder" / f"{number:03}.txt").write_bytes(text.encode())
    return {
        "lines": Jsonl(str(root / "lines"), heldout_percent=20),
        "folder": TextFolder(str(root / "folder"), heldout_percent=20),
    }


@pytest.fixture(scope="module")
def pools():
    """Two and three processes, started once."""
    with Workers(2, SMALL) as two, Workers(3, SMALL) as three:
        yield two, three


@pytest.mark.parametrize("size", [1, 50, 333, SMALL, 4096, 10**9, None])
def test_parts_in_order_are_the_corpus_in_order(corpora, size):
    for corpus in corpora.values():
        parts = divide(corpus, size)
        assert [part.number for part in parts] == list(range(len(parts)))
        found = [one for part in parts for one in documents(corpus, part)]
        if isinstance(corpus, Jsonl):
            assert found == list(corpus.lines())
        else:
            assert found == [(name, text.decode()) for name, _, text in corpus.contents()]
        if size is not None and size < 10**9:
            assert len(parts) > 2
            most = max(len(text.encode()) for _, text in found)
            assert all(part.size <= size + 2 * most for part in parts if "b.jsonl.gz" not in part.pieces[0].name)


def test_a_single_file_that_is_cut_is_one_part(tmp_path):
    (tmp_path / "one.txt").write_text("line\n" * 3000)
    corpus = TextFolder(str(tmp_path))
    (part,) = divide(corpus, 10)
    assert [text.encode() for _, text in documents(corpus, part)] == [text for _, _, text in corpus.contents()]


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
@pytest.mark.parametrize("kind", ["lines", "folder"])
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


def test_hashes_do_not_depend_on_how_documents_are_put_together(corpora, monkeypatch):
    corpus = corpora["lines"]
    one = [found for part in divide(corpus, None) for found in hashed(corpus, part, True)]
    monkeypatch.setattr("flm_jax.data.parts.BATCH_DOCUMENTS", 3)
    many = [found for part in divide(corpus, SMALL) for found in hashed(corpus, part, True)]
    assert len(one) == 1 and len(many) > 20
    assert np.array_equal(one[0].texts, np.concatenate([found.texts for found in many]))
    assert np.array_equal(one[0].bands, np.concatenate([found.bands for found in many], axis=1))
    assert np.array_equal(one[0].short, np.concatenate([found.short for found in many]))


@pytest.mark.integration
def test_what_a_killed_process_did_not_finish_is_done_again(tmp_path, caplog):
    corpus = deadly(tmp_path, 1)
    expected = prepare(corpus, Bytes(), tmp_path / "here", progress=False)
    arm(corpus)
    with Workers(2, SMALL) as runner:
        found = prepare_by(runner, corpus, Bytes(), tmp_path / "there", progress=False)
    assert (Path(corpus.path) / "death0").exists() and "is done again" in caplog.text
    assert sums(found.store.path) == sums(expected.path)


def always_killed(number):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.integration
def test_a_process_that_is_killed_again_and_again_ends_the_work():
    with (
        pytest.raises(OSError, match="were killed 3 times before one had finished a part: is there enough memory"),
        Workers(2) as runner,
    ):
        list(runner.map(always_killed, [1]))


class Stopped:
    """A runner of one process that stops, as if by Ctrl-C, after some parts of a step."""

    part_bytes = SMALL
    here = Workers(1, SMALL)

    def __init__(self, after):
        self.after, self.done = after, 0

    def run(self, function, parts, done):
        for part in parts:
            if self.done == self.after:
                raise KeyboardInterrupt
            done(function(part))
            self.done += 1


@pytest.mark.parametrize("dedup", [None, Dedup(near=0.8)], ids=["all", "dedup"])
def test_a_command_that_was_stopped_goes_on_with_the_parts_that_are_left(corpora, tmp_path, dedup):
    corpus, total = corpora["lines"], len(divide(corpora["lines"], SMALL))
    expected = prepare(corpus, Bytes(), tmp_path / "here", progress=False, dedup=dedup)
    everything = total * (1 if dedup is None else 2)
    left = everything
    # With duplicates to drop, the second stop is before the last part is hashed, and the third after it.
    for after in (3, 2, 1) if dedup is None else (3, total - 4, 2, 1):
        runner = Stopped(after)
        with pytest.raises(KeyboardInterrupt):
            prepare_by(runner, corpus, Bytes(), tmp_path / "there", progress=False, dedup=dedup)
        left -= after
        folder = next((tmp_path / "there").glob(".*.parts"))
        (folder / ".tokens-000001.killed.tmp").mkdir()  # as a killed process leaves one
    runner = Stopped(-1)
    found = prepare_by(runner, corpus, Bytes(), tmp_path / "there", progress=False, dedup=dedup)
    assert runner.done == left and sums(found.store.path) == sums(expected.path)
    assert [path.name for path in (tmp_path / "there").iterdir()] == [expected.path.name]


def test_results_of_another_job_are_not_used(corpora, tmp_path):
    corpus = corpora["lines"]
    with pytest.raises(KeyboardInterrupt):
        prepare_by(Stopped(5), corpus, Bytes(), tmp_path, progress=False)
    other = Stopped(-1)
    other.part_bytes = 2 * SMALL
    prepare_by(other, corpus, Bytes(), tmp_path, progress=False)
    assert other.done == len(divide(corpus, 2 * SMALL))


@pytest.mark.parametrize("damage", ["flip", "cut", "record"])
def test_a_damaged_result_of_a_part_is_refused_and_named(corpora, tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        prepare_by(Stopped(5), corpora["lines"], Bytes(), tmp_path, progress=False)
    folder = next(tmp_path.glob(".*.parts")) / result_name(part_work.TOKENS, 2)
    path = folder / ("record.json" if damage == "record" else "train.tokens")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage != "cut" else content[:-2])
    with pytest.raises(ValueError, match=r"tokens-000002/.* is damaged.*: delete .*, and the same command does this"):
        prepare_by(Stopped(-1), corpora["lines"], Bytes(), tmp_path, progress=False)
    assert not list(tmp_path.glob("jsonl-*"))


def test_the_second_process_that_writes_a_result_leaves_the_first(tmp_path):
    for number in (1, 2):
        with result(tmp_path, "tokens-000000") as writer:
            writer.add("a", np.array([number], np.uint8))
            if number == 1:
                with result(tmp_path, "tokens-000000") as other:
                    other.add("a", np.array([7], np.uint8))
    assert PartResult(tmp_path / "tokens-000000").array("a", np.uint8).tolist() == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-000000"]


def test_two_commands_do_not_prepare_the_same_text_at_once(tmp_path):
    message = "another process prepares the same text"
    with (
        PartFolder(tmp_path / "parts", {"a": 1}),
        pytest.raises(ValueError, match=message),
        PartFolder(tmp_path / "parts", {"a": 1}),
    ):
        pytest.fail("both have it")
    with PartFolder(tmp_path / "parts", {"a": 1}):
        pass


def test_a_file_that_changes_while_it_is_prepared_is_noticed(corpora, tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    corpus = Jsonl(str(tmp_path / "a.jsonl"))

    class Changing(Stopped):
        def run(self, function, parts, done):
            text = (tmp_path / "a.jsonl").read_bytes()
            (tmp_path / "a.jsonl").write_bytes(text[: text.rindex(b"\n", 0, -3)])
            super().run(function, parts, done)

    with pytest.raises(ValueError, match="was altered while it was prepared"):
        prepare_by(Changing(-1), corpus, Bytes(), tmp_path / "cache", progress=False)
    last = divide(corpus, SMALL)[-1]
    with pytest.raises(ValueError, match="was altered while it was prepared"):
        list(tokenised(corpus, last, 0, ByteVocabulary(), np.zeros(100, bool)))


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


def test_processes_that_work_on_parts_do_not_load_jax():
    code = "import sys, flm_jax.data.part_work; sys.exit(bool({'jax', 'tensorflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


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


def test_results_come_in_order_and_a_few_at_a_time():
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    with Workers(1) as runner:
        found = runner.map(functools.partial(pow, 2), items())
        assert next(found) == (0, 1) and len(taken) == 1
    assert workers.Workers(0).count == len(os.sched_getaffinity(0))
    assert prepare_text.parts_folder(Path("a/jsonl-1")) == Path("a/.jsonl-1.parts")
