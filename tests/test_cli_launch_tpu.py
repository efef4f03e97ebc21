"""The program that launches: flags that are refused, dry runs as docs/launch.md shows them, plans before machines.

`python -m tests.test_cli_launch_tpu` writes the output of the commands in docs/launch.md.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flm_jax.cli import gin_reader, launch_tpu
from flm_jax.planning import text
from flm_jax.planning.topology import topology
from tests import fake_gcloud, fake_hosts
from tests.environment import as_user

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/launch.md"
BLOCK = re.compile(r"```console\n\$ (python experiments/launch_tpu\.py (?:.*\\\n)*.*)\n((?:(?!```).*\n)*)```")
WHAT = ["--name=demo", "--topology=v4-8", "--zone=us-central2-b"]
RECIPE = ["--gin_file=gin_configs/recipes/minimal.gin", "--release=flm_jax==0.1.0"]
TEXTS = "--gin_bindings=TextFolder.path = '/a'"


def launch(*arguments, env=(), cwd=ROOT):
    command = [sys.executable, str(ROOT / "experiments/launch_tpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**as_user(), **dict(env)})


def shown(command):
    """What a command of the page prints."""
    done = launch(*shlex.split(command.replace("\\\n", " "))[2:])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to do: create, run, status, logs, stop, delete, write"),
        (["dance"], "action dance: value should be one of <create|run|"),
        (["run", "now"], "unexpected argument 'now'"),
        (["status"], "status needs --name and --zone"),
        (["run", "--name=demo"], "run needs --zone and --topology and --workdir"),
        (["run", *WHAT, "--workdir=/shared/run"], "give a recipe with --gin_file"),
        (["run", *WHAT, *RECIPE, "--workdir=gs://bucket/run"], "must lie on a POSIX file system"),
        (["run", *WHAT, *RECIPE, "--workdir=/a/b", "--topology=v4-7"], "the nearest size is v4-8"),
        (["run", *WHAT, *RECIPE, "--workdir=/a/b", "--topology=h100-8"], "run is for TPUs; for h100-8 there is write"),
        (["run", *WHAT, *RECIPE, "--workdir=/a/b", "--zone=mars"], "--zone=mars is not the name of a zone"),
        (["status", "--name=demo", "--zone=mars"], "--zone=mars is not the name of a zone; such as us-east5-a"),
        (["run", *WHAT, *RECIPE, "--workdir=/a/b", "--name=Demo"], "--name=Demo: give 1 to 57"),
        (["run", *WHAT, *RECIPE, "--workdir=/a/b", "--release=flm_jax"], "--release=flm_jax is not pinned"),
        (["run", *WHAT, *RECIPE, "--workdir=/a/b", "--gin_file=nope.gin"], "There is no gin file 'nope.gin'"),
        (["run", *WHAT, *RECIPE, "--workdir=/a/b", "--constraints=nope.txt"], "nope.txt"),
    ],
)
def test_wrong_flags_are_refused_with_one_sentence(arguments, said):
    done = launch(*arguments)
    error, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout, last) == (2, "", "--help lists the flags.")
    assert error.startswith("error: ") and said in error


@pytest.mark.integration
def test_a_missing_gcloud_is_told(tmp_path):
    done = launch("status", *WHAT, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: gcloud is not on the PATH: install") and len(done.stderr.splitlines()) == 1


@pytest.mark.integration
def test_a_manifest_that_cannot_be_is_told(tmp_path):
    done = launch("write", *WHAT, *RECIPE, TEXTS, "--workdir=/a/b", "--format=slurm", f"--output={tmp_path / 'x'}")
    assert done.returncode == 1 and not (tmp_path / "x").exists()
    assert done.stderr == "error: --format=slurm is for GPU nodes, such as --topology=h100-64; v4-8 is a TPU.\n"


@pytest.mark.integration
@pytest.mark.parametrize("action", [["write", "--format=host"], ["run", "--noplan"]])
def test_a_recipe_with_a_mistyped_name_reaches_no_host(action, tmp_path):
    wrong = [*RECIPE, TEXTS, "--gin_bindings=Recipe.sedd = 1", "--workdir=/a/b"]
    fake_hosts.make(tmp_path)
    env = {"PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}", "FAKE_GCLOUD": str(tmp_path / "cloud")}
    # The machine is there already, so that no plan would be shown.
    (tmp_path / "cloud/state.json").write_text('{"queue": ["ACTIVE"]}')
    done = launch(*action[:1], *WHAT, *wrong, *action[1:], env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert "sedd" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not {"scp", "ssh", "create"} & set(verbs(env))


@pytest.mark.integration
def test_the_page_shows_what_dry_runs_print():
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) >= 2
    for command, output in blocks:
        assert shown(command) == output, "`python -m tests.test_cli_launch_tpu` writes the page"


@pytest.mark.integration
def test_a_manifest_is_written_to_a_file_and_holds_the_recipe(tmp_path):
    file = tmp_path / "demo.sh"
    asked = ["write", *WHAT, *RECIPE, TEXTS, "--workdir=/a/b", "--format=host", f"--output={file}"]
    shown = launch(*asked, "--dry_run")
    assert shown.returncode == 0 and not file.exists()
    made = launch(*asked, "--env=A=1", "--env=WANDB_API_KEY=x")
    told = f"Written to {file}. It holds WANDB_API_KEY as it is: share it with nobody.\n"
    assert (made.returncode, made.stdout) == (0, told)
    without = re.sub(r"  (A=1|WANDB_API_KEY=x)\n", "", file.read_text())
    assert re.sub("digest=.*", "", shown.stdout) == re.sub("digest=.*", "", without)
    assert "small/Stage.name = 'small'" in file.read_text()


def test_the_gin_files_of_a_recipe_are_found_with_what_they_include(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "mine.gin").write_text("include 'base/a.gin'\n  include 'not/at/the/start.gin'\n")
    (tmp_path / "base/a.gin").write_text('include "b.gin"\ninclude "gin_configs/recipes/minimal.gin"\n')
    (tmp_path / "base/b.gin").write_text("# include 'c.gin'\n")
    monkeypatch.chdir(tmp_path)
    names, found = gin_reader.files_of(["base/b.gin", "mine.gin"], [ROOT])
    assert names == ["base/b.gin", "mine.gin"]
    assert list(found) == ["base/b.gin", "mine.gin", "base/a.gin", "gin_configs/recipes/minimal.gin"]
    assert found["gin_configs/recipes/minimal.gin"] == ROOT / "gin_configs/recipes/minimal.gin"
    # One file by two names is read twice, and what it includes is not taken for one that was given.
    twice = ["base/a.gin", str(tmp_path / "base/a.gin")]
    assert launch_tpu._gin_files(twice)[0] == ("base/a.gin", "base/a.gin")
    monkeypatch.chdir(tmp_path / "base")
    with pytest.raises(ValueError, match="lies outside of the current directory"):
        gin_reader.files_of(["../mine.gin"], [ROOT])


def test_the_cost_of_a_plan_is_that_of_all_chips():
    record = {"flops": 1.0, "tokens": 1, "flops_per_token": 1.0, "days": 1.5}
    machine = topology("2xv5e-16")
    assert text.cost([record, record], machine, 2.0) == {"chip_hours": 3 * 24 * 32, "cost": 2 * 3 * 24 * 32}
    assert text.cost([record], machine, None)["cost"] is None
    assert "1,152 chip-hours, 2,304 at 2 per chip-hour" in text.total_text([record], machine, 2.0)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The environment of a user whose gcloud is a stand-in."""
    fake_hosts.make(tmp_path)
    yield {"PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}", "FAKE_GCLOUD": str(tmp_path / "cloud")}
    monkeypatch.setattr(fake_gcloud, "ROOT", tmp_path / "cloud")
    fake_gcloud.take_away()


def verbs(world):
    calls = Path(world["FAKE_GCLOUD"]) / "calls.jsonl"
    return [json.loads(line)[4] for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.mark.integration
def test_a_plan_is_shown_before_a_machine_is_made_and_one_that_does_not_fit_makes_none(world):
    # On four chips, and cut to one stage, so that it is planned in a few seconds.
    one = ["--gin_bindings=Recipe.stages = [@small/Stage()]", "--gin_bindings=TextFolder.path = '/a'"]
    asked = ["create", *WHAT, *RECIPE, *one, "--workdir=/a/b", "--price_per_chip_hour=3"]
    done = launch(*asked, env=world)
    assert done.returncode == 0, done.stderr
    plan, _, last = done.stdout.partition("chip-hours, 0 at 3 per chip-hour")
    assert "v4-8: 4 devices on 1 host" in plan and "fits in" in plan
    queued, cost = last.strip().splitlines()
    assert queued == "Queued demo: v4-8, in us-central2-b." and verbs(world) == ["create"]
    assert cost.startswith("It costs from when it is there, whether anything runs on it or not")
    done = launch(*asked, "--gin_bindings=Stage.batch_size = 4000000", env=world)
    assert done.returncode == 1 and "DOES NOT FIT" in done.stdout
    assert "error: The recipe does not fit on this machine, so nothing was created; --noplan" in done.stderr
    assert verbs(world) == ["create"]


@pytest.mark.integration
def test_the_hosts_go_on_when_the_program_is_interrupted_and_stop_and_delete_end_them(world, tmp_path):
    where = [*WHAT[:2], "--zone=us-central2-b", "--poll=0.1"]
    asked = [*where, *RECIPE, TEXTS, f"--workdir={tmp_path}/run", "--noplan", "--env=LAST=9000"]
    command = [sys.executable, "experiments/launch_tpu.py", "run", *asked]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**as_user(), **world})
    for line in program.stdout:
        if "running, attempt 1" in line:
            break
    logs = tmp_path / "cloud/hosts"
    while sum("step 1" in log.read_text() for log in logs.glob("*/flm_launch/demo/log")) < 2:
        time.sleep(0.05)  # a signal before it trains would end it without a save
    program.send_signal(signal.SIGINT)
    assert "The hosts go on without this program" in program.communicate(timeout=120)[0]
    assert program.returncode == 130
    found = launch("status", "--name=demo", "--zone=us-central2-b", env=world).stdout
    assert "host-0-0: running, attempt 1" in found and found.endswith("demo: running\n")
    assert "stopped, as asked" in launch("stop", *where, env=world).stdout
    assert "attempt 1 on host-0-0 ended with exit status 75" in launch("logs", *where, env=world).stdout
    assert launch("delete", *where, env=world).stdout == "Deleted demo.\n"
    assert launch("status", *where, env=world).stdout.endswith("demo: not running\n")


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda block: f"```console\n$ {block[1]}\n{shown(block[1])}```", PAGE.read_text()))
