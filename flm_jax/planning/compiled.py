"""Lowers and compiles a stage's programs for a target topology, and reads what the compiler says of them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from flm_jax import costs
from flm_jax.data.batches import Batch
from flm_jax.generate import generate
from flm_jax.planning import hlo
from flm_jax.planning.topology import Topology
from flm_jax.recipe import Recipe, ResolvedStage
from flm_jax.sharding import replicated, spec
from flm_jax.state import abstract_state
from flm_jax.step import StageProgram, make_grower, parameter_growers, quietly_donated

COMPILERS = ("none", "cpu", "tpu")
# Hand-written kernels, whose cycles no compiler estimates, are taken to run at half of the chip's peak.
KERNEL_UTILISATION = 0.5
_FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def devices_of(topology: Topology, compiler: str) -> Sequence[Any]:
    """The devices to compile for.

    Raises:
      ValueError: the compiler is unknown, is not installed, or does not know this chip.
    """
    if compiler not in COMPILERS:
        raise ValueError(f"compiler={compiler!r}: use one of {', '.join(COMPILERS)}.")
    if compiler == "tpu":
        return _tpu_devices(topology)
    if len(jax.devices()) < topology.devices:
        raise ValueError(
            f"{topology.name} has {topology.devices} devices and {len(jax.devices())} are simulated: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices} before JAX starts."
        )
    return jax.devices()[: topology.devices]


def _tpu_devices(topology: Topology) -> Sequence[Any]:
    if topology.chip.compiler is None:
        raise ValueError(f"{topology.name}: the TPU compiler does not compile for it; use --compiler=cpu.")
    # What a TPU host would be asked for, and this one does not know.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", topology.name)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    name, settings = topology.chip.compiler
    bounds = "x".join(map(str, topology.bounds))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{bounds}", num_slices=topology.slices, **settings
        )
    except RuntimeError as error:
        raise ValueError(
            f"The TPU compiler is not here ({str(error).splitlines()[0]}). `make test-tpu` installs libtpu beside the "
            "environment; TPU_LIBRARY_PATH names its libtpu.so."
        ) from error
    return list(found.devices)


def programs(recipe: Recipe, program: StageProgram) -> Iterator[tuple[str, Any]]:
    """Lowers every program of a stage, and names it."""
    stage, mesh = program.stage, program.mesh
    where = NamedSharding(mesh, spec(("batch", "time")))
    shape = (stage.batch_size, recipe.data.context)
    ids, weights = (jax.ShapeDtypeStruct(shape, dtype, sharding=where) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(inputs_BT=ids, targets_BT=ids, weights_BT=weights, segments_BT=ids)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        if stage.grows:
            before = abstract_state(stage.lineage.before, mesh)
            with quietly_donated():
                lowered = make_grower(stage.lineage, mesh, donate=True).lower(before, key)
            yield "growth", lowered
        elif not stage.restored:
            yield "initialisation", program.initialiser().lower(key)
        if stage.ramp_steps:
            yield "train step with masks", program.stepper(masked=True).lower(program.abstract_state, batch)
        yield "train step", program.stepper(masked=False).lower(program.abstract_state, batch)


def decoding(program: StageProgram, rows: int, context: int, tokens: int = 64) -> Any:
    """Lowers generation: a prompt of `context` tokens less the `tokens` that are added, in `rows` rows."""
    mesh, cfg = program.mesh, program.stage.cfg
    where = NamedSharding(mesh, spec(("batch", "time")))
    prompt = jax.ShapeDtypeStruct((rows, context - tokens), jnp.int32, sharding=where)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    with jax.set_mesh(mesh):
        return generate.lower(cfg, program.abstract_state.params, prompt, tokens, key, 0.7)


def parameter_growth(program: StageProgram, topology: Topology | None) -> dict[str, Any]:
    """What growing every parameter by itself takes, in all."""
    lineage, mesh = program.stage.lineage, program.mesh
    before = abstract_state(lineage.before, mesh).params
    key = jax.eval_shape(lambda: jax.random.key(0))
    total: dict[str, Any] = {"lowered": True, "fits": True, "compile_seconds": 0.0, "collectives": {}}
    gathers: list[dict[str, Any]] = []
    for grower in parameter_growers(lineage, mesh):
        with jax.set_mesh(mesh):
            about = compiled(grower.lower(before, key), topology, mesh)
        total["compile_seconds"] += about["compile_seconds"]
        for kind, moved in about["collectives"].items():
            entry = total["collectives"].setdefault(kind, {"count": 0, "sent_bytes": 0.0})
            for name, number in moved.items():
                entry[name] += number
        gathers += [about["largest_gather"]] if about["largest_gather"] else []
        free_compiled_programs()
    total["largest_gather"] = max(gathers, key=lambda g: int(g["bytes"]), default=None)
    return total


def free_compiled_programs() -> None:
    """Frees what was traced and compiled: for a thousand devices it is gigabytes."""
    jax.clear_caches()
    gc.collect()
    # The C library keeps what is freed unless it is told not to; other systems' do as they please.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def compiled(lowered: Any, topology: Topology | None, mesh: Mesh) -> dict[str, Any]:
    """What the compiler and its program's text say."""
    start = time.perf_counter()
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    try:
        # On a CPU it is the partitioning that is looked at, and code that runs fast would be made in vain.
        done = lowered.compile(compiler_options=None if on_tpu else _FAST_COMPILE)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = next((line for line in str(error).splitlines() if "xceeded" in line or "memory" in line), str(error))
        return {"fits": False, "compiler_said": said.strip()[:400], "compile_seconds": time.perf_counter() - start}
    record: dict[str, Any] = {"fits": True, "compile_seconds": time.perf_counter() - start}
    memory = done.memory_analysis()
    if memory is not None:
        record["bytes_per_device"] = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs_not_donated": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
        }
    program = hlo.read(done.as_text())
    record["collectives"] = program.by_kind()
    gather = program.largest("all-gather")
    record["largest_gather"] = None if gather is None else {"shape": gather.shape, "bytes": gather.result}
    record["gathers"] = sorted({c.shape for c in program.collectives if c.kind == "all-gather"})
    record["kernels"] = dict(program.kernels)
    record["unread"] = program.unread
    if topology is not None and topology.chip.clock and program.cycles:
        record["predicted"] = predicted(program, topology, mesh)
    return record


def predicted(program: hlo.Program, topology: Topology, mesh: Mesh) -> dict[str, float]:
    """Seconds of one call, as the compiler's cycles and the links' bandwidth have it: a prediction, never measured.

    Work is the compiler's own estimate of every operation, loops counted in full. Collectives that the program waits
    for come on top; those that run beside work are hidden as far as work lasts. Hand-written kernels are not in it.
    """
    work = program.cycles / topology.chip.clock
    waited = beside = 0.0
    for c in program.collectives:
        seconds = c.times * c.sent / _rate(c.group, topology, mesh)
        beside += seconds if c.overlapped else 0.0
        waited += 0.0 if c.overlapped else seconds
    return {
        "work_seconds": work,
        "collectives_waited_seconds": waited,
        "collectives_beside_seconds": beside,
        "seconds": max(work, beside) + waited,
    }


def _rate(group: Sequence[int], topology: Topology, mesh: Mesh) -> float:
    """Bytes/s that a device sends within a group: the links of the physical axes that the group lies along."""
    if len(group) < 2:
        return topology.chip.links
    members = [mesh.devices.flat[i] for i in group]
    if len({getattr(d, "slice_index", 0) for d in members}) > 1:
        return topology.chip.network
    coords = [getattr(d, "coords", None) for d in members]
    if coords[0] is None:
        return topology.chip.links
    along = sum(len({place[axis] for place in coords if place is not None}) > 1 for axis in range(len(coords[0])))
    return topology.chip.links * max(along, 1) / len(topology.bounds)


# Products of queries' size with keys' size that one run of each of splash's kernels computes, by what its name holds.
_KERNEL_PRODUCTS = {"mha_fwd": 2, "mha_dkv": 4, "mha_dq": 3}


def kernel_seconds(
    kernels: Mapping[str, int], stage: ResolvedStage, context: int, topology: Topology, mesh: Mesh
) -> float:
    """Seconds of the attention kernels in one call, at half of the peak, on the device that has most to do.

    Positions are split in runs, and later ones see more: of s shares the last does 2 - 1/s times the mean. What is
    recomputed is in the count of runs.

    Raises:
      ValueError: a kernel that is not known, whose time would be left out without a word.
    """
    known = {name: [n for part, n in _KERNEL_PRODUCTS.items() if part in name] for name in kernels}
    if unknown := [name for name, products in known.items() if not products]:
        raise ValueError(
            f"The kernels {', '.join(unknown)} are not known: say in planning/compiled.py what they compute."
        )
    cfg, shape = stage.cfg, mesh.shape
    rows = stage.batch_size // stage.accumulate // (shape["data"] * shape["fsdp"])
    causal_half = 0.5 * context * (context // shape["sequence"]) * (2 - 1 / shape["sequence"])
    product = 2 * rows * cfg.heads // shape["tensor"] * causal_half * cfg.h_dim
    runs = sum(times * known[name][0] for name, times in kernels.items())
    return float(runs * product / (topology.chip.flops * KERNEL_UTILISATION))


def prefer_compiler_memory(
    record: dict[str, Any], stage: ResolvedStage, recipe: Recipe, topology: Topology | None, mesh: Mesh
) -> None:
    """Fits if every program did; the steps' predicted times, with the attention kernels' share, and what follows."""
    said = [about["fits"] for about in record["programs"].values() if "fits" in about]
    if said:
        record["fits"], record["fits_by"] = all(said), "the TPU compiler"
    for about in record["programs"].values():
        if topology is None or "predicted" not in about or not about["kernels"]:
            continue
        predicted = about["predicted"]
        predicted["kernel_seconds"] = kernel_seconds(about["kernels"], stage, recipe.data.context, topology, mesh)
        predicted["seconds"] += predicted["kernel_seconds"]
        tokens = stage.batch_size * recipe.data.context
        needed = costs.train_flops_per_token(stage.cfg, recipe.data.context) * tokens
        predicted["utilisation"] = needed / (mesh.size * topology.chip.flops * predicted["seconds"])
