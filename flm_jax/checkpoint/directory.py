"""A directory of checkpoint steps: which steps look complete, and the lock of the one process that may write."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from flm_jax.checkpoint import manifest
from flm_jax.checkpoint.manifest import CheckpointError, read_manifest
from flm_jax.files import fsync
from flm_jax.records import LOCK

STEP = re.compile(r"0|[1-9][0-9]*")
LEFTOVER = re.compile(r"(0|[1-9][0-9]*)\.(partial|deleted)")

_log = logging.getLogger("flm_jax.checkpoint")


class Steps:
    """The steps in one directory.

    Attributes:
      directory: the directory.
      writing: name of the subdirectory that is being written, which `scan` skips; None: nothing is being written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.writing: str | None = None
        self._passed_over: set[tuple[str, str]] = set()

    def clear(self) -> None:
        """Removes what a killed run left unfinished."""
        for entry in sorted(self.directory.iterdir()):
            if LEFTOVER.fullmatch(entry.name) and entry.is_dir():
                _log.warning("%s: removed, a killed run left it unfinished", entry)
                shutil.rmtree(entry)

    def scan(self) -> tuple[list[int], list[int]]:
        """The steps that look complete, and those that do not but are not empty; logs each other entry once."""
        good, bad = [], []
        entries = self.directory.iterdir() if self.directory.is_dir() else ()
        for entry in sorted(entry for entry in entries if entry.is_dir()):
            if entry.name == self.writing:
                continue
            if not STEP.fullmatch(entry.name):
                unfinished = LEFTOVER.fullmatch(entry.name)
                self._pass_over(
                    entry, "a save or deletion did not finish" if unfinished else "its name is not a step number"
                )
            elif not any(entry.iterdir()):
                self._pass_over(entry, "it is empty")
            elif faults := structure_faults(entry):
                bad.append(int(entry.name))
                self._pass_over(entry, faults[0])
            else:
                good.append(int(entry.name))
        return sorted(good), sorted(bad)

    def _pass_over(self, entry: Path, reason: str) -> None:
        if (entry.name, reason) not in self._passed_over:
            self._passed_over.add((entry.name, reason))
            if STEP.fullmatch(entry.name) and (entry / manifest.MANIFEST).exists():
                _log.error("%s is damaged and passed over: %s", entry, reason)
            else:
                _log.warning("%s is passed over: %s", entry, reason)

    def delete(self, steps: Iterable[int]) -> None:
        """Deletes steps; each is renamed first, so that a half-deleted step does not pass for a step."""
        for step in steps:
            doomed = self.directory / f"{step}.deleted"
            (self.directory / str(step)).rename(doomed)
            fsync(self.directory)  # or a machine that fails could come back with the old name and half of the files
            shutil.rmtree(doomed)


def check_path(directory: Path) -> None:
    """Checks that orbax and tensorstore can read back what they write into a directory.

    Raises:
      CheckpointError: its path has characters with which they cannot.
    """
    # Orbax merges what processes have written by a pattern made from the path; a pattern such as `a[1]` does not match
    # itself. tensorstore takes paths as UTF-8.
    shown = str(directory).encode("utf8", "backslashreplace").decode()
    if shown != str(directory) or re.search(r"\[.*\]|\\", shown):
        raise CheckpointError(
            f"{shown}: checkpoints cannot be read back from a path with [...] or \\ in it, or one that is not UTF-8; "
            "use another directory."
        )


def structure_faults(step_dir: Path) -> list[str]:
    """What is missing or has another size in a step's directory, a sentence for each; contents are not read."""
    try:
        return manifest.file_faults(step_dir, read_manifest(step_dir), contents=False)
    except CheckpointError as error:
        return [str(error)]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """A context that holds the writer's lock of a directory, as `take_lock`; nothing is left of one that wrote nothing.

    Where the directory holds the lock alone at the end, the lock is removed, with the folders that were made for it.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    with take_lock(directory) as lock:
        try:
            yield
        finally:
            # Where somebody has removed the folder, or put something there, nothing is to be done.
            with contextlib.suppress(OSError):
                if [entry.name for entry in directory.iterdir()] == [LOCK] and _has_name(lock, directory / LOCK):
                    (directory / LOCK).unlink()  # held: `take_lock` takes none that has lost its name
                    for folder in made:
                        folder.rmdir()


def take_lock(directory: Path) -> IO[str]:
    """Takes the writer's lock of a directory for this process, until the returned file is closed.

    Raises:
      CheckpointError: another process holds it, or checkpoints cannot be read back from there.
    """
    check_path(directory)
    path = directory / LOCK
    while True:
        lock = _opened(path)
        try:
            while not _locked(lock):
                time.sleep(random.uniform(0.001, 0.01))  # so that two who look at each other do not do so for ever
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise CheckpointError(f"{directory} is being written by another run (process {holder})") from error
        # Who held it may have removed it, and a third one made another: the file that has the name is the lock.
        if _has_name(lock, path):
            break
        lock.close()
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def holder(directory: Path) -> str | None:
    """The process that holds the writer's lock of a directory, such as '123 on host'; None if nobody does.

    The shared lock that this takes for a moment keeps no writer away; see `take_lock`.
    """
    with contextlib.suppress(OSError), (directory / LOCK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read().strip() or "unknown"
    return None


def _has_name(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one that a path leads to."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _opened(path: Path) -> IO[str]:
    """The file of a lock, which is made if necessary, as its folder is."""
    for left in range(100, -1, -1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a+")
        except FileNotFoundError:  # who held it may have removed the folder in between
            if not left:
                raise
    raise AssertionError


def _locked(lock: IO[str]) -> bool:
    """Takes a lock for this process alone; False if others only looked at it, by a shared lock, and it may be free.

    Raises:
      OSError: another process has it for itself, or files cannot be locked there.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_UN)
        return False
    return True
