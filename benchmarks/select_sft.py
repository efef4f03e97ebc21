"""Selection from a synthetic pool: memory, time, and how many of the planted duplicates are found.

  python benchmarks/select_sft.py --count=2000000 [--write=docs/select.md] [--json=FILE] [--dir=DIR]

A pool of `count` short conversations is made, and before it one of a quarter of that, for the extrapolation: random
words, with formulas, code and several turns, in three formats, one file in ten compressed. 4 % are exact copies of
others but for case and spaces, 6 % near copies with one to six words changed, whose share of common shingles is
computed exactly; 3 % are refusals, and one line in 10,000 is broken. The selection runs as a process of its own, with
gin_configs/sft/select.gin and two processes that read. Memory is VmHWM of each process. The exit status is 1 if fewer
than 99 % of the exact copies are found.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import disk  # noqa: E402
from benchmarks.select_page import page  # noqa: E402
from flm_jax.duplicates import near, shingles  # noqa: E402

_COUNT = flags.DEFINE_integer("count", 2_000_000, "Conversations in the pool.", lower_bound=1000)
_PROCESSES = flags.DEFINE_integer("processes", 2, "Processes that read.", lower_bound=1)
_DIR = flags.DEFINE_string("dir", None, "Directory for pool and results; by default a temporary directory.")
_WRITE = flags.DEFINE_string("write", None, "Write the page to this file.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")

FILES, KEPT = 10, 20_000
EXACT, NEAR, BROKEN_RULE, BROKEN_LINE = 0.04, 0.06, 0.03, 1e-4
SYLLABLES = [f"{a}{b}" for a in "klmntsrpvb" for b in "aeiou"]


def texts(rng: np.random.Generator, words: np.ndarray, count: int) -> list[list[str]]:
    """The words of some texts, 20 to 120 each; frequent words are frequent as in a language."""
    lengths = rng.integers(20, 121, count)
    ranks = np.minimum((len(words) ** rng.random(int(lengths.sum()))).astype(np.int64), len(words) - 1)
    ends = np.cumsum(lengths)
    drawn = words[ranks].tolist()
    return [drawn[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]


def dressed(words: list[str], kind: int) -> list[tuple[str, str]]:
    """Questions and answers made of the words: chat, maths, code or several turns."""
    cut = max(3, len(words) // 4)
    question, answer = " ".join(words[:cut]), " ".join(words[cut:])
    if kind == 1:
        return [(f"Calculate for {len(answer)}: {question}?", f"{answer} $x^2 = {len(question)}$.")]
    if kind == 2:
        return [(f"Write Python: {question}.", f"{answer}\n```python\nprint({words[0]})\n```")]
    if kind == 3:
        half = (cut + len(words)) // 2
        return [(question, " ".join(words[cut:half])), (f"And {words[0]}?", " ".join(words[half:]))]
    return [(f"{question}?", f"{answer}.")]


def line(turns: list[tuple[str, str]], style: int) -> bytes:
    """A line in one of the three formats."""
    if style == 1:
        named = [
            {"from": who, "value": text} for pair in turns for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        return json.dumps({"conversations": named}).encode() + b"\n"
    if style == 2 and len(turns) == 1:
        return json.dumps({"instruction": turns[0][0], "input": "", "output": turns[0][1]}).encode() + b"\n"
    named = [{"role": who, "content": t} for pair in turns for who, t in zip(("user", "assistant"), pair, strict=True)]
    return json.dumps({"messages": named}).encode() + b"\n"


def jaccard(pairs: list[tuple[str, str]]) -> list[float]:
    """The exact share of common shingles of pairs of normalised texts."""
    found = shingles.shingles(shingles.tokens([text for pair in pairs for text in pair]))
    sets = [set(found.hashes[a:b].tolist()) for a, b in itertools.pairwise(found.starts)]
    return [len(a & b) / len(a | b) for a, b in zip(sets[::2], sets[1::2], strict=True)]


def conversations(count: int, truth: dict[str, list[Any]]) -> Iterator[bytes]:
    """Yields the lines of the pool; what was planted goes to `truth`: number, kind, similarity."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(SYLLABLES, rng.integers(1, 5))) for _ in range(20_000)], object)
    kept: list[tuple[list[str], int]] = []
    waiting: list[tuple[int, str, str]] = []
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        drawn, what = texts(rng, words, size), rng.random(size)
        kinds, styles = rng.integers(0, 5, size), rng.integers(0, 3, size)
        for place in range(size):
            own, kind = drawn[place], int(kinds[place])
            if kept and what[place] < EXACT + NEAR:
                own, kind = kept[int(rng.integers(len(kept)))]
                turns = dressed(own, kind)
                if what[place] < EXACT:
                    turns = [(q.upper(), a.replace(" ", "  ", 1)) for q, a in turns]
                    truth["exact"].append(start + place)
                else:
                    changed = list(own)
                    for at in rng.choice(len(own), rng.integers(1, 7), replace=False).tolist():
                        changed[at] = str(words[int(rng.integers(len(words)))])
                    waiting.append((start + place, flat(turns), flat(turns := dressed(changed, kind))))
            else:
                turns = dressed(own, kind)
                if what[place] > 1 - BROKEN_RULE:
                    turns = [(turns[0][0], f"As an AI language model, I cannot say. {own[0]} {own[1]}")]
                    truth["rule"].append(start + place)
                elif len(kept) < KEPT:
                    kept.append((own, kind))
                elif what[place] > 0.5:
                    kept[int(rng.integers(KEPT))] = own, kind
            yield line(turns, int(styles[place]))
            if rng.random() < BROKEN_LINE:
                yield b'{"messages": [{"role": "user", "content": "cut off\n'
        for (number, _, _), similarity in zip(waiting, jaccard([(a, b) for _, a, b in waiting]), strict=True):
            truth["near"].append(number)
            truth["similarity"].append(similarity)
        waiting = []


def flat(turns: list[tuple[str, str]]) -> str:
    """The normalised text of a conversation, as `compared_text` makes it."""
    return " ".join("\n".join(text for pair in turns for text in pair).casefold().split())


def make_pool(folder: Path, count: int) -> dict[str, list[Any]]:
    """Writes the pool; returns what was planted in it."""
    folder.mkdir()
    truth: dict[str, list[Any]] = {"exact": [], "near": [], "similarity": [], "rule": []}
    lines = conversations(count, truth)
    per_file = -(-count // FILES)
    for number in range(FILES):
        path = folder / f"{number:02}.jsonl{'.gz' if number == FILES - 1 else ''}"
        with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
            file.writelines(itertools.islice(lines, per_file if number < FILES - 1 else None))
    return truth


def peaks(root: int) -> dict[int, tuple[int, int]]:
    """VmHWM and the share of memory (Pss) in bytes of a process and all below it, by process."""
    found, waiting = {}, [root]
    while waiting:
        number = waiting.pop()
        try:
            status = Path(f"/proc/{number}/status").read_text()
            rollup = Path(f"/proc/{number}/smaps_rollup").read_text()
            tasks = list(Path(f"/proc/{number}/task").iterdir())
            waiting += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except (OSError, ValueError):
            continue
        fields = dict(line.split(":", 1) for line in (status + rollup).splitlines() if ":" in line)
        found[number] = tuple(int(fields.get(name, "0").split()[0]) * 1024 for name in ("VmHWM", "Pss"))
    return found  # type: ignore[return-value]


def run(pool: Path, output: Path, processes: int) -> dict[str, Any]:
    """Runs the selection; returns its time, memory and output."""
    command = [sys.executable, "experiments/select_sft.py", "--gin_file=gin_configs/sft/select.gin"]
    command += [f"--input={pool}", f"--output={output}", f"--gin_bindings=Selection.processes = {processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    since = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    highest: dict[int, int] = {}
    together = 0
    while child.poll() is None:
        now = peaks(child.pid)
        together = max(together, sum(share for _, share in now.values()))
        highest.update({number: peak for number, (peak, _) in now.items()})
        time.sleep(0.2)
    said = child.stdout.read() if child.stdout else ""
    print(said, flush=True)
    if child.returncode:
        sys.exit(child.returncode)
    main = highest.pop(child.pid)
    return {
        "seconds": time.perf_counter() - since,
        "main": main,
        "other": max(highest.values(), default=0),
        "together": together,
        "said": said.splitlines(),
    }


def recall(output: Path, truth: dict[str, list[Any]]) -> dict[str, Any]:
    """The shares of planted duplicates that fell out, and how many others fell out as duplicates."""
    (path,) = (output / "steps").glob("duplicates-*/kinds.npy")
    out = np.load(path) > 0
    near_out, similarity = out[np.array(truth["near"], np.int64)], np.array(truth["similarity"])
    edges = [(0.9, 1.01), (0.8, 0.9), (0.7, 0.8), (0.6, 0.7), (0.0, 0.6)]
    rows = []
    for low, high in edges:
        own = (similarity >= low) & (similarity < high)
        rows.append({"from": low, "to": min(high, 1.0), "planted": int(own.sum()), "found": int(near_out[own].sum())})
    planted = np.zeros(len(out), bool)
    planted[truth["exact"] + truth["near"]] = True
    # Refusals are short and alike by construction.
    planted[truth["rule"]] = True
    return {
        "exact": {"planted": len(truth["exact"]), "found": int(out[truth["exact"]].sum())},
        "near": rows,
        "others": {"conversations": int((~planted).sum()), "out": int((out & ~planted).sum())},
    }


def minhash_rates() -> dict[str, float]:
    """Microseconds per text of a signature of 128 permutations, in NumPy and by datasketch, shingles included."""
    from datasketch import MinHash

    rng = np.random.default_rng(1)
    words = np.array([f"{a}{b}{c}" for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES], object)
    drawn = [" ".join(text) for text in texts(rng, words, 2000)]
    near.signatures(shingles.shingles(shingles.tokens(drawn)))
    since = time.perf_counter()
    near.signatures(shingles.shingles(shingles.tokens(drawn)))
    ours = time.perf_counter() - since
    since = time.perf_counter()
    for text in drawn[:500]:
        tokens = text.split()
        MinHash(near.PERMUTATIONS).update_batch(
            [" ".join(tokens[i : i + shingles.SHINGLE]).encode() for i in range(len(tokens) - shingles.SHINGLE + 1)]
        )
    theirs = time.perf_counter() - since
    return {"numpy": ours / 2000 * 1e6, "datasketch": theirs / 500 * 1e6}


def measure(count: int) -> dict[str, Any]:
    """Makes a pool, selects from it, and returns the figures."""
    work = Path(tempfile.mkdtemp(prefix="select_", dir=_DIR.value))
    try:
        since = time.perf_counter()
        truth = make_pool(work / "pool", count)
        size = sum(path.stat().st_size for path in (work / "pool").iterdir())
        print(f"made {count:,} conversations, {size / 1e9:.2f} GB, in {time.perf_counter() - since:.0f} s", flush=True)
        found = run(work / "pool", work / "out", _PROCESSES.value)
        found["load"] = os.getloadavg()[0]
        found |= recall(work / "out", truth)
        steps = sum(path.stat().st_size for path in (work / "out" / "steps").rglob("*") if path.is_file())
        report = json.loads((work / "out" / "report.json").read_text())
    finally:
        shutil.rmtree(work)
    found |= {"conversations": count, "pool_bytes": size, "steps_bytes": steps, "processes": _PROCESSES.value}
    return {**found, "minhash": minhash_rates(), "machine": disk.machine(), "flow": report["steps"]}


def main(argv: list[str]) -> None:
    """Measures a smaller pool and a larger one, and reports."""
    del argv
    runs = [measure(count) for count in (_COUNT.value // 4, _COUNT.value)]
    print(json.dumps(runs, indent=1))
    if _WRITE.value:
        command = f"python benchmarks/select_sft.py --count={_COUNT.value} --write=docs/select.md"
        Path(_WRITE.value).write_text(page(runs, command))
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(runs, indent=1) + "\n")
    if any(found["exact"]["found"] < 0.99 * found["exact"]["planted"] for found in runs):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
