"""A token store of more than 10^12 tokens, in sparse files: it opens within a second, and is read beyond 2^40 bytes."""

import collections
import functools
import hashlib
import pickle
import shutil
import time

import numpy as np
import pytest

from flm_jax.data import store_verify
from flm_jax.data.batches import StoreBatches
from flm_jax.data.permutation import permute
from flm_jax.data.random_access import StoreWindows
from flm_jax.data.store import TokenStore
from flm_jax.data.store_record import files_of, render
from flm_jax.data.store_sums import Summing, write_sums
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.data.vocabulary_files import spec_bytes
from flm_jax.files import sha256_json

CONTEXT, BLOCK = 4096, 1 << 20
# Tokens of the first shard, of each other one (as they are written by default), and how many these are.
LARGE, SHARD, SHARDS = 2**33, 2**27, 7500
TOTAL = LARGE + SHARD * SHARDS
# Where documents begin: beyond 2^32 within a file, across the border of two shards, beyond 2^40 bytes, near the end.
PLACES = (0, 2**32 + 12345, LARGE - 5, 2**39 + 2**20 + 7, TOTAL - 50)


def text(place):
    """The first tokens of a document; zeros follow."""
    return np.arange(50, dtype="<u2") + place % 97 + 3


def placed(position):
    """The number of the shard of a token, and its place there."""
    if position < LARGE:
        return 0, position
    return 1 + (position - LARGE) // SHARD, (position - LARGE) % SHARD


def crc32_of(content):
    summing = Summing(BLOCK)
    summing.add(content)
    return summing.sums()


@functools.cache
def zeros(size):
    """The checksums of the blocks of a file of zeros; each different block is computed once."""
    full, rest = divmod(size, BLOCK)
    return np.concatenate([np.repeat(crc32_of(bytes(BLOCK if full else 0)), full), crc32_of(bytes(rest))])


def sums_of(path, size, blocks):
    """The checksums of a file's blocks, of which only the given ones are not zero."""
    found = zeros(size).copy()
    for block in blocks:
        with path.open("rb") as file:
            file.seek(block * BLOCK)
            found[block] = crc32_of(file.read(BLOCK))[0]
    return found


def check_sparse(folder):
    """Skips the tests where files take the disk that they are long."""
    probe = folder / "probe"
    try:
        for size in (2**26, 2 * LARGE):
            with probe.open("wb") as file:
                file.truncate(size)
            if probe.stat().st_blocks > 2**12:
                pytest.skip("this file system has no sparse files, and a store of 2 TB does not fit")
    except OSError as error:
        pytest.skip(f"this file system has no files of {2 * LARGE / 1e9:.0f} GB: {error}")
    finally:
        probe.unlink()


def split_record(path, split, tokens, starts):
    """Writes a split's index and makes its sparse shards; returns its record."""
    index = np.array([*starts, sum(tokens)], "<u8").tobytes()
    (path / f"{split}.idx").write_bytes(index)
    shards = [{"file": f"{split}-{n:05d}.bin", "tokens": count, "sha256": "0" * 64} for n, count in enumerate(tokens)]
    for shard in shards:
        with (path / shard["file"]).open("wb") as file:
            file.truncate(2 * shard["tokens"])
    counts = {"documents": len(starts), "tokens": sum(tokens), "text_bytes": sum(tokens)}
    return {**counts, "index_sha256": hashlib.sha256(index).hexdigest(), "shards": shards}


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    path = tmp_path_factory.mktemp("huge") / "store"
    path.mkdir()
    check_sparse(path.parent)
    try:
        train = split_record(path, "train", [LARGE] + [SHARD] * SHARDS, PLACES)
        heldout = split_record(path, "heldout", [CONTEXT + 1], [0])
        written = collections.defaultdict(set)
        for place in PLACES:
            for number, token in enumerate(text(place)):
                shard, at = placed(place + number)
                name = train["shards"][shard]["file"]
                with (path / name).open("r+b") as file:
                    file.seek(2 * at)
                    file.write(token.tobytes())
                written[name].add(2 * at // BLOCK)
        written |= {f"{split}.idx": {0} for split in ("train", "heldout")}
        spec, vocabulary = spec_bytes(ByteVocabulary()), ByteVocabulary()
        (path / "vocabulary.json").write_bytes(spec)
        about = {"kind": vocabulary.kind, "size": vocabulary.size, "eos_id": 1, "digest": vocabulary.digest}
        record = {"format": 1, "dtype": "<u2", "vocabulary": about, "corpus": "zeros", "description": {}}
        record |= {"vocabulary_file": [len(spec), hashlib.sha256(spec).hexdigest()]}
        record |= {"splits": {"train": train, "heldout": heldout}}
        (path / "store.json").write_bytes(render({**record, "seal": sha256_json(record)}))
        files = files_of(record)
        sums = {file.name: sums_of(path / file.name, file.size, written.get(file.name, ())) for file in files}
        write_sums(path, sha256_json(record), files, sums, BLOCK)
        yield path
    finally:
        shutil.rmtree(path)


def test_it_opens_within_a_second_of_processor_time(huge, monkeypatch):
    monkeypatch.setattr(store_verify, "_compare", lambda *_: pytest.fail("a file was read as a whole"))
    assert TOTAL > 10**12 and len(list(huge.iterdir())) > SHARDS
    began = time.process_time()
    store = TokenStore.open(huge)
    assert store.num_tokens("train") == TOTAL and store.digest
    windows = StoreBatches(store, "train", CONTEXT, seed=0)
    windows.next(1)
    assert time.process_time() - began < 1
    assert sum(file._mapped is not None for file in store._files.values()) <= 2  # no other file was opened


def test_it_is_read_beyond_32_and_40_bits(huge):
    store = TokenStore.open(huge)
    positions = np.array(PLACES)[:, None] + np.arange(50)
    assert np.array_equal(store.tokens("train", positions), [text(place) for place in PLACES])
    assert store.document_numbers("train", positions[1:, 0] - 1).tolist() == [0, 1, 2, 3]
    assert store.document("train", len(PLACES) - 1).tolist() == text(PLACES[-1]).tolist()
    for place in PLACES[:-1]:  # what is left behind the last window is in none
        window = place // CONTEXT
        found = store.window("train", window, CONTEXT)
        assert np.array_equal(found, store.tokens("train", window * CONTEXT + np.arange(CONTEXT + 1)))
        assert found.any()
    with pytest.raises(IndexError):
        store.tokens("train", np.array([TOTAL]))


def test_batches_resume_and_permute_there(huge):
    store = TokenStore.open(huge)
    total = store.num_windows("train", CONTEXT)
    batches, again = (StoreBatches(store, "train", CONTEXT, seed=5) for _ in range(2))
    batches.position = total - 3  # the last three windows of an epoch, and the first of the next
    again.restore(batches.state())
    order = again.order(total - 3 + np.arange(6))
    assert order.tolist() == [
        *permute(np.arange(total - 3, total), total, 5, 0).tolist(),
        *permute(np.arange(3), total, 5, 1).tolist(),
    ]
    assert order.max() * CONTEXT > 2**37 and (again.epoch, len(set(order.tolist()))) == (0, 6)
    batch = again.next(6)
    assert np.array_equal(batch.inputs_BT, store.windows("train", order, CONTEXT)[:, :-1])
    assert again.position == total + 3 and again.epoch == 1
    place = PLACES[3] // CONTEXT
    assert pickle.loads(pickle.dumps(StoreWindows(store, "train", CONTEXT)))[place]["inputs"].any()


def test_damage_beyond_40_bits_is_named(huge):
    store, place = TokenStore.open(huge), PLACES[3] + 2**22
    shard, at = placed(place)
    file = huge / f"train-{shard:05d}.bin"
    with file.open("r+b") as content:
        content.seek(2 * at)
        content.write(b"\1")
    first = 2 * at // BLOCK * BLOCK
    said = f"{file.name}, shard {shard} of .* in bytes {first:,} to {first + BLOCK - 1:,} "
    with pytest.raises(ValueError, match=said):
        store.window("train", place // CONTEXT, CONTEXT)
    with file.open("r+b") as content:
        content.seek(2 * at)
        content.write(b"\0")
    assert not store.window("train", place // CONTEXT, CONTEXT).any()
