"""Where the time of one profiled step went on a GPU: its kernels by kind, from the trace that JAX's profiler wrote."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

# What the names of kernels of a kind contain, in lower case; the first kind that fits. XLA names its own after the
# operation, libraries after their templates.
KINDS = {
    "attention": ("cudnn", "fmha", "sdpa", "flash"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "wgmma", "cublas", "splitk"),
    "copies": ("memcpy", "memset", "copy"),
}


def kind_of(kernel: str) -> str:
    """The kind of a kernel of this name; what is none of `KINDS` is what XLA fused."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "fused by XLA")


def summary(folder: Path, most: int = 25) -> dict[str, Any] | None:
    """Milliseconds of a profile's first GPU: by kind, idle, and of its longest kernels; None without a GPU's plane."""
    import jax

    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"))
    return of_planes(jax.profiler.ProfileData.from_file(str(files[-1])).planes, most) if files else None


def of_planes(planes: Any, most: int) -> dict[str, Any] | None:
    """`summary`, of the planes of a profile."""
    plane = next((plane for plane in planes if plane.name.startswith("/device:GPU")), None)
    if plane is None:
        return None
    events = [event for line in plane.lines if line.name.startswith("Stream") for event in line.events]
    if not events:
        return None
    kernels: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for event in events:
        kernels[event.name] += event.duration_ns
        counts[event.name] += 1
        kinds[kind_of(event.name)] += event.duration_ns
    # Kernels of several streams overlap: busy is the length of the union of their times.
    busy, end = 0.0, float("-inf")
    for start, stop in sorted((event.start_ns, event.start_ns + event.duration_ns) for event in events):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    span = end - min(event.start_ns for event in events)
    return {
        "span_ms": span / 1e6,
        "idle_ms": (span - busy) / 1e6,
        "kinds_ms": {kind: ns / 1e6 for kind, ns in kinds.most_common()},
        "kernels": [{"name": name, "ms": ns / 1e6, "count": counts[name]} for name, ns in kernels.most_common(most)],
    }
