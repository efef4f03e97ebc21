"""Atomic writes of files, bounded reads, sha256 sums, and checks that a folder can be written to and has room."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sha256_file(path: Path) -> str:
    """The sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The sha256 (hex) of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_bounded(path: Path, most: int, *, links: bool = True) -> bytes:
    """The content of a regular file.

    Args:
      path: the file.
      most: the most bytes that it may have.
      links: whether the last part of the path may be a symbolic link to the file.

    Raises:
      OSError: it cannot be read, is not a regular file (a device or a pipe may have no end), or has more bytes.
    """
    # Without O_NONBLOCK, opening a pipe would wait until another process writes to it.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    found = path.stat() if links else path.lstat()
    if stat.S_ISREG(found.st_mode):  # devices are not opened: that alone may do something
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode):
                content = file.read(most + 1) if found.st_size <= most else b""
                if len(content) > most or found.st_size > most:
                    raise OSError(errno.EFBIG, f"more than the {most} bytes that it may have", str(path))
                return content
    raise OSError(errno.EINVAL, "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a regular file", str(path))


def fsync(path: Path) -> None:
    """Waits until the content of a file, or the list of entries of a directory, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context in which an error of the operating system names the file, as one of writing does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_write(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with naming(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def draft_of(path: Path) -> Path:
    """A new hidden name beside `path`, on the same file system, so that renaming it to `path` is atomic."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def atomic_write(path: Path, content: bytes | str) -> None:
    """Writes a file that gets its name only once it is complete and on disk; makes the folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    try:
        sync_write(draft, content.encode() if isinstance(content, str) else content)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def check_writable(folder: Path, what: str) -> None:
    """Checks that files can be written into a folder, or that it can be made; leaves nothing behind.

    Args:
      folder: need not exist.
      what: the setting that names it, for the message, such as '--workdir=runs/demo'.

    Raises:
      ValueError: it is no folder, or nothing can be written there.
    """
    folder = folder.expanduser().absolute()
    found = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not found.is_dir():
        raise ValueError(f"{what}: {found} is not a directory; give another one.")
    # Permissions do not tell whether the disk was mounted for reading only, so a file is made.
    draft = draft_of(found / "draft")
    try:
        draft.touch()
        draft.unlink()
    except OSError as error:
        # /proc answers that there is no such file, which would mislead.
        reason = "" if error.errno == errno.ENOENT else f" ({error.strerror})"
        raise ValueError(f"{what}: {found} cannot be written to{reason}; give another directory.") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON-able value by `atomic_write`, indented."""
    atomic_write(path, json.dumps(value, indent=1) + "\n")


def missing_room(folder: Path, needed: int) -> str | None:
    """A sentence on how much room there is and how much is needed, if there is too little; else None."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"{folder} has room for {free / 1e9:.4g} GB, and {needed / 1e9:.4g} GB are needed: free some"
