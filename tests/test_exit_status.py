"""Exit statuses of programs: 75 for a run that a signal stopped, 130 and one line for one that is interrupted."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import gin
import pytest

from flm_jax.cli import runs
from flm_jax.cli.flags import INTERRUPTED, STOPPED
from tests.environment import as_user

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("result", "status"), [(None, STOPPED), ({}, None)])
def test_a_run_that_a_signal_stopped_exits_with_75(result, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "train", lambda *_, **__: result)
    monkeypatch.setattr(runs, "git_state", str)
    gin.clear_config()
    bindings = [f"TextFolder.path = {str(tmp_path)!r}"]
    try:
        runs.run_train([str(ROOT / "gin_configs/recipes/minimal.gin")], bindings, str(tmp_path / "run"), False)
        found = None
    except SystemExit as stop:
        found = stop.code
    finally:
        gin.clear_config()
    assert found == status
    assert ("Run the same command to continue" in capsys.readouterr().out) == (result is None)


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        ("train", ["--gin_fil=x"], "Unknown command line flag 'gin_fil'. Did you mean: gin_file ?"),
        ("train", ["--gin_file=x", "--dry_run", "--process=a"], "flag --process=a: invalid literal"),
        (
            "train",
            ["--gin_file=x", "--dry_run", "--coordinator=a:1", "--processes=2"],
            "--coordinator, --processes needs --process as well",
        ),
        ("evaluate", ["--prompts=x", "--output=x", "--answers=x", "--judge_options={"], "--judge_options is not JSON"),
        ("train", [], "give a recipe with --gin_file"),
        ("train", ["x"], "unexpected argument 'x'"),
        ("train", ["--gin_file=x", "--dry_run", "--fork="], "--fork is empty: give a path, or leave the flag out"),
        ("sweep", ["--gin_file=x", "--workdir="], "--workdir is empty: give a path, or leave the flag out"),
        ("compare", ["x", "--output="], "--output is empty: give a path, or leave the flag out"),
        ("compare", ["x", "--json= "], "--json is empty: give a path, or leave the flag out"),
        ("grow", ["--gin_file=x"], "give --source; give --workdir"),
        ("evaluate", ["--checkpoint=x", "--text=x", "--batch_size=0"], "--batch_size=0"),
        ("evaluate", ["--checkpoint=x"], "say what to evaluate: --lm_eval, --text, --generate or --prompts"),
        ("plan", ["--gin_file=x", "--topology=v5p-2000"], "nearest sizes are v5p-1920 and v5p-2048"),
        ("verify", ["--source=x"], "give --source and --target, or --checkpoint, or --store"),
        ("verify", ["--source=x", "--checkpoint=x"], "--checkpoint stands alone, or with --json"),
        ("verify", ["--store=x", "--gin_bindings=a.b = 1"], "--store stands alone, or with --json"),
        ("savings", ["--gin_file=x", "--workdir=y", "--steps=tune,plan"], "--steps names 'plan'; the steps are tune,"),
        ("savings", ["--gin_file=x"], "give a --workdir"),
        ("prepare_data", [], "give a recipe with --gin_file"),
        ("prepare_data", ["--gin_file=x", "--runner=SprakRunner"], "did you mean 'SparkRunner'?"),
        ("prepare_data", ["--gin_file=x", "--beam_option=a=b"], "--beam_option is for a runner of Beam"),
        ("prepare_data", ["--gin_file=x", "--runner=SparkRunner", "--beam_option=--a=b"], "write key=value, without"),
        ("compare", [], "give the work directories of the runs to compare"),
        (
            "checkpoint",
            ["lst", "x"],
            "there is no subcommand 'lst'; there are list, show, verify, diff, prune, copy; did",
        ),
        ("checkpoint", ["prune", "x", "--every=-2"], "flag --every=-2: -2 is not a positive integer"),
        ("bindings", ["--nope"], "Unknown command line flag 'nope'"),
    ],
)
def test_wrong_flags_exit_with_2_and_say_what_is_wrong_first(program, arguments, said):
    command = [sys.executable, f"experiments/{program}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=as_user())
    error, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout, last) == (2, "", "--help lists the flags.")
    assert error.startswith("error: ") and said in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gin_bindings=Study.seds=2"], "did you mean 'seeds'?"),
        (["--steps=plans"], "The rate of adamw with wsd is not known yet: run the step 'tune' first."),
        (["--write=docs"], "--write=docs is a directory; give the name of a file."),
    ],
)
def test_a_study_that_cannot_be_run_is_one_sentence(arguments, said, tmp_path):
    command = [sys.executable, "experiments/savings.py", "--gin_file=gin_configs/savings/t0.gin", *arguments]
    command += [f"--workdir={tmp_path / 'study'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=as_user())
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("before", ["", "begun()\n  "], ids=["while it starts", "later"])
@pytest.mark.parametrize(
    "body",
    [
        "signal.raise_signal(signal.SIGINT)",
        # As an import that C code does may turn it into another error.
        "try:\n    signal.raise_signal(signal.SIGINT)\n  except BaseException as e:\n    raise ImportError('x') from e",
        "class A:\n    def __del__(self):\n      signal.raise_signal(signal.SIGINT)\n  A()\n  print('went on')",
        "try:\n    signal.raise_signal(signal.SIGINT)\n  except BaseException:\n    signal.raise_signal(signal.SIGINT)",
    ],
    ids=["as it comes", "as another error", "where it cannot be raised", "swallowed, and then sent again"],
)
def test_an_interrupted_program_says_one_line(body, before):
    code = "import signal, sys\nsys.argv = ['x']\nfrom flm_jax.cli.flags import begun, launch\n"
    code += f"def run(_):\n  {before}{body}\nlaunch('', lambda: None, run)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=as_user())
    assert done.stdout == ""
    assert (done.returncode, done.stderr) == (INTERRUPTED, "Interrupted.\n")


def test_sigterm_ends_a_program_like_ctrl_c_and_lets_it_clean_up():
    code = (
        "import signal, sys\nsys.argv = ['x']\nfrom flm_jax.cli.flags import begun, launch\ndef run(_):\n  begun()\n"
        "  try:\n    signal.raise_signal(signal.SIGTERM)\n  finally:\n    print('cleaned')\n"
        "launch('', lambda: None, run)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=as_user())
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "cleaned\n", "Interrupted.\n")


@pytest.mark.integration
def test_ctrl_c_while_a_run_starts_says_one_line(tmp_path):
    for delay in (0.5, 1.5):
        process = subprocess.Popen(
            [sys.executable, "experiments/train.py", "--gin_file=gin_configs/recipes/demo.gin", "--dry_run"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=as_user(),
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        assert (process.returncode, error) == (INTERRUPTED, "Interrupted.\n")
