"""The files that lie beside a model's weights: which are taken along with them, and how they are read.

A directory from elsewhere may hold links. One that leads out of it could bring a private file into a checkpoint, and
from there into an export that is published; so links are followed inside the directory only.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

from flm_jax.data import vocabulary_files
from flm_jax.files import read_bounded

# Nothing else is imported or exported, whatever lies in the directory or the checkpoint: no programs, and no file that
# has the name of one that an export writes itself.
FILES = (
    "config.json",
    *(name for name in vocabulary_files.FILES if name != vocabulary_files.RECORD),
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
# Marks the folder of files that the models of a hub's cache share, and the names of those files: sums of their content.
_SHARED, _CONTENT = ".huggingface-shared-blobs", re.compile(r"[0-9a-f]{64}")
# The largest tokenizers in use have 35 MB.
MOST_BYTES = 1 << 28


class FormatError(ValueError):
    """Files that are damaged, incomplete, or not what they should be."""


def check_place(path: Path) -> None:
    """Checks that a file is what it says: not a link that leads out of its directory.

    In a cache of the Hugging Face hub every file of a model is a link from `models--X/snapshots/REVISION/` to
    `models--X/blobs/`: from a directory so named, links may lead there too, because both belong to the one model. What
    lies there may itself be a link, to a file that the models of the cache share: `blobs/` beside them, marked as such
    a store, where files have the names of their content.

    Raises:
      FormatError: it is such a link.
    """
    folder, real = path.parent.resolve(), path.resolve()
    inside = [folder]
    if folder.parent.name == "snapshots":
        model = folder.parent.parent
        inside.append(model / "blobs")
        shared = model.parent / "blobs"
        if (shared / _SHARED).is_file() and _CONTENT.fullmatch(real.name):
            inside.append(shared / real.name[:2])
    if not any(real.is_relative_to(place) for place in inside):
        raise FormatError(
            f"{path} is a link that leads out of its directory, to {real}: only what lies in {folder} is taken. Put a "
            "copy in its place if it belongs there."
        )


def read(path: Path) -> bytes:
    """The content of a file beside the weights.

    Raises:
      FormatError: it is no regular file, too large, or a link that leads out of its directory.
      OSError: it cannot be read, for example because it does not exist.
    """
    check_place(path)
    try:
        return read_bounded(path, MOST_BYTES)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise FormatError(f"{path} cannot be read: {error.strerror}") from None
        raise


def read_companions(source: Path) -> dict[str, bytes]:
    """The contents of those of FILES that a directory has, by name; raises what `read` does."""
    return {name: read(source / name) for name in FILES if (source / name).exists() or (source / name).is_symlink()}
