"""Training only what is new: old entries and their moments stay bit for bit, and nothing else has any state."""

import dataclasses
import json
import shutil
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from flm_jax import costs
from flm_jax import train as training
from flm_jax.checkpoint import checksum, manifest
from flm_jax.checkpoint_growth import grow_checkpoint, verify_checkpoints
from flm_jax.cli import configure
from flm_jax.data.batches import Batch
from flm_jax.growth import Growth, Lineage, Ramp, grow
from flm_jax.growth.lineage import lineage_of
from flm_jax.growth.trained import Trained
from flm_jax.loss import loss_sum
from flm_jax.model import declared
from flm_jax.optimizer import AVERAGES, OptimizerConfig, in_form, is_masked
from flm_jax.planning import stages, text
from flm_jax.recipe import Recipe, Run, Stage, begin, resolve
from flm_jax.sharding import MeshConfig, make_mesh, put_batch
from flm_jax.source_checkpoint import CheckpointMeta, read_source
from flm_jax.state import abstract_state
from flm_jax.step import StageProgram, make_grower
from tests import small
from tests.growing import GROW
from tests.runs import RUN, recipe_of
from tests.small import examples, shape

ROOT = Path(__file__).resolve().parent.parent
OLD = shape(layers=1)
DEEPER = OLD.replace(layers=2)
LARGER = shape(embed=32, heads=8, kv_heads=4, mlp=56, layers=2, vocab=272)
# Decay, and clipping that is felt.
ADAMW = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip=0.5)
ONE = make_mesh(MeshConfig(), jax.devices()[:1])
HOW = dataclasses.replace(RUN, mesh=MeshConfig(), checkpoint_every=1, keep=9)
EIGHT = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def program(target, growth, train="new", mesh=ONE, optimizer=ADAMW) -> StageProgram:
    """The programs of a stage that begins with a growth."""
    first = Stage("first", OLD, 1, 8, optimizer)
    recipe = Recipe((first, Stage("grown", target, 8, 8, optimizer, growth, train=train)))
    return StageProgram(resolve(recipe)[1], mesh, 1)


def random_state(program: StageProgram):
    """A state in which every entry has a gradient, with moments of random numbers."""
    rng = np.random.default_rng(0)

    def one(like):
        value = rng.uniform(0.01, 0.1, like.shape) if like.shape else np.asarray(7)
        return jax.device_put(value.astype(like.dtype), like.sharding)

    state = jax.tree.map(one, program.abstract_state)
    # An old entry of every parameter is -0, which even an update of 0 would change.
    params = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(-0.0), small.params(program.stage.cfg))
    return state.replace(params=jax.device_put(params, program.shardings.params))


def batch() -> Batch:
    ids = np.random.default_rng(0).integers(0, 264, (8, 17), dtype=np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], np.ones((8, 16), np.float32), np.zeros((8, 16), np.int32))


def new_masks(lineage: Lineage) -> dict[str, np.ndarray]:
    """By path, bool: the entries that are new along some dimension, from the spans alone."""
    found = {}
    for path, like, sig in costs.leaves(lineage.cfg):
        found[path] = np.zeros(like.shape, bool)
        for dim, axis in enumerate(sig.axes):
            if axis in lineage.maps:
                found[path][(slice(None),) * dim + (lineage.maps[axis].span.fresh,)] = True
    return found


def by_path(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(value) for path, value in manifest.leaf_paths(tree).items()}


def adam(state) -> optax.ScaleByAdamState:
    return next(part for part in state.opt_state if type(part) in AVERAGES)


@pytest.mark.usefixtures("cheap_draws")
@examples(3)
@given(pair=small.growths())
def test_the_entries_that_train_are_those_that_a_growth_draws(pair, monkeypatch):
    """The growth itself says which entries are new: where all of them are drawn, it draws a value like no other."""
    old, target = pair
    new = target.replace(output_mult=old.logits_mult * target.embed / target.base_width) if old.tied else target
    plan = Growth("fresh")
    lineage = Lineage(old).grown(new, plan)
    monkeypatch.setattr(GROW, "draw", lambda sig, key, shape, *, std, dtype: jnp.full(shape, 42, dtype))
    zeros = jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), declared(old)[0])
    ones = jax.tree.map(lambda like: np.ones(like.shape, like.dtype), declared(lineage.cfg)[0])
    drawn = by_path(jax.jit(lambda p: grow(p, old, lineage.cfg, plan, jax.random.key(0)))(zeros))
    trained = Trained(lineage, "new")
    found = by_path(jax.jit(trained.select)(trained.part(ones)))
    for path, value in drawn.items():
        assert (path in found) == bool(value.any()), path
        np.testing.assert_array_equal(found.get(path, np.zeros_like(value)), value == 42, path)
    assert trained.count == sum(int((value == 42).sum()) for value in drawn.values())


MASKED = Growth("mask", optimizer="asymmetric", rewarm_steps=2, ramp_steps=2, ramps={"layers": Ramp(2, delay=1)})
CASES = {
    "zeros, on eight devices": (LARGER, Growth("zero"), EIGHT),
    "masks, at a rate of their own": (LARGER.replace(vocab=OLD.vocab), MASKED, ONE),
    "copies, rescaled": (LARGER, Growth("copy", methods={"layers": "zero", "vocab": "mean"}, optimizer="exact"), ONE),
    "layers alone": (DEEPER, Growth("identity"), ONE),
}


@pytest.mark.integration
@pytest.mark.parametrize("name", CASES)
def test_old_entries_stay_bit_for_bit_and_new_ones_move(name):
    target, growth, mesh = CASES[name]
    steps = program(target, growth, mesh=mesh)
    lineage = steps.stage.lineage
    new = new_masks(lineage)
    with jax.set_mesh(mesh):
        state = random_state(steps)
        before, moments = by_path(state.params), {power: by_path(getattr(adam(state), power)) for power in ("mu", "nu")}
        step = steps.stepper(masked=bool(lineage.ramp_steps))
        for _ in range(3):
            state, metrics = step(state, put_batch(batch(), mesh))
            assert not metrics.bad
    # Entries of tokens that no text holds have a gradient of the head alone; those of every other parameter all move.
    for path, value in by_path(state.params).items():
        assert value[~new[path]].tobytes() == before[path][~new[path]].tobytes(), path
        moved = (value != before[path])[new[path]]
        assert moved.all() if path != "embedding" and moved.size else moved.size == 0 or moved.any(), path
    for power, kept in moments.items():
        found = by_path(getattr(adam(state), power))
        assert set(found) == {path for path, mask in new.items() if mask.any()}
        for path, value in found.items():
            assert value[~new[path]].tobytes() == kept[path][~new[path]].tobytes(), path
            assert (value != kept[path])[new[path]].any(), path
    assert int(adam(state).count) == 10
    assert (set(found) == set(new)) == (target is not DEEPER)


@pytest.mark.integration
def test_norms_and_clipping_are_those_of_what_trains():
    cfg = dataclasses.replace(ADAMW, clip=0.01)
    steps = program(DEEPER, Growth("zero"), optimizer=cfg)
    new = new_masks(steps.stage.lineage)
    rows = batch()

    def loss(params):
        count = rows.weights_BT.sum()
        return loss_sum(DEEPER, params, rows.inputs_BT, rows.targets_BT, rows.weights_BT, rows.segments_BT) / count

    with jax.set_mesh(ONE):
        state = random_state(steps)
        grads = {path: g * new[path] for path, g in by_path(jax.jit(jax.grad(loss))(state.params)).items()}
        before, mu = by_path(state.params), by_path(adam(state).mu)
        state, metrics = steps.stepper(masked=False)(state, put_batch(rows, ONE))
    norm = np.sqrt(sum(np.square(g).sum() for g in grads.values()))
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-4)
    moved = sum(np.square(value - before[path]).sum() for path, value in by_path(state.params).items())
    assert float(metrics.update_norm) == pytest.approx(np.sqrt(moved), rel=1e-4)
    for path, m in by_path(adam(state).mu).items():
        expected = 0.9 * mu[path] + 0.1 * grads[path] * 0.01 / norm
        np.testing.assert_allclose(m[new[path]], expected[new[path]], rtol=1e-4, atol=1e-8)


@pytest.mark.integration
def test_what_is_frozen_has_no_gradient_in_the_program_and_no_bytes_in_the_plan():
    """Of a growth in depth: embedding, head and last norm."""
    first = Stage("first", OLD, 1, 8)
    grows = Stage("grown", DEEPER, 1, 8, growth=Growth("zero"), train="new")
    recipe = Recipe((first, grows, dataclasses.replace(grows, name="all", growth=None, train="all")))
    run = Run(mesh=MeshConfig(fsdp=8))
    base, new, whole = stages.stages(recipe, run, jax.devices(), None, "arithmetic")
    frozen = sum(like.size for _, like, sig in costs.leaves(DEEPER) if not sig.stacked)
    moving = whole["params"] - frozen
    assert new["growth"]["read_bytes"] == 12 * base["params"] + 8
    assert new["growth"]["written_bytes"] == 4 * whole["params"] + 8 * moving + 8
    layer = sum(like.size for _, like, sig in costs.leaves(OLD) if sig.stacked)
    assert (new["trained_params"], whole["trained_params"]) == (layer, whole["params"])
    assert f"{costs.count(whole['params'])} parameters, {costs.count(layer)} of them train;" in text.stage_text(new)
    split = {path: like.size // 8 for path, like, sig in costs.leaves(DEEPER) if not sig.stacked}
    for kind, times in (("moments", 2), ("gradients", 1)):
        less = whole["bytes_per_device"][kind] - new["bytes_per_device"][kind]
        assert less == pytest.approx(4 * times * sum(split.values()), abs=8)
    assert new["least_sent_bytes"]["gradients"] < whole["least_sent_bytes"]["gradients"]
    flops = []
    for train in ("all", "new"):
        steps = program(DEEPER, Growth("zero"), train)
        with jax.set_mesh(ONE):
            flops.append(steps.stepper(False).lower(steps.abstract_state, batch()).cost_analysis()["flops"])
    head = 2 * batch().inputs_BT.size * OLD.embed * OLD.vocab
    assert flops[0] - flops[1] > 0.9 * head


def recipe_of_three(data) -> Recipe:
    """A base; one more layer, which alone trains; then everything."""
    pro = Stage("pro", DEEPER, 3, 8, ADAMW, Growth("zero"), train="new")
    return recipe_of(
        data, Stage("first", OLD, 2, 8, ADAMW), pro, dataclasses.replace(pro, name="end", growth=None, train="all")
    )


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of these stages."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, training.train(recipe_of_three(data), HOW, workdir)


def digest(step: Path) -> str:
    return manifest.read_manifest(step).state_digest


def values(step: Path):
    """The state of a checkpoint's step."""
    return read_source(step).restore(ONE)


@pytest.mark.integration
def test_a_run_trains_what_is_new_and_then_everything(run, data):
    workdir, report = run
    stages = workdir / "checkpoints"
    start, end = values(stages / "1_pro" / "0"), values(stages / "1_pro" / "3")
    new = new_masks(read_source(stages / "1_pro").lineage)
    for path, value in by_path(end.params).items():
        before = by_path(start.params)[path]
        assert value[~new[path]].tobytes() == before[~new[path]].tobytes()
        assert (value != before).any() == new[path].any()
    assert [row["trained_params"] == row["params"] for row in report["stages"]] == [True, False, True]
    assert "of them trained |" in (workdir / "report.md").read_text()
    meta = json.loads((stages / "1_pro" / "3" / "meta.json").read_text())
    assert meta["train"] == "new" and "train" not in json.loads((stages / "2_end/0/meta.json").read_text())
    begins, last = values(stages / "2_end" / "0"), values(stages / "2_end" / "3")
    kept = by_path(adam(end).nu)
    for path, nu in by_path(adam(begins).nu).items():
        assert nu.tobytes() == kept[path].tobytes() if path in kept else not nu.any(), path
    assert sorted(set(new) - set(kept)) == ["embedding", "final_norm/scale", "head"]
    assert int(adam(begins).count) == int(adam(end).count) == 5
    assert all((value != by_path(begins.params)[path]).any() for path, value in by_path(last.params).items())
    assert verify_checkpoints(stages / "0_first" / "2", stages / "1_pro" / "0", data=data)["holds"]


@pytest.mark.integration
def test_stopped_in_the_middle_it_goes_on_to_the_same_bits(run, data, tmp_path):
    workdir, _ = run
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "2_end")
    for step in (2, 3):
        shutil.rmtree(copy / "checkpoints" / "1_pro" / str(step))
    training.train(recipe_of_three(data), HOW, copy)
    last = Path("checkpoints/2_end/3")
    assert digest(copy / last) == digest(workdir / last)


@pytest.mark.integration
def test_a_checkpoint_without_some_moments_grows_streamed_as_in_memory_and_is_gone_on_with(run, data, tmp_path):
    """Its embedding, head and last norm have none; those of the grown checkpoint are 0 there."""
    pro = run[0] / "checkpoints" / "1_pro"
    source, target = read_source(pro), DEEPER.replace(embed=32, mlp=56)
    grow_checkpoint(pro, tmp_path / "grown", target, Growth("copy"), streamed=True, chunk_bytes=20_000)
    written = manifest.read_manifest(tmp_path / "grown/checkpoints/0_grown/0").leaves
    with jax.set_mesh(ONE):
        state = make_grower(source.lineage.grown(target, Growth("copy")), ONE)(source.restore(ONE), jax.random.key(0))
        sums = checksum.digests({path: checksum.of(x) for path, x in manifest.leaf_paths(state).items()})
    assert {path: leaf.checksum for path, leaf in written.items()} == sums
    assert not adam(state).nu["embedding"].any() and adam(state).nu["blocks"]["mlp"]["up"].all()
    # And a run begins with it, with the entries of that growth or, from the first checkpoint, of its own.
    wide = Stage("wide", read_source(tmp_path / "grown").cfg, 2, 8, train="new")
    _, (found,) = begin(recipe_of(data, wide, start=str(tmp_path / "grown")))
    assert (found.trained_before, found.trained.count) == ("all", Trained(found.lineage, "new").count)
    _, (found,) = begin(recipe_of(data, dataclasses.replace(wide, model=DEEPER), start=str(pro)))
    assert found.trained_before == "new"
    form = jax.tree.structure(abstract_state(found.lineage, ONE, train="new"))
    assert jax.tree.structure(source.restore(ONE)) == form


def test_a_state_takes_the_form_of_another():
    """Moments that it lacks are 0, others are left out, and what both have is the same array."""
    lineage = lineage_of(OLD, DEEPER, Growth("zero"))
    whole, part = (abstract_state(lineage, ONE, train=train).opt_state for train in ("all", "new"))
    ones = jax.tree.map(lambda like: jnp.ones(like.shape, like.dtype), part)
    more = in_form(ones, whole)
    assert jax.tree.structure(more) == jax.tree.structure(whole)
    assert not more[0].nu["head"].any() and more[0].nu["blocks"]["mlp"]["up"].all()
    back = in_form(more, part)
    assert jax.tree.structure(back) == jax.tree.structure(part) and is_masked(back[0].mu["embedding"])
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(ones), strict=True))


def test_a_stage_in_which_nothing_is_new_is_refused():
    first = Stage("first", OLD, 1, 8)
    heads = Stage("heads", OLD.replace(kv_heads=4), 1, 8, growth=Growth("zero"), train="new")
    alone = (
        "Stage 'first': train='new' trains the entries that .*, and its model has not grown: give the stage a Growth"
    )
    cases = (
        ((dataclasses.replace(first, train="new"),), alone),
        ((first, dataclasses.replace(first, name="more", train="new")), alone.replace("first", "more", 1)),
        # Each key head is repeated for its own queries: nothing about them is new.
        ((first, heads), "Stage 'heads': train='new' .*, and its growth added none: give"),
    )
    for given_stages, message in cases:
        with pytest.raises(ValueError, match=message):
            resolve(Recipe(given_stages))
    with pytest.raises(ValueError, match=r"Stage.train = 'nwe': use one of all, new"):
        dataclasses.replace(first, train="nwe")


@pytest.mark.parametrize("train", ["old", "new", 3])
def test_a_record_that_says_what_cannot_be_is_refused(train):
    record = {**CheckpointMeta("first", Lineage(OLD)).record(), "train": train}
    with pytest.raises(ValueError, match="its train is"):
        CheckpointMeta.from_record(record)
    deeper = CheckpointMeta("grown", lineage_of(OLD, DEEPER, Growth("zero")), train="new")
    assert CheckpointMeta.from_record(deeper.record()).train == "new"


@pytest.mark.parametrize(("name", "sources"), [("llama_pro", [0, 1, 1, 2, 3, 3]), ("solar", [0, 1, 2, 1, 2, 3])])
def test_the_published_recipes_place_layers_as_published(name, sources):
    gin.clear_config()
    configure.parse([str(ROOT / f"gin_configs/growth/{name}_small.gin")], [])
    recipe, _ = configure.configured(configure.train)
    configure.check_used()
    gin.clear_config()
    grows = resolve(recipe)[1]
    assert grows.lineage.maps["layers"].span.source.tolist() == sources
    assert grows.train == ("new" if name == "llama_pro" else "all")
