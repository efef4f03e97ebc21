"""Training on the command line: killed and run again, without TensorFlow, with bad input, and every shipped recipe."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flm_jax.checkpoint import read_manifest
from flm_jax.data.source import open_data
from tests.commands import parsed
from tests.environment import as_user, as_user_compiling_fast

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent
GIN = """
train.recipe = @Recipe()
train.run = @Run()
Recipe.stages = [@a/Stage(), @b/Stage()]
Recipe.data = @DataConfig()
Recipe.eval_every = 10
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


@pytest.fixture(scope="session")
def gin_file(data, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gin") / "small.gin"
    file.write_text(GIN.format(corpus=data.corpus.path, cache=data.cache_dir))
    open_data(data)
    return file


def test_killed_and_run_again_on_the_command_line_equals_never_killed(gin_file, tmp_path):
    """SIGTERM in the first stage saves and exits with 75; kill -9 inside the mask ramp; then to the end."""
    env = as_user_compiling_fast()  # the four starts compile the same programs
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
        assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL), output
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


def test_training_from_a_prepared_store_needs_no_tensorflow_and_imports_no_torch(gin_file, tmp_path):
    code = (
        "import runpy, sys; sys.modules['tensorflow'] = None; sys.modules['seqio'] = None\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        "try: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
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
        env=as_user_compiling_fast(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "Held-out loss" in done.stdout
    assert done.stderr.endswith("False\n")


def test_help_answers_at_once():
    since = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments/train.py"), "--helpshort"],
        env=as_user(),
        capture_output=True,
        text=True,
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


# The full-size ones want another mesh: see test_planning.py.
SMALL = [f for f in sorted((ROOT / "gin_configs/recipes").glob("*.gin")) if not f.name.startswith("tele_flm")]


@pytest.mark.parametrize("file", SMALL, ids=lambda f: f.name)
def test_every_recipe_parses_and_lowers(file, tmp_path, capsys):
    import gin

    from flm_jax.cli import runs

    text = file.read_text()
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a text")
    one = {"MeshConfig": "MeshConfig.tensor = 1", "TextFolder": f"TextFolder.path = {str(tmp_path)!r}"}
    gin.clear_config()
    runs.run_train([str(file)], [binding for name, binding in one.items() if name in text], None, True)
    gin.clear_config()
    out = capsys.readouterr().out
    assert out.count("lowered: ") >= 1
    assert "held out: " in out
    assert "train step" in out


def test_the_program_passes_on_where_to_fork_from(monkeypatch):
    from flm_jax.cli import runs, train

    given = []
    monkeypatch.setattr(runs, "join", lambda flags: None)
    monkeypatch.setattr(runs, "run_train", lambda *values: given.append(values))
    with parsed("train", ["--gin_file=a.gin", "--workdir=new", "--fork=old"]) as values:
        train.run(values)
    assert given == [(["a.gin"], [], "new", False, "old")]
