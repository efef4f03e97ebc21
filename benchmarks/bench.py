"""Everything that is fast or slow, measured side by side in one run; the page docs/results/bench.md.

  python benchmarks/bench.py [--quick] [--parts=step,decode] [--write=docs/results/bench.md]

Each part of `benchmarks/parts` runs in a process of its own. Within a part, what is compared takes turns, so that
other load disturbs all of it alike; figures are medians with quartiles, and ratios are those of neighbours in one
round. A part that fails is reported with its error, the others go on, and the exit status is 1. With --write=PAGE.md,
the figures of every round are written to PAGE.json beside it, both after every part. With --parts, what PAGE.json has
of the other parts stays on the page, which names the command of each part.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import disk, parts
from flm_jax.cli import huge_pages

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers")

PAGE = """# All benchmarks, side by side

    {command}

{machine}, Python {python}, {versions}. Load average {before} at the start and {after} at the end of the last run, over
a minute; all parts took {minutes:.0f} minutes.{note}

Within each part, what is compared takes turns within one run. A figure is a median with the first and third quartile in
parentheses; a ratio is taken between neighbours of one round, and its quartiles over the rounds. The figures of every
round: [{json}]({json}).

{sections}
"""


def measure(part: str, effort: str, file: Path) -> None:
    """Measures one part in this process, and writes its figures."""
    logging.set_verbosity(logging.ERROR)  # orbax logs a lot
    found = importlib.import_module(f"benchmarks.parts.{part}").measure(effort)
    file.write_text(json.dumps(found))


def measured(part: str, effort: str, file: Path, minutes: float) -> dict[str, Any]:
    """The record of one part: its figures, or why there are none."""
    since = time.perf_counter()
    path = os.pathsep.join(filter(None, (str(parts.ROOT), os.environ.get("PYTHONPATH"))))
    command = [
        sys.executable,
        __file__,
        f"--parts={part}",
        f"--child={file}",
        f"--{effort}" if effort != "full" else "",
    ]
    error, found = "", None
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": path}
    # As the programs do for themselves; what ours is compared with has them too.
    asked = huge_pages.asked()
    child = subprocess.Popen(
        [word for word in command if word],
        cwd=parts.ROOT,
        env={**environment, "GLIBC_TUNABLES": asked} if asked else environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said = child.communicate(timeout=minutes * 60)[1].strip().splitlines()
        if child.returncode:
            error = said[-1] if said else f"it ended with status {child.returncode} and printed nothing"
        else:
            found = json.loads(file.read_text())
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with the programs that it has started
        child.communicate()
        error = f"it was ended after {minutes:g} minutes"
    seconds = time.perf_counter() - since
    load = os.getloadavg()[0]
    return {"part": part, "command": ran(), "seconds": seconds, "error": error, "found": found, "load": load}


def ran() -> str:
    """The command that this program was started with."""
    return " ".join(["python benchmarks/bench.py", *sys.argv[1:]])


def section(record: Mapping[str, Any]) -> str:
    """The section of one part in Markdown."""
    module = importlib.import_module(f"benchmarks.parts.{record['part']}")
    body = [f"Failed: {record['error']}"] if record["error"] else module.tables(record["found"])
    return "\n\n".join([f"## {module.TITLE}", module.READING, *body])


def page(records: Sequence[Mapping[str, Any]], about: Mapping[str, Any], name: str) -> str:
    """The page in Markdown; `name` is that of the file with the figures."""
    sections = "\n\n".join(section(record) for record in records)
    return PAGE.format(sections=sections, json=name, **about)


def versions() -> str:
    """The installed versions of what the figures depend on, as text."""
    found = []
    for name in VERSIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def arguments() -> argparse.Namespace:
    """The command line; not read by absl, since parts import programs that have absl flags of their own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and shapes")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for tests of this program")
    parser.add_argument("--parts", default=",".join(parts.PARTS), help="which parts to run, joined by commas")
    parser.add_argument("--write", type=Path, help="write the page here, and its figures to .json beside it")
    parser.add_argument("--minutes", type=float, default=30, help="after which a part is ended and reported as failed")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # for the figures of one part
    given = parser.parse_args()
    given.parts = given.parts.split(",")
    if unknown := [part for part in given.parts if part not in parts.PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; the parts are {', '.join(parts.PARTS)}")
    return given


def written(records: Sequence[Mapping[str, Any]], before: float, target: Path | None) -> str:
    """The page of the parts that have run so far; written to `target`, with its figures, if there is one."""
    busy = before > 0.5 * (os.cpu_count() or 1)
    about = {
        "command": "\n    ".join(dict.fromkeys(record.get("command", ran()) for record in records)),
        "machine": disk.machine(),
        "python": platform.python_version(),
        "versions": versions(),
        "before": f"{before:.1f}",
        "after": f"{os.getloadavg()[0]:.1f}",
        "minutes": sum(record["seconds"] for record in records) / 60,
        "note": " **The machine was busy with other work:** ratios hold roughly, times do not." if busy else "",
    }
    text = page(records, about, target.with_suffix(".json").name if target else "bench.json")
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.with_suffix(".json").write_text(json.dumps({**about, "parts": records}, indent=1) + "\n")
    return text


def main() -> None:
    """Runs the parts, and prints the page or writes it after each of them."""
    given = arguments()
    effort = "tiny" if given.tiny else "quick" if given.quick else "full"
    if given.child:
        measure(given.parts[0], effort, given.child)
        return
    before = os.getloadavg()[0]
    figures = given.write.with_suffix(".json") if given.write else None
    kept = json.loads(figures.read_text())["parts"] if figures and figures.exists() else []
    records = {record["part"]: record for record in kept if record["part"] not in given.parts}
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts:
            record = records[part] = measured(part, effort, Path(folder) / f"{part}.json", given.minutes)
            state = f"failed: {record['error']}" if record["error"] else "done"
            print(f"{part}: {state}, {record['seconds']:.0f} s", file=sys.stderr, flush=True)
            in_order = [records[name] for name in parts.PARTS if name in records]
            text = written(in_order, before, given.write)
    if not given.write:
        print(text)
    if failed := [part for part in given.parts if records[part]["error"]]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
