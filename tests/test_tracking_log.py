"""The files of measurements: what is in them, and that they stop nothing."""

import errno
import json

import pytest

from flm_jax.tracking import MetricsLog, Session, StageCost, Totals, read_log


def log(workdir, start=0, session=None):
    before = Totals(100, 3200, 6400)
    metrics = MetricsLog(workdir, "1_two", "two", before, StageCost(8, 2), session)
    metrics.open(start)
    return metrics


def lines(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] != "start"]


def test_steps_tokens_and_flops_count_over_all_stages(tmp_path):
    metrics = log(tmp_path)
    metrics.write("train", 3, {"loss": float("nan"), "note": "kept", "rate": 1})
    metrics.close()
    (line,) = lines(tmp_path)
    assert line.pop("time") > 1.7e9
    assert line == {
        "kind": "train",
        "stage": "two",
        "stage_step": 3,
        "step": 103,
        "tokens": 3224,
        "flops": 6448,
        "loss": None,
        "note": "kept",
        "rate": 1,
    }


def test_what_comes_again_after_a_restart_is_there_once(tmp_path):
    metrics = log(tmp_path)
    for step in (1, 2, 3, 4):
        metrics.write("train", step, {"loss": step})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # killed while it wrote
    metrics = log(tmp_path, start=2)
    metrics.write("train", 3, {"loss": 30.0})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(101, 1), (102, 2), (103, 30.0)]


def test_a_file_that_cannot_be_written_is_given_up_aloud_and_the_other_goes_on(tmp_path, caplog):
    (tmp_path / "events").write_text("in the way")
    metrics = log(tmp_path)
    metrics.write("train", 1, {"loss": 1.0})
    assert f"{tmp_path}/events/1_two cannot be written" in caplog.text
    assert len(lines(tmp_path)) == 1

    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            raise AssertionError("it is given up")

    metrics._writers[tmp_path / "metrics.jsonl"].close()
    metrics._writers[tmp_path / "metrics.jsonl"] = Full()
    caplog.clear()
    for step in (2, 3):
        metrics.write("train", step, {"loss": 1.0})
    metrics.close()
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/metrics.jsonl cannot be written (No space left on device): training goes on without it."
    ]


def test_a_damaged_line_costs_no_measurement_after_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for damage in (b"", b"[]", b"3", b'{"step": "x"}', b"\x00" * 9, b"\xff", b"[" * 100_000):
        path.write_bytes(b'{"step": 7}\n' + damage + b'\n{"step": 8}\n{"step": 104}\n{"st')
        log(tmp_path, start=3).close()
        *kept, start = path.read_bytes().splitlines()
        assert kept == [b'{"step": 7}', damage, b'{"step": 8}'], damage[:20]
        assert json.loads(start)["step"] == 103


def test_lines_that_stay_after_one_that_goes_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 104}\n{"step": 8}\n{"step": 105}\nx\n')
    log(tmp_path, start=3).close()
    assert path.read_text().splitlines()[:-1] == ['{"step": 8}', "x"]


def test_a_start_of_the_program_is_one_line_over_all_its_stages(tmp_path):
    session = Session(None, {"devices": 8})
    for stage in range(2):
        metrics = log(tmp_path, start=stage, session=session)
        metrics.write("train", stage + 1, {"loss": 1.0})
        metrics.close()
    found = [(line["kind"], line["stage_step"], line.get("devices")) for line in read_log(tmp_path / "metrics.jsonl")]
    assert found == [("start", 0, 8), ("train", 1, None), ("train", 2, None)]
    assert "start" not in "".join(path.read_bytes().decode("latin1") for path in (tmp_path / "events").rglob("*tfev*"))


class Taking:
    """In place of a service's thread."""

    def __init__(self):
        self.taken = []

    def write(self, measured):
        self.taken.append((measured.kind, measured.total.steps))


def test_the_service_gets_what_the_file_gets_even_if_the_file_cannot_be_written(tmp_path):
    service = Taking()
    metrics = MetricsLog(tmp_path / "gone", "0_one", "one", Totals(0, 0, 0), StageCost(8, 2), Session(service))
    metrics.write("save", 0, {})  # before the log is open
    metrics.open(0)
    metrics.write("train", 1, {"loss": 1.0})
    metrics.close()
    metrics.write("train", 2, {"loss": 1.0})
    assert service.taken == [("start", 0), ("train", 1)]


def test_a_log_is_read_up_to_what_is_being_written_and_other_files_are_refused(tmp_path):
    metrics = log(tmp_path)
    metrics.write("train", 1, {"loss": 1.0})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "tra')
    assert [line["kind"] for line in read_log(path)] == ["start", "train"]
    for line, said in (("3", "is 3; it must be: object"), ('{"kind": 1}', "'kind' is 1; it must be: text")):
        path.write_text(whole + line + "\n")
        with pytest.raises(ValueError, match="metrics.jsonl, line 3,.*") as refused:
            list(read_log(path))
        assert said in str(refused.value).replace("field 'kind'", "'kind'")
