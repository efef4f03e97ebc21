"""Plans of small and of full-size recipes: what adds up, what is compiled, what fits, and what is refused."""

import dataclasses
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from flm_jax import costs
from flm_jax.config import small_52b, small_102b
from flm_jax.data.config import DataConfig
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.growth import Growth
from flm_jax.optimizer import OptimizerConfig
from flm_jax.planning import compiled, stages, text
from flm_jax.planning.topology import topology
from flm_jax.recipe import Recipe, Run, Stage, resolve
from flm_jax.records import from_dict
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.state import abstract_state
from flm_jax.step import StageProgram, make_grower, quietly_donated
from tests.environment import as_user

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent


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


def test_a_plan_of_muon_has_one_moment_for_matrices_and_says_what_it_computes():
    muon = OptimizerConfig(name="muon", newton_schulz_steps=3)
    small = Recipe((Stage("one", small_52b(260), 5, 16, muon),), DataConfig(vocabulary=Bytes(), context=64))
    given = (Run(mesh=MeshConfig(fsdp=2, tensor=4)), jax.devices(), topology("h100-8"), "arithmetic")
    (found,) = stages.stages(small, *given)
    cfg = small.stages[0].model
    parts = [(math.prod(x.shape) / (2 if sig.gains else 8), sig) for _, x, sig in costs.leaves(cfg)]
    moments = sum(size * (1 if sig.is_matrix_like else 2) for size, sig in parts)
    assert found["bytes_per_device"]["moments"] == 4 * moments + 4
    said = found["orthogonalisation"]
    assert said["flops"] == costs.orthogonalisation_flops(cfg, 3)
    # Four layers on two groups of four devices, which split the products of long sides and repeat those of short ones.
    assert said["flops"] / 8 < said["flops_per_device"] < said["flops"] / 2
    a, b = sorted((cfg.embed, cfg.mlp))
    assert said["bytes_per_device"] == 2 * 4 * (3 * a * b / 4 + 2 * a * a)
    seconds = found["flops"] / 8 + 5 * said["flops_per_device"]
    assert found["days"] == pytest.approx(seconds / (989e12 * 0.5) / 86_400)
    assert f"Muon orthogonalises in {said['flops']:.3g} FLOPs per step" in text.stage_text(found)


def test_arithmetic_lowers_nothing_and_none_compiles_nothing(monkeypatch):
    monkeypatch.setattr(stages, "compiled", lambda *given: pytest.fail("a program was compiled"))
    monkeypatch.setattr(stages, "parameter_growth", lambda *given: pytest.fail("a growth was compiled"))
    lowered = list(stages.stages(recipe(), RUN, jax.devices(), topology("h100-8"), "none"))
    monkeypatch.setattr(stages, "programs", lambda *given: pytest.fail("a program was lowered"))
    counted = list(stages.stages(recipe(), RUN, jax.devices(), topology("h100-8"), "arithmetic"))
    assert [list(stage["programs"]) for stage in lowered] == [
        ["initialisation", "train step"],
        ["growth", "train step with masks", "train step"],
    ]
    assert counted == [{**stage, "programs": {}} for stage in lowered]
    assert "lowered" not in text.stage_text(counted[1])


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
    for remat in ("full", "mlp", "inner", "products", "none"):
        cfg = small_52b().replace(remat=remat)
        sizes[remat] = stages.activations(cfg, 8, 64, 1, mesh)["saved_activations"]
    B, T, D, F, tensor = 8 // 2, 64 // 2, cfg.embed, cfg.mlp, 2
    stream, product = B * T * D // tensor * 4, B * T * F // tensor * 4
    assert sizes["full"] == cfg.layers * stream
    assert sizes["mlp"] == cfg.layers * (stream + 2 * product)
    assert sizes["inner"] == sizes["mlp"] + cfg.layers * 4 * stream
    assert sizes["products"] == sizes["inner"] + cfg.layers * stream
    assert sizes["none"] > sizes["products"]


def run_plan(*arguments):
    command = [sys.executable, str(ROOT / "experiments/plan.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=as_user())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
