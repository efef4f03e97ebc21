"""The page docs/select.md, from the figures of benchmarks/select_sft.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TARGET = 10_000_000

PAGE = """# Choosing instruction data: memory, time, duplicates

    {command}

makes a pool of {conversations:,} short conversations ({pool_gb:.2f} GB of JSON lines, {bytes_each:.0f} bytes each,
one file of ten compressed) and selects from it with `gin_configs/sft/select.gin`, in a process of its own, with
{processes} processes that read. What the steps do and how to set them: [Choosing data](sft.md#choosing-data).

## Time and memory

| conversations | time | per second | main process | each reading process | all together |
|---|---|---|---|---|---|
{rows}
| 10,000,000, extrapolated | {far_time} | {far_rate:,.0f} | {far_main} | {other} | |

Memory of a process is VmHWM, its highest resident memory, libraries included; all together is the highest sum of
Pss, in which pages that processes share are counted once, sampled five times per second. The last row is **not
measured**: it is the straight line through the two rows above it. {machine}, shared with other work: the load was
{load:.1f} at the end of the measurement, so times are longer than on an idle machine.

What each step said:

{said}

On disk the steps take {steps_each:.0f} bytes per conversation. In memory each has a few dozen: a hash of 8 bytes while
exact duplicates are found, the hash of one band at a time while near ones are, a place and a length for each that the
rules leave. Texts are read again by file and offset; those of compressed files that keep the rules are written to a
plain file first.

## Duplicates

| planted | share of common shingles | planted | found | recall |
|---|---|---|---|---|
| exact, but for case and spaces | 1 | {exact_planted:,} | {exact_found:,} | {exact_recall:.2%} |
{near_rows}

Near copies have one to six words changed. Their similarity is the exact share of common shingles (Jaccard), so those
below 0.7 should stay; the threshold is applied to an estimate with a standard deviation of 0.04 at 0.7, and 16 bands of
8 rows find 61 % of the pairs at 0.7, 95 % at 0.8 and 99.99 % at 0.9. Of {others:,} conversations that are no planted
copies and no refusals, {others_out:,} fell out as duplicates.

A signature of 128 permutations took {numpy:.0f} µs per text of 20 to 120 words in NumPy, over a batch, shingles
included, and {datasketch:.0f} µs with `datasketch`, text by text, on the same machine in the same minute. So the
library uses NumPy.
"""


def page(runs: Sequence[dict[str, Any]], command: str) -> str:
    """The page as text.

    Args:
      runs: the figures of a smaller pool, and of a larger one.
      command: what measured them.
    """
    small, large = runs
    minutes = "{:.1f} min"
    rows = "\n".join(
        f"| {run['conversations']:,} | {minutes.format(run['seconds'] / 60)} | "
        f"{run['conversations'] / run['seconds']:,.0f} | {_megabytes(run['main'])} | {_megabytes(run['other'])} | "
        f"{_megabytes(run['together'])} |"
        for run in runs
    )
    seconds = _line(small, large, "seconds")
    near = "\n".join(
        f"| near | {row['from']:g} to {row['to']:g} | {row['planted']:,} | {row['found']:,} | "
        f"{row['found'] / max(row['planted'], 1):.1%} |"
        for row in large["near"]
    )
    return PAGE.format(
        command=command,
        conversations=large["conversations"],
        pool_gb=large["pool_bytes"] / 1e9,
        bytes_each=large["pool_bytes"] / large["conversations"],
        processes=large["processes"],
        rows=rows,
        far_time=f"{seconds / 60:.0f} min",
        far_rate=TARGET / seconds,
        far_main=_megabytes(_line(small, large, "main")),
        other=_megabytes(large["other"]),
        machine=large["machine"],
        load=large["load"],
        said="\n".join(f"- {line}" for line in large["said"] if "written to" not in line),
        steps_each=large["steps_bytes"] / large["conversations"],
        exact_planted=large["exact"]["planted"],
        exact_found=large["exact"]["found"],
        exact_recall=large["exact"]["found"] / max(large["exact"]["planted"], 1),
        near_rows=near,
        others=large["others"]["conversations"],
        others_out=large["others"]["out"],
        numpy=large["minhash"]["numpy"],
        datasketch=large["minhash"]["datasketch"],
    )


def _line(small: dict[str, Any], large: dict[str, Any], figure: str) -> float:
    """The figure at 10 million on the straight line through both runs."""
    slope = (large[figure] - small[figure]) / (large["conversations"] - small["conversations"])
    return float(large[figure] + slope * (TARGET - large["conversations"]))


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"
