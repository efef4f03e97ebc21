"""Which model a stage's teacher is, and what is refused; the train step with it, on meshes and in parts; its plan."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flm_jax import costs
from flm_jax.checkpoint import CheckpointError, NoCheckpointError
from flm_jax.data.source import open_data
from flm_jax.distillation import Teacher, resolve_teacher
from flm_jax.growth import Growth
from flm_jax.growth.lineage import Lineage
from flm_jax.planning import stages as planning
from flm_jax.planning import text
from flm_jax.planning.compiled import TAUGHT
from flm_jax.recipe import Run, Stage, check_vocabulary, resolve
from flm_jax.sharding import MeshConfig, make_mesh, put_batch
from flm_jax.source_checkpoint import CheckpointMeta, SourceCheckpoint
from flm_jax.state import TrainState, shardings_of
from flm_jax.step import StageProgram
from tests.runs import LARGE, grown_once, recipe_of
from tests.small import params as small_params
from tests.small import shape

pytestmark = pytest.mark.integration


def source(lineage: Lineage, step: int = 1) -> SourceCheckpoint:
    """The record of a checkpoint without arrays; its vocabulary is said to be one of three ids."""
    found = SourceCheckpoint(Path("elsewhere/1"), step, "0" * 64, CheckpointMeta("first", lineage), trained=True)
    vars(found)["vocabulary"] = SimpleNamespace(kind="bytes", digest="a")
    return found


def test_the_teacher_is_the_model_before_with_the_numerics_of_the_stage(data):
    model = LARGE.replace(compute_dtype="bfloat16")
    found = resolve(grown_once(data, Teacher(steps=4), model=model))[1].teacher
    assert (found.cfg.embed, found.cfg.compute_dtype, found.steps, found.source) == (24, "bfloat16", 4, None)
    held = found.abstract(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    # Gains are computed in float32, all else in the compute dtype, so nothing else need be held.
    dtypes = {str(x.dtype): len(x.shape) for x in jax.tree.leaves(held)}
    assert set(dtypes) == {"bfloat16", "float32"}
    assert held["final_norm"]["scale"].dtype == "float32"
    assert resolve(grown_once(data, Teacher()))[1].teacher.steps == 6
    assert resolve(grown_once(data))[1].teacher is None


def test_what_cannot_teach_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"Stage 'first': Teacher.checkpoint is empty.* has no Growth: name a check"):
        resolve(recipe_of(data, Stage("first", shape(), 3, 8, teacher=Teacher())))
    with pytest.raises(ValueError, match=r"Stage 'second': Teacher.steps=7 is more than its 6 steps"):
        resolve(grown_once(data, Teacher(steps=7)))
    with pytest.raises(NoCheckpointError, match="The teacher cannot be read: .*gone is no directory; give a step"):
        resolve(grown_once(data, Teacher(str(tmp_path / "gone"))))
    mesh = make_mesh(MeshConfig(tensor=8))
    odd = resolve(
        grown_once(data, Teacher(), first={"model": shape(heads=4)}, model=shape(heads=8, kv_heads=8, head_dim=4))
    )
    with pytest.raises(ValueError, match="Stage 'second': its teacher: .*'kv_heads' of size 2 cannot be split"):
        StageProgram(odd[1], mesh, 1).check_trains(16)


def test_a_checkpoint_must_be_settled_and_of_the_same_vocabulary():
    small = Lineage(shape())
    rising = source(small.grown(shape(mlp=64), Growth("mask", ramp_steps=4)), step=1)
    with pytest.raises(ValueError, match="its teacher elsewhere/1 is at step 1, and its masks rise for 3 more steps"):
        resolve_teacher(Teacher("elsewhere"), LARGE, 6, None, rising)
    with pytest.raises(ValueError, match="gives probabilities to 264 ids, and its model only to 256"):
        resolve_teacher(Teacher("elsewhere"), LARGE.replace(vocab=256), 6, None, source(small))
    found = resolve_teacher(Teacher("elsewhere"), LARGE.replace(vocab=300), 6, None, source(small))
    assert found.other_vocabulary(SimpleNamespace(kind="bytes", digest="a"), "one") == ""
    with pytest.raises(ValueError, match="Stage 'one': as its teacher, .* ids mean other text. Take a teacher of"):
        found.other_vocabulary(SimpleNamespace(kind="words", digest="b"), "one")
    with pytest.raises(
        ValueError, match="Stage 'one': the vocabulary has 265 tokens, its teacher's embedding only 264"
    ):
        found.check_ids(265, "one")
    with pytest.raises(
        CheckpointError, match="elsewhere/1 has the digest 0{64}, and the teacher that this stage began"
    ):
        found.restore(make_mesh(MeshConfig()), "1" * 64, Path("elsewhere/1"))


def test_a_vocabulary_that_the_teacher_does_not_know_is_refused_with_the_stage(data):
    grown = resolve(grown_once(data, Teacher(), model=LARGE.replace(vocab=272)))
    check_vocabulary(grown, 264)
    with pytest.raises(ValueError, match="Stage 'first': the vocabulary has 270 tokens"):
        check_vocabulary(grown, 270)
    with pytest.raises(ValueError, match="Stage 'second': the vocabulary has 270 tokens, its teacher's embedding"):
        check_vocabulary(grown[1:], 270)


def test_meshes_chunks_and_parts_take_the_same_steps_and_the_model_comes_nearer(data):
    whole = grown_once(data, Teacher(weight=1.0, decay="constant", steps=5))
    parts = grown_once(data, Teacher(weight=1.0, decay="constant", steps=5), accumulate=2)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    like = StageProgram(resolve(whole)[1], one, 1).abstract_state
    moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like.opt_state)
    # NumPy's: an array of one device would be given to the first program.
    weights, own = jax.device_get((small_params(shape()), small_params(LARGE, seed=1)))
    first = TrainState(np.zeros((), np.int32), own, moments)
    found = []
    for of, mesh, chunks in ((whole, one, 1), (parts, make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2)), 4)):
        program = StageProgram(resolve(of)[1], mesh, chunks)
        batches = open_data(data).train()
        with jax.set_mesh(mesh):
            state = jax.device_put(first, program.shardings)
            teacher = jax.device_put(weights, shardings_of(program.abstract_teacher()))
            step, metrics = program.stepper(False), []
            for _ in range(4):
                batch = batches.next(8)
                batch.weights_BT[:3] = 0  # parts must be weighted by what counts in them
                state, measured = step(state, put_batch(batch, mesh), teacher=teacher)
                metrics.append([float(x) for x in (measured.loss, measured.kl, measured.grad_norm, measured.bad)])
        assert not any(x.is_deleted() for x in jax.tree.leaves(teacher))
        found.append(metrics)
    np.testing.assert_allclose(*found, rtol=2e-4)
    kl = [values[1] for values in found[0]]
    assert kl[-1] < 0.9 * kl[0]


def test_without_the_teacher_the_step_is_that_of_a_stage_that_has_none(data):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = open_data(data).train().next(8)
    texts = []
    for teacher in (Teacher(), None):
        program = StageProgram(resolve(grown_once(data, teacher))[1], mesh, 1)
        with jax.set_mesh(mesh):
            texts.append(program.stepper(False).lower(program.abstract_state, batch, teacher=None).as_text())
    assert texts[0] == texts[1]


def test_a_plan_counts_the_teacher(data):
    growth = Growth("mask", ramp_steps=4)
    run = Run(mesh=MeshConfig(fsdp=2, tensor=2))
    taught, alone = (
        next(planning.stages(grown_once(data, t, growth), run, jax.devices(), None, compiler, among=["second"]))
        for t, compiler in ((Teacher(steps=2), "none"), (None, "arithmetic"))
    )
    forward = costs.forward_flops_per_token(resolve(grown_once(data))[0].cfg, 16)
    assert taught["flops"] == alone["flops"] + 2 * 8 * 16 * forward
    assert taught["flops_per_token"] == alone["flops_per_token"]
    held = taught["bytes_per_device"]
    assert held["teacher"] > costs.param_count(shape()) * 4 / 4
    assert held["total"] == alone["bytes_per_device"]["total"] + held["teacher"]
    assert list(taught["programs"]) == ["growth", TAUGHT, "train step with masks", "train step"]
    assert "a teacher of" in text.stage_text(taught) and "a teacher" not in text.stage_text(alone)
