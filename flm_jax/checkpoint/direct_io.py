"""Direct I/O: writes files without the page cache, where the file system allows it.

Data that is streamed through once gains nothing from the cache, and filling the cache costs more processor time than
the disk takes: measured on a virtual machine, 1 to 2.7 s per GB written, against 0.03 s without it. Where a file system
refuses (tmpfs), the same calls go through the cache. (Reading past the cache is tensorstore's, see `blocks`.)
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np

_ALIGN = 4096  # alignment of addresses, offsets and lengths; a multiple of every disk's block size
_per_thread = threading.local()


def write(path: Path, rows: np.ndarray, size: int) -> None:
    """Writes an array of any strides in row-major order, padded with zeros to `size` bytes, and waits for the disk.

    Raises:
      OSError: it cannot be written.
    """
    data = _buffer(_up(size))
    held = np.frombuffer(data, rows.dtype, rows.size).reshape(rows.shape)
    held[...] = rows
    np.frombuffer(data, np.uint8)[rows.nbytes : _up(size)] = 0
    file, done = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0
    try:
        while done < size:
            done += os.write(file, data[done : _up(size)])
            if done < size and done % _ALIGN:
                done = done // _ALIGN * _ALIGN
                os.lseek(file, done, os.SEEK_SET)
        os.ftruncate(file, size)
        os.fsync(file)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(file)


def _up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _buffer(size: int) -> memoryview:
    """Aligned memory of at least `size` bytes that belongs to this thread; it is reused by the next call."""
    if len(getattr(_per_thread, "data", b"")) < size:
        _per_thread.data = memoryview(mmap.mmap(-1, size))
    return _per_thread.data


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)
