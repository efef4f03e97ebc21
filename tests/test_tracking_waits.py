"""Seconds that a run waits, per step, and what is said if it waits for its data; memory and utilisation."""

import jax
import pytest

from flm_jax.planning.topology import CHIPS
from flm_jax.progress import Progress
from flm_jax.tracking import MetricsLog, StageCost, Totals, Waits, memory, read_log, utilisation
from flm_jax.tracking import machine as used


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Result:
    """A result of a step that runs until `ready`."""

    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


def spend(context, clock, seconds):
    with context:
        clock.now += seconds


def test_seconds_are_per_step_and_since_the_last_entry():
    clock = Clock()
    waits = Waits(10, clock)
    assert waits.per_step(10) == {}
    for _ in range(4):
        spend(waits.on("device"), clock, 2.0)
    spend(waits.on("save"), clock, 8.0)
    clock.now += 4.0  # the loop itself
    assert waits.per_step(14) == {"seconds/step": 5.0, "seconds/device": 2.0, "seconds/save": 2.0}
    spend(waits.on("device"), clock, 1.0)
    assert waits.per_step(16) == {"seconds/step": 0.5, "seconds/device": 0.5}


def test_reading_while_devices_compute_is_no_waiting():
    clock = Clock()
    waits = Waits(0, clock)
    spend(waits.on_data(Result(False)), clock, 3.0)
    assert waits.per_step(1) == {"seconds/step": 3.0}
    spend(waits.on_data(Result(True)), clock, 3.0)
    spend(waits.on_data(None), clock, 2.0)
    assert waits.per_step(2) == {"seconds/step": 5.0, "seconds/data": 5.0}


def test_a_share_takes_enough_steps_and_seconds():
    clock = Clock()
    waits = Waits(0, clock)
    spend(waits.on_data(None), clock, 6.0)
    assert waits.data_share(1) is None
    clock.now += 14.0
    waits.per_step(10)  # another count
    assert waits.data_share(19) is None and waits.data_share(20) == pytest.approx(0.3)
    clock.now += 9.0
    assert waits.data_share(99) is None
    clock.now += 9.0
    assert waits.data_share(99) == 0.0


def test_a_run_that_waits_for_its_data_says_so_once_and_writes_what_it_waited_for(tmp_path, monkeypatch, caplog):
    clock = Clock()
    monkeypatch.setattr("flm_jax.progress.Waits", lambda step: Waits(step, clock))
    metrics = MetricsLog(tmp_path, "0_one", "one", Totals(0, 0, 0), StageCost(8, 2))
    metrics.open(0)
    with Progress(metrics, "one", 70, 0) as show:
        for step in range(1, 71):
            spend(show.reading(None), clock, 0.3)
            spend(show.waiting("device"), clock, 0.7)
            show.step(step, {"loss": 1.0}, write=step % 10 == 0)
    metrics.close()
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "Stage one waits for its data: 30 % of the time before step 21" in said[0]
    lines = [line for line in read_log(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert [round(lines[2][f"seconds/{what}"], 9) for what in ("step", "data", "device")] == [1.0, 0.3, 0.7]
    assert lines[2]["memory/process"] > 1e7 and "utilisation" not in lines[2]


def test_memory_is_that_of_the_devices_where_they_count_it(monkeypatch):
    assert memory().keys() == {"memory/process"}

    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    def among(*stats):
        monkeypatch.setattr(used.jax, "local_devices", lambda: [Device(own) for own in stats])
        return memory()

    both = {"bytes_in_use": 5, "peak_bytes_in_use": 9}
    assert among(both, {"bytes_in_use": 7, "peak_bytes_in_use": 8}) == {"memory/device": 7, "memory/device_peak": 9}
    assert among({"bytes_in_use": 7}) == {"memory/device": 7}
    assert among(both, None).keys() == {"memory/process"}


def test_utilisation_is_of_the_peak_of_all_devices_and_left_out_where_it_is_unknown(monkeypatch):
    assert utilisation(1e12) == {}
    assert set(used.DEVICE_KINDS.values()) == set(CHIPS)
    with monkeypatch.context() as patch:
        patch.setitem(used.DEVICE_KINDS, jax.devices()[0].device_kind, "v5e")
        used.peak_flops.cache_clear()
        assert utilisation(4e12) == {"utilisation": pytest.approx(4e12 / (197e12 * jax.device_count()))}
    used.peak_flops.cache_clear()
