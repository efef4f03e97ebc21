"""The end of a checkpoint that was written block by block: its record, its manifest, its name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flm_jax import integrity
from flm_jax.integrity import Leaf, Manifest
from flm_jax.steps import fsync
from flm_jax.stored import ARRAYS, META
from flm_jax.streamed.blocks import key_of


def seal(
    partial: Path, leaves: Mapping[str, Leaf], meta: Any, blobs: Mapping[str, bytes], in_blocks: Iterable[str]
) -> None:
    """Makes step 0 of what lies in a directory beside it, once every byte of it is on disk.

    Args:
      partial: where the arrays are.
      leaves: by path, as the manifest describes them.
      meta: its record, JSON-able.
      blobs: small files that go with it.
      in_blocks: the leaves whose blocks are on disk already.
    """
    (partial / META).write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
    (partial / "blobs").mkdir(exist_ok=True)
    for name, content in blobs.items():
        (partial / "blobs" / name).write_bytes(content)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    described = {str(path.relative_to(partial)): integrity.describe_file(path) for path in files}
    manifest = Manifest(0, leaves, {name: file for name, file in described.items() if name != integrity.MANIFEST})
    (partial / integrity.MANIFEST).write_bytes(integrity.dump_manifest(manifest))
    # A name must not be on disk before what it names.
    there = {partial / ARRAYS / key_of(path) for path in in_blocks}
    for path in [*partial.rglob("*"), partial]:
        if path.is_dir() or path.parent not in there or not path.name[0].isdigit():
            fsync(path)
    partial.rename(partial.parent / "0")
    fsync(partial.parent)
