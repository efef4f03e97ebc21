"""Checksums of a token store's blocks: it opens at once, and no damaged block is read."""

import hashlib
import json
import os
import pickle
import random
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest

from flm_jax.cli import errors, runs
from flm_jax.data import prepare, store_verify
from flm_jax.data.batches import StoreBatches, read_batch
from flm_jax.data.random_access import StoreWindows
from flm_jax.data.reading import MissingExtraError
from flm_jax.data.source import StoreData, verified_behind
from flm_jax.data.store import TokenStore
from flm_jax.data.store_record import files_of, read_record, render
from flm_jax.data.store_sums import Summing, write_sums
from flm_jax.data.store_verify import verify_store
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.text import TextFolder
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.files import sha256_json
from tests import small

CONTEXT, BLOCK = 16, 256


def write(path, weighted=False, seed=0, documents=90):
    """A store of a few shards of 3,000 tokens, as long for every seed; of weights, with a window per document."""
    rng, lengths = np.random.default_rng(seed), np.random.default_rng(0)
    with StoreWriter(path, ByteVocabulary(), f"corpus {seed}", {"kind": "test"}, 3000, weighted) as writer:
        for number in range(documents):
            ids = rng.integers(3, 259, CONTEXT if weighted else lengths.integers(1, 250)).astype(np.int32)
            weights = rng.integers(0, 2, len(ids)).astype(np.uint8) if weighted else None
            writer.append("heldout" if number % 20 == 0 else "train", ids, len(ids), weights)
        return writer.close()


def resum(path, block=BLOCK):
    """Gives a store blocks so small that its files have many."""
    record, seal = read_record(path)
    sums = {}
    for file in files_of(record):
        summing = Summing(block)
        summing.add((path / file.name).read_bytes())
        sums[file.name] = summing.sums()
    write_sums(path, seal, files_of(record), sums, block)
    return TokenStore.open(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return [resum(write(folder / str(weighted), weighted).path) for weighted in (False, True)]


def read_everything(store):
    """All that training, evaluation and growth read of a store."""
    for split in store.splits:
        read_batch(store, split, np.arange(store.num_windows(split, CONTEXT)), CONTEXT)
        for number in range(store.num_documents(split)):
            store.document(split, number)
        store.weights(split, np.arange(store.num_tokens(split)))
        store.tokens(split, np.arange(store.num_tokens(split)))


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_no_flipped_bit_in_any_file_is_unseen(stores):
    """200 random places; each is found by reading everything, and by the verification of the whole, and named."""
    rng = random.Random(0)
    for number in range(200):
        store = stores[number % 2]
        file = rng.choice(sorted(store.path.iterdir()))
        bit = rng.randrange(8 * file.stat().st_size)
        flip(file, bit)
        with pytest.raises(ValueError, match=file.name):
            read_everything(TokenStore.open(store.path))
        found = verify_store(store.path, progress=False)
        assert not found.ok and any(file.name in problem for problem in found.problems), (file, bit)
        flip(file, bit)
    for store in stores:
        read_everything(TokenStore.open(store.path))
        assert verify_store(store.path, progress=False).ok


def test_a_damaged_block_is_never_read_and_all_others_are(stores, tmp_path):
    whole = stores[0]
    shutil.copytree(whole.path, tmp_path / "copy")
    flip(tmp_path / "copy" / "train-00001.bin", 8 * (3 * BLOCK + 17))
    store = TokenStore.open(tmp_path / "copy")
    first = 3000 + 3 * BLOCK // 2  # token of the block
    said = (
        r"train-00001\.bin, shard 1 of the split 'train', is damaged in bytes 768 to 1,023 \(not the recorded crc32\)"
    )
    read = 0
    for window in range(store.num_windows("train", CONTEXT)):
        start = window * CONTEXT
        if start + CONTEXT + 1 <= first or start >= first + BLOCK // 2:
            assert np.array_equal(store.window("train", window, CONTEXT), whole.window("train", window, CONTEXT))
            read += 1
        else:
            for _ in range(2):  # again too
                with pytest.raises(ValueError, match=said):
                    store.window("train", window, CONTEXT)
            with pytest.raises(ValueError, match=said):
                store.tokens("train", np.array([0, first]))
    assert read > 100


def test_damage_ends_a_program_with_one_sentence(stores, tmp_path, capsys):
    shutil.copytree(stores[0].path, tmp_path / "copy")
    flip(tmp_path / "copy" / "train-00001.bin", 8 * 700)
    batches = StoreBatches(TokenStore.open(tmp_path / "copy"), "train", CONTEXT, seed=0)
    position = None
    with pytest.raises(SystemExit) as ended, errors.started():
        while batches.epoch == 0:
            position = batches.position
            batches.next(8)
    assert ended.value.code == 1 and batches.position == position  # the batch was not given out
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/copy/train-00001.bin, shard 1 of") and said.count("\n") == 1


def test_verify_py_names_every_place(stores, tmp_path, capsys):
    shutil.copytree(stores[0].path, tmp_path / "copy")
    runs.run_verify_store(str(tmp_path / "copy"), str(tmp_path / "a.json"))
    assert (
        "are as they were written." in capsys.readouterr().out and json.loads((tmp_path / "a.json").read_text())["ok"]
    )
    for place in (0, BLOCK, 4 * BLOCK):
        flip(tmp_path / "copy" / "train-00000.bin", 8 * place)
    (tmp_path / "copy" / "train-00002.bin").unlink()
    os.truncate(tmp_path / "copy" / "heldout.idx", 8)
    with pytest.raises(SystemExit) as ended:
        runs.run_verify_store(str(tmp_path / "copy"), str(tmp_path / "a.json"))
    assert ended.value.code == 1
    problems, said = json.loads((tmp_path / "a.json").read_text())["problems"], capsys.readouterr().out
    assert len(problems) == 4 and all(problem in said for problem in problems)
    for part in ("bytes 0 to 511 ", "bytes 1,024 to 1,279 ", "train-00002.bin", "heldout.idx is 8 bytes long"):
        assert part in said
    with pytest.raises(SystemExit):
        runs.run_verify_store(str(tmp_path / "absent"), None)
    assert capsys.readouterr().err.startswith(f"error: there is no token store at {tmp_path}/absent")
    with pytest.raises(SystemExit):
        runs.run_verify_store(str(tmp_path), None)
    assert capsys.readouterr().err.endswith(f"in it are {tmp_path}/copy\n")


def as_of_an_earlier_version(store, path):
    shutil.copytree(store.path, path)
    for name in ("blocks.json", "blocks.crc32"):
        (path / name).unlink()
    return path


def test_a_store_of_an_earlier_version_is_compared_once_and_gets_its_checksums(stores, tmp_path, monkeypatch, caplog):
    path = as_of_an_earlier_version(stores[1], tmp_path / "old")
    assert TokenStore.open(path, verify=False).digest == stores[1].digest
    assert not (path / "blocks.json").exists()
    assert TokenStore.open(path).digest == stores[1].digest
    assert "has no checksums of its blocks: all its" in caplog.text
    monkeypatch.setattr(store_verify, "_compare", lambda *_: pytest.fail("a file was read as a whole"))
    store = TokenStore.open(path)
    read_everything(store)
    flip(path / "train-00000.weights", 5)
    with pytest.raises(ValueError, match=r"train-00000\.weights, the weights of shard 0 of the split 'train', is d"):
        read_everything(TokenStore.open(path))
    (path / "blocks.json").unlink()  # as after a kill between the two files
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"train-00000\.weights was altered"):
        TokenStore.open(path)
    assert not (path / "blocks.json").exists()  # no checksums are made of what was not found right


def test_where_checksums_cannot_be_written_every_start_compares(stores, tmp_path, monkeypatch, caplog):
    path = as_of_an_earlier_version(stores[0], tmp_path / "old")

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store_verify, "write_sums", refuse)
    read_everything(TokenStore.open(path))
    assert "Read-only file system), so every start compares all of it" in caplog.text
    flip(path / "train-00000.bin", 5)
    with pytest.raises(ValueError, match=r"train-00000\.bin was altered"):
        TokenStore.open(path)


def reseal(path, change):
    record = json.loads((path / "store.json").read_text())
    del record["seal"]
    change(record)
    (path / "store.json").write_bytes(render({**record, "seal": sha256_json(record)}))


def test_parts_of_another_store_are_refused(stores, tmp_path):
    other = resum(write(tmp_path / "other", seed=1).path)
    for name, said in {
        "blocks.json": r"blocks\.json belongs to another store than .*: delete blocks\.json",
        "blocks.crc32": r"blocks\.crc32 is damaged in bytes 0 to ",
        "store.json": r"blocks\.json belongs to another store",
        "vocabulary.json": r"vocabulary\.json",
    }.items():
        copy = tmp_path / f"with {name}"
        shutil.copytree(stores[0].path, copy)
        shutil.copy(other.path / name, copy / name)
        if name == "vocabulary.json":  # another one, of the same length
            (copy / name).write_bytes((copy / name).read_bytes().replace(b'"bytes"', b'"bites"'))
        with pytest.raises(ValueError, match=said):
            read_everything(TokenStore.open(copy))
    copy = tmp_path / "seals"
    for seal in (json.loads((other.path / "store.json").read_text())["seal"], None):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(stores[0].path, copy)
        record = json.loads((copy / "store.json").read_text())
        record = {**record, "seal": seal} if seal else {key: record[key] for key in record if key != "seal"}
        (copy / "store.json").write_bytes(render(record))
        with pytest.raises(ValueError, match="seal does not match" if seal else "has no seal"):
            TokenStore.open(copy)


def test_an_empty_shard_holds_nothing_and_a_shard_that_was_emptied_is_refused(stores, tmp_path):
    path = as_of_an_earlier_version(stores[0], tmp_path / "empty")
    (path / "train-x.bin").write_bytes(b"")
    empty = {
        "file": "train-x.bin",
        "tokens": 0,
        "sha256": hashlib.sha256(b"").hexdigest(),
    }
    reseal(path, lambda record: record["splits"]["train"]["shards"].insert(1, empty))
    store, total = TokenStore.open(path), stores[0].num_tokens("train")
    everything = np.arange(total)
    assert np.array_equal(store.tokens("train", everything), stores[0].tokens("train", everything))
    windows = np.arange(store.num_windows("train", CONTEXT))
    assert np.array_equal(store.windows("train", windows, CONTEXT), stores[0].windows("train", windows, CONTEXT))
    os.truncate(path / "train-00001.bin", 0)
    with pytest.raises(ValueError, match=r"train-00001\.bin is 0 bytes long and should be 6,000"):
        TokenStore.open(path)
    reseal(path, lambda record: record["splits"]["train"]["shards"].pop())
    with pytest.raises(ValueError, match="the shards of its split 'train' do not add up to"):
        TokenStore.open(path)


def not_installed():
    raise MissingExtraError("TensorFlow is not needed for files of text, and takes seconds to import")


def test_a_store_under_the_name_of_another_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "load_tensorflow", not_installed)
    corpora = [TextFolder(str(tmp_path / name), heldout_percent=20) for name in "ab"]
    for corpus in corpora:
        for number in range(30):
            file = tmp_path / corpus.path[-1] / f"{number}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{corpus.path} {number}")
    found = prepare.prepare(corpora[0], Bytes(), tmp_path / "cache", progress=False)
    assert prepare.prepare(corpora[0], Bytes(), tmp_path / "cache", progress=False).digest == found.digest
    shutil.copytree(found.path, prepare.store_path(corpora[1], Bytes(), tmp_path / "cache"))
    with pytest.raises(ValueError, match="holds the tokens of another corpus: delete the store and prepare it again"):
        prepare.prepare(corpora[1], Bytes(), tmp_path / "cache", progress=False)


def test_a_store_has_the_digest_that_version_0_1_0_recorded(tmp_path, monkeypatch):
    """Runs refuse other data by it: checksums of blocks, and what else is kept beside the tokens, must not enter it."""
    monkeypatch.setattr(prepare, "load_tensorflow", not_installed)
    small.write_corpus(tmp_path / "corpus")
    store = prepare.prepare(
        TextFolder(str(tmp_path / "corpus")), Bytes(), tmp_path / "cache", progress=False, context=16
    )
    recorded = json.loads((Path(__file__).parent / "golden/run/data.json").read_text())
    assert store.digest == recorded["digest"] and (store.path / "blocks.json").exists()
    (store.path / "blocks.json").unlink()
    assert TokenStore.open(store.path).digest == recorded["digest"]


def wait(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    assert condition()


def test_a_thread_finds_damage_that_no_batch_has_met(stores, tmp_path, capsys):
    path = tmp_path / "copy"
    shutil.copytree(stores[0].path, path)
    with verified_behind(StoreData(TokenStore.open(path), CONTEXT, 0), 1e3):
        time.sleep(0.05)
    assert f"{path}: " in capsys.readouterr().out
    flip(path / "train-00002.bin", 9)
    store = TokenStore.open(path)
    assert store.window("train", 0, CONTEXT).size
    thread = store.verify_behind(1e9)
    wait(lambda: store._found)
    for read in (lambda: store.window("train", 0, CONTEXT), lambda: store.tokens("heldout", np.arange(3))):
        with pytest.raises(ValueError, match=r"train-00002\.bin, shard 2 of .* is damaged in bytes 0 to 255"):
            read()
    assert "so far" in thread.close()
    with pytest.raises(ValueError, match="is damaged"), verified_behind(StoreData(store, CONTEXT, 0), 0):
        pass
    streamed, said = types.SimpleNamespace(stores=()), r"Run\.verify_data is 5, and the data is not in a token store"
    with pytest.raises(ValueError, match=said), verified_behind(streamed, 5):
        pass


def test_threads_of_several_processes_share_the_files_and_keep_to_their_rate(stores):
    processes = [TokenStore.open(stores[0].path) for _ in range(3)]
    threads = [store.verify_behind(1e9, (number, 3)) for number, store in enumerate(processes)]
    wait(lambda: all(thread.done for thread in threads))
    sizes = sum(file.stat().st_size for file in stores[0].path.iterdir() if file.suffix in (".bin", ".idx"))
    assert sum(thread.compared for thread in threads) == sizes
    for name, file in processes[0]._files.items():  # reading need not compare them again
        assert sum(sum(store._files[name]._seen) for store in processes) == file.blocks
    slow = TokenStore.open(stores[0].path).verify_behind(1e4)  # 64 blocks take 1.6 s
    time.sleep(0.1)
    assert slow.compared <= 64 * BLOCK and "so far" in slow.close()


def test_windows_are_a_data_source(stores, tmp_path):
    for store in stores:
        windows = StoreWindows(store, "train", CONTEXT)
        batches = StoreBatches(store, "train", CONTEXT, seed=3)
        order, batch = batches.order(np.arange(len(windows))), batches.next(len(windows))
        copy = pickle.loads(pickle.dumps(windows))  # as in another process
        assert repr(copy) == repr(windows) and len(copy) == len(windows) == store.num_windows("train", CONTEXT)
        for position in range(0, len(windows), 5):
            for source in (windows, copy):
                for name, values in source[order[position]].items():
                    expected = getattr(batch, f"{name}_{'BT'}")[position]
                    assert np.array_equal(values, expected) and values.dtype == expected.dtype
        for index in (-1, len(windows)):
            with pytest.raises(IndexError):
                windows[index]
    with pytest.raises(ValueError, match="fewer than"):
        StoreWindows(stores[0], "heldout", 10**6)
    shutil.copytree(stores[0].path, tmp_path / "store")
    pickled = pickle.dumps(StoreWindows(TokenStore.open(tmp_path / "store"), "train", CONTEXT))
    shutil.rmtree(tmp_path / "store")
    shutil.copytree(stores[1].path, tmp_path / "store")
    with pytest.raises(ValueError, match="holds another token store than the one that was opened there before"):
        pickle.loads(pickled)
