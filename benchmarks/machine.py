"""What a page of figures was measured on."""

from __future__ import annotations

import os
from pathlib import Path


def hardware() -> str:
    """The processor, in a few words."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of an {names[0]}" if names else f"{os.cpu_count()} cores"
