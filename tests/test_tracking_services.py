"""Tracking services, with stand-ins for their packages: what they are told, and that a failure stops nothing."""

import importlib.util
import shutil
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from flm_jax.tracking import Measurement, Mlflow, Totals, Trackio, Wandb, background, check_installed, tracked

SETTINGS = {"recipe": {"stages": [{"name": "a b!", "steps": 3}]}}


def measured(step, **values):
    return Measurement("train", "a", step, Totals(step, 10 * step, 100 * step), 1.5e9, values)


def module(name, **contents):
    found = ModuleType(name)
    vars(found).update(contents)
    return found


@pytest.fixture
def said(monkeypatch):
    """What stand-ins for wandb, mlflow and trackio are told, in order."""
    calls = []

    def record(name, answer=None):
        def call(*args, **kwargs):
            calls.append((name, args, kwargs))
            return answer

        return call

    methods = {name: record(name) for name in ("define_metric", "log", "finish")}
    run = SimpleNamespace(url="https://wandb.test/x", offline=False, dir="/w/wandb/offline-run-1/files", **methods)
    wandb = module("wandb", Settings=dict, init=record("init", run), login=record("login", True))
    trackio = module("trackio", init=record("init", run))

    runs = []

    class Client:
        def __init__(self, tracking_uri):
            calls.append(("client", (tracking_uri,), {}))

        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id="7")

        def search_runs(self, experiments, text, max_results):
            calls.append(("search", (text,), {}))
            return runs

        def create_run(self, experiment, run_name, tags):
            calls.append(("create", (run_name, tags), {}))
            runs.append(SimpleNamespace(info=SimpleNamespace(run_id="r")))
            return runs[0]

        log_batch, set_terminated, update_run = record("batch"), record("end"), record("update")

    entities = module("mlflow.entities", Metric=lambda *a: a, Param=lambda *a: a)
    mlflow = module("mlflow", MlflowClient=Client, get_tracking_uri=lambda: "sqlite:///m.db", entities=entities)
    for one in (wandb, trackio, mlflow, entities):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return calls


def send(tracker, workdir, *steps, fails=False):
    """One start of a run, and the sentence on where to look."""
    try:
        with tracked(tracker, workdir, SETTINGS) as service:
            where = service.where(10)
            for step in steps:
                service.write(measured(step, loss=2.0, bad=float("nan"), note="text"))
            if fails:
                raise KeyError("the run fails")
    except KeyError:
        assert fails
    return where


def test_weights_and_biases_goes_on_in_one_run(said, tmp_path):
    assert send(Wandb(name="mine"), tmp_path, 3) == "Weights & Biases: https://wandb.test/x"
    send(Wandb(), tmp_path, 2, fails=True)
    inits = [kwargs for name, _, kwargs in said if name == "init"]
    assert [given["name"] for given in inits] == ["mine", tmp_path.name]
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow"
    assert inits[0]["config"] == SETTINGS and inits[0]["mode"] == "online"
    # Without a step of its own, which could not go back: the axis is ours.
    logs = [(args, kwargs) for name, args, kwargs in said if name == "log"]
    numbers = {"train/loss": 2.0, "train/tokens": 30, "train/flops": 300, "step": 3}
    assert logs[0] == ((numbers,), {}) and logs[1][0][0]["step"] == 2
    assert ("define_metric", ("*",), {"step_metric": "step"}) in said
    assert [kwargs["exit_code"] for name, _, kwargs in said if name == "finish"] == [0, 1]


def test_weights_and_biases_asks_for_no_key_on_the_terminal(said, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sys.modules["wandb"], "login", lambda prompt: prompt)
    assert send(Wandb(), tmp_path, 1, 2) is None
    assert [record.message for record in caplog.records] == [
        "Wandb: RuntimeError: nobody is logged in: run `wandb login`, or bind Wandb.offline = True. Training goes on; "
        "metrics.jsonl has every measurement."
    ]
    send(Wandb(offline=True), tmp_path)
    assert [kwargs["mode"] for name, _, kwargs in said if name == "init"] == ["offline"]


def test_mlflow_finds_the_run_of_the_start_before(said, tmp_path):
    where = send(Mlflow(uri="http://host:5000/"), tmp_path, 3)
    assert where.startswith("MLflow: http://host:5000/#/experiments/7/runs/")
    ((_, (_, tags), _),) = [call for call in said if call[0] == "create"]
    batches = [(args, kwargs) for name, args, kwargs in said if name == "batch"]
    # A parameter's name allows few characters.
    assert batches[0][1]["params"] == [("recipe.stages.a b_.name", "a b!"), ("recipe.stages.a b_.steps", "3")]
    assert batches[1][1]["metrics"][0] == ("train/loss", 2.0, 1_500_000_000_000, 3)
    assert len(batches[1][1]["metrics"]) == 3, "a number that is not finite, and a text, are left out"
    assert send(Mlflow(), tmp_path, 2, fails=True) == "MLflow: mlflow ui --backend-store-uri sqlite:///m.db"
    assert ("search", (f"tags.flm_jax = '{tags['flm_jax']}'",), {}) in said
    assert [call[0] for call in said].count("create") == 1
    assert [args[-1] for name, args, _ in said if name == "end"] == ["FINISHED", "FAILED"]


def test_trackio_goes_on_by_a_name_that_no_other_run_has(said, tmp_path):
    assert send(Trackio(space="me/flm"), tmp_path, 3) == "trackio: in the Space me/flm"
    assert send(Trackio(), tmp_path, 4) == "trackio: trackio show --project flm_jax"
    inits = [kwargs for name, _, kwargs in said if name == "init"]
    assert inits[0]["name"] == inits[1]["name"] and inits[0]["name"].startswith(f"{tmp_path.name}-")
    assert [kwargs["step"] for name, _, kwargs in said if name == "log"] == [3, 4]


def test_a_package_that_is_missing_is_named_before_anything_begins(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ValueError, match=r"Run.tracker = @Trackio\(\) needs the package trackio.*pip install trackio"):
        check_installed(Trackio())
    check_installed(None)


class Standing:
    """In place of a tracker: takes what it is given, or fails, or hangs."""

    package = "standing"

    def __init__(self, opens=None, writes=None):
        self.opens, self.writes, self.taken = opens, writes, []

    def begin(self, about):
        if self.opens is not None:
            self.opens()
        return self, "here"

    def write(self, one):
        if self.writes is not None:
            self.writes()
        self.taken.append(one.total.steps)

    def close(self, failed):
        self.taken.append("failed" if failed else "finished")


def refuse():
    raise ConnectionError("no route to host")


def test_a_service_that_fails_is_said_once_and_the_next_measurement_is_tried(tmp_path, caplog):
    fails = iter([refuse, refuse, lambda: None])
    standing = Standing(writes=lambda: next(fails)())
    assert send(standing, tmp_path, 1, 2, 3) == "here"
    assert standing.taken == [3, "finished"]
    assert [record.message for record in caplog.records] == [
        "Standing: ConnectionError: no route to host. Training goes on; metrics.jsonl has every measurement."
    ]
    caplog.clear()
    assert send(Standing(opens=refuse), tmp_path, 1) is None
    assert len(caplog.records) == 1


def test_a_service_that_hangs_delays_neither_a_step_nor_the_end_for_long(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(background, "WAITING", 5)
    free = threading.Event()
    about = background.About("run", "key", tmp_path, {})
    begun = time.perf_counter()
    with background.Background(Standing(writes=free.wait), about, patience=0.2) as service:
        assert service.where(10) == "here"
        for step in range(50):
            service.write(measured(step))
    assert time.perf_counter() - begun < 5
    free.set()
    assert [record.message.partition(":")[2][:30] for record in caplog.records] == [" 5 measurements wait to be sen"]
    service._thread.join(10)


def test_only_process_0_tells_the_service(said, tmp_path, monkeypatch):
    monkeypatch.setattr(background, "is_primary", lambda: False)
    with tracked(Wandb(), tmp_path, SETTINGS) as service:
        assert service is None
    assert not said and not list(tmp_path.iterdir())


def test_a_key_that_cannot_be_read_gives_a_new_run(said, tmp_path):
    (tmp_path / "tracker.json").write_text("{")
    send(Wandb(), tmp_path, 1)
    send(Wandb(), tmp_path, 2)
    keys = [kwargs["id"] for name, _, kwargs in said if name == "init"]
    assert keys[0] == keys[1] and len(keys[0]) == 8


def test_a_copy_of_a_work_directory_begins_a_run_of_its_own(said, tmp_path, caplog):
    first, copied = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    (first / "tracker.json").write_text('{"key": "01234567"}')  # as earlier versions wrote it
    send(Wandb(), first, 1)
    shutil.copytree(first, copied)
    (tmp_path / "link").symlink_to(first)
    for workdir in (tmp_path / "link", copied, copied):
        send(Wandb(), workdir, 2)
    keys = [kwargs["id"] for name, _, kwargs in said if name == "init"]
    assert keys[:2] == ["01234567"] * 2
    assert keys[2] == keys[3] != keys[0]
    (warning,) = [record.message for record in caplog.records]
    assert f"is of {first}, so {copied} begins a new run" in warning and '{"key": "01234567"}' in warning
