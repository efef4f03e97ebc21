"""Lowering and compiling a stage's programs for a target topology; memory, collectives and predicted time of each."""

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
from flm_jax.generation import Sampling
from flm_jax.generation.decode import continued
from flm_jax.planning import hlo
from flm_jax.planning.topology import Topology
from flm_jax.recipe import Recipe, ResolvedStage
from flm_jax.records import counted
from flm_jax.sharding import spec
from flm_jax.step import StageProgram, parameter_growers, quietly_donated

# The program of a stage's first steps, if these have a teacher; with masks, if they have some.
TAUGHT = "train step with a teacher"
COMPILERS = ("arithmetic", "none", "cpu", "tpu")
# Assumed fraction of the chip's peak at which hand-written kernels run; the compiler does not estimate their cycles.
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
            f"{topology.name} has {counted(topology.devices, 'device')} and {len(jax.devices())} are simulated: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices} before JAX starts."
        )
    return jax.devices()[: topology.devices]


def _tpu_devices(topology: Topology) -> Sequence[Any]:
    if topology.chip.compiler is None:
        raise ValueError(f"{topology.name}: the TPU compiler does not compile for it; use --compiler=cpu.")
    # libtpu asks a TPU host for these values; this host does not have them.
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
            f"The TPU compiler was not found ({str(error).splitlines()[0]}). `make test-tpu` installs libtpu beside "
            "the environment; set TPU_LIBRARY_PATH to the path of its libtpu.so."
        ) from error
    return list(found.devices)


def programs(recipe: Recipe, program: StageProgram) -> Iterator[tuple[str, Any]]:
    """The name and the lowered form of every program of a stage."""
    stage, mesh = program.stage, program.mesh
    where = NamedSharding(mesh, spec(("batch", "time")))
    shape = (stage.batch_size, recipe.data.context)
    ids, weights = (jax.ShapeDtypeStruct(shape, dtype, sharding=where) for dtype in (jnp.int32, jnp.float32))
    packing = recipe.data.packing
    segments, positions = (None if packing == "joined" else ids), (ids if packing == "restarted" else None)
    batch = Batch(ids, ids, weights, segments, positions_BT=positions)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        if stage.grows:
            with quietly_donated():
                lowered = program.grower(donate=True).lower(program.state_before, key)
            yield "growth", lowered
        elif not stage.continues:
            yield "initialisation", program.initialiser().lower(key)
        teacher = program.abstract_teacher()
        if teacher is not None:
            first = program.stepper(masked=stage.ramp_steps > 0)
            yield TAUGHT, first.lower(program.abstract_state, batch, teacher=teacher)
        if stage.ramp_steps > stage.teacher_steps:
            yield "train step with masks", program.stepper(masked=True).lower(program.abstract_state, batch)
        if stage.teacher_steps < stage.steps:
            yield "train step", program.stepper(masked=False).lower(program.abstract_state, batch)


def decoding(program: StageProgram, rows: int, context: int, tokens: int = 64) -> Any:
    """The lowered program that adds `tokens` tokens to prompts of `context - tokens` tokens, in `rows` rows."""
    mesh, cfg = program.mesh, program.stage.cfg
    where = NamedSharding(mesh, spec(("batch", "time")))
    prompt = jax.ShapeDtypeStruct((rows, context - tokens), jnp.int32, sharding=where)
    with jax.set_mesh(mesh):
        return continued.lower(cfg, program.abstract_state.params, prompt, tokens, Sampling(temperature=0.7))


def parameter_growth(program: StageProgram, topology: Topology | None) -> dict[str, Any]:
    """The record of growing each parameter by a program of its own: compile time and collectives, summed over all."""
    lineage, mesh = program.stage.lineage, program.mesh
    before = program.state_before.params
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
    """Frees the memory of traced and compiled programs; for a thousand devices it is gigabytes."""
    jax.clear_caches()
    gc.collect()
    # The C library keeps freed memory unless malloc_trim is called; systems without glibc have no such call.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def compiled(lowered: Any, topology: Topology | None, mesh: Mesh) -> dict[str, Any]:
    """Compiles a program; returns bytes per device, collectives, kernels and predicted time, or why it does not fit."""
    start = time.perf_counter()
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    try:
        # On a CPU only the partitioning matters, since the program is never run; so the compiler may skip optimisation.
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
    record["most_sent"] = program.most_sent(8)
    gather = program.largest("all-gather")
    record["largest_gather"] = None if gather is None else {"shape": gather.shape, "bytes": gather.result}
    record["gathers"] = sorted({c.shape for c in program.collectives if c.kind == "all-gather"})
    record["kernels"] = dict(program.kernels)
    record["unread"] = program.unread
    if topology is not None and topology.chip.clock and program.cycles:
        record["predicted"] = predicted(program, topology, mesh)
    return record


def predicted(program: hlo.Program, topology: Topology, mesh: Mesh) -> dict[str, float]:
    """Predicted seconds of one call, from the compiler's estimated cycles and the bandwidth of the links; not measured.

    Work is the compiler's estimate for every operation, with loops counted in full. The time of collectives that the
    program waits for is added. Asynchronous collectives overlap with work and count only if they take longer than it.
    Hand-written kernels are not included.
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
    """Bytes/s that a device sends within a group: the bandwidth of its links along the group's physical axes."""
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


# The number of (queries x keys) matrix products in one run of each splash kernel, by a part of the kernel's name.
_KERNEL_PRODUCTS = {"mha_fwd": 2, "mha_dkv": 4, "mha_dq": 3}


def kernel_seconds(
    kernels: Mapping[str, int], stage: ResolvedStage, context: int, topology: Topology, mesh: Mesh
) -> float:
    """Seconds of the attention kernels in one call, at half of the peak, on the device with the most work.

    Positions are split into contiguous parts, and later positions see more keys: of s parts, the last has 2 - 1/s times
    the mean work. Recomputation is included in the number of runs.

    Raises:
      ValueError: a kernel is unknown, so its time cannot be computed.
    """
    known = {name: [n for part, n in _KERNEL_PRODUCTS.items() if part in name] for name in kernels}
    if unknown := [name for name, products in known.items() if not products]:
        raise ValueError(
            f"The kernels {', '.join(unknown)} are unknown: add their products to _KERNEL_PRODUCTS in "
            "flm_jax/planning/compiled.py."
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
    """Updates a stage's record in place with the TPU compiler's results.

    The stage fits if every compiled program does. The time of the attention kernels is added to the predicted times,
    and the model FLOPs utilisation is computed from these.
    """
    said = [about["fits"] for about in record["programs"].values() if "fits" in about]
    if said:
        record["fits"], record["fits_by"] = all(said), "the TPU compiler"
    for name, about in record["programs"].items():
        # The kernels of a step with a teacher are those of two models, which their names do not tell apart.
        if topology is None or "predicted" not in about or not about["kernels"] or name == TAUGHT:
            continue
        predicted = about["predicted"]
        predicted["kernel_seconds"] = kernel_seconds(about["kernels"], stage, recipe.data.context, topology, mesh)
        predicted["seconds"] += predicted["kernel_seconds"]
        tokens = stage.batch_size * recipe.data.context
        needed = costs.train_flops_per_token(stage.cfg, recipe.data.context) * tokens
        predicted["utilisation"] = needed / (mesh.size * topology.chip.flops * predicted["seconds"])
