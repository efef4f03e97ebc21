"""Parts of a corpus, their results on disk, and the processes that work on them: through kills, stops and damage."""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flm_jax.data import part_work, prepare_text, workers
from flm_jax.data.corpora import Jsonl, TextFolder
from flm_jax.data.dedup import Dedup
from flm_jax.data.part_files import PartFolder, PartResult, result, result_name
from flm_jax.data.parts import divide, documents, hashed, tokenised
from flm_jax.data.prepare import prepare, prepare_by
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.data.workers import Workers
from tests.preparing import SMALL, TEXTS, Stopped, arm, deadly, sums, write_corpora, write_lines

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Those of `write_corpora`."""
    return write_corpora(tmp_path_factory.mktemp("corpora"))


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
        pytest.raises(
            OSError,
            match="killed 3 times before one had finished a piece of its work: is there enough memory for 2 processes. "
            "Set --workers to fewer",
        ),
        Workers(2, setting="--workers") as runner,
    ):
        list(runner.map(always_killed, [1]))


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


def test_processes_that_work_on_parts_do_not_load_jax():
    code = "import sys, flm_jax.data.part_work; sys.exit(bool({'jax', 'tensorflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


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
