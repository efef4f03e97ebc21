"""The page of benchmarks/gpu.py: its figures as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Peak dense bf16 FLOP/s of cards, by what `device_kind` begins with; the longest name that fits. From NVIDIA's data
# sheets, without sparsity.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


def peak(device_kind: str) -> float | None:
    """The data sheet's dense bf16 FLOP/s of a card; None if it is not in the table."""
    words = device_kind.split()
    for count in range(len(words), 0, -1):
        # SXM cards carry form factor and memory in one word or more: "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3".
        name = " ".join(words[:count])
        for found in (name, name.split("-")[0]):
            if found in PEAKS:
                return PEAKS[found]
    return None


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table."""
    lines = [list(head), ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def rate(found: dict[str, float], unit: float = 1.0, digits: int = 0) -> str:
    """A rate as text: its median, and the range."""
    return f"{found['median'] / unit:,.{digits}f} ({found['lowest'] / unit:,.{digits}f} to " + (
        f"{found['highest'] / unit:,.{digits}f})"
    )


def memory(number: float | None) -> str:
    """Bytes as GB; a dash if unknown."""
    return "-" if number is None else f"{number / 1e9:.1f}"


def page(results: dict[str, Any]) -> str:
    """The page, from the content of gpu.json; parts that are missing leave their tables out."""
    parts = results["parts"]
    done = {name: part for name, part in parts.items() if "error" not in part and "skipped" not in part}
    commands = list(dict.fromkeys(part.get("command", results["command"]) for part in parts.values()))
    lines = ["# On one GPU", "", *(f"    {command}" for command in commands), ""]
    lines += _about(done.get("about"))
    lines += _kernels(done.get("kernels"))
    sheet = peak(done["about"]["device"]) if "about" in done else None
    limits = done.get("limits")
    if limits:
        flops, copied = limits["matmul_flops"]["median"], limits["copy_bandwidth"]["median"]
        known = (
            f"; the data sheet says {sheet / 1e12:,.0f}" if sheet else "; the card is not in the table of data sheets"
        )
        lines += [
            f"A bf16 product of {limits['matmul_side']:,} x {limits['matmul_side']:,} matrices runs at "
            f"{flops / 1e12:,.1f} TFLOP/s{known}. Copying {limits['copied_bytes'] / 1e9:.2g} GB moves "
            f"{copied / 1e9:,.0f} GB/s, read and written.",
            "",
        ]
    lines += _training(done, sheet, limits)
    lines += _rest(done, limits)
    lines += ["## Parts", ""]
    outcome = lambda part: part.get("error") or part.get("skipped") or "done"  # noqa: E731
    rows = [(name, f"{part.get('seconds_taken', 0):.0f}", outcome(part)) for name, part in parts.items()]
    lines += table(("part", "s", "outcome"), rows)
    return "\n".join([*lines, "", f"{sum(part.get('seconds_taken', 0) for part in parts.values()):.0f} s in all.", ""])


def _about(about: dict[str, Any] | None) -> list[str]:
    if about is None:
        return []
    return [
        f"{about['device']}, compute capability {about['capability']}, {memory(about['memory_limit'])} GB for JAX; JAX "
        f"{about['jax']}, Python {about['python']}, {about['backend']}.",
        "",
    ]


def _kernels(kernels: dict[str, Any] | None) -> list[str]:
    if kernels is None:
        return []
    names = ("output", "queries", "keys", "values")
    rows = [
        (
            *(row["kernel"], row["form"], f"4 ({row['kv_heads']} kv) of {row['head_dim']}", row["window"] or "-"),
            *(f"{row[name]:.2g}" if name in row else "-" for name in names),
            "yes" if row["right"] else f"no {row.get('error', '')}".strip(),
        )
        for row in kernels["rows"]
    ]
    return [
        "## Attention",
        "",
        "The largest difference of the output, and of the gradients of queries, keys and values, in bfloat16, from the "
        "plain kernel in float32, relative to the largest value; right up to "
        f"{kernels['tolerance']}. {kernels['note']}".strip(),
        "",
        *table(("kernel", "form", "heads", "window", *names, "right"), rows),
        "",
    ]


def _training(done: dict[str, Any], sheet: float | None, limits: dict[str, Any] | None) -> list[str]:
    rows = []
    for name, part in done.items():
        program, _, rest = name.partition(" ")
        ours = done.get(f"train {rest}")
        if program not in ("train", "torch"):
            continue
        speed, flops = part["tokens_per_s"]["median"], ours["flops_per_token"] if ours else None
        of = [f"{100 * speed * flops / p:.1f} %" if flops and p else "-" for p in _peaks(sheet, limits)]
        of += [f"{speed * flops / 1e12:,.1f}" if flops else "-"]
        if program == "torch":
            detail = f"PyTorch {part['torch']}"
        else:
            detail = part["attention"] + (f", loss_chunks {part['loss_chunks']}" if part["loss_chunks"] > 1 else "")
        several = rate(part["tokens_per_s_documents"]) if program == "train" else "-"
        rows.append(
            (
                *(rest.split()[0], part["context"], part["rows"], "flm_jax" if program == "train" else "transformers"),
                *(rate(part["tokens_per_s"]), several, of[2], of[0], of[1], memory(part["peak_memory"]), detail),
            )
        )
    if not rows:
        return []
    head = ("model", "tokens per row", "rows", "program", "tokens/s", "with documents", "TFLOP/s")
    lines = [
        "## Training",
        "",
        "Tokens per second: median, lowest and highest of the steps. Windows are one document each; in the next "
        "column, documents have 512 tokens on average. FLOPs are those of flm_jax.costs: scores of all pairs of "
        "positions count, as the plain kernel computes them; recomputation does not.",
        "",
        *table((*head, "of the data sheet", "of the product", "peak GB", "how"), rows),
        "",
    ]
    ratios = [
        f"{rest}: {done[f'train {rest}']['tokens_per_s']['median'] / part['tokens_per_s']['median']:.2f}"
        for name, part in done.items()
        if name.startswith("torch ") and f"train {(rest := name[6:])}" in done
    ]
    lines += [f"Speed of flm_jax over transformers: {', '.join(ratios)}.", ""] if ratios else []
    for name, part in done.items():
        if name.startswith("train ") and (profile := part.get("profile")):
            lines += _profile(f"one step ({name[6:]} tokens per row)", profile)
    return lines


def _profile(what: str, profile: dict[str, Any], most: int = 12) -> list[str]:
    """The time of the kernels of what was profiled by kind, and the longest."""
    kinds = ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in profile["kinds_ms"].items())
    rows = [(f"`{k['name'][:80]}`", k["count"], f"{k['ms']:.1f}") for k in profile["kernels"][:most]]
    return [
        f"A profile of {what}: {profile['span_ms']:.1f} ms, of which {kinds}, and idle {profile['idle_ms']:.1f} ms. "
        "The longest kernels:",
        "",
        *table(("kernel", "calls", "ms"), rows),
        "",
    ]


def _peaks(sheet: float | None, limits: dict[str, Any] | None) -> tuple[float | None, float | None]:
    return sheet, limits["matmul_flops"]["median"] if limits else None


def _rest(done: dict[str, Any], limits: dict[str, Any] | None) -> list[str]:
    lines, copied = [], limits["copy_bandwidth"]["median"] if limits else None
    if growth := done.get("growth"):
        lines += [
            "## Growth",
            "",
            f"0.5B with its moments into 1.5B: {growth['bytes'] / 1e9:.2f} GB read and written in "
            f"{growth['seconds']:.3g} s, "
            f"{rate(growth['bandwidth'], 1e9)} GB/s"
            + (f", {growth['bandwidth']['median'] / copied:.2f} of copying." if copied else "."),
            "",
        ]
    if decoding := done.get("decoding"):
        rows = []
        for case in decoding["cases"]:
            floor = case["bytes_per_step"] / copied if copied else None
            step = case["rows"] / case["tokens_per_s"]["median"]
            of = (f"{1e3 * floor:.2f}", f"{100 * floor / step:.0f} %") if floor else ("-", "-")
            rows.append((case["rows"], rate(case["tokens_per_s"]), f"{1e3 * step:.2f}", *of))
        lines += [
            "## Decoding",
            "",
            f"{decoding['model']}, parameters and cache in bfloat16, greedy, prompts of {decoding['prompt']} tokens, "
            f"answers of {decoding['answer']}. The floor is the time to read parameters and the filled part of the "
            "cache once per step, at the rate of copying.",
            "",
            *table(("rows", "tokens/s", "ms per step", "floor", "floor over step"), rows),
            "",
        ]
        if profile := decoding.get("profile"):
            lines += _profile(f"{decoding['answer'] - 1} steps of one row", profile)
    return lines
