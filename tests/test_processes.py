"""Several processes that train as one: the same numbers however many they are, one writer, one verdict."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flm_jax import distributed
from flm_jax import train as training
from flm_jax.checkpoint import read_manifest
from flm_jax.data.source import open_data
from flm_jax.guards import lost
from flm_jax.sharding import MeshConfig, make_mesh
from tests import worker
from tests.environment import fast_flags
from tests.small import write_corpus

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900


def start(folder: Path, processes: int, devices: int, *acts: dict) -> list[str]:
    """Runs acts of tests/worker.py in several processes; returns what each has printed, and leaves none behind."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"folder": str(folder), "acts": acts}))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices} {fast_flags()}"
    environment = {**os.environ, "XLA_FLAGS": flags}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.worker", f"localhost:{port}", str(processes), str(i), str(plan)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        return [process.communicate(timeout=PATIENCE)[0] + f"exit status {process.returncode}" for process in started]
    finally:
        for process in started:
            process.kill()


def found(folder: Path, name: str, processes: int, printed: list[str]) -> list[dict]:
    """What each process has found in one act."""
    files = [folder / f"{name}.{i}.json" for i in range(processes)]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    assert not missing, "\n".join(printed[i][-3000:] for i in missing)
    return [json.loads(file.read_text()) for file in files]


def digest(work: Path) -> str:
    """Of the last state."""
    return read_manifest(work / "checkpoints" / "1_second" / "6").state_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The data, prepared: shared, one copy a process; and other texts for one of them."""
    base = tmp_path_factory.mktemp("processes")
    write_corpus(base / "corpus")
    open_data(worker.recipe(base).data)
    for i in range(2):
        shutil.copytree(base / "cache", base / f"cache.{i}")
    for i in range(2):
        shutil.copytree(base / "corpus", base / f"other.{i}")
    (base / "other.1" / "00.txt").write_text("another text\n" * 30)
    return base


@pytest.fixture(scope="module")
def reference(folder):
    """One process, never stopped; like the others it adds up by gloo."""
    printed = start(folder, 1, 8, {"do": "train", "name": "reference", "with": {"work": "reference"}})
    return found(folder, "reference", 1, printed)[0]["result"]["report"]


@pytest.fixture(scope="module")
def two(folder):
    """Two processes, each with a cache of its own; one of them gets SIGTERM in the second stage, at its third step."""
    acts = [
        ("train", "unshared", {"work": "unshared.#"}, True),
        ("train", "altered", {"work": "altered", "cache": "cache.#", "corpus": "other.#"}, True),
        ("train", "stopped", {"work": "stopped", "cache": "cache.#", "terminate": [1, 7]}, False),
        ("locked", "locked", {"work": "stopped"}, True),
        ("alone", "alone", {}, True),
    ]
    return start(folder, 2, 4, *({"do": do, "name": name, "with": given, "fails": f} for do, name, given, f in acts))


def test_a_signal_to_one_process_stops_all_at_one_step_with_a_save(two, folder):
    results = found(folder, "stopped", 2, two)
    assert [r["result"]["report"] for r in results] == [None, None]
    saved = sorted(int(path.name) for path in (folder / "stopped" / "checkpoints" / "1_second").glob("[0-9]*"))
    assert saved == [0, 3, 4], "heard at the next step, which is saved though no save is due"
    assert "SIGTERM: stopping after this step" in two[1] and "SIGTERM" not in two[0]


def test_each_process_reads_its_own_rows_and_the_first_writes_all_else(two, folder):
    first, second = found(folder, "stopped", 2, two)
    assert [first["result"]["rows"], second["result"]["rows"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert first["result"]["read"] == second["result"]["read"] == [4]

    def own(path: str) -> bool:
        # A cache that is not shared remembers the digests of texts for itself.
        return "/arrays" in path or "/cache.1/digests" in path

    assert any("/.recipe.json." in path and path.endswith(".tmp") for path in first["written"])
    assert [path for path in second["written"] if not own(path)] == []
    lines = [line for line in two[1].splitlines() if "Gloo" not in line and "Rank" not in line and line.strip()]
    assert "Growth to 'second'" in two[0] and not any("Growth" in line or "step/s" in line for line in lines)


def test_what_fails_in_one_process_fails_in_all_with_its_sentence(two, folder):
    first, second = found(folder, "locked", 2, two)
    assert first["error"] == second["error"] == "CheckpointError"
    assert "is being written by another run (process " in first["text"]
    assert second["text"] == f"process 0: {first['text']}"
    first, second = found(folder, "unshared", 2, two)
    assert "checkpoints need a file system that all processes share" in second["text"]
    assert first["text"] == f"process 1: {second['text']}"
    for result in found(folder, "altered", 2, two):
        assert result["error"] == "ValueError"
        assert "The data's digest differs between processes: process 0 has " in result["text"]
        assert not (folder / "altered").exists()


def test_an_error_in_one_process_leaves_no_other_waiting(two, folder):
    assert not list(folder.glob("alone.*"))
    assert two[0].endswith("error: process 1 failed: no more data\nexit status 1")
    assert two[1].endswith("exit status 1")


class Ended(BaseException):
    """In the place of the end of this process."""


@pytest.mark.parametrize(("told", "status"), [(None, distributed.LOST), ("process 1 failed: no more data", 1)])
def test_a_collective_that_breaks_ends_the_process_at_once_with_a_sentence(monkeypatch, capfd, told, status):
    """Which process notices a lost one, and when, differs from run to run: its errors are written here."""

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(distributed, "joined", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "tell", lambda text, status: (1, told) if told else (status, text))
    monkeypatch.setattr(lost, "_TELLING_S", 0.0)
    monkeypatch.setattr(os, "_exit", end)
    for said in (
        "Gloo AllReduce failed: Connection closed by peer",
        "NCCL error: remote process exited or there was a network error",
    ):
        with pytest.raises(Ended, match=str(status)), lost.ending_if_lost():
            raise jax.errors.JaxRuntimeError(said)
        printed = capfd.readouterr().err
        assert printed.count("\n") == 1
        assert printed.startswith(
            f"error: {told or 'process 0 has lost another process, which was killed, or whose host is gone ('}"
        )
        assert told or said in printed
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"), lost.ending_if_lost():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(ValueError, match="Gloo AllReduce failed"), lost.ending_if_lost():
        raise ValueError("Gloo AllReduce failed: of whatever")


@pytest.mark.parametrize(("process", "why"), [(0, "another one was not started, or ended"), (1, "did not let it in")])
def test_a_process_that_waits_for_others_in_vain_says_so_and_ends(process, why):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    program = f"from flm_jax import distributed; distributed.join({address!r}, 2, {process}, join_timeout=2)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "every process must be started within 2 s" in done.stderr
    assert "error: Within 2 s not all 2 processes have joined the run: " in done.stderr and why in done.stderr
    assert "Check failure stack trace" not in done.stderr


def test_stopped_with_two_processes_and_gone_on_with_one(two, reference, folder):
    """Which does not add up by gloo, so in another order."""
    found(folder, "stopped", 2, two)
    shutil.copytree(folder / "stopped", folder / "one")
    report = training.train(worker.recipe(folder), worker.RUN, folder / "one")
    losses = [[e["loss"] for e in r["evals"]] for r in (report, reference)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    assert report["growths"] == reference["growths"]


def test_stopped_with_two_processes_and_gone_on_with_four_that_share_rows(two, reference, folder):
    found(folder, "stopped", 2, two)
    shutil.copytree(folder / "stopped", folder / "four")
    # What one process sees to be damaged is damaged to all of them.
    newest = folder / "four" / "checkpoints" / "1_second" / "4" / "arrays"
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    printed = start(folder, 4, 2, {"do": "train", "name": "four", "with": {"work": "four"}})
    results = [r["result"] for r in found(folder, "four", 4, printed)]
    assert [r["rows"] for r in results] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    assert [r["report"] for r in results] == [reference] * 4
    assert digest(folder / "four") == digest(folder / "reference")
    assert json.loads((folder / "four" / "report.json").read_text()) == results[0]["report"]
    assert "step 4 is REFUSED, using an older one" in printed[0] and "REFUSED" not in "".join(printed[1:])
    assert all(text.endswith("exit status 0") for text in printed)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"process": 1}, "--process needs --coordinator and --processes as well"),
        ({"coordinator": "a:1", "processes": 2}, "--coordinator, --processes needs --process as well"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "numbered from 0 to 1"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "--coordinator=a must be host:port"),
        ({"coordinator": "a:99999", "processes": 2, "process": 0}, "a port up to 65535"),
        ({"process": 0, "distributed": True}, "leave --coordinator, --processes, --process out"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit(given, sentence, monkeypatch):
    with pytest.raises(ValueError, match=sentence):
        distributed.join(**given)
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID=one in the environment must be a number"):
        distributed.join()
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(ValueError, match="--process needs --coordinator and --processes as well"):
        distributed.join()


class Chip:
    """Stands for a device of several slices."""

    device_kind = "TPU v4"

    def __init__(self, number: int, chips: int, platform: str) -> None:
        self.id, self.slice_index, self.platform = number, number // chips, platform
        self.process_index = number // 4
        self.coords, self.core_on_chip = (number % chips % 2, number % chips // 2, 0), 0
        self.client = None


def test_data_is_split_over_slices_first():
    chips = [Chip(i, 4, "tpu") for i in range(8)]
    mesh = make_mesh(MeshConfig(data=4, tensor=2), chips)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert mesh.shape["data"] == 4 and mesh.shape["tensor"] == 2
    assert [set(row.ravel()) for row in slices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match="MeshConfig.data=1 must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), chips)


def test_any_axis_may_cross_gpu_nodes():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), [Chip(i, 4, "gpu") for i in range(8)])
    assert [chip.id for chip in mesh.devices.ravel()] == list(range(8))
