"""What a fork records: costs of steps that change on the way, and records that come back or are refused."""

import json
import random

import pytest

from flm_jax.records import FORK
from flm_jax.tracking import Change, ForkRecord, StageCost, Totals, read_fork
from tests.test_hostile_fuzz import changed, check

FIRST = StageCost(8, 10, teacher_flops_per_token=3, teacher_steps=4)
SECOND = StageCost(16, 10, teacher_flops_per_token=5, teacher_steps=6)
THIRD = StageCost(4, 10)
RECORD = ForkRecord(
    checkpoint="/runs/old/checkpoints/0_first/3",
    asked="/runs/old",
    stage="first",
    step=3,
    digest="ab" * 32,
    recipe="cd" * 32,
    changes=(Change("stages.first.batch_size", 8, 16), Change("data.corpus", {"class": "Jsonl"}, None)),
    notes=("The data goes on.",),
    position={"position": 3},
    costs={"first": FIRST},
)


def test_each_step_costs_what_it_cost_when_it_was_done():
    """Two forks, at step 3 and at step 5: sums over steps, one at a time."""
    cost = THIRD.following(SECOND.following(FIRST, 3), 5)
    tokens = [8, 8, 8, 16, 16, 4, 4]
    per_token = [13, 13, 13, 15, 15, 10, 10]
    for steps in range(8):
        assert cost.tokens(steps) == sum(tokens[:steps])
        assert cost.flops(steps) == sum(n * f for n, f in zip(tokens[:steps], per_token, strict=False))
        assert Totals(1, 2, 3).plus(steps, cost) == (1 + steps, 2 + cost.tokens(steps), 3 + cost.flops(steps))
    assert [cost.at(step) for step in range(1, 8)] == per_token
    assert cost.teacher_flops(7) == 3 * 8 * 3 + 2 * 16 * 5
    assert StageCost.from_record(json.loads(json.dumps(cost.record())), "it") == cost


def test_forks_that_change_no_cost_do_not_nest():
    assert FIRST.following(FIRST, 3) == FIRST and THIRD.following(FIRST, 0) == THIRD


def test_stages_that_were_begun_cost_what_they_did_and_later_ones_their_own():
    record = ForkRecord(**{**vars(RECORD), "stage": "second", "costs": {"first": FIRST, "second": SECOND}})
    assert record.cost("first", THIRD) == FIRST and record.cost("third", THIRD) == THIRD
    assert record.cost("second", THIRD) == THIRD._replace(since=3, before=SECOND)


def test_a_record_is_read_as_it_was_written(tmp_path):
    (tmp_path / FORK).write_text(json.dumps(RECORD.record()))
    assert read_fork(tmp_path) == RECORD
    assert RECORD.lines() == [
        "Forked from /runs/old/checkpoints/0_first/3 (digest abababababab): step 3 of stage 'first'.",
        "  stages.first.batch_size: 8 -> 16",
        "  data.corpus: a Jsonl -> -",
        "The data goes on.",
    ]
    assert RECORD.begun == b'{"position": 3}'
    assert read_fork(tmp_path / "none") is None


def test_a_record_that_is_damaged_is_refused_in_a_sentence(tmp_path):
    path, rng, whole = tmp_path / FORK, random.Random(0), RECORD.record()

    def read(content):
        path.write_text(json.dumps(content))
        found = read_fork(tmp_path)
        assert found is not None
        found.lines()

    assert check(read, json.loads(json.dumps(whole)), "as it was")
    assert 10 < sum(check(read, changed(json.loads(json.dumps(whole)), rng), "fork.json") for _ in range(300)) < 250
    with pytest.raises(ValueError, match=r"fork.json lacks the field 'notes'"):
        read({name: value for name, value in whole.items() if name != "notes"})
