"""What a work directory belongs to: the recipe and the data that it was begun with, as JSON files in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flm_jax.files import atomic_write, write_json
from flm_jax.records.foreign_json import read_json
from flm_jax.records.json import compared, completed

RECIPE, DATA = "recipe.json", "data.json"
# What a run that goes on from another one's checkpoint records first.
FORK = "fork.json"
# What the process that writes to a directory holds.
LOCK = ".lock"
_DIGEST = re.compile("[0-9a-f]{64}")


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Yields where two such structures differ: ``stages.small.steps: 100 there, 200 here``; or by place, if unnamed."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}.{_place(i, x, y)}")
    elif a != b:
        yield f"{path}: {_short(a)} there, {_short(b)} here"


def _place(index: int, a: Any, b: Any) -> Any:
    """What two entries of a list are called: by their name, as in stages.small, if they have the same."""
    named = isinstance(a, dict) and isinstance(b, dict) and a.get("name") == b.get("name")
    return a.get("name") or index if named else index


def _short(value: Any) -> str:
    """A value in a sentence: a configuration by its class, a list of configurations by its length, a digest's start."""
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:12]
    if isinstance(value, dict) and "class" in value:
        return f"a {value['class']}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return f"{len(value)} of them"
    return repr(value)


def check_identity(workdir: Path, file: str, mine: Any, what: str) -> None:
    """Checks that a work directory that is already in use was begun with `mine`, apart from what may change.

    Raises:
      ValueError: it was begun with something else, and the message names what differs; or it is not a work directory.
    """
    if (workdir / file).exists():
        before, now = completed(read_json(workdir / file, finite=False)), json.loads(json.dumps(mine))
        found = list(differences(compared(before), compared(now)))
        if file == DATA:
            found = [_digest_of(one) for one in found]
        if found:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            raise ValueError(
                f"{workdir} was begun with {what}: {'; '.join(found[:3])}{more}. Nothing was changed. Give this one a "
                f"new --workdir; to go on there from the newest checkpoint here, add --fork={workdir}, which keeps "
                f"optimizer and data position, or set Recipe.start = {str(workdir)!r}: the first stage then continues "
                "that model, or grows it."
            )
    elif (
        workdir.exists()
        and not (workdir / RECIPE).exists()
        and any(p.name not in (LOCK, FORK) for p in workdir.iterdir())
    ):
        raise ValueError(f"{workdir} holds files but no {RECIPE}, so it is not a work directory; use another one.")


def check_no_run(workdir: Path, program: str) -> None:
    """Checks that a directory for something else than a run is not the work directory of one.

    Args:
      workdir: the directory, which need not exist.
      program: what would write there, for the sentence.

    Raises:
      ValueError: it is.
    """
    if (workdir / RECIPE).exists():
        raise ValueError(
            f"--workdir={workdir} is the work directory of a run of train.py (it holds {RECIPE}): give {program} "
            "one of its own."
        )


def _digest_of(difference: str) -> str:
    """The same of data.json, whose digests have the names of what they are digests of."""
    name, _, rest = difference.partition(": ")
    whose = {"digest": "text", "vocabulary": "vocabulary", "start": "start"}.get(name)
    return difference if whose is None else f"the digest of the {whose}: {rest}"


def _is_primary() -> bool:
    # Imported here: processes that only read text need not load JAX.
    from flm_jax.distributed import is_primary

    return is_primary()


def write_identity(workdir: Path, file: str, mine: Any) -> None:
    """Records `mine` atomically, in process 0, once `check_identity` has passed."""
    if not _is_primary():
        return
    write_json(workdir / file, mine)


def write_record(workdir: Path, file: str, text: str) -> None:
    """Keeps a text about this start of the run; one that differs from those of earlier starts gets a number.

    Only process 0 writes it.
    """
    if not _is_primary():
        return
    path, number = workdir / file, 1
    while path.exists() and path.read_text() != text:
        number += 1
        path = workdir / f"{Path(file).stem}.{number}{Path(file).suffix}"
    atomic_write(path, text)
