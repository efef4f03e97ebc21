"""Ahead of time: what a recipe takes on machines that are not there, and proof that its programs compile for them.

Parameters, tokens and bytes of state are exact. FLOPs follow the formula of `costs.forward_flops_per_token`. Saved
activations are counted from the names that blocks save under (`model.SAVED`). With `compiler="tpu"` the TPU compiler
itself says what a program takes; with "cpu" the programs are compiled for as many simulated devices, which proves that
they lower, shard and exchange what they should, and says nothing of a TPU's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from flm_jax import costs
from flm_jax.attention import ATTENDED
from flm_jax.config import ModelConfig
from flm_jax.data.batches import Batch
from flm_jax.generate import generate
from flm_jax.model import SAVED
from flm_jax.planning import hlo
from flm_jax.planning.topology import Topology
from flm_jax.recipe import Recipe, ResolvedStage, Run
from flm_jax.records import as_dict
from flm_jax.sharding import check_slices, fitting_axes, make_mesh, mesh_axes, replicated, spec
from flm_jax.source_checkpoint import begin
from flm_jax.step import StageProgram, quietly_donated

COMPILERS = ("none", "cpu", "tpu")
# Hand-written kernels, whose cycles no compiler estimates, are taken to run at half of the chip's peak.
KERNEL_UTILISATION = 0.5
# What compilers take besides, over what is counted of activations. The peaks of docs/tpu.md, less parameters, moments
# and gradients, are 1.53, 1.55 and 1.02 times what `activations` counts for the three stages.
SLACK = 0.6
_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True)
class Assumptions:
    """What no compiler knows.

    Attributes:
      utilisation: model FLOPs over peak FLOPs, by which days are reckoned.
      storage: bytes/s that one host reads or writes of checkpoints.
    """

    utilisation: float = 0.5
    storage: float = 1e9


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


def programs(
    recipe: Recipe, stage: ResolvedStage, program: StageProgram, previous: StageProgram | None
) -> Iterator[tuple[str, Any]]:
    """Lowers every program of a stage, and names it."""
    mesh = program.mesh
    where = NamedSharding(mesh, spec(("batch", "time")))
    shape = (stage.stage.batch_size, recipe.data.context)
    ids, weights = (jax.ShapeDtypeStruct(shape, dtype, sharding=where) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(inputs_BT=ids, targets_BT=ids, weights_BT=weights, segments_BT=ids)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        if not stage.ready and previous is None:
            yield "initialisation", program.initialiser().lower(key)
        elif not stage.ready:
            assert previous is not None and stage.stage.growth is not None
            program.settle(stage.stage.growth.placeholder)
            with quietly_donated():
                lowered = program.grower(donate=True).lower(previous.abstract_state, key)
            yield "growth", lowered
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


def stages(
    recipe: Recipe,
    run: Run,
    devices: Sequence[Any],
    topology: Topology | None,
    compiler: str = "none",
    assumed: Assumptions | None = None,
    only: Sequence[str] | None = None,
    among: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Plans stage after stage, and compiles what each will run.

    Args:
      recipe: what is to be computed.
      run: how devices are laid out.
      devices: of the machine, or stand-ins that a compiler knows: see `devices_of`.
      topology: the machine; None: whatever `devices` are, of which nothing more is known.
      compiler: "none" lowers only; else see the head of this file.
      assumed: what no compiler knows.
      only: names of programs to compile; None: all that differ in what matters here. On a CPU the growth is compiled
        parameter by parameter: as a whole it takes more memory than a laptop may have. Moments move alike. The rest is
        lowered.
      among: names of stages; None: all.

    Yields:
      What `experiments/plan.py` writes for each stage, JSON-able.

    Raises:
        ValueError: the recipe is wrong, or the mesh does not divide one of its axes.
    """
    assumed = assumed or Assumptions()
    run.check(recipe)
    origin, resolved = begin(recipe)
    if only is None:
        on_tpu = ("growth", "train step with masks", "train step")
        only = on_tpu if compiler == "tpu" else ("growth of parameters", "train step")
    before = None if origin is None else origin.stage
    for stage in resolved:
        if among is not None and stage.stage.name not in among:
            before = stage
            continue
        mesh = make_mesh(run.mesh_of(stage.stage), devices)
        if topology is not None:  # Simulated devices do not say which slice they are in.
            check_slices(mesh.shape["data"], topology.slices)
        program = StageProgram(stage, mesh, recipe.loss_chunks, run.compiler_options)
        program.check_trains(recipe.data.context)
        previous = None if before is None else StageProgram(before, mesh, 1)
        record = _arithmetic(recipe, stage, program, previous, topology, assumed)
        found = record["programs"] = {}
        for name, lowered in programs(recipe, stage, program, previous):
            found[name] = {"lowered": True}
            if compiler != "none" and name in only:
                found[name] |= compiled(lowered, topology, mesh)
            del lowered
        if "growth" in found and "growth of parameters" in only:
            found["growth of parameters"] = _parameter_growth(program, previous, topology)
        _give_memory_back()
        if compiler == "tpu":
            _take_the_compilers_word(record, stage, recipe, topology, mesh)
        yield record
        before = stage


def _parameter_growth(
    program: StageProgram, previous: StageProgram | None, topology: Topology | None
) -> dict[str, Any]:
    """What growing every parameter by itself takes, in all."""
    assert previous is not None
    key = jax.eval_shape(lambda: jax.random.key(0))
    total: dict[str, Any] = {"lowered": True, "fits": True, "compile_seconds": 0.0, "collectives": {}}
    gathers: list[dict[str, Any]] = []
    for grower in program.parameter_growers():
        with jax.set_mesh(program.mesh):
            about = compiled(grower.lower(previous.abstract_state.params, key), topology, program.mesh)
        total["compile_seconds"] += about["compile_seconds"]
        for kind, moved in about["collectives"].items():
            entry = total["collectives"].setdefault(kind, {"count": 0, "sent_bytes": 0.0})
            for name, number in moved.items():
                entry[name] += number
        gathers += [about["largest_gather"]] if about["largest_gather"] else []
        _give_memory_back()
    total["largest_gather"] = max(gathers, key=lambda g: int(g["bytes"]), default=None)
    return total


def _give_memory_back() -> None:
    """Lets go of what was traced and compiled: of a thousand devices' programs it is gigabytes."""
    jax.clear_caches()
    gc.collect()
    # The C library keeps what is freed unless it is told not to; other systems' do as they please.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _arithmetic(
    recipe: Recipe,
    stage: ResolvedStage,
    program: StageProgram,
    previous: StageProgram | None,
    topology: Topology | None,
    assumed: Assumptions,
) -> dict[str, Any]:
    cfg, s, context, mesh = stage.cfg, stage.stage, recipe.data.context, program.mesh
    tokens = s.steps * s.batch_size * context
    per_token = costs.train_flops_per_token(cfg, context)
    state = program.abstract_state
    size = {
        "parameters": _bytes_here(state.params),
        "moments": _bytes_here(state.opt_state),
        "gradients": _bytes_here(state.params) * (2 if s.accumulate > 1 else 1),
        **activations(cfg, s.batch_size // s.accumulate, context, recipe.loss_chunks, mesh),
    }
    size["slack"] = int(SLACK * (size["saved_activations"] + size["working"]))
    size["total"] = sum(size.values())
    record: dict[str, Any] = {
        "name": s.name,
        "model": as_dict(cfg),
        "shape": costs.shape_line(cfg),
        "params": costs.param_count(cfg),
        "steps": s.steps,
        "batch_tokens": s.batch_size * context,
        "tokens": tokens,
        "flops_per_token": per_token,
        "flops": tokens * per_token,
        "mesh": dict(mesh.shape),
        "accumulate": s.accumulate,
        "ramp_steps": stage.ramp_steps,
        "bytes_per_device": size,
        "memory": None,
        "fits": None,
        "days": None,
        "growth": None,
    }
    if topology is not None:
        chip = topology.chip
        record["memory"] = chip.memory
        record["fits_by"] = "arithmetic"
        seconds = tokens * per_token / (topology.devices * chip.flops * assumed.utilisation)
        record["days"] = seconds / 86_400
    if previous is not None and not stage.ready:
        record["growth"] = _growth(previous, program, topology, assumed)
    if topology is not None:
        # At a growth, both states are there.
        growing = 0 if record["growth"] is None else record["growth"]["on_device_bytes"]
        record["fits"] = max(size["total"], growing) <= topology.chip.memory
    return record


def _growth(
    previous: StageProgram, program: StageProgram, topology: Topology | None, assumed: Assumptions
) -> dict[str, Any]:
    """Bytes and seconds to grow: in place on the mesh, all hosts reading and writing; and streamed, by one of them."""
    plan_of_it = program.stage.stage.growth
    assert plan_of_it is not None
    read, written = (_bytes_in_all(p.abstract_state) for p in (previous, program))
    on_device = _bytes_here(previous.abstract_state) + _bytes_here(program.abstract_state)
    record = {
        "method": plan_of_it.name,
        "params_before": costs.param_count(previous.stage.cfg),
        "read_bytes": read,
        "written_bytes": written,
        "on_device_bytes": on_device,
    }
    if topology is not None:
        rate = assumed.storage * topology.hosts
        record |= {
            "read_seconds": read / rate,
            "write_seconds": written / rate,
            "streamed_seconds": (read + written) / assumed.storage,
            "on_device_seconds": on_device / topology.chip.bandwidth,
        }
    return record


def _bytes_here(tree: Any) -> int:
    """Bytes of a tree of `jax.ShapeDtypeStruct`s on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _bytes_in_all(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _products(cfg: ModelConfig) -> dict[str, tuple[str, ...]]:
    """What a block computes between the residual stream and itself, by the names that it saves under: their axes.

    Every parameter that does not write the stream gives a product, named after it; the attention gives one more, which
    is what the writer of heads reads.
    """
    found: dict[str, tuple[str, ...]] = {}
    for path, _, sig in costs.leaves(cfg):
        if sig.stacked and sig.reads:
            if "embed" not in sig.writes:
                found[path.split("/")[-1]] = sig.writes
            elif "heads" in sig.reads:
                found[ATTENDED] = sig.reads
    return found


def activations(cfg: ModelConfig, rows: int, context: int, chunks: int, mesh: Mesh) -> dict[str, int]:
    """Bytes a device of what the forward pass leaves for the backward pass, and of what one layer and the head need.

    Saved: for every layer its input, and what the remat policy names ("dots" and "none" save more than is named; they
    are counted as every product of a block). Working: one layer's gathered weights and their gradient, its products,
    and one chunk of logits.
    """

    def here(axes: Sequence[str], sizes: Sequence[int], itemsize: int) -> int:
        total = itemsize
        for size, names in zip(sizes, fitting_axes(sizes, axes, mesh), strict=True):
            total *= size // math.prod(mesh.shape[name] for name in names)
        return total

    item = cfg.compute.itemsize
    stream = here(("batch", "stream", "residual"), (rows, context, cfg.embed), item)
    whole = here(("batch", "time", "residual"), (rows, context, cfg.embed), item)

    def product(axes: tuple[str, ...]) -> int:
        return here(("batch", "time", *axes), (rows, context, *(cfg.sizes[a] for a in axes)), item)

    inner = {name: product(axes) for name, axes in _products(cfg).items()}
    saved = sum(inner[name] for name in SAVED.get(cfg.remat, tuple(inner)))
    a_layer = stream * (3 if cfg.remat in ("dots", "none") else 1) + saved
    weights = 0
    for _, like, sig in costs.leaves(cfg):
        if sig.stacked:
            parts = math.prod(mesh.shape["tensor"] for axis in sig.axes if "tensor" in mesh_axes(axis))
            weights += math.prod(like.shape[1:]) * item // parts
    logits = here(("batch", "time", "vocab"), (rows, context // chunks, cfg.vocab), 4)
    working = 2 * weights + 2 * sum(inner.values()) + 4 * whole
    return {"saved_activations": cfg.layers * a_layer, "working": max(working, 3 * logits)}


def compiled(lowered: Any, topology: Topology | None, mesh: Mesh) -> dict[str, Any]:
    """What the compiler and its program's text say."""
    start = time.perf_counter()
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    try:
        # On a CPU it is the partitioning that is looked at, and code that runs fast would be made in vain.
        done = lowered.compile(compiler_options=None if on_tpu else _QUICKLY)
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
        raise ValueError(f"The kernels {', '.join(unknown)} are not known: say in ahead.py what they compute.")
    cfg, s, shape = stage.cfg, stage.stage, mesh.shape
    rows = s.batch_size // s.accumulate // (shape["data"] * shape["fsdp"])
    causal_half = 0.5 * context * (context // shape["sequence"]) * (2 - 1 / shape["sequence"])
    product = 2 * rows * cfg.heads // shape["tensor"] * causal_half * cfg.h_dim
    runs = sum(times * known[name][0] for name, times in kernels.items())
    return float(runs * product / (topology.chip.flops * KERNEL_UTILISATION))


def _take_the_compilers_word(
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
        tokens = stage.stage.batch_size * recipe.data.context
        needed = costs.train_flops_per_token(stage.cfg, recipe.data.context) * tokens
        predicted["utilisation"] = needed / (mesh.size * topology.chip.flops * predicted["seconds"])
