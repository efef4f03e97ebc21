"""The token store and the batches read from it: exact, by number, and damage is refused by name."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_jax import files
from flm_jax.data.batches import StoreBatches, heldout_batches, make_batch
from flm_jax.data.permutation import permute
from flm_jax.data.store import TokenStore
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.vocabulary import ByteVocabulary

CONTEXT = 8


class Wide(ByteVocabulary):
    """Too many ids for 16 bits."""

    def __init__(self):
        super().__init__(extra_ids=2**17)


def write(path, documents, heldout=(b"held out text",), vocabulary=None, **options):
    with StoreWriter(path, vocabulary or ByteVocabulary(), "corpus", {"kind": "test"}, **options) as writer:
        for split, texts in (("train", documents), ("heldout", heldout)):
            for text in texts:
                writer.append(split, np.frombuffer(text, np.uint8).astype(np.int32) + 3, len(text))
        return writer.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, rng.integers(0, 40), np.uint8).tobytes() for _ in range(60)]
    return write(tmp_path_factory.mktemp("a") / "store", texts, texts[:7], max_shard_tokens=100)


@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 2**40))
def test_permutation(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@given(st.integers(1, 2**62), st.data())
def test_permutation_of_any_size_is_one_index_at_a_time(n, data):
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9, unique=True)))
    images = permute(indices, n, 1, 2)
    assert len(set(images.tolist())) == len(indices) and images.min() >= 0 and images.max() < n
    assert [int(permute(np.array([i]), n, 1, 2)[0]) for i in indices] == images.tolist()


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1), (2**32, 0), (2**63, 0)])
def test_orders_differ_between_seeds_and_epochs(seed, epoch):
    one, two = permute(np.arange(1000), 1000, 0, 0), permute(np.arange(1000), 1000, seed, epoch)
    assert np.mean(one == two) < 0.02  # a random pair of orders agrees in one place of a thousand


def test_permutation_looks_random():
    n, runs = 50, 2000
    placed = np.stack([permute(np.arange(n), n, 7, epoch) for epoch in range(runs)])
    counts = np.stack([np.bincount(placed[:, i], minlength=n) for i in range(n)])
    chi2 = ((counts - runs / n) ** 2 / (runs / n)).sum(axis=1) / (n - 1)  # near 1 for each position
    assert chi2.min() > 0.3 and chi2.max() < 2.2
    steps = np.diff(permute(np.arange(10_000), 10_000, 0, 0))
    assert abs(np.mean(np.abs(steps)) - 10_000 / 3) < 150  # neighbours land far from each other


@pytest.mark.parametrize(("index", "n"), [(5, 5), (-1, 5), (0, 0)])
def test_permutation_refuses(index, n):
    with pytest.raises(ValueError, match=r"lie in|possible"):
        permute(np.array([index]), n, 0, 0)


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=30), min_size=1, max_size=12), st.integers(1, 50), st.booleans())
def test_store_gives_back_what_was_written(tmp_path_factory, texts, limit, wide):
    vocabulary = Wide() if wide else ByteVocabulary()
    path = tmp_path_factory.mktemp("s") / "store"
    store = write(path, texts, vocabulary=vocabulary, max_shard_tokens=limit)
    expected = [[byte + 3 for byte in text] + [1] for text in texts]
    flat = [token for document in expected for token in document]
    assert [store.document("train", i).tolist() for i in range(len(texts))] == expected
    assert store.tokens("train", np.arange(len(flat))).tolist() == flat
    shards = list(path.glob("train-*.bin"))
    assert len(shards) == -(-len(flat) // limit)
    assert sum(shard.stat().st_size for shard in shards) == len(flat) * (4 if wide else 2)
    assert store.text_bytes_per_token("train") == sum(map(len, texts)) / len(flat)
    assert store.vocabulary.digest == vocabulary.digest
    for context in range(1, len(flat)):
        number = store.num_windows("train", context)
        windows = store.windows("train", np.arange(number), context)
        assert windows.dtype == np.int32 and windows.shape == (number, context + 1)
        assert windows[:, :-1].ravel().tolist() == flat[: number * context]
        assert windows[:, 1:].ravel().tolist() == flat[1 : number * context + 1]
        assert len(flat) - number * context <= context  # nothing more would fit
        assert store.window("train", number - 1, context).tolist() == windows[-1].tolist()


def test_digest_is_of_the_data_and_not_of_its_place(tmp_path):
    one, two = write(tmp_path / "1", [b"abc"]), write(tmp_path / "2", [b"abc"])
    assert one.digest == two.digest != write(tmp_path / "3", [b"abd"]).digest


def test_store_errors(store, tmp_path):
    with pytest.raises(ValueError, match="no split 'test': it has train, heldout"):
        store.num_tokens("test")
    with pytest.raises(ValueError, match="fewer than context"):
        store.num_windows("train", 10**6)
    with pytest.raises(ValueError, match="context is 0"):
        store.num_windows("train", 0)
    total = store.num_windows("train", CONTEXT)
    for index in (total, -1):
        with pytest.raises(IndexError, match="windows"):
            store.window("train", index, CONTEXT)
    with pytest.raises(IndexError, match="document"):
        store.document("train", 60)
    with pytest.raises(FileNotFoundError, match="no token store at"):
        TokenStore.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no document in its split 'heldout'"):
        write(tmp_path / "x", [b"a"], heldout=())
    with pytest.raises(ValueError, match=r"ids from 3 to 258; the vocabulary has 100"):
        small = ByteVocabulary()
        small.size = 100
        write(tmp_path / "x", [bytes([0, 255])], vocabulary=small)
    assert not list(tmp_path.iterdir())  # neither a store nor a draft of one


FILES = ("store.json", "vocabulary.json", "train.idx", "heldout.idx", "train-00000.bin", "train-00003.bin")
FILES += ("blocks.json", "blocks.crc32")


def read_all(store):
    for split in store.splits:
        for number in range(store.num_documents(split)):
            store.document(split, number)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"}"),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(store, tmp_path, name, damage):
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    assert TokenStore.open(copy).digest == store.digest
    DAMAGE[damage](copy / name)
    if (name, damage) == ("blocks.json", "deleted"):  # as in a store of an earlier version
        assert TokenStore.open(copy, verify=False).digest == store.digest and not (copy / name).exists()
        assert TokenStore.open(copy).digest == store.digest and (copy / name).exists()
        return
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        read_all(TokenStore.open(copy, verify=False))
    if damage != "flipped":  # sizes are looked at before anything is read
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            TokenStore.open(copy)


@pytest.mark.parametrize("place", ["digest", "tokens", "eos_id", "dtype"])
def test_every_entry_of_the_manifest_is_sealed(store, tmp_path, place):
    shutil.copytree(store.path, tmp_path / "copy")
    manifest = tmp_path / "copy" / "store.json"
    manifest.write_text(manifest.read_text().replace(f'"{place}": ', f'"{place}":  1', 1))
    with pytest.raises(ValueError, match=r"store\.json (is damaged|was altered)"):
        TokenStore.open(tmp_path / "copy")


def test_a_killed_writer_leaves_no_store(tmp_path):
    writer = StoreWriter(tmp_path / "store", ByteVocabulary(), "corpus", {})
    writer.append("train", np.arange(3, 50), 47)
    assert not (tmp_path / "store").exists()
    with pytest.raises(FileNotFoundError):
        TokenStore.open(tmp_path / "store")
    assert write(tmp_path / "store", [b"abc"]).num_documents("train") == 1  # and the next is not in its way


def test_the_second_of_two_writers_takes_the_first_ones_store(tmp_path):
    writer = StoreWriter(tmp_path / "store", ByteVocabulary(), "corpus", {"kind": "test"})
    for split in ("train", "heldout"):
        writer.append(split, np.arange(3, 9), 6)
    first = write(tmp_path / "store", [b"abc"])
    assert writer.close().digest == first.digest
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_atomic_write_keeps_the_old_file_on_an_error(tmp_path, monkeypatch):
    files.atomic_write(tmp_path / "a", b"old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def rows(batches):
    return np.concatenate([batch.inputs_BT for batch in batches])


@given(st.lists(st.integers(1, 70), min_size=1, max_size=8), st.integers(0, 200))
def test_batches_depend_on_the_position_alone(store, sizes, start):
    one = StoreBatches(store, "train", CONTEXT, seed=3)
    windows = one.order(np.arange(start + sum(sizes)))
    if start:
        one.next(start)
    again = StoreBatches(store, "train", CONTEXT, seed=3)
    again.restore(one.state())
    expected = store.windows("train", windows[start:], CONTEXT)[:, :-1]
    for reader in (one, again):  # whatever the batch sizes, over epoch borders, resumed or not
        assert np.array_equal(rows([reader.next(size) for size in sizes]), expected)
        assert reader.position == start + sum(sizes)


def test_every_epoch_holds_each_window_once_in_an_order_of_its_own(store):
    total = store.num_windows("train", CONTEXT)
    batches = StoreBatches(store, "train", CONTEXT, seed=0)
    order = batches.order(np.arange(3 * total)).reshape(3, total)
    assert all(np.array_equal(np.sort(epoch), np.arange(total)) for epoch in order)
    assert np.mean(order[0] == order[1]) < 0.1 and np.mean(order[1] == order[2]) < 0.1
    batches.next(total)
    assert batches.epoch == 1


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3))
def test_processes_together_read_what_one_reads(store, processes, skipped):
    one = StoreBatches(store, "train", CONTEXT, seed=1)
    many = [StoreBatches(store, "train", CONTEXT, seed=1) for _ in range(processes)]
    for _ in range(skipped):
        one.next(24)
    for reader in many:
        reader.restore(one.state())  # a position taken by one process serves any number
    shares = [reader.next(12, rows) for reader, rows in zip(many, np.split(np.arange(12), processes), strict=True)]
    whole = one.next(12)
    arrays = zip(*(share[:4] for share in shares), whole[:4], strict=True)
    assert all(np.array_equal(np.concatenate(parts), all_) for *parts, all_ in arrays)
    assert {reader.state() for reader in many} == {one.state()}


def test_any_rows_of_a_batch_are_read_alone(store):
    whole, some = (StoreBatches(store, "train", CONTEXT, seed=1) for _ in range(2))
    for rows in ([0, 1, 2], [3, 9, 10], list(range(12))):
        expected, found = whole.next(12), some.next(12, np.array(rows))
        assert all(np.array_equal(mine, all_[rows]) for mine, all_ in zip(found[:4], expected[:4], strict=True))
        assert some.mark() == whole.mark()
    with pytest.raises(ValueError, match="rows 3 to 12 of a batch of 12 windows"):
        some.next(12, np.array([3, 12]))


def test_batches_refuse(store, tmp_path):
    batches = StoreBatches(store, "train", CONTEXT, 0)
    with pytest.raises(ValueError, match="a batch of 0 windows"):
        batches.next(0)
    other = write(tmp_path / "other", [b"another corpus altogether"])
    for name, theirs in {
        "store": StoreBatches(other, "train", CONTEXT, 0),
        "split": StoreBatches(store, "heldout", CONTEXT, 0),
        "context": StoreBatches(store, "train", CONTEXT + 1, 0),
        "seed": StoreBatches(store, "train", CONTEXT, 1),
    }.items():
        with pytest.raises(ValueError, match=f"taken with {name} = "):
            batches.restore(theirs.state())
    for state in (b"", b"[]", b"{}", b"\xff", batches.state()[:-3]):
        with pytest.raises(ValueError, match="not the state of a data iterator"):
            batches.restore(state)
    broken = json.loads(batches.state())
    broken["position"] = -1
    with pytest.raises(ValueError, match="position is -1"):
        batches.restore(json.dumps(broken).encode())


def test_segments_count_the_documents_that_have_ended():
    batch = make_batch(np.array([[5, 1, 6, 7, 1, 1, 8]], np.int32), eos_id=1, rows=2)
    assert batch.inputs_BT.tolist()[0] == [5, 1, 6, 7, 1, 1]
    assert batch.targets_BT.tolist()[0] == [1, 6, 7, 1, 1, 8]
    assert batch.segments_BT.tolist()[0] == [0, 0, 1, 1, 1, 2]
    assert batch.weights_BT.tolist() == [[1.0] * 6, [0.0] * 6]
    assert [array.dtype for array in batch[:4]] == [np.int32, np.int32, np.float32, np.int32]


@given(st.integers(1, 40), st.integers(1, 9))
def test_heldout_is_spread_over_the_split_and_padded(store, windows, batch_size):
    batches = list(heldout_batches(store, CONTEXT, batch_size, windows))
    total = store.num_windows("heldout", CONTEXT)
    wanted = min(windows, total)
    assert all(len(batch.inputs_BT) == batch_size for batch in batches)
    real = np.concatenate([batch.weights_BT[:, 0] for batch in batches]) == 1
    assert real.sum() == wanted and real[:wanted].all()
    indices = [i * total // wanted for i in range(wanted)]
    assert len(set(indices)) == wanted
    assert np.array_equal(rows(batches)[real], store.windows("heldout", np.array(indices), CONTEXT)[:, :-1])


def test_heldout_refuses_nothing_at_all(store):
    with pytest.raises(ValueError, match="0 held-out windows"):
        heldout_batches(store, CONTEXT, 4, 0)


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    """The first error comes from a write, and closing the file fails again, as what it holds cannot be written."""

    class Full:
        def __init__(self, file):
            self.file, self.name = file, file.name

        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            self.write(b"")

    monkeypatch.setattr(Path, "open", lambda self, mode="r", _open=Path.open: Full(_open(self, mode)))
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/\.store\.\w+\.tmp/train-00000.bin'"),
        StoreWriter(tmp_path / "cache" / "store", ByteVocabulary(), "digest", {}) as writer,
    ):
        writer.append("train", np.arange(9), 9)
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_killed_preparation_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    left = tmp_path / ".store.00000000.tmp"
    left.mkdir()
    (left / "train-00000.bin").write_bytes(b"x" * 100)
    with StoreWriter(tmp_path / "store", ByteVocabulary(), "digest", {}) as first:
        assert not left.exists()
        with StoreWriter(tmp_path / "store", ByteVocabulary(), "digest", {}) as second:
            assert first._draft.exists() and second._draft.exists()
            second.abandon()
        first.abandon()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_truncated_while_it_is_read_is_named(tmp_path):
    """Reading a map beyond the end of its file would end the program by SIGBUS."""
    with StoreWriter(tmp_path / "store", ByteVocabulary(), "digest", {}) as writer:
        for split in ("train", "heldout"):
            writer.append(split, np.arange(3, 200), 197)
        store = writer.close()
    assert store.tokens("train", np.arange(3)).tolist() == [3, 4, 5]
    file = tmp_path / "store" / "train-00000.bin"
    os.truncate(file, 0)
    with pytest.raises(ValueError, match=rf"{file} had 396 bytes when it was opened and has 0 now"):
        store.tokens("train", np.arange(3))


@pytest.mark.parametrize(
    ("weighted", "weights", "message"),
    [
        (True, [1, 0], "must have a weight of 0 or 1 for each of its 3 tokens"),
        (True, [0, 1, 2], "must have a weight of 0 or 1"),
        (False, [0, 1, 1], "has weights, and the store was begun without"),
    ],
)
def test_weights_are_those_of_the_tokens(tmp_path, weighted, weights, message):
    with StoreWriter(tmp_path / "store", ByteVocabulary(), "digest", {}, weighted=weighted) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append("train", np.array([5, 6, 7]), 3, np.array(weights))
        writer.abandon()
