"""A directory of checkpoints: which steps look whole, and the lock of the one process that may write."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from flm_jax.checkpoint import manifest
from flm_jax.checkpoint.manifest import CheckpointError, read_manifest

LOCK = ".lock"
STEP = re.compile(r"0|[1-9][0-9]*")
LEFTOVER = re.compile(r"(0|[1-9][0-9]*)\.(partial|deleted)")

_log = logging.getLogger("flm_jax.checkpoint")


class Steps:
    """The steps in one directory.

    Attributes:
      directory: where.
      writing: the name of the one that is being written; it is passed over.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.writing: str | None = None
        self._ignored: set[tuple[str, str]] = set()

    def clear(self) -> None:
        """Removes what a killed run left."""
        for entry in sorted(self.directory.iterdir()):
            if LEFTOVER.fullmatch(entry.name) and entry.is_dir():
                _log.warning("%s: removed, a killed run left it unfinished", entry)
                shutil.rmtree(entry)

    def scan(self) -> tuple[list[int], list[int]]:
        """Returns the steps that look whole, and those that do not but hold something."""
        good, bad = [], []
        entries = self.directory.iterdir() if self.directory.is_dir() else ()
        for entry in sorted(entry for entry in entries if entry.is_dir()):
            if entry.name == self.writing:
                continue
            if not STEP.fullmatch(entry.name):
                unfinished = LEFTOVER.fullmatch(entry.name)
                self._ignore(entry, "a save or deletion did not finish" if unfinished else "it is not named for a step")
            elif not any(entry.iterdir()):
                self._ignore(entry, "it is empty")
            elif faults := _structure(entry):
                bad.append(int(entry.name))
                self._ignore(entry, faults[0])
            else:
                good.append(int(entry.name))
        return sorted(good), sorted(bad)

    def _ignore(self, entry: Path, reason: str) -> None:
        if (entry.name, reason) not in self._ignored:
            self._ignored.add((entry.name, reason))
            damaged = STEP.fullmatch(entry.name) and (entry / manifest.MANIFEST).exists()
            _log.log(logging.ERROR if damaged else logging.WARNING, "%s is ignored: %s", entry, reason)

    def delete(self, steps: Iterable[int]) -> None:
        """Deletes steps, each under another name, so that a half-deleted one is none."""
        for step in steps:
            doomed = self.directory / f"{step}.deleted"
            (self.directory / str(step)).rename(doomed)
            shutil.rmtree(doomed)


def _structure(step_dir: Path) -> list[str]:
    try:
        return manifest.file_faults(step_dir, read_manifest(step_dir), contents=False)
    except CheckpointError as error:
        return [str(error)]


def take_lock(directory: Path) -> IO[str]:
    """Takes the lock of a directory for this process, until it is closed.

    Raises:
      CheckpointError: another process has it.
    """
    # Not deleted afterwards: a lock file that comes and goes can be held twice.
    lock = (directory / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise CheckpointError(f"{directory} is being written by another run (process {holder})") from error
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock
