"""Digests of corpora, remembered by the state of their files: a start need not read texts that have not changed.

A digest names the token store of a corpus, and finding it takes reading every text. What is remembered is the digest,
under the size, the times of change and the inode of every file, as git does for the files of a checkout. A file whose
content changes gets another time, unless that happens within the resolution of the file system's clock. Therefore
nothing is remembered of files that changed less than SETTLED seconds before they were read.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from flm_jax.data.corpora import Corpus, Jsonl, Parquet, Records, TextFolder
from flm_jax.data.mixture import Mixture
from flm_jax.files import atomic_write, sha256_json
from flm_jax.records.foreign_json import field, parse_json

# In a folder of this name in DataConfig.cache_dir.
FOLDER = "digests"
# Part of what a digest is remembered under: increase it when the digest of the same texts becomes another one.
FORMAT = 1
# Seconds; also how far the clock of a file server may be behind.
SETTLED = 60
# No subclasses: they may read more than these files.
_KINDS = (TextFolder, Jsonl, Parquet, Records)


def _paths(corpus: Corpus) -> Iterator[Path]:
    """The files that a corpus of _KINDS reads."""
    if isinstance(corpus, TextFolder):
        yield from corpus.paths()
    elif isinstance(corpus, Jsonl | Parquet | Records):
        yield from (path for _, path in corpus.files())


class Known:
    """The digest of a corpus as it was when its files were last read, if they have not changed since.

    Attributes:
      digest: remembered; None: it must be computed.
    """

    def __init__(self, corpus: Corpus, cache_dir: str | Path) -> None:
        """Looks at the files of the corpus, without reading them.

        Raises:
          FileNotFoundError: as the corpus raises it where there are none.
        """
        self._corpus, self._cache, self._began = corpus, Path(cache_dir).expanduser(), time.time()
        self._state, self._changed = self._look()
        self.digest = None if self._state is None else self._remembered(self._state)

    def keep(self, digest: str) -> str:
        """Remembers the digest that was computed since; returns it.

        Nothing is remembered if a file has changed meanwhile or shortly before, or the cache cannot be written.
        """
        settled = self._changed < self._began - SETTLED
        if self._state is not None and settled and self._look()[0] == self._state:
            content = {"files": self._state, "digest": digest}
            with contextlib.suppress(OSError):  # the next start reads the texts again
                atomic_write(self._path(self._state), _sealed(content))
        return digest

    def _path(self, state: str) -> Path:
        return self._cache / FOLDER / f"{state[:32]}.json"

    def _remembered(self, state: str) -> str | None:
        try:
            raw = self._path(state).read_bytes()
            found = parse_json(raw, "it")
            content = {"files": field(found, "files", str, "it"), "digest": field(found, "digest", str, "it")}
        except (OSError, ValueError):
            return None
        return content["digest"] if content["files"] == state and raw == _sealed(content) else None

    def _look(self) -> tuple[str | None, float]:
        """A digest of the files' states, None if the corpus has no such files; and when the last of them changed."""
        if type(self._corpus) not in _KINDS:
            return None, 0.0
        states, changed = [], 0.0
        for path in _paths(self._corpus):
            found = path.stat()
            # ctime also changes where a program gives a file its old mtime back, as rsync and cp -p do.
            states.append([str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino])
            changed = max(changed, found.st_mtime, found.st_ctime)
        return sha256_json([FORMAT, self._corpus.describe(), states]), changed


def _sealed(content: dict[str, str]) -> bytes:
    seal = sha256_json(content)
    return (f'{{"files": "{content["files"]}", "digest": "{content["digest"]}", "seal": "{seal}"}}\n').encode()


def digest_of(corpus: Corpus, cache_dir: str | Path) -> str:
    """`corpus.digest()`, without reading texts that are as they were when it was last computed.

    Args:
      corpus: any; the texts of some kinds, and of a mixture's sources of other kinds, are always read.
      cache_dir: as `DataConfig.cache_dir`.

    Raises:
      ValueError, FileNotFoundError: as `corpus.digest`.
    """
    if isinstance(corpus, Mixture):
        return corpus.digest(lambda source: digest_of(source, cache_dir))
    known = Known(corpus, cache_dir)
    return known.digest or known.keep(corpus.digest())


def forget(cache_dir: str | Path) -> None:
    """Forgets every digest: the next start reads all texts."""
    shutil.rmtree(Path(cache_dir).expanduser() / FOLDER, ignore_errors=True)
