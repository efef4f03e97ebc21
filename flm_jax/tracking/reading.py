"""Reading metrics.jsonl, also while a run writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flm_jax.records.foreign_json import JsonError, field, parse_json

METRICS = "metrics.jsonl"
# What every line has; the measurements stand beside it.
_FIELDS = {"kind": str, "stage": str, "stage_step": int, "time": float}
# A line has a few hundred bytes.
_LONGEST = 1 << 20


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of metrics.jsonl, in order; a last line that is not yet written to its end is left out.

    Raises:
      OSError: the file cannot be read.
      JsonError: a line is no measurement; the message names file and line.
    """
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(_LONGEST):
            number += 1
            if not raw.endswith(b"\n"):
                if len(raw) == _LONGEST:
                    raise JsonError(f"{path}, line {number}, has more than {_LONGEST} bytes: it is no measurement")
                return
            where = f"{path}, line {number},"
            line = parse_json(raw, where)
            for name, kind in _FIELDS.items():
                field(line, name, kind, where)
            yield line
