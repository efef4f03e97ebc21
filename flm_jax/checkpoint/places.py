"""Where the blocks of a stored leaf lie: the files that hold its chunks, and the bytes of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tensorstore as ts

from flm_jax.checkpoint.blocks import key_of
from flm_jax.records import counted

# Names of chunks that are shown.
_SHOWN = 3


@dataclass(frozen=True)
class Place:
    """A chunk of a leaf on disk.

    Attributes:
      chunk: its place in the grid of chunks, such as '0.3'.
      file: that holds it, relative to the step's directory.
      start: its first byte in the file; 0 where it is the file.
      size: in bytes; None where it is the whole file, or lies among the file's index.
    """

    chunk: str
    file: str
    start: int = 0
    size: int | None = None

    def __str__(self) -> str:
        if self.size is None:
            return f"{self.chunk} in {self.file}"
        return f"{self.chunk} in {self.file} at bytes {self.start:,} to {self.start + self.size - 1:,}"


def places(arrays: Path, path: str) -> list[Place]:
    """The chunks of a leaf and where each lies; empty if the files do not tell.

    Args:
      arrays: the directory of a step's arrays.
      path: of the leaf.
    """
    key = key_of(path)
    if not (arrays / "manifest.ocdbt").exists():
        folder = arrays / key
        names = sorted(file.name for file in folder.iterdir() if file.name[0].isdigit()) if folder.is_dir() else []
        return [Place(name, f"{arrays.name}/{key}/{name}") for name in names]
    try:
        base = ts.KvStore.open({"driver": "file", "path": f"{arrays}/"}).result()
        root = ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
        node = ts.ocdbt.dump(base, root).result()
        found = []
        for entry in node["entries"]:
            name, _, chunk = entry["key"].decode().rpartition("/")
            if name == key and chunk[:1].isdigit():
                # value:FOLDER:FILE:START:SIZE; a small value lies in the file of the index itself.
                kind, folder, file, start, size = entry.get("indirect_value", root).split(":")
                where = f"{arrays.name}/{folder}{file}"
                inside = (int(start), int(size)) if kind == "value" else (0, None)
                found.append(Place(chunk, where, *inside))
    except (ValueError, OSError, KeyError, IndexError, TypeError):  # damaged, or an index of several levels
        return []
    return found


def told(arrays: Path, path: str) -> str:
    """The end of a sentence about a damaged leaf: its chunks and their files; '' if the files do not tell."""
    found = places(arrays, path)
    if not found:
        return ""
    more = f" and {counted(len(found) - _SHOWN, 'more chunk')}" if len(found) > _SHOWN else ""
    return f"; {'chunk' if len(found) == 1 else 'one of chunks'} {', '.join(map(str, found[:_SHOWN]))}{more}"
