"""The checkpoint manager: saves, restores and prunes the steps in one directory, through orbax.

A step is written as `100.partial` and renamed to `100` once every byte of it is on disk, so a step that has its name is
complete; a step that is deleted is first renamed to `100.deleted`. This module also makes up for four gaps of orbax: it
checks no values, takes any directory with a number for a name as a step, restores into other shapes and dtypes unless
it is told the right ones, and continues after a save has failed.

Several processes write one checkpoint together, on a file system that all of them see. Process 0 writes
everything but the arrays, holds the lock, commits, deletes, and decides which step is restored. All processes must call
each method that writes or restores; an error in one of them is raised in all.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import operator
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import jax
import orbax.checkpoint as ocp

from flm_jax import distributed
from flm_jax.checkpoint import checksum, manifest, orbax_io
from flm_jax.checkpoint.blocks import open_leaves
from flm_jax.checkpoint.commit import commit_step, small_files
from flm_jax.checkpoint.directory import Steps, take_lock
from flm_jax.checkpoint.manifest import (
    ARRAYS,
    BLOB,
    CheckpointError,
    DamagedError,
    Leaf,
    NoCheckpointError,
    PyTree,
    leaf_paths,
    read_blobs,
    read_manifest,
    read_meta,
)
from flm_jax.records import LOCK, counted

_log = logging.getLogger("flm_jax.checkpoint")

# How long a shared file system may take to show one machine what another has just written.
_SHOWN_WITHIN_S = 60.0


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint; `state` has the requested structure, shapes, dtypes and shardings."""

    step: int
    state: PyTree
    meta: Mapping[str, Any]
    blobs: Mapping[str, bytes]


class Checkpoints:
    """The checkpoints in one directory; a context manager.

    Only one writer at a time may have a directory open; any number of readers may (`read_only`).
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int = 2,
        keep_steps: Collection[int] = (),
        *,
        read_only: bool = False,
    ) -> None:
        """Opens a directory; a writer makes it, locks it and removes what a killed run left unfinished.

        Args:
          directory: holds the steps, on a POSIX file system.
          keep: how many of the newest steps are kept.
          keep_steps: steps that are kept in addition.
          read_only: takes no lock and changes nothing.

        Raises:
          CheckpointError: another writer has the directory open, or not all processes see it.
          ValueError: `keep` is not positive.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}: the newest checkpoint is never deleted")
        self.directory = Path(directory).absolute()
        self._keep, self._keep_steps = keep, frozenset(keep_steps)
        # Steps that are kept as well, until others are named.
        self.kept_for_now: Collection[int] = ()
        self._primary = distributed.is_primary()
        self._read_only = read_only
        self._lock: IO[str] | None = None
        self._pending: concurrent.futures.Future[None] | None = None
        self._steps = Steps(self.directory)
        self._refused: set[int] = set()  # steps that were found damaged when their values were read
        if not read_only:
            self._open()
        # Weights hardly compress; without compression a save takes half the time.
        self._reader = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
        # Told which processes take part, orbax waits for them through the coordination service, five minutes at most;
        # otherwise it waits on the devices, without limit. Its handler alone, used for reading, does not wait at all:
        # `_together` does so here, and learns of failures.
        everyone = set(range(jax.process_count())) if jax.process_count() > 1 else None
        processes = ocp.options.MultiprocessingOptions(
            active_processes=everyone, barrier_sync_key_prefix=f"flm_jax_{self.directory.name}" if everyone else None
        )
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(
                use_ocdbt=True,
                use_compression=False,
                multiprocessing_options=processes,
                type_handler_registry=orbax_io.handlers(),
            ),
            multiprocessing_options=processes,
        )
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def _open(self) -> None:
        with self._together("open"):
            if self._primary:
                self._lock = take_lock(self.directory)
                self._steps.clear()
        lock = self.directory / LOCK
        written = distributed.from_primary("lock", lock.read_text)
        with self._together("see"):
            deadline = time.monotonic() + _SHOWN_WITHIN_S
            while not (lock.is_file() and lock.read_text() == written):
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{self.directory} is not the directory that process 0 has made: checkpoints need a file "
                        "system that all processes share"
                    )
                time.sleep(0.1)

    def _together(self, what: str) -> contextlib.AbstractContextManager[None]:
        return distributed.together(f"{what} {self.directory.name}", CheckpointError, DamagedError, NoCheckpointError)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        meta: Mapping[str, Any],
        signatures: Mapping[str, str] | None = None,
        blobs: Mapping[str, bytes] | None = None,
    ) -> None:
        """Saves a state; returns once it is copied off the devices, so that the next step may donate it.

        Waits for the save before it. An error that occurs later is raised by `check`, `wait`, `close` or the next
        `save`, whichever comes first.

        Args:
          step: must be greater than every step that can be restored.
          state: a pytree of arrays.
          meta: anything that JSON can hold; tuples are restored as lists.
          signatures: by leaf path, recorded in the manifest.
          blobs: contents of small files, by plain file name.

        Raises:
          CheckpointError: this save cannot start, or the one before it failed.
          TypeError: `meta` cannot be written as JSON.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened read_only")
        self.wait()
        step = operator.index(step)
        with self._together("save"):
            newest = max(self._trusted(), default=-1) if self._primary else -1
            if step <= newest:
                raise CheckpointError(f"{self.directory}: step {step} cannot be saved, step {newest} is already there")
        leaves = {path: orbax_io.as_array(path, leaf) for path, leaf in leaf_paths(state).items()}
        signatures, blobs = dict(signatures or {}), dict(blobs or {})
        if not leaves:
            raise CheckpointError(f"{self.directory}: step {step} cannot be saved, the state has no arrays")
        if unknown := sorted(signatures.keys() - leaves.keys()):
            raise CheckpointError(f"signatures are given for leaves that the state does not have: {unknown}")
        if wrong := sorted(name for name in blobs if not BLOB.fullmatch(name)):
            raise CheckpointError(f"blobs need plain file names, not {wrong}")
        files = small_files(meta, blobs)
        described = {
            path: Leaf(tuple(leaf.shape), leaf.dtype.name, signatures.get(path, ""), "")
            for path, leaf in leaves.items()
        }
        self._steps.writing = f"{step}.partial"
        partial = self.directory / self._steps.writing
        try:
            with self._together("save"):
                if self._primary:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
            # These copies to the host are intended; a train loop may forbid those that are not.
            with self._together("save"), jax.transfer_guard("allow"):
                lanes = {path: checksum.of(leaf) for path, leaf in leaves.items()}
                # Orbax refuses arrays without elements; the manifest keeps their shape and dtype.
                nested = orbax_io.nest({path: leaf for path, leaf in leaves.items() if leaf.size})
                if nested:
                    self._orbax.save(partial / ARRAYS, args=ocp.args.PyTreeSave(nested))
        except Exception as error:
            self._abandon(partial)
            raise CheckpointError(f"{self.directory}: saving step {step} failed: {error}") from error
        self._pending = self._worker.submit(self._finish, step, described, lanes, files)

    def failed(self) -> bool:
        """Whether `check` would raise; does not wait."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def check(self) -> None:
        """Raises the error of a save that failed in the background, once; does not wait.

        Raises:
          CheckpointError: the save failed, and its step does not exist.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is committed.

        Raises:
          CheckpointError: the save failed, and its step does not exist.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last save and releases the lock. May be called twice.

        Raises:
          CheckpointError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def steps(self) -> list[int]:
        """The steps whose files are all complete, oldest first; logs each other entry once."""
        return self._steps.scan()[0]

    def restore(self, abstract: PyTree, step: int | str | None = None, *, partial: bool = False) -> Restored:
        """Restores a checkpoint onto any mesh, and checks every bit of it.

        Args:
          abstract: the requested structure, of `jax.ShapeDtypeStruct`; an array without a sharding goes to the default
            device.
          step: which one, or the name of a directory that a step was copied to; None: the newest undamaged one, and
            each newer, damaged step is logged as an error.
          partial: the checkpoint may hold more leaves than are requested; only the requested ones are read.

        Returns:
          The state, and the meta and blobs that were saved with it.

        Raises:
          NoCheckpointError: there is no such step; if step is None, there is nothing that could be one.
          DamagedError: the step is damaged; if step is None, every step is. The message names the file or leaf.
          CheckpointError: leaves, shapes or dtypes do not fit: the message names each leaf and both shapes.
        """
        self.wait()
        wanted = {path: orbax_io.target(path, leaf) for path, leaf in leaf_paths(abstract).items()}
        if step is not None:
            name = step if isinstance(step, str) else str(operator.index(step))
            return self._restore(abstract, wanted, name, partial)
        good, bad = distributed.from_primary("scan", self._steps.scan)
        for candidate in reversed(good):
            try:
                return self._restore(abstract, wanted, str(candidate), partial)
            except DamagedError as error:
                self._refused.add(candidate)
                bad.append(candidate)
                if self._primary:
                    _log.error("%s: step %d is REFUSED, using an older one: %s", self.directory, candidate, error)
        if bad:
            raise DamagedError(f"{self.directory}: no step can be restored, these are damaged: {sorted(bad)}")
        raise NoCheckpointError(f"{self.directory} holds no checkpoint")

    def discard_after(self, step: int) -> None:
        """Deletes every step after this one: after a rewind they no longer belong to the run.

        Raises:
          CheckpointError: the directory was opened read_only, or the last save failed.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened read_only")
        self.wait()
        with self._together("discard"):
            if self._primary:
                self._steps.delete(newer for newer in self.steps() if newer > step)

    def _trusted(self) -> list[int]:
        return [step for step in self.steps() if step not in self._refused]

    def _finish(
        self,
        step: int,
        leaves: Mapping[str, Leaf],
        lanes: Mapping[str, jax.Array],
        files: Mapping[str, bytes],
    ) -> None:
        """Runs on the worker thread: waits for orbax, writes the other files, and commits the step."""
        partial = self.directory / f"{step}.partial"
        try:
            with self._together("written"):
                self._orbax.wait_until_finished()
            with self._together("commit"):
                if self._primary:
                    sums = checksum.digests(lanes)
                    leaves = {path: dataclasses.replace(leaf, checksum=sums[path]) for path, leaf in leaves.items()}
                    # A step is not committed unless its arrays are found where a reader looks for them.
                    open_leaves(partial / ARRAYS, {path: leaf for path, leaf in leaves.items() if 0 not in leaf.shape})
                    commit_step(partial, step, leaves, files)
                    self._refused.discard(step)
        except BaseException as error:
            self._abandon(partial)
            raise CheckpointError(f"{self.directory}: saving step {step} failed: {error}") from error
        self._steps.writing = None
        if self._primary:
            self._prune()

    def _abandon(self, partial: Path) -> None:
        # On a full disk, the parts of an unfinished step would keep it full.
        if self._primary:
            shutil.rmtree(partial, ignore_errors=True)
        self._steps.writing = None

    def _prune(self) -> None:
        try:
            trusted = self._trusted()
            kept = self._keep_steps.union(self.kept_for_now)
            self._steps.delete(step for step in trusted[: -self._keep] if step not in kept)
        except OSError as error:  # the save itself has succeeded
            _log.warning("%s: old checkpoints could not be deleted: %s", self.directory, error)

    def _restore(
        self, abstract: PyTree, wanted: Mapping[str, jax.ShapeDtypeStruct], name: str, partial: bool
    ) -> Restored:
        step_dir = self.directory / name
        with self._together("manifest"):
            if not step_dir.is_dir():
                raise NoCheckpointError(f"{self.directory} holds no step {name}, it holds {self.steps()}")
            saved = read_manifest(step_dir)
            manifest.compare(saved.leaves, wanted, where=str(step_dir), partial=partial)
            # Files need to be checked by one process only; each process checks its own part of the values below.
            if self._primary and (faults := manifest.file_faults(step_dir, saved, contents=True)):
                raise DamagedError("; ".join(faults[:3]))
        with self._together("read"):
            arrays = orbax_io.read(self._reader, step_dir, saved, wanted)
        if wrong := orbax_io.wrong_leaves(saved, arrays):
            raise DamagedError(
                f"{step_dir}: the values of {', '.join(wrong[:3])} "
                f"({counted(len(wrong), 'leaf', 'leaves')}) have changed"
            )
        state = jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in wanted])
        with self._together("rest"):
            meta, blobs = read_meta(step_dir, saved), read_blobs(step_dir, saved)
        return Restored(saved.step, state, meta, blobs)
