"""Ahead-of-time planning: parameters, FLOPs, memory and days per stage, for machines that are not here.

Parameters, tokens and bytes of state are exact. FLOPs follow the formula of `costs.forward_flops_per_token`. Saved
activations are counted from the names that blocks save under (`model.SAVED`). With `compiler="tpu"` the TPU compiler
itself says what a program takes; with "cpu" the programs are compiled for as many simulated devices, which proves that
they lower, shard and exchange what they should, and says nothing of a TPU's memory.
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
from flm_jax.attention import ATTENDED
from flm_jax.config import ModelConfig
from flm_jax.growth.lineage import Lineage
from flm_jax.model import SAVED
from flm_jax.planning.compiled import (
    compiled,
    free_compiled_programs,
    parameter_growth,
    prefer_compiler_memory,
    programs,
)
from flm_jax.planning.topology import Topology
from flm_jax.recipe import Recipe, Run, begin
from flm_jax.records import as_dict
from flm_jax.sharding import check_slices, fitting_axes, make_mesh, mesh_axes
from flm_jax.state import abstract_state
from flm_jax.step import StageProgram

# What compilers take besides, over what is counted of activations. The peaks of docs/tpu.md, less parameters, moments
# and gradients, are 1.53, 1.55 and 1.02 times what `activations` counts for the three stages.
SLACK = 0.6


@dataclass(frozen=True)
class Assumptions:
    """What no compiler knows.

    Attributes:
      utilisation: model FLOPs over peak FLOPs, by which days are reckoned.
      storage: bytes/s that one host reads or writes of checkpoints.
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
    _, resolved = begin(_placed_anywhere(recipe))
    if only is None:
        on_tpu = ("growth", "train step with masks", "train step")
        only = on_tpu if compiler == "tpu" else ("growth of parameters", "train step")
    for stage in resolved:
        if among is not None and stage.name not in among:
            continue
        mesh = make_mesh(run.mesh_of(stage.stage), devices)
        if topology is not None:  # Simulated devices do not say which slice they are in.
            check_slices(mesh.shape["data"], topology.slices)
        program = StageProgram(stage, mesh, recipe.loss_chunks, run.compiler_options)
        program.check_trains(recipe.data.context)
        record = _arithmetic(recipe, program, topology, assumed)
        found = record["programs"] = {}
        for name, lowered in programs(recipe, program):
            found[name] = {"lowered": True}
            if compiler != "none" and name in only:
                found[name] |= compiled(lowered, topology, mesh)
            del lowered
        if "growth" in found and "growth of parameters" in only:
            found["growth of parameters"] = parameter_growth(program, topology)
        free_compiled_programs()
        if compiler == "tpu":
            prefer_compiler_memory(record, stage, recipe, topology, mesh)
        yield record


def _placed_anywhere(recipe: Recipe) -> Recipe:
    """The recipe with layers placed without measuring distances: where they go changes nothing that is planned."""
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
        "ramp_steps": s.ramp_steps,
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
    if s.grows:
        record["growth"] = _growth(s.lineage, mesh, topology, assumed)
    if topology is not None:
        # At a growth, both states are there.
        growing = 0 if record["growth"] is None else record["growth"]["on_device_bytes"]
        record["fits"] = max(size["total"], growing) <= topology.chip.memory
    return record


def _growth(lineage: Lineage, mesh: Mesh, topology: Topology | None, assumed: Assumptions) -> dict[str, Any]:
    """Bytes and seconds to grow: in place on the mesh, all hosts reading and writing; and streamed, by one of them."""
    states = [abstract_state(of, mesh) for of in (lineage.before, lineage)]
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
