"""Whole runs: resumed, killed, on several devices, with bad input."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from flm_jax import train as training
from flm_jax.checkpoint import Checkpoints, read_manifest
from flm_jax.data.corpora import TextFolder
from flm_jax.data.source import open_data
from flm_jax.growth import Growth, GrowthError
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage, resolve
from flm_jax.records import as_dict, check_identity
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.step import StageProgram
from tests import small
from tests.small import shape, write_corpus

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent
RAMP = 4


@pytest.fixture(scope="session")
def recipe(data) -> Recipe:
    fast = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    return Recipe(
        stages=(
            Stage("first", shape(), 6, 8, fast),
            Stage("second", shape(embed=32, layers=3), 8, 8, fast, Growth("mask", ramp_steps=RAMP), accumulate=2),
            Stage("third", shape(embed=40, layers=4, mlp=64), 4, 16, fast, Growth("zero")),
        ),
        data=data,
        eval_windows=16,
        eval_every=4,
    )


RUN = Run(mesh=MeshConfig(fsdp=2, tensor=2), checkpoint_every=2, log_every=1, sample_tokens=8)


def digest(recipe: Recipe, run: Run, workdir: Path) -> str:
    """sha256 over every array of the last state."""
    stage = resolve(recipe)[-1]
    mesh = make_mesh(run.mesh)
    with Checkpoints(workdir / "checkpoints" / stage.directory, read_only=True) as store:
        state = store.restore(StageProgram(stage, mesh, 1).abstract_state, stage.steps).state
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state)):
        whole.update(np.ascontiguousarray(leaf).tobytes())
    return whole.hexdigest()


@pytest.fixture(scope="session")
def reference(recipe, tmp_path_factory):
    """The run that is never stopped."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    report = training.train(recipe, RUN, workdir, {"config.gin": "# as given"})
    return workdir, report, digest(recipe, RUN, workdir)


def test_a_run_learns_grows_exactly_and_reports(reference, recipe):
    workdir, report, _ = reference
    assert json.loads((workdir / "report.json").read_text()) == json.loads(json.dumps(report))
    losses = [s["eval_loss"] for s in report["stages"]]
    assert losses[-1] < losses[0] < np.log(264)
    for growth, method in zip(report["growths"], ("mask", "zero"), strict=True):
        assert growth["method"] == method
        assert growth["max_rel_logit_diff"] < 1e-5
        assert growth["eval_loss_before"] == pytest.approx(growth["eval_loss_after"], abs=5e-5)
        assert growth["params_after"] > growth["params_before"]
        assert len(growth["source_digest"]) == 64
    assert [s["tokens"] for s in report["stages"]] == [6 * 8 * 16, 8 * 8 * 16, 4 * 16 * 16]
    total = sum(s["flops"] for s in report["stages"])
    assert report["stages"][-1]["total_flops"] == total
    text = (workdir / "report.md").read_text()
    assert "| second | mask |" in text
    assert (workdir / "loss.png").stat().st_size > 5_000
    assert list((workdir / "events").rglob("events.out.tfevents*"))
    assert "blocks/attention/query" in (workdir / "parameters.txt").read_text()
    assert (workdir / "config.gin").read_text() == "# as given"


def test_stages_on_meshes_of_their_own_give_the_same_losses(reference, recipe, tmp_path):
    """The state moves from mesh to mesh where a stage begins."""
    meshes = {"second": MeshConfig(sequence=2, fsdp=4), "third": MeshConfig(data=4, tensor=2)}
    run = dataclasses.replace(RUN, meshes=meshes)
    training.train(recipe, run, tmp_path / "run")
    found = json.loads((tmp_path / "run/report.json").read_text())
    for mine, theirs in zip(found["stages"], reference[1]["stages"], strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-4)
    assert found["growths"][0]["eval_loss_before"] == pytest.approx(
        reference[1]["growths"][0]["eval_loss_before"], abs=1e-5
    )
    with pytest.raises(ValueError, match="Run.meshes names other; the stages are first, second, third"):
        training.train(recipe, dataclasses.replace(RUN, meshes={"other": MeshConfig()}), tmp_path / "run")


def test_event_files_are_read_by_tensorboard(reference):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workdir, report, _ = reference
    events = EventAccumulator(str(workdir / "events" / "1_second"))
    events.Reload()
    names = {
        "loss",
        "grad_norm",
        "update_norm",
        "param_norm",
        "learning_rate",
        "mask",
        "tokens",
        "tokens_per_second",
    }
    assert {f"train/{n}" for n in names} <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("train/mask")][: RAMP + 1] == [0.0, 0.25, 0.5, 0.75, 1.0]
    held_out = [e["loss"] for e in report["evals"] if e["stage"] == "second" and e["step"]]
    assert [e.value for e in events.Scalars("heldout/loss")] == pytest.approx(held_out)


class StopAfter:
    """In place of `Interrupts`: asks for a stop after some checks of the loop."""

    def __init__(self, steps):
        self.left = steps

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def requested(self):
        self.left -= 1
        return "a test" if self.left < 0 else None


def test_stopped_everywhere_and_resumed_equals_never_stopped(reference, recipe, tmp_path, monkeypatch):
    """Within each stage, inside the mask ramp, at the borders of stages and of epochs, and one damaged checkpoint."""
    _, report, expected = reference
    consumed = sum(stage.steps * stage.batch_size for stage in recipe.stages)
    assert consumed > open_data(recipe.data).store.num_windows("train", 16), "the run must cross an epoch's border"
    starts, steps, result = 0, [], None
    while result is None:
        starts += 1
        assert starts < 30
        monkeypatch.setattr(training, "Interrupts", lambda asked=4 + starts % 3: StopAfter(asked))
        result = training.train(recipe, RUN, tmp_path / "run")
        found = sorted((int(p.parent.name[0]), int(p.name)) for p in (tmp_path / "run").glob("checkpoints/*/[0-9]*"))
        steps.append(found[-1])
    assert starts > 2
    assert any(step % RUN.checkpoint_every for _, step in steps), "a stop saves where it stopped, not where it is due"
    assert result == report
    assert digest(recipe, RUN, tmp_path / "run") == expected


def test_a_damaged_last_checkpoint_is_refused_and_the_one_before_leads_to_the_same_end(
    reference, recipe, tmp_path, monkeypatch, caplog
):
    _, report, expected = reference
    monkeypatch.setattr(training, "Interrupts", lambda: StopAfter(12))
    assert training.train(recipe, RUN, tmp_path / "run") is None
    monkeypatch.undo()
    newest = max((tmp_path / "run" / "checkpoints").glob("*/[0-9]*"), key=lambda p: p.stat().st_mtime)
    victim = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    assert training.train(recipe, RUN, tmp_path / "run") == report
    assert "REFUSED" in caplog.text
    assert digest(recipe, RUN, tmp_path / "run") == expected


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, tensor=4), MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=str
)
def test_one_device_and_eight_give_the_same_loss(mesh, recipe):
    stage = dataclasses.replace(recipe.stages[0], model=shape(kv_heads=4))
    recipe = dataclasses.replace(recipe, stages=(stage,))
    losses = []
    for where in (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(mesh)):
        program = StageProgram(resolve(recipe)[0], where, 1)
        batches = open_data(recipe.data).train()
        with jax.set_mesh(where):
            state, step = program.initialiser()(jax.random.key(0)), program.stepper(False)
            for _ in range(3):
                state, metrics = step(state, training.put_batch(batches.next(8), where))
                losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-5)


def test_a_batch_in_parts_gives_the_step_of_the_whole_batch(recipe):
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    batch = open_data(recipe.data).train().next(8)
    # Parts must be weighted by what counts in them, not equally.
    batch = batch._replace(weights_BT=batch.weights_BT * (np.arange(8)[:, None] % 3 > 0))
    found = []
    for parts in (1, 2, 4):
        stage = dataclasses.replace(recipe.stages[0], accumulate=parts)
        program = StageProgram(resolve(dataclasses.replace(recipe, stages=(stage,)))[0], mesh, 1)
        with jax.set_mesh(mesh):
            state = program.initialiser()(jax.random.key(0))
            state, metrics = program.stepper(False)(state, training.put_batch(batch, mesh))
        found.append((metrics.loss, metrics.grad_norm, state.params))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[0], other)


def lowered(program, masked, rows=8):
    batch = open_data(program.stage_data).train().next(rows)
    with jax.set_mesh(program.mesh):
        return program.stepper(masked).lower(program.abstract_state, batch).as_text()


def test_after_the_ramp_the_masks_are_gone_from_the_program(recipe, data):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    grown = resolve(recipe)[1]
    alone = resolve(dataclasses.replace(recipe, stages=(dataclasses.replace(grown.stage, growth=None),)))[0]
    texts = []
    for stage, masked in ((grown, True), (grown, False), (alone, False)):
        program = StageProgram(stage, mesh, 1)
        program.stage_data = data
        texts.append(lowered(program, masked))
    assert texts[1] == texts[2]
    assert texts[0] != texts[1]


def test_a_growth_that_breaks_its_promise_stops_the_run(reference, recipe, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    from flm_jax import step as steps

    honest = steps.grow_params

    def broken(*args):
        grown = honest(*args)
        return {**grown, "embedding": grown["embedding"] * 1.01}

    monkeypatch.setattr(steps, "grow_params", broken)
    with pytest.raises(GrowthError, match="more than the tolerance of 1e-05; layer 0 of the grown model is the first"):
        training.train(recipe, RUN, workdir)
    assert not (workdir / "checkpoints" / "1_second" / "0").exists()


def test_steps_that_are_not_finite_are_skipped_counted_and_then_stop_the_run(recipe, tmp_path, monkeypatch):
    honest = training.put_batch

    def poisoned(bad):
        calls = iter(range(10_000))

        def put(batch, mesh, *size):
            factor = np.float32(np.nan if batch.weights_BT.shape[0] == 8 and next(calls) in bad else 1)
            return honest(batch._replace(weights_BT=batch.weights_BT * factor), mesh, *size)

        return put

    one = dataclasses.replace(recipe, stages=recipe.stages[:1])
    monkeypatch.setattr(training, "put_batch", poisoned({2}))
    report = training.train(one, RUN, tmp_path / "one")
    assert report["skipped_steps"] == [{"stage": "first", "step": 3}]
    assert np.isfinite(report["stages"][0]["eval_loss"])
    monkeypatch.setattr(training, "put_batch", poisoned({2, 3, 4, 5}))
    with pytest.raises(training.NonFiniteError, match=r"Stage 'first': 3 steps in a row, up to step 5.*None of them"):
        training.train(one, RUN, tmp_path / "three")


def test_an_unmasked_growth_of_nothing_and_other_impossible_recipes(recipe):
    first, second, _ = recipe.stages
    grow = dataclasses.replace
    cases = [
        ((), "Recipe.stages is empty"),
        ((second,), "Stage 'second': the first stage is initialised"),
        ((first, grow(second, growth=None)), "Stage 'second': it follows 'first' and must say how it grows"),
        (
            (first, grow(second, growth=Growth("mask"))),
            r"ramp_steps=0 on embed: give the ramp at least one step",
        ),
        (
            (first, grow(second, growth=Growth("mask", ramp_steps=6, ramp_delay=3))),
            "its masks ramp over 9 steps, delays included, of its 8",
        ),
        (
            (first, grow(second, growth=Growth("zero", ramp_steps=3))),
            "ramp_steps=3, but growing by zero masks nothing",
        ),
        (
            (first, grow(second, model=shape(embed=22))),
            "Stage 'second': Axis 'embed' would shrink from 24 to 22",
        ),
        ((first, grow(second, name="first")), "Stage names must differ: first, first"),
        ((grow(first, accumulate=3),), "accumulate=3 must divide batch_size=8"),
    ]
    with pytest.raises(ValueError, match=r"Run.checkpoint_every=0 must be at least 1"):
        Run(checkpoint_every=0)
    with pytest.raises(ValueError, match=r"loss_chunks=3 must divide DataConfig.context=16"):
        resolve(dataclasses.replace(recipe, loss_chunks=3))
    odd = dataclasses.replace(recipe, stages=(grow(first, batch_size=12),))
    with pytest.raises(ValueError, match=r"Stage 'first': batch_size=12 must be a multiple of .* = 8"):
        StageProgram(resolve(odd)[0], make_mesh(MeshConfig(fsdp=8)), 1).check_trains(16)
    for stages, message in cases:
        with pytest.raises(ValueError, match=message):
            resolve(dataclasses.replace(recipe, stages=stages))


def snapshot(folder: Path):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_another_recipe_other_data_or_a_foreign_folder_are_refused_and_nothing_is_touched(
    reference, recipe, tmp_path, data
):
    workdir, _, _ = reference
    before = snapshot(workdir)
    with pytest.raises(ValueError, match="was begun with another recipe: seed: 0 there, 1 here.*Nothing was changed"):
        training.train(dataclasses.replace(recipe, seed=1), RUN, workdir)
    assert snapshot(workdir) == before

    changed = tmp_path / "changed"
    write_corpus(changed)
    moved = dataclasses.replace(data, corpus=TextFolder(str(changed)))
    one = dataclasses.replace(recipe, stages=recipe.stages[:1], data=moved)
    training.train(one, RUN, tmp_path / "run")
    (changed / "07.txt").write_text("one document is not what it was\n" * 20)
    before = snapshot(tmp_path / "run")
    with pytest.raises(ValueError, match="was begun with other data or another start: .*digest"):
        training.train(one, RUN, tmp_path / "run")
    assert snapshot(tmp_path / "run") == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not a work directory"):
        training.train(one, RUN, foreign)
    with pytest.raises(
        ValueError, match=r"the vocabulary has 259 tokens, the model's embedding only 100; set its vocab"
    ):
        tiny = dataclasses.replace(one.stages[0], model=small.config(vocab=100))
        training.train(dataclasses.replace(one, stages=(tiny,)), RUN, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists(), "a start that was refused must not claim the directory"


def test_the_cache_may_move(recipe):
    moved = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, cache_dir="elsewhere"))
    assert as_dict(moved) == as_dict(recipe)


# The command line, as a user has it.

GIN = """
train.recipe = @Recipe()
train.run = @Run()
Recipe.stages = [@a/Stage(), @b/Stage()]
Recipe.data = @DataConfig()
Recipe.eval_every = 5
Recipe.eval_windows = 8
DataConfig.corpus = @TextFolder()
DataConfig.vocabulary = @Bytes()
DataConfig.context = 16
TextFolder.path = '{corpus}'
DataConfig.cache_dir = '{cache}'
Run.checkpoint_every = 5
Run.sample_tokens = 4
small_52b.vocab = 264
small_102b.vocab = 264
Stage.batch_size = 8
a/Stage.name = 'a'
a/Stage.model = @small_52b()
a/Stage.steps = 40
b/Stage.name = 'b'
b/Stage.model = @small_102b()
b/Stage.steps = 40
b/Stage.growth = @Growth()
Growth.method = 'mask'
Growth.ramp_steps = 30
"""


def command(gin_file: Path, workdir: Path, *bindings: str) -> list[str]:
    extra = [f"--gin_bindings={b}" for b in bindings]
    script = str(ROOT / "experiments" / "train.py")
    return [sys.executable, script, f"--gin_file={gin_file}", f"--workdir={workdir}", *extra]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


@pytest.fixture(scope="session")
def gin_file(data, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gin") / "small.gin"
    file.write_text(GIN.format(corpus=data.corpus.path, cache=data.cache_dir))
    open_data(data)
    return file


def test_killed_and_run_again_on_the_command_line_equals_never_killed(gin_file, tmp_path):
    """SIGTERM in the first stage saves and exits with 0; kill -9 inside the mask ramp; then to the end."""
    env = environment()
    whole = subprocess.run(command(gin_file, tmp_path / "whole"), env=env, capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stderr
    for wanted, number in (
        (tmp_path / "cut/checkpoints/0_a/5", signal.SIGTERM),
        (tmp_path / "cut/checkpoints/1_b/5", signal.SIGKILL),
    ):
        process = subprocess.Popen(
            command(gin_file, tmp_path / "cut"),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 200
        while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        output = process.communicate(timeout=100)[0]
        assert process.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL), output
        if number == signal.SIGTERM:
            assert "everything is saved" in output
            assert not (tmp_path / "cut/checkpoints/0_a/40").exists()
    again = subprocess.run(command(gin_file, tmp_path / "cut"), env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "Continuing stage 'b' at step" in again.stdout
    reports = [(tmp_path / name / "report.json").read_text() for name in ("whole", "cut")]
    assert reports[0] == reports[1]
    leaves = [read_manifest(tmp_path / name / "checkpoints/1_b/40").leaves for name in ("whole", "cut")]
    assert leaves[0] == leaves[1]


def test_training_from_a_prepared_store_needs_no_tensorflow(gin_file, tmp_path):
    code = (
        "import sys; sys.modules['tensorflow'] = None; sys.modules['seqio'] = None\n"
        "sys.argv = ['train.py', *sys.argv[1:]]; import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    arguments = command(gin_file, tmp_path / "run", "a/Stage.steps = 4", "Recipe.stages = [@a/Stage()]")
    # The bindings of the stage that is left out would be refused as unused.
    small_file = tmp_path / "one.gin"
    small_file.write_text(
        "\n".join(
            x for x in gin_file.read_text().splitlines() if "b/" not in x and "Growth" not in x and "102b" not in x
        )
    )
    arguments[2] = f"--gin_file={small_file}"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments[1:]],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "Held-out loss" in done.stdout


def test_help_answers_at_once():
    since = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments/train.py"), "--helpshort"], capture_output=True, text=True
    )
    assert "--gin_file" in done.stdout
    assert "--dry_run" in done.stdout
    assert time.monotonic() - since < 2


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["Growth.method = 'stretch'"], "Unknown growth operator 'stretch'; the registry has aki, copy"),
        (
            ["b/Stage.model = @small_52b()", "Stage.model = @small_102b()", "a/Stage.model = @small_102b()"],
            "would shrink",
        ),
        (["TextFolder.path = '/nowhere/at/all'"], "/nowhere/at/all"),
        (["Stage.batchsize = 3"], "doesn't have a parameter named 'batchsize'"),
        (["c/Stage.steps = 3"], "Nothing uses these gin bindings: c/Stage.steps"),
        (["learningrate = 3"], "Nothing uses these gin bindings: learningrate"),
        (["Recipe.stages = ["], "does not parse"),
        (["small_52b.vocab = 20", "small_102b.vocab = 20"], "vocabulary has 259 tokens"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_gets_one_sentence_and_status_1(gin_file, tmp_path, bindings, message, capsys):
    import gin

    from flm_jax.cli import runs

    gin.clear_config()
    with pytest.raises(SystemExit) as stop:
        runs.run_train([str(gin_file)], bindings, str(tmp_path / "run"), False)
    gin.clear_config()
    assert stop.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_missing_gin_file_is_named(tmp_path, capsys):
    from flm_jax.cli import runs

    with pytest.raises(SystemExit):
        runs.run_train([str(tmp_path / "missing.gin")], [], str(tmp_path), False)
    assert "There is no gin file" in capsys.readouterr().err


# The full-size ones want another mesh: see test_ahead.py.
SMALL = [f for f in sorted((ROOT / "gin_configs/recipes").glob("*.gin")) if not f.name.startswith("tele_flm")]


def test_a_record_from_before_a_field_was_there_is_the_same_recipe(tmp_path):
    """A configuration that gains a field is, at its default, what it was: runs begun before go on."""
    stage = Stage("first", shape(), 4, 8, growth=None)
    mine = as_dict(Recipe(stages=(stage,)))
    old = json.loads(json.dumps(mine))
    for name in ("qkv_bias", "qk_norm", "sliding_window", "rope_scaling"):
        del old["stages"][0]["model"][name]
    del old["eval_every"]
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    check_identity(tmp_path, "recipe.json", mine, "another recipe")
    changed = as_dict(Recipe(stages=(dataclasses.replace(stage, model=shape(qkv_bias=True)),)))
    with pytest.raises(ValueError, match="model.qkv_bias: False there, True here"):
        check_identity(tmp_path, "recipe.json", changed, "another recipe")


@pytest.mark.parametrize("file", SMALL, ids=lambda f: f.name)
def test_every_recipe_parses_and_lowers(file, capsys):
    import gin

    from flm_jax.cli import runs

    text = file.read_text()
    one = {"MeshConfig": "MeshConfig.tensor = 1", "TextFolder": "TextFolder.path = 'texts'"}
    gin.clear_config()
    runs.run_train([str(file)], [binding for name, binding in one.items() if name in text], None, True)
    gin.clear_config()
    out = capsys.readouterr().out
    assert out.count("lowered: ") >= 1
    assert "train step" in out
