"""Preparing as a pipeline of Apache Beam, by its DirectRunner: the same bytes, through a killed worker too.

`make test-beam` runs this where Beam is installed, in an environment of its own; elsewhere it is skipped.
"""

import json
import sys
from pathlib import Path

import pytest

from flm_jax.data import beam
from flm_jax.data.beam import Beam
from flm_jax.data.corpora import Jsonl
from flm_jax.data.dedup import Dedup
from flm_jax.data.prepare import prepare, prepare_by
from flm_jax.data.reading import MissingExtraError
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.data.workers import Workers
from tests.test_data_prepare import PLANTED, SMALL, TEXTS, deadly, sums, write_lines

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


def test_what_a_killed_worker_did_not_finish_is_done_again(tmp_path, caplog):
    runner = by_beam(3)
    corpus = deadly(tmp_path, 1)
    expected = prepare(corpus, Bytes(), tmp_path / "here", progress=False)
    (Path(corpus.path) / "armed").write_text("tokens")  # only reading by this process is safe
    found = prepare_by(runner, corpus, Bytes(), tmp_path / "there", progress=False)
    assert (Path(corpus.path) / "death0").exists()
    assert sums(found.store.path) == sums(expected.path)


class Fails:
    """Stands for a runner of Beam whose pipelines fail, some times."""

    def __init__(self, times, error):
        self.times, self.error, self.begun = times, error, 0

    def Pipeline(self, *_, **__):
        self.begun += 1
        if self.begun <= self.times:
            raise self.error
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __or__(self, _):
        return self

    def __getattr__(self, _):
        return lambda *_: self


@pytest.mark.parametrize(
    ("times", "error", "begun", "raised"),
    [
        (2, RuntimeError("a bundle\nfailed"), 3, None),
        (3, RuntimeError("a bundle\nfailed"), 3, OSError),
        (1, ValueError("a line is broken"), 1, ValueError),
    ],
)
def test_a_pipeline_that_fails_is_started_again_and_a_fault_of_the_text_is_not(
    corpus, tmp_path, monkeypatch, times, error, begun, raised
):
    fails = Fails(times, error)
    monkeypatch.setattr(beam, "load_beam", lambda: fails)
    monkeypatch.setattr(Beam, "_options", lambda _: None)
    runner, finished = Beam("DirectRunner", 1), []
    from flm_jax.data.parts import divide

    parts = divide(corpus, SMALL)
    if raised is None:
        runner.run(len, parts, finished.append)
        assert sum(finished) == sum(part.size for part in parts)
    else:
        with pytest.raises(raised, match="failed 3 times: failed" if raised is OSError else "a line is broken"):
            runner.run(len, parts, finished.append)
    assert fails.begun == begun


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
