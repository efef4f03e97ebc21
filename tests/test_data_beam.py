"""Preparing as a pipeline of Apache Beam, by its DirectRunner: the same bytes, through a killed worker too.

`make test-beam` runs this where Beam is installed, in an environment of its own; elsewhere it is skipped.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from flm_jax.data import beam
from flm_jax.data.beam import Beam
from flm_jax.data.corpora import Jsonl
from flm_jax.data.dedup import Dedup
from flm_jax.data.parts import divide
from flm_jax.data.prepare import prepare, prepare_by
from flm_jax.data.reading import MissingExtraError
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.data.workers import Workers
from tests.preparing import PLANTED, SMALL, TEXTS, arm, deadly, sums, write_faulty, write_lines

pytestmark = pytest.mark.integration
DEDUP = Dedup(near=0.8)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "lines").mkdir()
    write_lines(tmp_path / "lines" / "a.jsonl", [*TEXTS, *PLANTED])
    return Jsonl(str(tmp_path / "lines"), heldout_percent=20)


def by_beam(workers, *options):
    pytest.importorskip("apache_beam")
    return Beam("DirectRunner", workers, options, Workers(1, SMALL))


@pytest.mark.parametrize("dedup", [None, DEDUP], ids=["all", "dedup"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_pipeline_writes_the_same_bytes(corpus, tmp_path, workers, dedup):
    runner = by_beam(workers)
    expected = prepare(corpus, Bytes(), tmp_path / "here", progress=False, dedup=dedup)
    found = prepare_by(runner, corpus, Bytes(), tmp_path / "there", progress=False, dedup=dedup)
    assert found.made and sums(found.store.path) == sums(expected.path)
    assert [path.name for path in (tmp_path / "there").iterdir()] == [expected.path.name]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pipeline_leaves_out_and_refuses_the_same_lines(tmp_path, workers):
    runner = by_beam(workers)
    corpus = Jsonl(str(tmp_path / "faulty"), heldout_percent=20, most_faulty=write_faulty(tmp_path / "faulty"))
    expected = prepare(corpus, Bytes(), tmp_path / "here", progress=False)
    found = prepare_by(runner, corpus, Bytes(), tmp_path / "there", progress=False)
    assert sums(found.store.path) == sums(expected.path) and expected.describe()["corpus"]["left_out"]["count"] == 15
    with pytest.raises(ValueError, match="more faulty lines than the 1 that Jsonl.most_faulty allows"):
        prepare_by(runner, dataclasses.replace(corpus, most_faulty=1), Bytes(), tmp_path / "there", progress=False)


def test_what_a_killed_worker_did_not_finish_is_done_again(tmp_path, caplog):
    runner = by_beam(3)
    corpus = deadly(tmp_path, 1)
    expected = prepare(corpus, Bytes(), tmp_path / "here", progress=False)
    arm(corpus)
    found = prepare_by(runner, corpus, Bytes(), tmp_path / "there", progress=False)
    assert (Path(corpus.path) / "death0").exists() and "is started again for what is left" in caplog.text
    assert sums(found.store.path) == sums(expected.path)


class Failing(Beam):
    """A runner of Beam whose pipelines fail `times` times."""

    times, begun = 0, 0

    def attempt(self, function, parts):
        type(self).begun += 1
        return "a worker was killed" if self.begun <= self.times else ""


@pytest.mark.parametrize("times", [0, 2, 3])
def test_a_pipeline_that_fails_is_started_again(corpus, monkeypatch, times, caplog):
    monkeypatch.setattr(beam, "load_beam", lambda: None)
    monkeypatch.setattr(Failing, "times", times)
    monkeypatch.setattr(Failing, "begun", 0)
    finished, parts = [], divide(corpus, SMALL)
    if times < 3:
        Failing("DirectRunner", 1).run(len, parts, finished.append)
        assert sum(finished) == sum(part.size for part in parts)
    else:
        with pytest.raises(OSError, match="DirectRunner has failed 3 times: a worker was killed"):
            Failing("DirectRunner", 1).run(len, parts, finished.append)
        assert not finished
    assert Failing.begun == min(times + 1, 3) and caplog.text.count("is started again") == min(times, 2)


def test_without_beam_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[beam\]'.*or take --runner=local"):
        beam.load_beam()


def test_machines_that_do_not_share_the_disk_are_noticed(corpus, tmp_path):
    class Elsewhere:
        part_bytes, here = SMALL, Workers(1, SMALL)

        def run(self, function, parts, done):
            pass

    with pytest.raises(OSError, match="do the machines share the disk of DataConfig.cache_dir"):
        prepare_by(Elsewhere(), corpus, Bytes(), tmp_path / "cache", progress=False)
    assert json.loads(next((tmp_path / "cache").glob(".*.parts/job.json")).read_text())["digest"]
