"""Texts to prepare, with planted duplicates; and a corpus that kills the process that reads it."""

import dataclasses
import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np

from flm_jax.data.text import FileCorpus, Percent

SMALL = 700  # bytes of a part
WORDS = np.random.default_rng(0).integers(0, 10_000, (60, 40))
TEXTS = [f"document {i}\r\n é\u2028 " + " ".join(map(str, words)) for i, words in enumerate(WORDS)]
# Equal to an earlier text; nearly equal to one; equal to the near one; unlike all.
PLANTED = [TEXTS[3], TEXTS[7] + " and three words more", TEXTS[7] + " and three words more", "short", TEXTS[3].upper()]


def sums(folder):
    """The sha256 of each file of a store."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def write_lines(path, texts, opened=open):
    with opened(path, "wt", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"text": text}, ensure_ascii=number % 2 == 0) + "\n" * (1 + number % 3))


@dataclasses.dataclass(frozen=True)
class Deadly(FileCorpus):
    """A folder of texts, of which one kills the process that reads it, `times` times, once the corpus is armed.

    Each time leaves a file. The process that armed it lives.
    """

    path: str
    times: int = 0
    heldout_percent: Percent = 20.0

    def listed(self):
        return [(path.name, path) for path in sorted(Path(self.path).glob("*.txt"))]

    def contents(self):
        return ((name, path, path.read_bytes()) for name, path in self.listed())

    def content(self, path):
        armed = Path(self.path) / "armed"
        if path.name == "030.txt" and armed.exists() and armed.read_text() != str(os.getpid()):
            deaths = len(list(Path(self.path).glob("death*")))
            if deaths < self.times:
                (Path(self.path) / f"death{deaths}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return path.read_bytes()


def deadly(tmp_path, times):
    root = tmp_path / "deadly"
    root.mkdir()
    for number, text in enumerate(TEXTS):
        (root / f"{number:03}.txt").write_bytes(text.encode())
    return Deadly(str(root), times)


def arm(corpus):
    (Path(corpus.path) / "armed").write_text(str(os.getpid()))
