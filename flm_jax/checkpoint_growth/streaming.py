"""Grows a checkpoint that is larger than memory, block by block, from disk to disk.

A block is a run of rows of one layer of one leaf. One pass goes over the leaves: it reads the rows that a block comes
from, grows them (`growth.leaf_map`, the same function that grows whole arrays, so every bit is the same), and writes
the block into the target. On the way it adds up the checksums of what it reads, which must equal the source's, and of
what it writes, which become the target's.

    checkpoints/0_grown/0.growing/         the target until it is complete; then it is renamed to 0
    checkpoints/0_grown/0.growing.jsonl    the journal: blocks on disk and their checksums; a killed growth resumes here

Reading: every byte that something grows from is read once, with two exceptions. Rows that have copies in other blocks
are read for each of these, and layers whose entries are copied into the layer below (aki) are read again for it.
Moments that start at 0 are not read.

Memory: about ten blocks, whatever the model: one that is read ahead, one that is grown and what its computation needs,
and `DEPTH` that are written, each with a buffer. A block is no larger than `chunk_bytes`, or one row if that is larger;
where noise cancels over rows, or a row is the mean of the others, it is a whole layer of the leaf.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import shutil
import threading
import zlib
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.checkpoint import blocks, checksum, manifest
from flm_jax.checkpoint.commit import commit_step, small_files
from flm_jax.checkpoint.directory import locked
from flm_jax.checkpoint.manifest import CheckpointError, DamagedError, Leaf, leaf_paths, read_manifest
from flm_jax.checkpoint_growth.jobs import BlockGroup, BlockProgram, grow_block, jobs
from flm_jax.checkpoint_growth.journal import Journal, Sum
from flm_jax.files import missing_room
from flm_jax.growth.lineage import Lineage
from flm_jax.progress import byte_bar
from flm_jax.records import as_dict
from flm_jax.sharding import make_mesh
from flm_jax.source_checkpoint import SourceCheckpoint, signature_texts
from flm_jax.state import abstract_state

CHUNK_BYTES = 16 << 20
# Blocks that are read, computed or written at the same time.
DEPTH = 2
ZERO = (0, 0)


def unfinished(directory: Path) -> bool:
    """Whether a directory holds nothing but a streamed growth that was not declared finished."""
    found = {path.name for path in directory.iterdir()}
    return found <= {".lock", "0.growing", "0.growing.jsonl"} or "0.growing.jsonl" in found


def finish(directory: Path) -> None:
    """Declares a committed growth finished: deletes the journal, so that there is nothing to resume."""
    (directory / "0.growing.jsonl").unlink(missing_ok=True)


def grow_streamed(
    source: SourceCheckpoint,
    lineage: Lineage,
    directory: Path,
    seed: int,
    meta: Callable[[dict[str, Any]], Mapping[str, Any]],
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Any]:
    """Grows a checkpoint into step 0 of a directory, or resumes such a growth where it was killed.

    Args:
      source: the checkpoint that grows; it is only read.
      lineage: of the grown model.
      directory: of the target's checkpoints.
      seed: for drawn entries.
      meta: from what was verified, which is also returned, to the target's meta.json.
      chunk_bytes: the largest block.

    Returns:
      JSON-able: how many leaves and bytes of the source were read and had the right checksums, and how many of the
      target were written.

    Raises:
      ValueError: `chunk_bytes` is not positive, or this is one of several processes.
      DamagedError: the source is not as it was saved; what was written of the target is deleted.
      CheckpointError: the target cannot be written, and the same call resumes it; or another process is writing it.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} must be positive.")
    if jax.process_count() > 1:
        raise ValueError("A streamed growth runs in one process: start one, or grow in memory in several.")
    return _Pass(source, lineage, directory, seed, chunk_bytes).run(meta)


class _Pass:
    def __init__(
        self, source: SourceCheckpoint, lineage: Lineage, directory: Path, seed: int, chunk_bytes: int
    ) -> None:
        self.source, self.lineage, self.directory = source, lineage, directory
        self.key = jax.random.key(seed)
        self.partial = directory / "0.growing"
        self.arrays = self.partial / "arrays"
        self.journal = Journal(directory / "0.growing.jsonl")
        one, weights = make_mesh(devices=jax.devices()[:1]), not source.trained
        form: dict[str, Any] = {"weights": weights, "optimizer": source.meta.optimizer}
        states = (
            abstract_state(source.lineage, one, **form, train=source.meta.train),
            abstract_state(lineage, one, **form),
        )
        self.jobs, self.kept = jobs(lineage, states, chunk_bytes)
        wanted, self.target = map(leaf_paths, states)
        self.manifest = read_manifest(source.directory)
        manifest.compare(self.manifest.leaves, wanted, where=str(source.directory))
        self.read = {j.source for j in self.jobs if j.source} | {path for path in self.kept.values() if path}
        self.wanted = {path: leaf for path, leaf in wanted.items() if path in self.read}
        layout = [(job.path, job.rows, job.chunks) for job in self.jobs]
        ancestry = source.meta.record()["lineage"]
        identity = [source.digest, ancestry, as_dict(lineage.cfg), as_dict(lineage.growth), seed, layout]
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def run(self, meta: Callable[[dict[str, Any]], Mapping[str, Any]]) -> dict[str, Any]:
        try:
            with locked(self.directory), self._cleared_if_damaged():
                if (self.directory / "0").exists():
                    if self.journal.resume(self.identity):
                        return self._verified()
                    raise ValueError(f"{self.directory} holds another grown checkpoint; take another --workdir.")
                if faults := manifest.file_faults(self.source.directory, self.manifest, contents=True):
                    raise DamagedError("; ".join(faults[:3]))
                held = {path: leaf for path, leaf in self.wanted.items() if 0 not in leaf.shape}
                self.leaves = blocks.open_leaves(self.source.directory / "arrays", held)
                self._check_kept()
                self._open()
                written = self._stream()
                return self._commit(written, meta)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or self.directory} cannot be written: {error.strerror or error}. The same command "
                "goes on where this one stopped."
            ) from error
        finally:
            self.journal.close()

    @contextlib.contextmanager
    def _cleared_if_damaged(self) -> Generator[None, None, None]:
        """A context, entered under the lock, that deletes the target if the source is not as it was saved."""
        try:
            yield
        except DamagedError:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.journal.path.unlink(missing_ok=True)
            raise

    def _check_kept(self) -> None:
        self.values: dict[str, np.ndarray] = {}
        for target, source in self.kept.items():
            like = self.target[target]
            self.values[target] = np.zeros(like.shape, like.dtype) if source is None else self.leaves[source].value()
            if source is not None:
                self._check(source, checksum.of(jnp.asarray(self.values[target])))

    def _check(self, path: str, found: Any) -> None:
        if checksum.digest(found) != self.manifest.leaves[path].checksum:
            raise DamagedError(f"{self.source.directory}: the values of {path} have changed")

    def _open(self) -> None:
        """Resumes what is there, or starts from scratch."""
        if self.journal.resume(self.identity) and (self.arrays / "_METADATA").is_file():
            return
        self.journal.close()
        self.journal.path.unlink(missing_ok=True)
        shutil.rmtree(self.partial, ignore_errors=True)
        self._check_room()
        self.partial.mkdir()
        like = {
            path: jnp.asarray(self.values[path]) if path in self.values else leaf
            for path, leaf in self.target.items()
            if 0 not in leaf.shape
        }
        blocks.write_skeleton(self.arrays, like, {job.path: job.chunks for job in self.jobs})
        self.journal.begin(self.identity)

    def _check_room(self) -> None:
        needed = sum(group.nbytes for job in self.jobs for group in job.groups())
        if missing := missing_room(self.directory, needed):
            raise CheckpointError(f"{missing}, or take a --workdir on another disk; nothing was written.")

    def _stream(self) -> dict[str, Sum]:
        """Grows the block groups that are not on disk yet; returns the checksums of the target's leaves."""
        reads: dict[str, Sum] = collections.defaultdict(lambda: ZERO)
        written: dict[str, Sum] = collections.defaultdict(lambda: ZERO)
        groups = {group.name: group for job in self.jobs for group in job.groups()}
        left = collections.Counter(group.job.path for group in groups.values())
        done = {name: sums for name, sums in self.journal.done.items() if self._is_there(groups.get(name))}
        total, before = (sum(groups[name].nbytes for name in names) for names in (groups, done))
        shown = byte_bar(total, before, "growing")

        def finish(group: BlockGroup, sums: tuple[Sum, Sum]) -> None:
            job = group.job
            written[job.path] = checksum.add(written[job.path], sums[1])
            left[job.path] -= 1
            if job.source is not None:
                reads[job.source] = checksum.add(reads[job.source], sums[0])
                if not left[job.path]:
                    self._check(job.source, reads[job.source])

        with shown:
            for name, sums in done.items():
                finish(groups[name], sums)
            # Closing it ends its threads; that must be done before anything of the target is deleted.
            with contextlib.closing(
                self._grown([group for name, group in groups.items() if name not in done])
            ) as grown:
                for group, sums in grown:
                    self.journal.add(group.name, *sums)
                    finish(group, sums)
                    shown.update(group.nbytes)
        return dict(written)

    def _is_there(self, group: BlockGroup | None) -> bool:
        """Whether the files of a block group in the journal really exist: the machine may have lost power since."""
        if group is None:
            return False
        job = group.job
        size = math.prod(job.chunks) * jnp.dtype(job.leaf_map.dtype).itemsize
        files = [
            file
            for layer in group.layers
            for file, _ in blocks.block_files(
                self.arrays, job.path, job.leaf_map.shape, job.chunks, (layer,) if job.stacked else (), group.start
            )
        ]
        return all(file.is_file() and file.stat().st_size == size for file in files)

    def _grown(self, groups: list[BlockGroup]) -> Generator[tuple[BlockGroup, tuple[Sum, Sum]], None, None]:
        """Reads, grows and writes block groups, all three concurrently; yields those on disk, with their checksums."""
        room = threading.Semaphore(DEPTH)
        pending: collections.deque[tuple[BlockGroup, Any, list[Any]]] = collections.deque()

        def oldest_written() -> tuple[BlockGroup, tuple[Sum, Sum]]:
            group, read, outs = pending.popleft()
            total = ZERO
            for out in outs:
                total = checksum.add(total, out.result())
            return group, (ZERO if read is None else checksum.add(ZERO, np.asarray(read)), total)

        with (
            concurrent.futures.ThreadPoolExecutor(1, "read") as reader,
            concurrent.futures.ThreadPoolExecutor(DEPTH, "write") as writer,
        ):
            reading = collections.deque(reader.submit(self._load, group) for group in groups[:1])
            try:
                for number, group in enumerate(groups):
                    value = reading.popleft().result()
                    if number + 1 < len(groups):
                        reading.append(reader.submit(self._load, groups[number + 1]))
                    read = self._checked(group, value)
                    outs = []
                    for layer in group.layers:
                        room.acquire()
                        block = self._block(group, layer, value)
                        outs.append(writer.submit(self._write, group, layer, block, room))
                        del block
                    del value
                    pending.append((group, read, outs))
                    while len(pending) > DEPTH:
                        yield oldest_written()
                while pending:
                    yield oldest_written()
            finally:
                writer.shutdown(cancel_futures=True)
                reader.shutdown(cancel_futures=True)

    def _load(self, group: BlockGroup) -> Any:
        """What a block group is grown from: (layers, rows, entries of a row), the sources of its rows in order.

        The layers are its old layer and those above it that the leaf map copies from. For an array that is not stacked
        the shape is (rows, entries of a row). Zeros, if the model before growth has no layers.
        """
        job, leaf_map = group.job, group.job.leaf_map
        if job.source is None:
            return None
        if leaf_map.from_nothing:
            count = group.stop - group.start if leaf_map.splits else leaf_map.before[leaf_map.row_dim]
            return jnp.zeros((1, count, math.prod(leaf_map.before[leaf_map.row_dim + 1 :])), leaf_map.dtype)
        leaf, dim = self.leaves[job.source], leaf_map.row_dim
        top = leaf.shape[0] - 1
        layers = [(min(group.old + above, top),) for above in range(1 + leaf_map.layers_above)] if job.stacked else [()]
        if leaf_map.splits:
            source, needed = (v[group.start : group.stop] for v in leaf_map.sources(dim))
        else:
            source, needed = np.arange(leaf.shape[dim]), np.ones(leaf.shape[dim], bool)
        rows = np.unique(source[needed])
        out = np.empty((len(layers), len(rows), *leaf.shape[dim + 1 :]), leaf.dtype)
        breaks = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)] if len(rows) else []
        for at, lead in enumerate(layers):
            for a, b in itertools.pairwise(breaks):
                leaf.read(lead, int(rows[a]), out[at, a:b])
        if len(rows) != len(source) or np.any(rows != source):
            # Rows that need no source may hold any values.
            pick = np.searchsorted(rows, np.where(needed, source, rows[0] if len(rows) else 0))
            out = out[:, pick] if len(rows) else np.zeros((len(layers), len(source), *out.shape[2:]), leaf.dtype)
        flat = out.reshape(*out.shape[:2], -1)
        return jax.device_put(flat if job.stacked else flat[0])

    def _checked(self, group: BlockGroup, value: Any) -> Any:
        """Starts the checksum of what was read, with each row counted in the first block that it is read for."""
        if value is None or group.job.leaf_map.from_nothing:
            return None
        leaf_map, counts = group.job.leaf_map, None
        source = np.arange(value.shape[leaf_map.row_dim])
        if leaf_map.splits:
            every, _ = leaf_map.sources(leaf_map.row_dim)
            first = np.zeros(len(every), bool)
            first[np.unique(every, return_index=True)[1]] = True
            source, counts = every[group.start : group.stop], first[group.start : group.stop]
        if group.job.stacked and len(value) > 1:
            value = value[:1]
        return self._lanes(group, group.old, source, value, counts)

    def _lanes(self, group: BlockGroup, layer: int, rows: np.ndarray, block: Any, counts: Any = None) -> Any:
        """Starts the checksum of a block; blocks of the same number of rows and row length share a program."""
        lead = (np.array([layer], np.uint32),) if group.job.stacked else ()
        counts = np.ones(len(rows), bool) if counts is None else counts
        return checksum.of_block(block, (*lead, rows.astype(np.uint32)), counts)

    def _block(self, group: BlockGroup, layer: int, value: Any) -> Any:
        job, leaf_map = group.job, group.job.leaf_map
        shape = (*(1,) * leaf_map.row_dim, group.stop - group.start, *leaf_map.shape[leaf_map.row_dim + 1 :])
        if value is None:
            return jnp.zeros((*shape[: leaf_map.row_dim + 1], math.prod(shape[leaf_map.row_dim + 1 :])), leaf_map.dtype)
        before = (layer * leaf_map.shape[leaf_map.row_dim] if job.stacked else 0) + group.start
        offset = before * math.prod(leaf_map.shape[leaf_map.row_dim + 1 :])
        words = np.array([offset >> 32, offset % 2**32], np.uint32)
        entries = leaf_map.block(layer, slice(group.start, group.stop))
        key = jax.random.fold_in(self.key, zlib.crc32(job.param.encode()))
        return grow_block(BlockProgram(leaf_map, job.std), shape, value, entries, key, words)

    def _write(self, group: BlockGroup, layer: int, block: Any, room: threading.Semaphore) -> Any:
        """Writes a block and returns its checksum."""
        job = group.job
        try:
            lead = (layer,) if job.stacked else ()
            lanes = self._lanes(group, layer, np.arange(group.start, group.stop), block)
            values = np.asarray(block).reshape(-1, *job.leaf_map.shape[job.leaf_map.row_dim + 1 :])
            blocks.write_block(self.arrays, job.path, job.leaf_map.shape, job.chunks, lead, group.start, values)
            return np.asarray(lanes)
        finally:
            room.release()

    def _commit(
        self, written: Mapping[str, Sum], meta: Callable[[dict[str, Any]], Mapping[str, Any]]
    ) -> dict[str, Any]:
        sums = {path: checksum.digest(written.get(path, ZERO)) for path in self.target}
        sums |= checksum.digests({path: checksum.of(jnp.asarray(v)) for path, v in self.values.items()})
        signatures = signature_texts(self.lineage.cfg)
        leaves = {
            path: Leaf(tuple(leaf.shape), jnp.dtype(leaf.dtype).name, signatures.get(path, ""), sums[path])
            for path, leaf in self.target.items()
        }
        verified = self._verified()
        on_disk = {self.arrays / blocks.key_of(job.path) for job in self.jobs}
        commit_step(self.partial, 0, leaves, small_files(meta(verified), self.source.files_with(None)), on_disk)
        return verified

    def _verified(self) -> dict[str, Any]:
        size = {path: math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for path, leaf in self.wanted.items()}
        return {
            "source": {"leaves": len(size), "bytes": sum(size.values()), "checksums": "equal"},
            "target": {"leaves": len(self.target), "bytes": sum(g.nbytes for job in self.jobs for g in job.groups())},
        }
