"""Verification of whole token stores: at once, once for a store without checksums of its blocks, or behind a run."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flm_jax.data.left_out import LEFT_OUT, sentence
from flm_jax.data.store_files import CheckedFile
from flm_jax.data.store_record import STORE_FILE, StoreFile, files_of, read_record, size_fault, vocabulary_of
from flm_jax.data.store_sums import BLOCK_BYTES, BlockSums, Summing, blocks_of, damage, read_sums, write_sums
from flm_jax.records import counted, meant_beside
from flm_jax.records.foreign_json import JsonError, check
from flm_jax.records.verification import Verification

_log = logging.getLogger(__name__)

_CHUNK = 1 << 22
# Damage beyond so many places in a file is counted, not listed.
_LISTED = 8


@dataclasses.dataclass(frozen=True)
class StoreReport(Verification):
    """What `verify_store` found.

    Attributes:
      directory: the store's.
      files: how many files were read and compared.
      bytes: their size.
      problems: a sentence per missing file, wrong size or damaged place.
      left_out: what was left out of the corpus because it was faulty, in words; empty: nothing.
    """

    directory: str
    files: int
    bytes: int
    problems: tuple[str, ...]
    left_out: str = ""

    def whole(self) -> str:
        """See Verification."""
        said = f"{counted(self.files, 'file')} and {counted(self.bytes, 'byte')} are as they were written"
        return said + (f". Of its text, {self.left_out}" if self.left_out else "")


def verify_store(path: str | Path, progress: bool = True) -> StoreReport:
    """Reads a whole store and compares it with its sha256 sums, and with the checksums of its blocks if it has them.

    Nothing is written. One core reads about 1 GB/s.

    Args:
      path: the store's folder.
      progress: show a progress bar on a terminal.

    Raises:
      FileNotFoundError: there is no store.
    """
    path = Path(path).expanduser()
    try:
        record, seal = read_record(path)
    except FileNotFoundError as error:
        inside = sorted(str(entry.parent) for entry in path.glob(f"*/{STORE_FILE}"))
        found = f"; in it are {', '.join(inside[:3])}{', ...' * (len(inside) > 3)}" if inside else ""
        near = "" if path.exists() else meant_beside(path)
        raise FileNotFoundError(
            f"{error}; a store is one of the folders in DataConfig.cache_dir, such as textfolder-5f1c{found}{near}"
        ) from None
    except ValueError as error:
        return StoreReport(str(path), 0, 0, (str(error),))
    files, problems, sums = files_of(record), [], None
    try:
        sums = read_sums(path, seal, files)
    except ValueError as error:
        problems.append(str(error))
    everything = [vocabulary_of(record), *files]
    faults = {file.name: size_fault(path, file) for file in everything}
    problems += filter(None, faults.values())
    whole = [file for file in everything if not faults[file.name]]
    with _bar(whole, progress) as bar:
        for file in whole:
            problems += _compare(path, file, sums if file in files else None, bar)[0]
    size = sum(file.size for file in whole)
    return StoreReport(str(path), len(whole), size, tuple(problems), _left_out(record["description"]))


def _left_out(description: dict[str, Any]) -> str:
    try:
        return sentence(check(description[LEFT_OUT], dict, LEFT_OUT)) if LEFT_OUT in description else ""
    except JsonError:  # descriptions are for people: what stands in them is no reason to distrust the store
        return ""


def verify_once(folder: Path, seal: str, files: Sequence[StoreFile]) -> BlockSums | None:
    """Compares a store that has no checksums of its blocks with its sha256 sums, and writes those checksums.

    They are written beside a store that was verified, so that it is read as a whole once and not at every start; what
    they are of is known to be right at that moment, and they are bound to the record by its seal.

    Args:
      folder: the store's.
      seal: of its record.
      files: of `files_of`, of the right sizes.

    Returns:
      The checksums; None if they cannot be written into the folder, which is said.

    Raises:
      ValueError: a file is altered; the message names the first.
    """
    size = sum(file.size for file in files)
    _log.warning(
        "%s has no checksums of its blocks: all its %s are compared with their sha256 sums now, once, and the "
        "checksums written.",
        folder,
        counted(size, "byte"),
    )
    found: dict[str, np.ndarray] = {}
    with _bar(files, size > _CHUNK) as bar:
        for file in files:
            problems, found[file.name] = _compare(folder, file, None, bar)
            if problems:
                raise ValueError(problems[0])
    try:
        write_sums(folder, seal, files, found)
    except OSError as error:
        _log.warning(
            "%s: the checksums of its blocks cannot be written (%s), so every start compares all of it.", folder, error
        )
        return None
    return read_sums(folder, seal, files)


def _bar(files: Sequence[StoreFile], progress: bool) -> Any:
    from tqdm import tqdm

    hidden = None if progress else True  # None: hidden where there is no terminal
    return tqdm(desc="verifying", total=sum(f.size for f in files), unit="B", unit_scale=True, disable=hidden)


def _compare(folder: Path, file: StoreFile, sums: BlockSums | None, bar: Any) -> tuple[list[str], np.ndarray]:
    """What is wrong with a file's content, in sentences, and the checksums of its blocks."""
    block = BLOCK_BYTES if sums is None else sums.block_bytes
    sha256, summing, path = hashlib.sha256(), Summing(block), folder / file.name
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sha256.update(chunk)
            summing.add(chunk)
            bar.update(len(chunk))
    found, problems = summing.sums(), []
    if sums is not None:
        try:
            recorded = sums.of(file.name, 0, blocks_of(file.size, block))
        except ValueError as error:
            problems.append(str(error))
        else:
            if len(found) == len(recorded):
                problems = damage(folder, file, np.flatnonzero(found != recorded), block)
    if len(problems) > _LISTED:
        problems[_LISTED:] = [f"{path} is damaged in {counted(len(problems) - _LISTED, 'more place')}"]
    if not problems and sha256.hexdigest() != file.sha256:
        problems = [f"{path} was altered (its sha256 is not the recorded one): delete the store and prepare it again"]
    return problems, found


class BackgroundVerification:
    """A thread that compares a store's blocks with their checksums, at a limited rate, while others read the store."""

    def __init__(
        self, files: Sequence[CheckedFile], bytes_per_second: float, found: dict[str, str], what: str = ""
    ) -> None:
        """Starts the thread; `close` ends it.

        Args:
          files: the files to read; blocks that were compared already are left out.
          bytes_per_second: the most that is read.
          found: gets the sentence of the first damage, by the key 'damage'.
          what: names the store.
        """
        self.compared, self.done = 0, False
        self._files, self._rate, self._found, self._what = files, bytes_per_second, found, what
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verify data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began, turn = time.monotonic(), 64
        try:
            for file in self._files:
                for first in range(0, file.blocks, turn):
                    self.compared += file.compare(first, first + turn)
                    ahead = self.compared / self._rate - (time.monotonic() - began)
                    if self._stop.wait(max(ahead, 0.0)):
                        return
            self.done = True
        except (ValueError, OSError) as error:
            self._found.setdefault("damage", str(error))

    def close(self) -> str:
        """Ends the thread; returns what it has compared, in a sentence."""
        self._stop.set()
        self._thread.join()
        end = "to the end" if self.done else "so far"
        return f"{self._what}: {self.compared / 1e9:.3g} GB were verified in the background, {end}."
