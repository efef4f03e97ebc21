"""The train step of transformers' Llama in PyTorch on one GPU, for benchmarks/gpu.py.

Scaled dot product attention, torch.compile, bf16 autocast over float32 parameters, fused AdamW, and gradients clipped
to norm 1, as the step of flm_jax does.
"""

from __future__ import annotations

import statistics
import time
from typing import Any


def measured(
    shape: dict[str, int], rows_to_try: list[int], context: int, steps: int, allow_cpu: bool = False
) -> dict[str, Any]:
    """Tokens per second of the step with the most rows that fit; or why nothing was measured.

    Args:
      shape: fields of `transformers.LlamaConfig`.
      rows_to_try: rows per step, the most first.
      context: tokens per row.
      steps: how many are timed, after three that are not.
      allow_cpu: whether to run without a GPU, to try the program; nothing is compiled there.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        return {"skipped": f"{error.name} is not installed"}
    if not torch.cuda.is_available() and not allow_cpu:
        return {"skipped": f"PyTorch {torch.__version__} sees no GPU"}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    tried: list[str] = []
    for rows in rows_to_try:
        try:
            return _once(shape, rows, context, steps) | versions | {"did_not_fit": tried}
        except torch.OutOfMemoryError:
            tried.append(f"{rows} rows")
            torch.cuda.empty_cache()
    raise MemoryError(f"does not fit: {', '.join(tried)}")


def _once(shape: dict[str, int], rows: int, context: int, steps: int) -> dict[str, Any]:
    import torch
    import transformers

    where = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = transformers.LlamaConfig(
        **shape, max_position_embeddings=context, use_cache=False, tie_word_embeddings=False, attn_implementation="sdpa"
    )
    model: Any = transformers.LlamaForCausalLM(config).to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=where == "cuda")
    forward = torch.compile(model) if where == "cuda" else model
    tokens = torch.randint(0, shape["vocab_size"], (rows, context), device=where)

    def step() -> float:
        with torch.autocast(where, torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    since = time.perf_counter()
    first = step()
    compiled = time.perf_counter() - since
    for _ in range(2):
        step()
    times = []
    for _ in range(steps):
        since = time.perf_counter()
        last = step()
        times.append(time.perf_counter() - since)
    rates = sorted(rows * context / t for t in times)
    return {
        "tokens_per_s": {"median": statistics.median(rates), "lowest": rates[0], "highest": rates[-1]},
        "rows": rows,
        "context": context,
        "compile_s": compiled,
        "peak_memory": torch.cuda.max_memory_allocated() if where == "cuda" else None,
        "losses": [first, last],
    }
