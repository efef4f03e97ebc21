"""grain's DataLoader over a token store: every window once, by a worker process, from a saved position on."""

import re
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from flm_jax.data.random_access import StoreWindows
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.vocabulary import ByteVocabulary

grain = pytest.importorskip("grain.python", reason="the extra grain is not installed")
CONTEXT, BATCH = 8, 4


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    rng = np.random.default_rng(0)
    with StoreWriter(tmp_path_factory.mktemp("grain") / "store", ByteVocabulary(), "corpus", {}, 100) as writer:
        for number in range(20):
            writer.append("train" if number else "heldout", rng.integers(3, 259, 30), 30)
        return StoreWindows(writer.close(), "train", CONTEXT)


@pytest.fixture
def parsed():
    """grain's workers read flags, which a program has parsed."""
    before = flags.FLAGS.is_parsed()
    flags.FLAGS.mark_as_parsed()
    yield
    if not before:
        flags.FLAGS.unparse_flags()


def loader(windows, workers):
    sampler = grain.IndexSampler(len(windows), grain.ShardOptions(0, 1), shuffle=True, num_epochs=1, seed=7)
    return grain.DataLoader(data_source=windows, sampler=sampler, operations=[grain.Batch(BATCH)], worker_count=workers)


def test_it_is_a_data_source(windows):
    assert isinstance(windows, grain.RandomAccessDataSource)
    batches = list(loader(windows, 0))
    inputs = np.concatenate([batch["inputs"] for batch in batches])
    assert batches[0]["inputs"].shape == (BATCH, CONTEXT) and batches[0]["segments"].dtype == np.int32
    own = windows.store.windows("train", np.arange(len(windows)), CONTEXT)[:, :-1]
    assert sorted(inputs.tolist()) == sorted(own.tolist()) and inputs.tolist() != own.tolist()
    dataset = grain.MapDataset.source(windows).shuffle(seed=1).batch(BATCH)
    assert dataset[0]["weights"].tolist() == [[1.0] * CONTEXT] * BATCH


def test_the_program_of_the_page_runs(windows, capsys):
    page = Path(__file__).parent.parent / "docs/token_store.md"
    program = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
    for own, mine in (
        ('"cache/textfolder-5f1c"', repr(str(windows.store.path))),
        ("4096", "8"),
        ("worker_count=4", "worker_count=0"),
    ):
        assert own in program
        program = program.replace(own, mine)
    names = {"__name__": "page"}
    exec(program, names)
    names["main"](None)
    assert capsys.readouterr().out.startswith("(8, 8) (8, 8)\n")


@pytest.mark.integration
def test_a_worker_process_reads_the_same_and_positions_are_restored(windows, parsed):
    expected = [batch["targets"].tolist() for batch in loader(windows, 0)]
    iterator = iter(loader(windows, 1))
    found = [next(iterator)["targets"].tolist() for _ in range(4)]
    state = iterator.get_state()
    rest = [batch["targets"].tolist() for batch in iterator]
    assert found + rest == expected
    again = iter(loader(windows, 1))
    again.set_state(state)
    assert [batch["targets"].tolist() for batch in again] == rest
