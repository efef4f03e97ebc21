"""`make bench`: its parts on tiny shapes, and what it reports of a part that fails."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from benchmarks import bench, parts
from benchmarks.parts import trainers
from tests.environment import as_user


@pytest.mark.integration
def test_the_cheap_parts_run_and_are_written(tmp_path):
    page = tmp_path / "out" / "bench.md"
    command = [sys.executable, "benchmarks/bench.py", "--tiny", "--parts=plan,input", f"--write={page}"]
    subprocess.run(command, cwd=parts.ROOT, env=as_user(), check=True, timeout=120)
    text, found = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    assert [record["part"] for record in found["parts"]] == ["input", "plan"]
    assert text.index("## Input pipeline") < text.index("## Planning") and "Failed" not in text
    low, median, high = found["parts"][0]["found"]["placed"]
    assert 0 < low <= median <= high
    assert "python benchmarks/bench.py --tiny" in text and "Load average" in text


@pytest.mark.integration
def test_a_part_that_is_measured_again_leaves_the_others_on_the_page(tmp_path):
    page = tmp_path / "bench.md"
    record = {"part": "start", "command": "an earlier one", "seconds": 60, "error": "no luck", "found": None}
    page.with_suffix(".json").write_text(json.dumps({"parts": [record]}))
    command = [sys.executable, "benchmarks/bench.py", "--tiny", "--parts=plan", f"--write={page}"]
    subprocess.run(command, cwd=parts.ROOT, env=as_user(), check=True, timeout=120)
    text = page.read_text()
    assert "    an earlier one\n    python benchmarks/bench.py --tiny --parts=plan" in text
    assert text.index("Failed: no luck") < text.index("## Planning")


def test_the_first_step_of_a_turn_is_not_timed():
    calls = []

    def step():
        time.sleep(0.01 if calls else 0.5)
        calls.append(1)

    assert 0.01 <= trainers.turn(step) < 0.2
    assert len(calls) == 1 + trainers.TIMED


@pytest.mark.integration
def test_a_trainer_is_served_by_a_process_of_its_own():
    ours, plain = (trainers.Served(name, "tiny") for name in ("flm_jax", "plain JAX"))
    assert ours.loss == pytest.approx(plain.loss, rel=1e-5)
    assert ours() > 0 and plain() > 0
    ours.close()
    with pytest.raises(RuntimeError, match="its process ended with status 1: KeyError: 'nobody'"):
        trainers.Served("nobody", "tiny")


def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    program = tmp_path / "fails.py"
    program.write_text("import sys; sys.exit('the disk is full')")
    monkeypatch.setattr(bench, "__file__", str(program))
    record = bench.measured("plan", "tiny", tmp_path / "none.json", 1)
    assert record["error"] == "the disk is full" and record["found"] is None
    assert "Failed: the disk is full" in bench.section(record)


def test_a_part_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    program = tmp_path / "sleeps.py"
    started = tmp_path / "started"
    sleeper = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    program.write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])")
    monkeypatch.setattr(bench, "__file__", str(program))
    assert "ended after 0.05 minutes" in bench.measured("plan", "tiny", tmp_path / "none.json", 0.05)["error"]
    status = pathlib.Path(f"/proc/{int(started.read_text())}/status")  # what it has started is ended too
    for _ in range(100):  # on a busy machine, a process takes a moment to end
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("what the part has started runs on")


def test_a_program_that_fails_says_why():
    with pytest.raises(RuntimeError, match="status 1: no such recipe"):
        parts.program(["-c", "import sys; sys.exit('no such recipe')"])
    assert parts.program(["-c", "print('said')"]) == "said\n"
