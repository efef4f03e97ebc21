"""Planning: topologies, what a compiled program's text says, and plans of small and of full-size recipes."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flm_jax import costs
from flm_jax.config import small_52b, small_102b
from flm_jax.data.config import DataConfig
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.growth import Growth
from flm_jax.planning import compiled, hlo, stages, text
from flm_jax.planning.topology import CHIPS, topology
from flm_jax.recipe import Recipe, Run, Stage, resolve
from flm_jax.records import from_dict
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.state import abstract_state
from flm_jax.step import StageProgram, make_grower, quietly_donated

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "devices", "bounds", "hosts", "slices"),
    [
        ("v5p-2048", 1024, (8, 8, 16), 256, 1),
        ("v4-128", 64, (4, 4, 4), 16, 1),
        ("2xv5e-256", 512, (16, 16), 128, 2),
        ("v5litepod-16", 16, (4, 4), 4, 1),
        ("v6e-8", 8, (2, 4), 2, 1),
        ("h100-64", 64, (64,), 8, 1),
        ("H200-8", 8, (8,), 1, 1),
    ],
)
def test_topologies_by_their_makers_names(name, devices, bounds, hosts, slices):
    found = topology(name)
    assert (found.devices, found.bounds, found.hosts, found.slices) == (devices, bounds, hosts, slices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-2000", "counts TensorCores, two per chip, and the nearest sizes are v5p-1920 and v5p-2048"),
        ("h100-12", "the nearest sizes are h100-8 and h100-16"),
        ("v9-8", "the chips are v4, v5e, v5p, v6e, h100, h200"),
        ("pod", "such as v5p-2048, or 2xv5e-256 for two slices"),
        ("0xv5e-16", "no topology"),
    ],
)
def test_unknown_topologies_are_refused_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        topology(name)


def test_every_chip_names_its_source_and_a_clock_that_fits_its_peak():
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2}
    for name, chip in CHIPS.items():
        assert chip.source
        if name in units:
            assert 2 * units[name] * chip.clock == pytest.approx(chip.flops, rel=0.02)


TEXT = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
}

%all-reduce-scatter.1 (p: bf16[64,8]) -> bf16[16,8] {
  %all-reduce.9 = bf16[64,8]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,4,8,12},{1,5,9,13}}, to_apply=%add
}

%piece (p: f32[4]) -> f32[16] {
  %all-gather.7 = f32[16]{0} all-gather(%p), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
}

%cond (s: (s32[], f32[4])) -> pred[] {
  %c = s32[]{:T(128)} constant(10)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.1 = f32[16]{0} fusion(%x), kind=kLoop, calls=%piece, backend_config={"estimated_cycles":"100"}
  %fusion.2 = f32[16]{0} fusion(%x), kind=kLoop, calls=%piece, backend_config={"estimated_cycles":"100"}
  %fusion.3 = bf16[16,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel.4 = (f32[4]{0}) custom-call(%q), custom_call_target="tpu_custom_call", backend_config={"x": {
}}, metadata={op_name="k"}
  ROOT %t = (s32[], f32[4]) tuple(%i, %x)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4]) while(%init), condition=%cond, body=%body
  %all-to-all.2 = f32[8,2]{1,0} all-to-all(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}
  %permute.3 = (f32[4], f32[4], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,2}}
}
"""


@pytest.mark.parametrize(
    ("line", "sent", "unread"),
    [
        ("%a = (f32[4]{0}, f32[4]{0}, f32[8]{0}) all-gather(%x, %y, %z), replica_groups={{0,1,2,3}}", 64 * 3 / 4, 0),
        ("%a = (f32[4]{0}, f32[4]{0}) all-to-all(%x, %y), replica_groups={{0,1}}", 32 / 2, 0),
        ("%a = (f32[4], f32[2]) all-reduce-start(%x, %y), replica_groups={{0,1}}", 24.0, 0),
        ("%a = ((f32[2], f32[1]), (f32[8], f32[4])) all-gather-start(%x, %y), replica_groups={{0,1,2,3}}", 36.0, 0),
        ("%a = f32[16]{0} all-gather(%x), replica_groups={}, dimensions={0}", 64 * 7 / 8, 0),
        ("%a = f8e4m3fn[16]{0} all-gather(%x), replica_groups={{0,1}}", 8.0, 0),
        ("%a = c64[16]{0} all-gather(%x), replica_groups={{0,1}}", 0.0, 1),
        ("%a = f32[16]{0} all-gather(%x), replica_groups=somehow", 0.0, 1),
    ],
)
def test_every_form_of_a_collective_is_read_or_counted_as_unread(line, sent, unread):
    found = hlo.read(f"HloModule m, num_partitions=8\n\nENTRY %main (x: f32[4]) -> f32[4] {{\n  {line}\n}}\n")
    assert sum(c.sent for c in found.collectives) == sent
    assert found.unread == unread


def test_a_programs_text_is_read_with_loops_and_cut_up_collectives():
    found = hlo.read(TEXT)
    assert found.cycles == 10 * 200
    assert found.kernels == {"kernel": 10}
    assert found.unread == 0
    gather, scatter, exchange, permute = found.collectives
    # Met in two fusions, by one channel: once, and beside other work.
    assert (gather.kind, gather.result, gather.group, gather.times) == ("all-gather", 64, (0, 4, 8, 12), 10)
    assert gather.overlapped
    assert not scatter.overlapped
    assert (scatter.kind, scatter.result, scatter.sent) == ("reduce-scatter", 1024, 1024 * 3 / 4)
    assert (exchange.kind, exchange.group, exchange.sent) == ("all-to-all", (0, 4), 32.0)
    assert (permute.kind, permute.result, permute.overlapped) == ("collective-permute", 16, True)


def test_collectives_of_a_real_program_are_counted():
    """A scanned product of split rows and a split inner dimension: one all-reduce a round, of a known size."""
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "tensor")))
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor", None)))

    def f(x, w):
        def body(x, _):
            return jax.lax.with_sharding_constraint(x @ w, x_where), None

        return jax.lax.scan(body, x, length=5)[0]

    x_where = PartitionSpec("data", "tensor")
    with jax.set_mesh(mesh):
        found = hlo.read(jax.jit(f).lower(x, w).compile().as_text())
    reduces = [c for c in found.collectives if c.kind in ("all-reduce", "reduce-scatter")]
    assert sum(c.times for c in reduces) == 5
    assert {(c.result, len(c.group)) for c in reduces} == {(4 * 64 * 4, 4)}


def recipe(**changes):
    first = Stage("first", small_52b(260), 4, 16)
    growth = Growth("mask", ramp_steps=2)
    second = Stage("second", small_102b(260), 3, 16, growth=growth, accumulate=2)
    return Recipe((first, second), DataConfig(vocabulary=Bytes(), context=64), **changes)


RUN = Run(mesh=MeshConfig(fsdp=2, tensor=4), meshes={"second": MeshConfig(fsdp=4, tensor=1, data=2)})


def test_a_plan_adds_up():
    small = Recipe((Stage("one", small_52b(260), 5, 16),), DataConfig(vocabulary=Bytes(), context=64))
    (found,) = stages.stages(small, Run(mesh=MeshConfig(fsdp=2, tensor=4)), jax.devices(), topology("h100-8"), "none")
    cfg = small.stages[0].model
    assert found["params"] == costs.param_count(cfg)
    assert found["tokens"] == 5 * 16 * 64
    assert found["flops"] == found["tokens"] * costs.train_flops_per_token(cfg, 64)
    # All but the gains is split over both axes of the mesh.
    split = sum(math.prod(x.shape) / (2 if sig.gains else 8) for _, x, sig in costs.leaves(cfg))
    assert found["bytes_per_device"]["parameters"] == 4 * split
    assert found["bytes_per_device"]["moments"] == 2 * 4 * split + 4  # and the count of steps
    assert found["fits"]
    assert found["days"] == pytest.approx(found["flops"] / (8 * 989e12 * 0.5) / 86_400)


def test_growths_are_compiled_from_mesh_to_mesh_and_gather_no_matrix():
    only = ("growth", "train step")
    found = list(stages.stages(recipe(), RUN, jax.devices(), None, "cpu", only=only))
    assert [set(record["programs"]) for record in found] == [
        {"initialisation", "train step"},
        {"growth", "train step with masks", "train step"},
    ]
    assert found[1]["mesh"] == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
    grown = found[1]["programs"]["growth"]
    assert grown["fits"]
    assert grown["largest_gather"] is None or grown["largest_gather"]["bytes"] <= 80 * 5 * 4  # the norms' scales
    growth = found[1]["growth"]
    assert growth["written_bytes"] == 12 * found[1]["params"] + 8
    assert growth["read_bytes"] == 12 * found[0]["params"] + 8
    shown = "\n".join(map(text.stage_text, found))
    assert "grows from" in shown
    total = text.totals(found)
    assert total["flops"] == sum(record["flops"] for record in found)
    assert total["scratch_flops"] == total["tokens"] * found[1]["flops_per_token"]


def test_what_keeps_its_shape_in_a_growth_keeps_its_memory():
    """In depth alone, the embedding, the head and their moments do."""
    cfg = small_52b(260)
    growth = Growth("zero")
    first, second = Stage("a", cfg, 1, 16), Stage("b", cfg.replace(layers=6), 1, 16, growth=growth)
    before, after = resolve(Recipe((first, second), DataConfig(vocabulary=Bytes(), context=64)))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    state = abstract_state(before.lineage, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    kept = 3 * 2 * 260 * cfg.embed * 4 // 8
    with jax.set_mesh(mesh), warnings.catch_warnings(action="error"), quietly_donated():
        for donate, least, most in ((True, kept, 2 * kept), (False, 0, 0)):
            done = make_grower(after.lineage, mesh, donate).lower(state, key).compile()
            assert least <= done.memory_analysis().alias_size_in_bytes <= most


def test_generation_lowers_and_compiles_for_a_mesh():
    (stage,) = resolve(Recipe((Stage("a", small_52b(260), 1, 16),), DataConfig(vocabulary=Bytes(), context=64)))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    about = compiled.compiled(compiled.decoding(StageProgram(stage, mesh, 1), 2, 64, tokens=8), None, mesh)
    assert about["fits"]
    assert about["bytes_per_device"]["arguments"] > 0


def test_a_mesh_for_a_stage_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="Run.meshes names third; the stages are first, second"):
        list(stages.stages(recipe(), Run(meshes={"third": MeshConfig()}), jax.devices(), None))


def test_a_sequence_axis_that_does_not_divide_the_context_is_refused_with_sizes_that_do():
    odd = dataclasses.replace(recipe(), data=DataConfig(vocabulary=Bytes(), context=36))
    for sequence in (8, -1):
        run = Run(mesh=MeshConfig(data=1, sequence=sequence))
        with pytest.raises(ValueError, match="sequence=8 does not divide the context of 36 tokens.*are 6 and 9"):
            list(stages.stages(odd, run, jax.devices(), None))


def test_a_stage_may_train_on_a_mesh_that_could_not_train_the_one_before():
    first = dataclasses.replace(recipe().stages[0], batch_size=4, accumulate=2)
    both = dataclasses.replace(recipe(), stages=(first, recipe().stages[1]))
    run = Run(mesh=MeshConfig(fsdp=2, tensor=4), meshes={"second": MeshConfig(data=8)})
    found = list(stages.stages(both, run, jax.devices(), None))
    assert "growth" in found[1]["programs"]
    with pytest.raises(ValueError, match="'first': batch_size=4 must be a multiple of.* = 16, such as 16"):
        list(stages.stages(both, Run(), jax.devices(), None))


def test_what_does_not_fit_at_a_growth_does_not_fit():
    """A step of one row is small; at a growth the old state and the new one are there together."""
    cfg = small_52b(260)
    first = Stage("a", cfg.replace(layers=7), 1, 1)
    second = Stage("b", cfg.replace(layers=8), 1, 1, growth=Growth("zero"))
    both = Recipe((first, second), DataConfig(vocabulary=Bytes(), context=8))
    machine = topology("h100-1")
    *_, found = stages.stages(both, Run(), jax.devices()[:1], machine)
    step, growing = found["bytes_per_device"]["total"], found["growth"]["on_device_bytes"]
    assert found["fits"]
    assert step < growing
    tight = dataclasses.replace(machine, chip=dataclasses.replace(machine.chip, memory=(step + growing) / 2))
    *_, found = stages.stages(both, Run(), jax.devices()[:1], tight)
    assert not found["fits"]


def test_saved_activations_follow_the_remat_policy():
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))
    sizes = {}
    for remat in ("full", "mlp", "inner", "none"):
        cfg = small_52b().replace(remat=remat)
        sizes[remat] = stages.activations(cfg, 8, 64, 1, mesh)["saved_activations"]
    B, T, D, F, tensor = 8 // 2, 64 // 2, cfg.embed, cfg.mlp, 2
    stream, product = B * T * D // tensor * 4, B * T * F // tensor * 4
    assert sizes["full"] == cfg.layers * stream
    assert sizes["mlp"] == cfg.layers * (stream + 2 * product)
    assert sizes["inner"] == sizes["mlp"] + cfg.layers * 4 * stream
    assert sizes["none"] > sizes["inner"]


def run_plan(*arguments):
    command = [sys.executable, str(ROOT / "experiments/plan.py"), *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5p-2000"], "nearest sizes are v5p-1920 and v5p-2048"),
        (["--topology=h100-8", "--gin_bindings=MeshConfig.tensor = 3"], "does not fit 8 devices"),
        (["--topology=v5p-128"], "64 devices"),
        (["--topology=2xv5p-1024", "--compiler=none"], "data=1 must be a multiple of the 2 slices"),
        (["--topology=h100-8", "--compiler=tpu"], "the TPU compiler does not compile for it; use --compiler=cpu"),
        (["--topology=v4-16", "--gin_bindings=MeshConfig.fsdp = 1", "--gin_bindings=MeshConfig.tensor = 8",
          "--gin_bindings=Recipe.loss_chunks = 3"], "loss_chunks=3 must divide"),
    ],
)  # fmt: skip
def test_wrong_plans_end_with_one_sentence(arguments, message):
    done = run_plan("--gin_file=gin_configs/recipes/tele_flm_1t.gin", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_full_size_recipe_plans_lowers_and_compiles(tmp_path):
    """52B, 102B and 1T for 1,024 simulated devices: the real train steps and growths."""
    out = tmp_path / "plan.json"
    done = run_plan("--gin_file=gin_configs/recipes/tele_flm_1t.gin", "--topology=v5p-2048", f"--json={out}")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [stage["name"] for stage in found["stages"]] == ["52b", "102b", "1t"]
    for stage, billions in zip(found["stages"], (52.85, 102.24, 1083.8), strict=True):
        assert stage["params"] / 1e9 == pytest.approx(billions, rel=1e-3)
        assert stage["fits"]
        step, size = stage["programs"]["train step"], stage["bytes_per_device"]
        assert step["bytes_per_device"]["arguments"] == pytest.approx(size["parameters"] + size["moments"], rel=1e-3)
        assert step["collectives"]
    for stage in found["stages"][1:]:
        # No parameter is ever whole on a device. (The CPU's partitioner gathers a `tensor` share of one; the
        # TPU's gathers nothing, see docs/tpu.md.)
        cfg = from_dict(stage["model"])
        smallest = 4 * min(x.size for _, x, sig in costs.leaves(cfg) if sig.stacked and not sig.gains)
        gather = stage["programs"]["growth of parameters"]["largest_gather"]
        assert gather is None or gather["bytes"] < smallest / stage["mesh"]["tensor"]
    assert "All stages: 2.316 T tokens" in done.stdout
