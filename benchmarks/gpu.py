"""Training, decoding and growth on one NVIDIA GPU, beside its limits and PyTorch: DIR/gpu.json and DIR/gpu.md.

  python benchmarks/gpu.py --out=DIR [--quick] [--budget_s=480] [--parts="limits,train 0.5B 2048"]

Parts run one after the other, the most important first, each in a process of its own: what fails is reported, and the
rest goes on; what no longer fits the budget is left out, and the page says so. First every attention kernel is compared
with the plain one in float32. Then, for models of 0.1, 0.5 and 1.5 billion parameters: tokens per second of the train
step (bf16 compute, float32 parameters, AdamW), the same with transformers' Llama in PyTorch if it is installed,
decoding beside the time to read parameters and cache, and a growth beside copying memory. A profile of one step lies in
DIR/profile. With --parts, only these are run, and what DIR has of other parts stays on the page. Needs JAX, Flax, optax
and this repository. With --tiny, the models are tiny and any device will do.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_page, gpu_parts

ROOT = Path(__file__).resolve().parent.parent

_OUT = flags.DEFINE_string("out", "", "The directory of the results.")
_QUICK = flags.DEFINE_bool("quick", False, "Fewer steps and shapes.")
_TINY = flags.DEFINE_bool("tiny", False, "Tiny models, to try the program on any device.")
_BUDGET = flags.DEFINE_float("budget_s", 480, "Seconds for everything; parts that no longer fit are left out.")
_PARTS = flags.DEFINE_list("parts", None, "Run these parts only, by their names on the page; all by default.")
_PART = flags.DEFINE_string("part", None, "Run this part in this process, for the pages of later runs into DIR.")
_SAME = flags.DEFINE_bool("same_process", False, "Run all parts in this process; an error of CUDA then ends them all.")


class Part(NamedTuple):
    """One part: what it runs, and about how many seconds it takes on an H200, compilation included."""

    run: Callable[[gpu_parts.Use], dict[str, Any]]
    seconds: float


def parts() -> dict[str, Part]:
    """All parts in the order of importance."""
    all_parts = {
        "about": Part(gpu_parts.about, 5),
        "kernels": Part(gpu_parts.kernels, 60),
        "limits": Part(gpu_parts.limits, 6),
        "train 0.5B 2048": Part(lambda use: gpu_parts.train(use, "0.5B", 2048, profile=True), 45),
        "train 1.5B 2048": Part(lambda use: gpu_parts.train(use, "1.5B", 2048), 50),
        "train 0.1B 2048": Part(lambda use: gpu_parts.train(use, "0.1B", 2048), 30),
        "torch 0.5B 2048": Part(lambda use: gpu_parts.torch_part(use, "0.5B", 2048), 100),
        "growth": Part(gpu_parts.growth, 12),
        "decoding": Part(gpu_parts.decoding, 22),
        "torch 1.5B 2048": Part(lambda use: gpu_parts.torch_part(use, "1.5B", 2048), 110),
        "torch 0.1B 2048": Part(lambda use: gpu_parts.torch_part(use, "0.1B", 2048), 60),
    }
    if not _QUICK.value:
        for name in ("0.5B", "1.5B", "0.1B"):
            all_parts[f"train {name} 4096"] = Part(functools.partial(gpu_parts.train, name=name, context=4096), 50)
        for name in ("0.5B", "1.5B", "0.1B"):
            all_parts[f"torch {name} 4096"] = Part(
                functools.partial(gpu_parts.torch_part, name=name, context=4096), 100
            )
    return all_parts


def run_part(name: str) -> dict[str, Any]:
    """A part's results with its seconds, or its error."""
    since = time.perf_counter()
    try:
        found = parts()[name].run(gpu_parts.Use(_TINY.value, _QUICK.value, Path(_OUT.value)))
    except Exception as error:  # one part's failure is a result
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    return found | {"seconds_taken": time.perf_counter() - since}


def command() -> str:
    """The command that this program was started with, as the page names it."""
    words = [f'"{word}"' if " " in word else word for word in sys.argv[1:]]
    return " ".join(["python", "benchmarks/gpu.py", *words])


def in_a_process(name: str, file: Path, limit: float) -> dict[str, Any]:
    """`run_part` in a process of its own, ended after `limit` seconds."""
    words = [sys.executable, str(Path(__file__).resolve()), f"--out={_OUT.value}", f"--part={name}"]
    words += ["--quick"] * _QUICK.value + ["--tiny"] * _TINY.value
    since = time.perf_counter()
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            words, env=os.environ | {"PYTHONPATH": paths}, timeout=limit, capture_output=True, text=True
        )
        if file.exists():
            return dict(json.loads(file.read_text())) | {"seconds_taken": time.perf_counter() - since}
        last = " ".join(done.stderr.split())[-600:]
        found: dict[str, Any] = {"error": f"the process ended with status {done.returncode}: {last}"}
    except subprocess.TimeoutExpired:
        found = {"error": f"ended after {limit:.0f} s"}
    return found | {"seconds_taken": time.perf_counter() - since}


def main(argv: list[str]) -> None:
    """Runs all parts that fit, and writes the results after each."""
    del argv
    if not _OUT.value:
        raise app.UsageError("give --out=DIR, the directory of the results")
    out = Path(_OUT.value)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    if _PART.value:
        found = run_part(_PART.value) | {"command": command()}
        (out / "parts" / f"{_PART.value}.json").write_text(json.dumps(found))
        return
    if unknown := set(_PARTS.value or ()) - set(parts()):
        raise app.UsageError(f"--parts: {', '.join(sorted(unknown))}: use some of {', '.join(parts())}")
    files = {name: out / "parts" / f"{name}.json" for name in parts()}
    chosen = [name for name in parts() if _PARTS.value is None or name in _PARTS.value]
    kept = {
        name: dict(json.loads(files[name].read_text())) for name in set(files) - set(chosen) if files[name].exists()
    }
    start, results = time.perf_counter(), kept
    for name in chosen:
        part, file = parts()[name], files[name]
        left = _BUDGET.value - (time.perf_counter() - start)
        if left < (0 if _TINY.value else part.seconds):
            results[name] = {"skipped": f"{left:.0f} s of the budget are left, and it takes about {part.seconds:.0f}"}
        else:
            file.unlink(missing_ok=True)
            results[name] = run_part(name) if _SAME.value else in_a_process(name, file, max(left, 1))
            results[name] |= {"command": command()}
            file.write_text(json.dumps(results[name]))
        outcome = results[name].get("error") or results[name].get("skipped") or "done"
        print(f"{name}: {outcome} ({results[name].get('seconds_taken', 0):.0f} s)", flush=True)
        whole = {"command": command(), "parts": {name: results[name] for name in files if name in results}}
        (out / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
        (out / "gpu.md").write_text(gpu_page.page(whole))
    print(f"{out / 'gpu.md'} and gpu.json, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    app.run(main)
