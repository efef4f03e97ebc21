"""What benchmarks/gpu.py measures: one function per part, from settings to figures."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Widths, layers, query heads (of 128; two per key head) and MLP widths; the middle one grows into the largest.
SHAPES = {"0.1B": (768, 12, 6, 2048), "0.5B": (1280, 24, 10, 3456), "1.5B": (2048, 28, 16, 5632)}
TINY = {"0.1B": (32, 1, 2, 64), "0.5B": (64, 2, 4, 128), "1.5B": (96, 3, 6, 192)}
VOCAB = 32_768
# Tokens per step of each model; halved until they fit.
TOKENS = {"0.1B": 32_768, "0.5B": 32_768, "1.5B": 16_384}


class Use(NamedTuple):
    """How to measure: tiny models, fewer steps and shapes, and where files go."""

    tiny: bool
    quick: bool
    out: Path


def model(use: Use, name: str) -> Any:
    """The configuration of a model."""
    from flm_jax.config import ModelConfig

    embed, layers, heads, mlp = (TINY if use.tiny else SHAPES)[name]
    return ModelConfig(
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2,
        head_dim=16 if use.tiny else 128,
        mlp=mlp,
        vocab=512 if use.tiny else VOCAB,
        compute_dtype="bfloat16",
        attention="auto",
    )


def window(use: Use, context: int) -> int:
    """The tokens of a window that stands for `context`."""
    return context // 32 if use.tiny else context


def repeated(once: Callable[[], Any], count: int) -> list[float]:
    """The seconds of each of `count` calls, after one that is not counted; `once` waits for its result."""
    once()
    times = []
    for _ in range(count):
        since = time.perf_counter()
        once()
        times.append(time.perf_counter() - since)
    return times


def spread(times: list[float], amount: float = 1.0) -> dict[str, float]:
    """Median, smallest and largest rate: `amount` per second."""
    rates = sorted(amount / t for t in times)
    return {"median": statistics.median(rates), "lowest": rates[0], "highest": rates[-1]}


def steps(use: Use) -> int:
    """The number of timed steps."""
    return 2 if use.tiny else 8 if use.quick else 20


def peak_memory() -> int | None:
    """The most bytes that this process has held on the device; None where JAX does not know."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def about(use: Use) -> dict[str, Any]:
    """The device and the versions."""
    del use
    import jax

    from flm_jax.kernels import cudnn

    device = jax.devices()[0]
    gpu = cudnn.device()
    return {
        "device": device.device_kind,
        "backend": str(device.client.platform_version).splitlines()[0],
        "capability": None if gpu is None else str(gpu.compute_capability),
        "memory_limit": (device.memory_stats() or {}).get("bytes_limit"),
        "jax": jax.__version__,
        "python": sys.version.split()[0],
    }


def kernels(use: Use) -> dict[str, Any]:
    """Every attention kernel: the largest difference of output and gradients from plain float32, over the largest."""
    import jax
    import jax.numpy as jnp

    from flm_jax.kernels import cudnn, cudnn_check, plain

    def by_plain(q: Any, k: Any, v: Any, segments: Any, packed: Any, *, width: float, sliding_window: Any) -> Any:
        del packed
        time_1T = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        seen = jnp.zeros_like(time_1T) if segments is None else segments
        return plain.attend(q, k, v, plain.attention_mask(time_1T, time_1T, seen, seen, sliding_window), width=width)

    found, length = [], 64 if use.tiny else 1024
    cases: list[tuple[str, str, int, int, int | None]] = [("plain", "bias", 4, 64, None)]
    if cudnn.device() is not None:
        cases += [("cudnn", form, 2, 128, None) for form in cudnn_check.FORMS]
        cases += [("cudnn", form, 2, 64, 100) for form in cudnn_check.FORMS[:2]]
        cases += [] if use.quick else [("cudnn", form, 4, 64, None) for form in cudnn_check.FORMS]
    for kernel, form, kv_heads, head_dim, sliding in cases:
        tensors, segments = cudnn_check.inputs(jnp.bfloat16, head_dim, 4, kv_heads, length=length)
        row: dict[str, Any] = dict(kernel=kernel, form=form, kv_heads=kv_heads, head_dim=head_dim, window=sliding)
        try:
            other = by_plain if kernel == "plain" else None
            row |= cudnn_check.differences(form, tensors, segments, sliding, other)
            row["right"] = all(row[x] <= cudnn_check.TOLERANCE for x in ("output", "queries", "keys", "values"))
        except Exception as error:  # reported as a row of the table
            row |= {"right": False, "error": " ".join(str(error).split())[:400]}
        found.append(row)
    note = "" if cudnn.device() is not None else f"no NVIDIA GPU ({jax.default_backend()}): cuDNN was not compared"
    return {"rows": found, "tolerance": cudnn_check.TOLERANCE, "note": note}


def limits(use: Use) -> dict[str, Any]:
    """FLOP/s of a large bf16 matrix product, and bytes/s of copying memory, read and written."""
    import jax
    import jax.numpy as jnp

    side, length = (256, 2**16) if use.tiny else (8192, 2**29)
    x = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    many = 10

    @jax.jit
    def products(x: Any) -> Any:
        return jax.lax.fori_loop(0, many, lambda _, y: x @ y * jnp.asarray(side**-0.5, x.dtype), x)

    flops = spread(repeated(lambda: jax.block_until_ready(products(x)), steps(use)), many * 2 * side**3)
    memory = jnp.zeros(length, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    moved = spread(repeated(lambda: jax.block_until_ready(copy(memory)), steps(use)), 8.0 * length)
    return {"matmul_side": side, "matmul_flops": flops, "copied_bytes": 4 * length, "copy_bandwidth": moved}


def train(use: Use, name: str, context: int, profile: bool = False) -> dict[str, Any]:
    """Tokens per second of the train step, FLOP/s, memory, with one document per window and with several."""
    import jax

    from flm_jax import costs

    tried = []
    # What needs less memory comes later: the head on an eighth of the positions at a time, then fewer rows.
    for rows, chunks in [(rows, chunks) for rows in rows_of(use, name, context) for chunks in (1, 8)]:
        try:
            found = train_once(use, name, context, rows, chunks, profile)
            break
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                raise
            tried.append(f"{rows} rows with loss_chunks={chunks}")
            jax.clear_caches()
    else:
        raise MemoryError(f"does not fit: {', '.join(tried)}")
    cfg = model(use, name)
    found["flops_per_token"] = costs.train_flops_per_token(cfg, window(use, context))
    found["parameters"] = costs.param_count(cfg)
    return found | {"did_not_fit": tried}


def rows_of(use: Use, name: str, context: int) -> list[int]:
    """Rows per step to try, the most first."""
    first = 2 if use.tiny else TOKENS[name] // context
    return [first, max(1, first // 2), max(1, first // 4)]


def train_once(use: Use, name: str, context: int, rows: int, chunks: int, profile: bool) -> dict[str, Any]:
    """`train` with so many rows, or an error of the device's memory."""
    import jax
    import numpy as np

    from flm_jax.attention import cudnn_form
    from flm_jax.data.batches import Batch
    from flm_jax.optimizer import OptimizerConfig
    from flm_jax.recipe import Recipe, Stage, resolve
    from flm_jax.sharding import make_mesh, put_batch
    from flm_jax.step import StageProgram

    cfg, mesh = model(use, name), make_mesh(devices=jax.devices()[:1])
    length = window(use, context)
    stage = resolve(Recipe((Stage(name, cfg, 1000, rows, OptimizerConfig(learning_rate=1e-3)),)))[0]
    program = StageProgram(stage, mesh, chunks)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab, (rows, length + 1), dtype=np.int32)
    weights = np.ones((rows, length), np.float32)
    documents = np.cumsum(rng.random((rows, length)) < 1 / 512, axis=1).astype(np.int32)
    with jax.set_mesh(mesh):
        one, several = (
            put_batch(Batch(tokens[:, :-1], tokens[:, 1:], weights, segments), mesh)
            for segments in (np.zeros((rows, length), np.int32), documents)
        )
        state = program.initialiser()(jax.random.key(0))
        since = time.perf_counter()
        step = program.stepper(masked=False).lower(state, one).compile()
        compiled = time.perf_counter() - since
        losses = []

        def once(batch: Any) -> None:
            nonlocal state
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))

        plain = spread(repeated(lambda: once(one), steps(use)), rows * length)
        packed = spread(repeated(lambda: once(several), steps(use)), rows * length)
        if profile:
            with jax.profiler.trace(str(use.out / "profile")):
                once(one)
        form = cudnn_form(cfg, rows, length, documents=True)
    return {
        "tokens_per_s": plain,
        "tokens_per_s_documents": packed,
        "rows": rows,
        "context": length,
        "loss_chunks": chunks,
        "attention": "plain" if form is None else f"cudnn, {form}",
        "compile_s": compiled,
        "peak_memory": peak_memory(),
        "losses": [losses[0], losses[-1]],
        "profile": profiled(use.out / "profile") if profile else None,
    }


def profiled(folder: Path) -> dict[str, Any] | None:
    """The summary of a profile; None if it cannot be read, which costs the other figures nothing."""
    from benchmarks import gpu_profile

    try:
        return gpu_profile.summary(folder)
    except Exception as error:
        print(f"the profile cannot be read: {error}", file=sys.stderr)
        return None


def torch_part(use: Use, name: str, context: int) -> dict[str, Any]:
    """The same step with transformers' Llama in PyTorch."""
    from benchmarks.gpu_torch import measured

    embed, layers, heads, mlp = (TINY if use.tiny else SHAPES)[name]
    shape = dict(
        hidden_size=embed,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=16 if use.tiny else 128,
        intermediate_size=mlp,
        vocab_size=512 if use.tiny else VOCAB,
    )
    return measured(shape, rows_of(use, name, context), window(use, context), steps(use), allow_cpu=use.tiny)


def decoding(use: Use, name: str = "0.5B") -> dict[str, Any]:
    """Tokens per second with the cache, beside the time to read parameters and the cache's filled part per step."""
    import jax
    import numpy as np

    from flm_jax.generation import decode
    from flm_jax.generation.sampling import GREEDY
    from flm_jax.model import init_params

    cfg = model(use, name).replace(param_dtype="bfloat16")
    params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
    # The embedding is looked up; every other parameter is read once per step.
    read = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embedding"].nbytes
    prompt, made = (16, 8) if use.tiny else (128, 128)
    found, profile = [], None
    for rows in (1, 16) if use.quick else (1, 16, 128):
        tokens = np.random.default_rng(0).integers(0, cfg.vocab, (rows, prompt), dtype=np.int32)
        start, keys = np.zeros(rows, np.int32), GREEDY.keys(jax.numpy.arange(rows, dtype=np.uint32))
        none, times = np.full(1, decode.ENDED, np.int32), []
        for _ in range(4):
            begun = decode.read(cfg, params, tokens, start, keys, GREEDY.values, None, prompt + made, GREEDY.form)
            jax.block_until_ready(begun)
            since = time.perf_counter()
            given = (np.zeros(rows, bool), none, made - 1, GREEDY.values, None, GREEDY.form)
            jax.block_until_ready(decode.extend(cfg, params, begun, *given, most=made))
            times.append((time.perf_counter() - since) / (made - 1))
        if rows == 1:
            begun = decode.read(cfg, params, tokens, start, keys, GREEDY.values, None, prompt + made, GREEDY.form)
            with jax.profiler.trace(str(use.out / "profile_decoding")):
                jax.block_until_ready(decode.extend(cfg, params, begun, *given, most=made))
            profile = profiled(use.out / "profile_decoding")
        cache = 2 * cfg.layers * cfg.k_heads * cfg.h_dim * 2 * rows * (prompt + made / 2)
        found.append({"rows": rows, "tokens_per_s": spread(times[1:], rows), "bytes_per_step": read + cache})
    sizes = {"model": name, "prompt": prompt, "answer": made, "peak_memory": peak_memory()}
    return sizes | {"cases": found, "profile": profile}


def growth(use: Use) -> dict[str, Any]:
    """Bytes per second of growing 0.5B with its moments into 1.5B: read and written, the weights' dtype float32."""
    import jax

    from flm_jax.growth import Growth
    from flm_jax.recipe import Recipe, Stage, resolve
    from flm_jax.sharding import make_mesh
    from flm_jax.step import StageProgram, make_grower

    mesh = make_mesh(devices=jax.devices()[:1])
    grown = Stage("grown", model(use, "1.5B"), 1, 8, growth=Growth("zero"))
    before, after = resolve(Recipe((Stage("first", model(use, "0.5B"), 1, 8), grown)))
    old, new = StageProgram(before, mesh, 1), StageProgram(after, mesh, 1)
    with jax.set_mesh(mesh):
        state = jax.block_until_ready(old.initialiser()(jax.random.key(0)))
        grower = make_grower(after.lineage, mesh).lower(state, jax.random.key(1)).compile()
        times = repeated(lambda: jax.block_until_ready(grower(state, jax.random.key(1))), 2 if use.tiny else 5)
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((old.abstract_state, new.abstract_state)))
    return {"bytes": moved, "bandwidth": spread(times, moved), "seconds": statistics.median(times)}
