"""Measurements of the disk's speed and of a process's time and memory, for the streaming and conversion benchmarks."""

from __future__ import annotations

import mmap
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIECE = 64 << 20


def memory(field: str) -> int:
    """Bytes of this process: with "VmRSS" its resident memory now, with "VmHWM" the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measured(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Calls a function and measures it; everything that it needs should be imported before.

    Returns:
      The function's result; its wall-clock and processor seconds, and the process's bytes before it and at the peak.
    """
    base = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    used = resource.getrusage(resource.RUSAGE_SELF)
    before, since = used.ru_utime + used.ru_stime, time.perf_counter()
    result = function()
    seconds = time.perf_counter() - since
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime - before
    return result, {"seconds": seconds, "base": base, "peak": memory("VmHWM"), "cpu": cpu}


def forget(folder: Path) -> list[Path]:
    """Drops the files of a folder from the page cache, and returns their paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return files


def floor(source: Path, read: int, written: int, past_cache: bool = False) -> tuple[float, float]:
    """Seconds to read `read` bytes of a folder's files, and to write and sync `written` bytes to a file beside it."""
    aligned = mmap.mmap(-1, PIECE)  # O_DIRECT needs an aligned buffer
    aligned.write(os.urandom(1 << 20) * (PIECE >> 20))
    buffer, flag = memoryview(aligned), os.O_DIRECT if past_cache else 0
    files = forget(source)
    since, done = time.perf_counter(), 0
    for path in files:
        file = os.open(path, os.O_RDONLY | flag)
        while got := os.readv(file, [buffer]):
            done += got
            if got % 4096:
                break
        os.close(file)
    reading = (time.perf_counter() - since) * read / done
    scratch = source.parent / "floor"
    since = time.perf_counter()
    file = os.open(scratch, os.O_WRONLY | os.O_CREAT | flag)
    for at in range(0, written // 4096 * 4096, PIECE):
        os.write(file, buffer[: min(PIECE, written // 4096 * 4096 - at)])
    os.fsync(file)
    os.close(file)
    writing = time.perf_counter() - since
    scratch.unlink()
    return reading, writing


def machine() -> str:
    """The number and model of the processors, as text."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return f"{os.cpu_count()} cores of an {model.partition(':')[2].strip()}"
