"""Sweeps on the command line: a whole one, halving, scripts, shipped sweeps, and bad input before anything runs."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import gin
import pytest

from flm_jax.cli import configure, sweep_points
from flm_jax.data.source import open_data
from flm_jax.records import RECIPE, as_dict, write_identity
from tests.environment import as_user, as_user_compiling_fast

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent
GIN = """
train.recipe = @Recipe()
Recipe.stages = [@a/Stage()]
Recipe.data = @DataConfig()
Recipe.eval_windows = 4
DataConfig.corpus = @TextFolder()
DataConfig.vocabulary = @Bytes()
DataConfig.context = 16
TextFolder.path = '{corpus}'
DataConfig.cache_dir = '{cache}'
small_52b.vocab = 264
a/Stage.name = 'a'
a/Stage.model = @small_52b()
a/Stage.steps = 3
a/Stage.batch_size = 8
a/Stage.optimizer = @OptimizerConfig()
sweep.over = @Sweep()
"""
RATES = "Sweep.axes = {'OptimizerConfig.learning_rate': [1e-3, 1e-2]}"
# In place of training: the loss follows from the learning rate and the steps that the point's gin file binds.
PROGRAM = """
import json, os, re, sys
text, workdir = open(sys.argv[1]).read(), sys.argv[2]
rate, steps = (float(re.search(name + r" = (\\S+)", text)[1]) for name in ("learning_rate", "steps"))
os.makedirs(workdir)
last = {"eval_loss": rate + 1 / steps, "total_tokens": 1, "total_flops": 2, "params": 3}
json.dump({"stages": [last]}, open(workdir + "/report.json", "w"))
"""


@pytest.fixture(autouse=True)
def clean():
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture
def gin_file(data, tmp_path) -> Path:
    file = tmp_path / "small.gin"
    file.write_text(GIN.format(corpus=data.corpus.path, cache=data.cache_dir))
    open_data(data)
    return file


@pytest.fixture
def program(monkeypatch):
    def command(places, point):
        return [sys.executable, "-c", PROGRAM, str(places.gin(point)), str(places.run(point))]

    monkeypatch.setattr("flm_jax.sweeps.execute.command", command)
    monkeypatch.setattr(sweep_points, "check_identity", lambda *_: None)  # which the program does not write


def how(**changes):
    fields = dict(parallel=1, scripts=False, dry_run=False, json_file=None, environment=dict(os.environ))
    return sweep_points.How(**{**fields, **changes})


def status(gin_file, bindings, workdir, **changes):
    gin.clear_config()
    try:
        sweep_points.run_sweep([str(gin_file)], bindings, str(workdir), how(**changes))
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_sweep_trains_its_points_and_the_best_is_a_recipe(gin_file, tmp_path):
    """One of three points diverges; run again with one value more, what is done is not trained again."""
    env = as_user_compiling_fast()
    rates = "Sweep.axes = {{'OptimizerConfig.learning_rate': [{}]}}"

    def start(values):
        arguments = [f"--gin_file={gin_file}", f"--workdir={tmp_path / 'sweep'}", f"--json={tmp_path / 'found.json'}"]
        arguments += ["--gin_bindings=Recipe.seed = 3", f"--gin_bindings={rates.format(values)}"]
        arguments += ["--gin_bindings=train.run = @Run()", "--gin_bindings=Run.max_loss = 1.5"]
        launcher = str(ROOT / "experiments/sweep.py")
        return subprocess.run([sys.executable, launcher, *arguments], env=env, capture_output=True, text=True)

    first = start("1e-3, 30.0")
    assert first.returncode == 1, first.stderr
    assert "learning_rate=0.001  done" in first.stdout
    assert "Failed: learning_rate=30.0: " in first.stdout
    report = tmp_path / "sweep/points/learning_rate=0.001/report.json"
    when = report.stat().st_mtime_ns
    again = start("1e-3, 1e-2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert report.stat().st_mtime_ns == when
    found = json.loads((tmp_path / "found.json").read_text())
    losses = {run["run"]: run["value"] for run in found["runs"]}
    assert found["best"]["mean"] == min(losses.values())
    assert losses["learning_rate=0.001"] == json.loads(report.read_text())["stages"][-1]["eval_loss"]
    rows = list(csv.DictReader((tmp_path / "sweep/results.csv").open()))
    assert [row["state"] for row in rows] == ["done", "done"]
    assert (tmp_path / "sweep/learning_rate.png").read_bytes().startswith(b"\x89PNG")
    # The best point is a gin file, from anywhere, that makes the recipe of that run.
    best = tmp_path / "sweep/best.gin"
    configure.parse([str(best)], [])
    recipe, _ = configure.configured(configure.train)
    assert recipe.seed == 3
    assert f"learning_rate={recipe.stages[0].optimizer.learning_rate}" == found["best"]["point"]
    recorded = tmp_path / "sweep/points" / found["best"]["point"] / "recipe.json"
    assert json.loads(json.dumps(as_dict(recipe))) == json.loads(recorded.read_text())


def test_halving_runs_the_best_longer(gin_file, tmp_path, program, capsys):
    axes = ["Sweep.axes = {'OptimizerConfig.learning_rate': [0.4, 0.1, 0.3, 0.2]}", "Sweep.halving = @Halving()"]
    rungs = ["Halving.rungs = [{'a/Stage.steps': 2}, {'a/Stage.steps': 4}, {'a/Stage.steps': 8}]"]
    assert status(gin_file, [*axes, *rungs], tmp_path / "sweep") == 0
    out = capsys.readouterr().out
    assert "Rung 2 of 3: 2 runs" in out and "Rung 3 of 3: 1 run" in out
    assert "Best: learning_rate=0.1, stages.-1.eval_loss 0.2250" in out
    assert len(list((tmp_path / "sweep/points").iterdir())) == 7
    assert "a/Stage.steps = 8" in (tmp_path / "sweep/best.gin").read_text()


def test_scripts_are_written_and_what_they_reach_is_collected(gin_file, tmp_path, program, capsys):
    workdir = tmp_path / "sweep"
    given = [RATES, "Sweep.halving = @Halving()"]
    given += ["Halving.rungs = [{'a/Stage.steps': 2}, {'a/Stage.steps': 4}]"]
    assert status(gin_file, given, workdir, scripts=True) == 0
    assert "2 runs to start, each by a script" in capsys.readouterr().out
    assert not (workdir / "points").exists()
    subprocess.run(["sh", workdir / "launch/all.sh"], check=True)
    # With halving, the next rung follows from what the first has reached.
    assert status(gin_file, given, workdir, scripts=True) == 0
    assert "1 run to start" in capsys.readouterr().out
    subprocess.run(["sh", workdir / "launch/all.sh"], check=True)
    assert status(gin_file, given, workdir, scripts=True) == 0
    out = capsys.readouterr().out
    assert "to start" not in out and "Best: learning_rate=0.001" in out


def test_a_point_begun_with_another_recipe_is_refused(gin_file, tmp_path, capsys):
    directory = tmp_path / "sweep/points/learning_rate=0.01"
    directory.mkdir(parents=True)
    configure.parse([str(gin_file)], ["OptimizerConfig.learning_rate = 1e-2", "a/Stage.batch_size = 16"])
    write_identity(directory, RECIPE, as_dict(configure.configured(configure.train)[0]))
    assert status(gin_file, [RATES], tmp_path / "sweep") == 1
    error = capsys.readouterr().err
    assert "was begun with another recipe: stages.a.batch_size: 16 there, 8 here." in error
    assert "Give the sweep a new --workdir, or remove that point" in error


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (
            ["Sweep.axes = {'OptimizerConfig.learning_rat': [1]}"],
            "parameter named 'learning_rat'; did you mean 'learning_rate'?",
        ),
        (
            ["Sweep.axes = {'OptimiserConfig.learning_rate': [1]}"],
            "no configurable OptimiserConfig; did you mean 'OptimizerConfig'?",
        ),
        (["Sweep.axes = {'b/Stage.steps': [1]}"], "Nothing uses these gin bindings: b/Stage.steps"),
        (
            ["Sweep.axes = {'OptimizerConfig.learning_rate': [1e-3, -1]}"],
            "Point 'learning_rate=-1': OptimizerConfig.learning_rate = -1",
        ),
        (["Sweep.axes = {'a/Stage.steps': [3, 2.5]}"], "Point 'steps=2.5': Stage.steps = 2.5: use an integer"),
        (["Sweep.axes = {'OptimizerConfig.learning_rate': [1, 1]}"], "one work directory, points/learning_rate=1"),
        (
            ["Sweep.axes = {'OptimizerConfig.warmup_steps': [1, 9]}"],
            "Point 'warmup_steps=9': Stage 'a': Warm-up (9 steps)",
        ),
        (["Sweep.axes = {'Stage.growth': [@Growth()]}"], "write the reference in quotes, such as '@Growth()'"),
        ([], "Sweep varies nothing"),
        (["Sweep.seed = [1]"], "did you mean 'seeds'?"),
        ([RATES, "Recipe.sede = 1"], "--gin_bindings: Recipe doesn't have a parameter named 'sede'"),
        ([RATES, "x/Recipe.seed = 1"], "Nothing uses these gin bindings: x/Recipe.seed"),
        (["sweep.over = None"], "sweep.over = None: use a Sweep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_sentence_before_anything_runs(gin_file, tmp_path, bindings, message, capsys):
    assert status(gin_file, bindings, tmp_path / "sweep") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_does_not_write_into_the_work_directory_of_a_run(gin_file, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RECIPE).write_text("{}")
    assert status(gin_file, [RATES], tmp_path / "run") == 1
    assert "is the work directory of a run of train.py" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RECIPE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=x"], "give a sweep with --gin_file"),
        (["--gin_file=x"], "give a --workdir, or --dry_run"),
        (["--gin_file=x", "--workdir=x", "--scripts", "--parallel=2"], "--scripts starts none"),
        (["--gin_file=x", "--workdir=x", "--parallel=0"], "parallel"),
    ],
)
def test_wrong_flags_exit_with_2(arguments, message):
    command = [sys.executable, str(ROOT / "experiments/sweep.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=as_user())
    assert done.returncode == 2
    assert message in done.stderr


SWEEPS = sorted((ROOT / "gin_configs/sweeps").glob("*.gin"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda f: f.name)
def test_every_shipped_sweep_holds(file, capsys):
    given = ["Jsonl.path = 'text.jsonl'", "Pretrained.path = 'tokenizer'"] if "52b" in file.name else []
    sweep_points.run_sweep([str(file)], given, None, how(dry_run=True))
    assert "All of them were checked." in capsys.readouterr().out


def test_the_shipped_proxy_searches_the_seven_hyperparameters_of_the_paper():
    configure.parse([str(ROOT / "gin_configs/sweeps/mup_proxy.gin")], [])
    assert {name.rpartition(".")[2] for name in configure.configured(configure.sweep).axes} == {
        "learning_rate",
        "matrix_rate",
        "final_rate",
        "init_std",
        "init_std_vector",
        "input_mult",
        "output_mult",
    }
