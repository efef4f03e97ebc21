"""Texts to prepare, with planted duplicates or faulty lines; a corpus that kills its reader; a runner that stops."""

import dataclasses
import gzip
import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np

from flm_jax.data.corpora import FileCorpus, Jsonl, TextFolder
from flm_jax.data.text import Percent
from flm_jax.data.workers import Workers

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


class Stopped:
    """A runner of one process that stops, as if by Ctrl-C, after some parts of a step."""

    part_bytes = SMALL
    here = Workers(1, SMALL)

    def __init__(self, after):
        self.after, self.done = after, 0

    def run(self, function, parts, done):
        for part in parts:
            if self.done == self.after:
                raise KeyboardInterrupt
            done(function(part))
            self.done += 1


# Lines that hold no document, each with the kind of its fault.
FAULTY = {
    b"not json": "a broken line",
    b'{"text": "caf\xe9"}': "a broken line",
    b"\0\0\0\0": "a broken line",
    b'{"text": "a", "text": "b"}': "a broken line",
    b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}": "a broken line",
    b"[1]": "no such field",
    b'{"body": "x"}': "no such field",
    b'{"text": 5}': "no text",
    b'{"text": null}': "no text",
    b'{"text": "\\ud800"}': "no text",
    b'{"text": "cut sho': "a broken line",
}


def write_faulty(folder):
    """Texts in three files of lines, one of them compressed, with faulty lines among them; how many there are of these.

    Most of them follow one another, behind one in an earlier part. The last line of the last file is cut short.
    """
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    *bad, cut = FAULTY
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\n\n".join([bad[0], *good[:5], *bad, *good[5:30]]) + b"\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join([bad[0], *good[30:40], bad[5]])))
    (folder / "c.jsonl").write_bytes(b"\r\n".join([*good[40:50], bad[6], *good[50:], cut]))
    return len(bad) + 5


def write_corpora(root):
    """Lines in several files, one of them compressed, and a folder, both with duplicates; and faulty lines."""
    for name in ("lines", "folder"):
        (root / name).mkdir()
    write_lines(root / "lines" / "a.jsonl", TEXTS[:40])
    write_lines(root / "lines" / "b.jsonl.gz", TEXTS[40:50], gzip.open)
    (root / "lines" / "c.jsonl").write_text("")
    write_lines(root / "lines" / "d.jsonl", [*TEXTS[50:], *PLANTED])
    with (root / "lines" / "d.jsonl").open("a") as file:
        file.write(json.dumps({"text": "no end of line"}))
    for number, text in enumerate([*TEXTS, *PLANTED, ""]):
        (root / "folder" / f"{number:03}.txt").write_bytes(text.encode())
    faulty = write_faulty(root / "faulty")
    return {
        "lines": Jsonl(str(root / "lines"), heldout_percent=20),
        "folder": TextFolder(str(root / "folder"), heldout_percent=20),
        "faulty": Jsonl(str(root / "faulty"), heldout_percent=20, most_faulty=faulty),
    }
