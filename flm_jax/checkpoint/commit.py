"""Commits a step: its small files and its manifest, fsync of everything, and only then the rename to its name."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flm_jax.checkpoint import manifest
from flm_jax.checkpoint.manifest import Leaf, Manifest
from flm_jax.files import fsync

META, BLOBS = "meta.json", "blobs"

_log = logging.getLogger("flm_jax.checkpoint")


def small_files(meta: Any, blobs: Mapping[str, bytes]) -> dict[str, bytes]:
    """What a step holds besides arrays and manifest, by path within it.

    Raises:
      TypeError: `meta` is not JSON-able.
    """
    files = {META: (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode()}
    return files | {f"{BLOBS}/{name}": bytes(content) for name, content in blobs.items()}


def commit_step(
    partial: Path,
    step: int,
    leaves: Mapping[str, Leaf],
    files: Mapping[str, bytes],
    on_disk: Collection[Path] = (),
) -> None:
    """Makes a step of a directory that holds its arrays: `partial` is renamed to `step`, beside where it is.

    Args:
      partial: where the arrays are.
      step: its number.
      leaves: by path, as the manifest describes them.
      files: from `small_files`.
      on_disk: folders of arrays whose numbered files are on disk already, and need no fsync.
    """
    for name, content in files.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content)
    written = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
    described = {name: manifest.describe_file(path) for name, path in written.items() if name != manifest.MANIFEST}
    (partial / manifest.MANIFEST).write_bytes(manifest.dump_manifest(Manifest(step, leaves, described)))
    # A name must not be on disk before what it names.
    for path in [*partial.rglob("*"), partial]:
        if path.is_dir() or path.parent not in on_disk or not path.name[0].isdigit():
            fsync(path)
    final = partial.parent / str(step)
    if final.exists():
        _set_aside(final)
    partial.rename(final)
    fsync(partial.parent)


def _set_aside(final: Path) -> None:
    """Renames what is in the way: it cannot be restored, or no save would have begun, but it is never deleted."""
    number = next(i for i in range(1, 1_000_000) if not final.with_name(f"{final.name}.damaged-{i}").exists())
    aside = final.rename(final.with_name(f"{final.name}.damaged-{number}"))
    _log.warning("%s was in the way of the new step and is now %s", final, aside.name)
