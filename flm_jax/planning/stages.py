"""Ahead-of-time planning: parameters, FLOPs, memory and days per stage, without the target hardware.

Parameters, tokens and bytes of state are exact. FLOPs follow the formula of `costs.forward_flops_per_token`. The bytes
of saved activations are counted from the products that each remat policy saves (`model.SAVED`). With `compiler="tpu"`
the memory of a program comes from the TPU compiler itself. With "cpu" the programs are compiled for the same number of
simulated devices: this shows that they lower, how they are sharded and what they exchange, but not the memory of a TPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from flm_jax import costs
from flm_jax.config import ModelConfig
from flm_jax.kernels import ATTENDED
from flm_jax.model import SAVED
from flm_jax.planning.compiled import (
    TAUGHT,
    compiled,
    free_compiled_programs,
    parameter_growth,
    prefer_compiler_memory,
    programs,
)
from flm_jax.planning.muon import orthogonalisation
from flm_jax.planning.topology import Topology
from flm_jax.planning.traffic import least_sent
from flm_jax.recipe import Recipe, Run, begin
from flm_jax.records import as_dict
from flm_jax.sharding import check_slices, fitting_axes, make_mesh, mesh_axes
from flm_jax.step import StageProgram

# Memory that compilers need beyond the counted activations, as a fraction of these. The peaks in docs/tpu.md, minus
# parameters, moments and gradients, are 1.49, 1.50 and 1.02 times the bytes of `activations` for the three stages.
SLACK = 0.6


@dataclass(frozen=True)
class Assumptions:
    """Assumptions that a plan needs and that no compiler provides.

    Attributes:
      utilisation: model FLOPs over peak FLOPs, for the estimate of days.
      storage: bytes/s at which one host reads or writes checkpoints.
    """

    utilisation: float = 0.5
    storage: float = 1e9


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
    """The plan of each stage; the programs that the stage will run are lowered and compiled.

    Args:
      recipe: what is to be computed.
      run: how devices are laid out.
      devices: of the machine, simulated, or descriptions for a compiler (`compiled.devices_of`).
      topology: the machine; None: only `devices` is known.
      compiler: "arithmetic" (count, lower nothing), "none" (lower only), "cpu" or "tpu": see the module's docstring.
      assumed: assumptions that no compiler provides.
      only: names of programs to compile; the others are only lowered. None: with "tpu", the growth and the train steps;
        otherwise the train steps without masks or with a teacher, and the growth, compiled parameter by parameter,
        because as one program it may need more memory than a laptop has (the growth of the moments exchanges the same
        entries).
      among: names of the stages to plan; None: all.

    Yields:
      One JSON-able record per stage, as `experiments/plan.py --json` writes it.

    Raises:
      ValueError: the recipe is not valid, or the mesh does not divide one of its axes.
    """
    assumed = assumed or Assumptions()
    run.check(recipe)
    _, resolved = begin(_placed_anywhere(recipe))
    if only is None:
        on_tpu = ("growth", TAUGHT, "train step with masks", "train step")
        only = on_tpu if compiler == "tpu" else ("growth of parameters", TAUGHT, "train step")
    for stage in resolved:
        if among is not None and stage.name not in among:
            continue
        mesh = make_mesh(run.mesh_of(stage.stage), devices)
        if topology is not None:  # Simulated devices have no slice index, so the mesh did not check this.
            check_slices(mesh.shape["data"], topology.slices)
        program = StageProgram(stage, mesh, recipe.loss_chunks, run.compiler_options)
        program.check_trains(recipe.data.context)
        record = _arithmetic(recipe, program, topology, assumed)
        found = record["programs"] = {}
        for name, lowered in programs(recipe, program) if compiler != "arithmetic" else ():
            found[name] = {"lowered": True}
            if compiler != "none" and name in only:
                found[name] |= compiled(lowered, topology, mesh)
            del lowered
        if compiler != "none" and "growth" in found and "growth of parameters" in only:
            found["growth of parameters"] = parameter_growth(program, topology)
        free_compiled_programs()
        if compiler == "tpu":
            prefer_compiler_memory(record, stage, recipe, topology, mesh)
        yield record


def _placed_anywhere(recipe: Recipe) -> Recipe:
    """The recipe with `depth="distance"` replaced by "interleave": the placement of layers does not change the plan."""
    stages = []
    for stage in recipe.stages:
        growth = stage.growth
        if growth is not None and growth.depth == "distance":
            growth = dataclasses.replace(growth, depth="interleave")
        stages.append(dataclasses.replace(stage, growth=growth))
    return dataclasses.replace(recipe, stages=tuple(stages))


def _arithmetic(
    recipe: Recipe, program: StageProgram, topology: Topology | None, assumed: Assumptions
) -> dict[str, Any]:
    s, context, mesh = program.stage, recipe.data.context, program.mesh
    cfg = s.cfg
    tokens = s.steps * s.batch_size * context
    cost = s.cost(context)
    flops = cost.flops(s.steps)
    state = program.abstract_state
    size = {
        "parameters": _bytes_here(state.params),
        "moments": _bytes_here(state.opt_state),
        "gradients": _bytes_here(program.trained.part(state.params)) * (2 if s.accumulate > 1 else 1),
        **activations(cfg, s.batch_size // s.accumulate, context, recipe.loss_chunks, mesh),
    }
    if s.teacher is not None:
        forward = activations(s.teacher.cfg, s.batch_size // s.accumulate, context, recipe.loss_chunks, mesh)["working"]
        size["teacher"] = _bytes_here(program.abstract_teacher()) + forward
    size["slack"] = int(SLACK * (size["saved_activations"] + size["working"]))
    muon = None
    if s.optimizer.name == "muon":
        muon = orthogonalisation(cfg, s.optimizer.newton_schulz_steps, mesh.shape)
    # The optimizer's arrays take the place of the activations, once these have served the backward pass.
    kept = size["parameters"] + size["moments"] + size["gradients"]
    size["total"] = max(sum(size.values()), kept + int(muon["bytes_per_device"]) if muon else 0)
    record: dict[str, Any] = {
        "name": s.name,
        "model": as_dict(cfg),
        "shape": costs.shape_line(cfg),
        "params": costs.param_count(cfg),
        "trained_params": program.trained.count,
        "steps": s.steps,
        "batch_tokens": s.batch_size * context,
        "tokens": tokens,
        "flops_per_token": cost.flops_per_token,
        "flops": flops,
        "optimizer": s.optimizer.name,
        "orthogonalisation": muon,
        "mesh": dict(mesh.shape),
        "accumulate": s.accumulate,
        "ramp_steps": s.ramp_steps,
        "teacher": None,
        "bytes_per_device": size,
        "least_sent_bytes": least_sent(cfg, s.batch_size, context, mesh.shape, s.accumulate, _trains(program)),
        "memory": None,
        "fits": None,
        "days": None,
        "growth": None,
    }
    if s.teacher is not None:
        record["teacher"] = {
            "params": costs.param_count(s.teacher.cfg),
            "steps": cost.teacher_steps,
            "flops_per_token": cost.teacher_flops_per_token,
            "flops": flops - tokens * cost.flops_per_token,
        }
    if topology is not None:
        chip = topology.chip
        record["memory"] = chip.memory
        record["fits_by"] = "arithmetic"
        seconds = flops / (topology.devices * chip.flops * assumed.utilisation)
        if muon:
            seconds += s.steps * muon["flops_per_device"] / (chip.flops * assumed.utilisation)
        record["days"] = seconds / 86_400
    if s.grows:
        record["growth"] = _growth(program, topology, assumed)
    if topology is not None:
        # During a growth, both states are in memory.
        growing = 0 if record["growth"] is None else record["growth"]["on_device_bytes"]
        record["fits"] = max(size["total"], growing) <= topology.chip.memory
    return record


def _trains(program: StageProgram) -> list[bool]:
    found: list[bool] = jax.tree.leaves(program.trained.leaves)
    return found


def _growth(program: StageProgram, topology: Topology | None, assumed: Assumptions) -> dict[str, Any]:
    """Bytes and seconds of a growth: on the mesh, with all hosts reading and writing, and streamed by one host."""
    lineage, states = program.stage.lineage, (program.state_before, program.abstract_state)
    read, written = map(_bytes_in_all, states)
    on_device = sum(map(_bytes_here, states))
    record = {
        "method": lineage.last_growth.name,
        "params_before": costs.param_count(lineage.before.cfg),
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
    """The axes of each product inside a block that may be saved for the backward pass, by checkpoint name.

    Every stacked parameter that reads and does not write the residual stream has a product with its name. The attention
    has one more: its output, which the output projection reads.
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
    """Bytes per device of activations: those saved for the backward pass, and those needed while computing one layer.

    Saved: for every layer its input, and the products that the remat policy saves ("dots" and "none" save more than
    `model.SAVED` names; they are counted as three inputs and all products of a block). Working: one layer's gathered
    weights, its products, the gradients of both, and four arrays of the residual stream; or three arrays of one chunk's
    logits, if these are larger.
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
    saved = sum(stream if name == "stream" else inner[name] for name in SAVED.get(cfg.remat, tuple(inner)))
    a_layer = stream * (3 if cfg.remat in ("dots", "none") else 1) + saved
    weights = 0
    for _, like, sig in costs.leaves(cfg):
        if sig.stacked:
            parts = math.prod(mesh.shape["tensor"] for axis in sig.axes if "tensor" in mesh_axes(axis))
            weights += math.prod(like.shape[1:]) * item // parts
    logits = here(("batch", "time", "vocab"), (rows, context // chunks, cfg.vocab), 4)
    working = 2 * weights + 2 * sum(inner.values()) + 4 * whole
    return {"saved_activations": cfg.layers * a_layer, "working": max(working, 3 * logits)}
