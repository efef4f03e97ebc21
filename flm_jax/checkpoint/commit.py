"""Commits a step: writes its small files and its manifest, fsyncs everything, and only then renames it to its name."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flm_jax.checkpoint import manifest
from flm_jax.checkpoint.manifest import ARRAYS, BLOBS, META, Leaf, Manifest
from flm_jax.files import fsync

_log = logging.getLogger("flm_jax.checkpoint")


def small_files(meta: Any, blobs: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a step other than arrays and manifest, by path within the step.

    Raises:
      TypeError: `meta` cannot be written as JSON.
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
    """Completes the directory `partial`, which holds the arrays of a step, and renames it to the step's number.

    Args:
      partial: holds the arrays.
      step: the step's number.
      leaves: by path, as the manifest describes them.
      files: from `small_files`.
      on_disk: folders of arrays whose numbered files are on disk already and need no fsync.
    """
    for name, content in files.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content)
    written = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
    described = {
        # Whatever is no array is interpreted as soon as it is read, so it has a sha256 at any size.
        name: manifest.describe_file(path, hashed=not name.startswith(f"{ARRAYS}/"))
        for name, path in written.items()
        if name != manifest.MANIFEST
    }
    (partial / manifest.MANIFEST).write_bytes(manifest.dump_manifest(Manifest(step, leaves, described)))
    # A name must not reach the disk before the content that it names.
    for path in [*partial.rglob("*"), partial]:
        if path.is_dir() or path.parent not in on_disk or not path.name[0].isdigit():
            fsync(path)
    final = partial.parent / str(step)
    if final.exists():
        _set_aside(final)
    partial.rename(final)
    fsync(partial.parent)


def _set_aside(final: Path) -> None:
    """Renames a directory that already has the step's name.

    It cannot be restored, or the save would have been refused; even so it is never deleted.
    """
    number = next(i for i in range(1, 1_000_000) if not final.with_name(f"{final.name}.damaged-{i}").exists())
    aside = final.rename(final.with_name(f"{final.name}.damaged-{number}"))
    _log.warning("%s was in the way of the new step and is now %s", final, aside.name)
