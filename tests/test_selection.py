"""A selection from a small pool: what is chosen, the same bytes for any processes, going on, refusals; the base."""

import dataclasses
import gzip
import json
import os
import signal
import sys
from pathlib import Path

import gin
import jax
import numpy as np
import pytest

from flm_jax.chat.conversation import parse
from flm_jax.chat.template import TELE_FLM
from flm_jax.checkpoint import CheckpointError
from flm_jax.cli import runs
from flm_jax.data.json_lines import LineError
from flm_jax.data.train_vocabulary import load_vocabulary
from flm_jax.data.vocabulary import ByteVocabulary, TokenizerVocabulary
from flm_jax.data.vocabulary_files import VocabularyError, to_files
from flm_jax.data.workers import Workers
from flm_jax.model import Transformer
from flm_jax.selection import (
    Diversity,
    Domains,
    Duplicates,
    SampleScore,
    ScoringBase,
    Selection,
    TextRules,
    select,
    work,
)
from flm_jax.selection import judge as judge_module
from flm_jax.selection import scores as score_registry
from flm_jax.selection.base import Base
from tests import hub, small
from tests.test_evaluate import saved

ROOT = Path(__file__).resolve().parent.parent
WORDS = np.array([f"{a}{b}{c}" for a in "bdgkp" for b in "aeiou" for c in ("ne", "lo", "ster", "mic", "rant")])
RESULTS = ("selected.jsonl", "report.json", "report.md", "selection.png")
ONE = Selection(count=40, processes=1, most_faulty=5, diversity=Diversity(width=64, sample=50))


def sentence(rng, count=30):
    return " ".join(rng.choice(WORDS, count)) + "."


def talk(rng, kind=0):
    """A conversation in one of the formats: chat, code, maths or two turns."""
    question, answer = sentence(rng, 12), sentence(rng, 20 + int(rng.integers(40)))
    if kind == 1:
        answer += "\n```python\nx = 1\n```"
    if kind == 2:
        question = f"Calculate 3 + {len(answer)}: {question}"
    turns = [question, answer] + ([sentence(rng, 5), sentence(rng, 30)] if kind == 3 else [])
    if kind == 0:
        return {"instruction": question, "input": "", "output": answer, "id": len(answer)}
    if kind == 1:
        return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]}
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]}


def write(path, records):
    content = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def copy(record, change):
    """A record in OpenAI's format with changed texts."""
    messages = [{"role": m.role, "content": change(m.content)} for m in parse(record, "").messages]
    return {"messages": messages}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Three files of 120 conversations; in the second, which is compressed, copies, refusals and a broken line."""
    folder, rng = tmp_path_factory.mktemp("pool"), np.random.default_rng(0)
    records = [talk(rng, i % 4) for i in range(120)]
    exact = [copy(record, lambda text: f"{text.upper()}  ") for record in records[:5]]
    near = [copy(record, lambda text: text if len(text) < 90 else f"changed {text}") for record in records[5:10]]
    refusals = [
        {"instruction": sentence(rng, 9), "output": f"As an AI language model, {sentence(rng)}"} for _ in range(4)
    ]
    write(folder / "a.jsonl", records[:60])
    write(folder / "b.jsonl.gz", [*records[60:90], "{broken", *exact, *near, *refusals, ""])
    write(folder / "c.jsonl", records[90:])
    return folder


@pytest.fixture(scope="module")
def done(pool, tmp_path_factory):
    output = tmp_path_factory.mktemp("done") / "out"
    return output, select(ONE, [pool], output)


def lines(output):
    return [json.loads(line) for line in (output / "selected.jsonl").read_text().splitlines()]


def test_what_is_chosen_is_written_with_its_fields_its_score_and_where_it_stood(done, pool):
    output, report = done
    chosen = lines(output)
    assert len(chosen) == report["chosen"] == 40
    about = [line["selection"] for line in chosen]
    assert [a["length"] for a in about] == sorted((a["length"] for a in about), reverse=True)
    for line in chosen:
        file, _, number = line["selection"]["source"].rpartition(":")
        raw = (pool / file).read_bytes()
        raw = gzip.decompress(raw) if file.endswith(".gz") else raw
        original = parse(json.loads(raw.splitlines()[int(number) - 1]), "")
        assert parse(line, "").messages == original.messages
        assert original.fields.items() <= line.items()
    assert {a["source"].partition(":")[0] for a in about} == {"a.jsonl", "b.jsonl.gz", "c.jsonl"}


def test_the_report_counts_every_line_once(done):
    output, report = done
    rows = {row["reason"]: row["out"] for row in report["steps"]}
    assert report["lines"] == 120 + 1 + 14
    assert (rows["a broken line"], rows["exact duplicate"], rows["near duplicate"], rows["refusal"]) == (1, 5, 5, 4)
    assert sum(rows.values()) == report["lines"] - report["chosen"]
    assert report["steps"][-1]["left"] == 40
    assert sum(row["chosen"] for row in report["domains"].values()) == 40
    assert "b.jsonl.gz:31" in report["faults"]["a broken line"]["examples"][0]
    sample = report["samples"]["near duplicate"][0]
    assert sample["stays"].startswith("a.jsonl:") and sample["where"].startswith("b.jsonl.gz:")
    page = (output / "report.md").read_text()
    assert "| rules | refusal | 4 |" in page and "half below" in page and "### refusal: " in page
    assert "score length (bytes of the answers), the highest first" in page
    assert "Nothing fell out for these reasons: turns, " in page and "| 0 |" not in page
    assert "b.jsonl.gz:31: a broken line: it is not JSON" in page
    assert (output / "selection.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.integration
def test_two_processes_give_the_same_bytes(done, pool, tmp_path):
    output, _ = done
    select(dataclasses.replace(ONE, processes=2), [pool], tmp_path / "two")
    for name in RESULTS:
        assert (tmp_path / "two" / name).read_bytes() == (output / name).read_bytes(), name


def test_quotas_are_kept_and_what_they_leave_is_filled(pool, tmp_path):
    fractions = {"code": 0.5, "maths": 0.25, "multi-turn": 0.1}
    report = select(dataclasses.replace(ONE, domains=Domains(fractions=fractions)), [pool], tmp_path / "out")
    found = {name: (row["chosen"], row["places"]) for name, row in report["domains"].items()}
    assert found == {"code": (20, 20), "maths": (10, 10), "chat": (6, None), "multi-turn": (4, 4)}
    short = dataclasses.replace(ONE, count=80, domains=Domains(fractions={"code": 0.75}, fill=False))
    report = select(short, [pool], tmp_path / "short", steps=tmp_path / "out/steps")
    assert report["domains"]["code"]["chosen"] == report["domains"]["code"]["before"] < 60
    assert report["chosen"] == report["domains"]["code"]["before"] + 20


class KilledError(Exception):
    pass


def test_a_start_after_a_kill_goes_on(done, pool, tmp_path, monkeypatch):
    output, _ = done
    hashed = []
    real = work.hash_batch
    monkeypatch.setattr("flm_jax.selection.dedupe.hash_batch", lambda *a, **k: hashed.append(1) or real(*a, **k))

    def killed(*_):
        raise KilledError

    for place in (
        "flm_jax.selection.dedupe.near.drop",
        "flm_jax.selection.judge._judge",
        "flm_jax.selection.choose.choose",
    ):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(place, killed)
            select(ONE, [pool], tmp_path / "out")
        assert not (tmp_path / "out/report.json").exists()
    select(ONE, [pool], tmp_path / "out")
    assert len(hashed) == 3  # the files were read once
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (output / name).read_bytes(), name
    said = []
    select(ONE, [pool], tmp_path / "out", say=said.append)
    assert said == [f"{tmp_path / 'out'} holds this selection already."]


@pytest.mark.integration
def test_what_a_killed_process_did_not_finish_is_done_again(done, pool, tmp_path, monkeypatch, caplog):
    class OneDies(Workers):
        def map(self, function, items, ahead=0):
            for number, found in enumerate(super().map(function, items, ahead)):
                yield found
                if number == 0:
                    os.kill(next(iter(self._executor._processes)), signal.SIGKILL)

    monkeypatch.setattr(sys.modules[select.__module__], "Workers", OneDies)
    select(dataclasses.replace(ONE, processes=2), [pool], tmp_path / "out")
    assert "is done again" in caplog.text
    for name in RESULTS:
        assert (tmp_path / "out" / name).read_bytes() == (done[0] / name).read_bytes(), name


def test_scoring_goes_on_within_its_step(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_module, "SHARD", 40)
    monkeypatch.setattr(score_registry, "REGISTRY", dict(score_registry.REGISTRY))
    calls = []

    @score_registry.register("turns", base=False, source="a test", most=3)
    def turns(conversations, base):
        calls.append(len(conversations))
        if len(calls) == 3:
            raise KilledError
        return np.array([len(c.messages) for c in conversations], np.float32)

    config = dataclasses.replace(ONE, score=SampleScore("turns", order="low"), precut=100)
    with pytest.raises(KilledError):
        select(config, [pool], tmp_path / "out")
    report = select(config, [pool], tmp_path / "out")
    assert calls == [40, 40, 20, 20]
    rows = {row["reason"]: row["out"] for row in report["steps"]}
    assert rows["cut before scoring"] == 20
    assert (
        rows["score too high"]
        == sum(line["out"] for line in report["steps"] if line["reason"] == "score too high")
        > 10
    )
    assert all(line["selection"]["turns"] == 2 for line in lines(tmp_path / "out"))


REFUSED = [
    (dict(score=SampleScore("lenght")), r"SampleScore.name = 'lenght': the scores are .*; did you mean 'length'"),
    (dict(score=SampleScore("ifd")), r"'ifd' needs a checkpoint: .* take one that needs none: length"),
    (dict(diversity=Diversity(features="hidden")), r"'hidden' needs a checkpoint"),
    (dict(rules=TextRules(off=("refusel",))), r"did you mean 'refusal'"),
    (dict(domains=Domains(fractions={"maths": 0.5, "cod": 0.5})), r"names 'cod'.*; did you mean 'code'"),
    (dict(domains=Domains(field="", fractions={"cod": 0.5})), r"did you mean 'code'"),
    (
        dict(most_faulty=0),
        r"b.jsonl.gz:31: a broken.*; none may be left out by Selection.most_faulty",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_does_not_fit_is_refused_in_a_sentence(changes, message, pool, tmp_path):
    with pytest.raises(ValueError, match=message):
        select(dataclasses.replace(ONE, **changes), [pool], tmp_path / "out")


def test_pools_that_hold_nothing_or_would_hold_the_results_are_refused(pool, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        select(ONE, [tmp_path / "none"], tmp_path / "out")
    with pytest.raises(ValueError, match="there is no pool"):
        select(ONE, [], tmp_path / "out")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no line of the pool is a conversation: it is empty"):
        select(ONE, [tmp_path / "empty.jsonl"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"a.jsonl is in the pool twice"):
        select(ONE, [pool, pool / "a.jsonl"], tmp_path / "out2")
    with pytest.raises(ValueError, match="would become part of the pool"):
        select(ONE, [pool], pool / "out")
    (tmp_path / "all.jsonl").write_text("{}\n" * 9)
    with pytest.raises(LineError, match=r"6 lines are left out, more than the 5 allowed by .*all.jsonl:6"):
        select(ONE, [tmp_path / "all.jsonl"], tmp_path / "out3")


def test_a_directory_of_another_selection_is_left_alone(done, pool, tmp_path):
    output, _ = done
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ValueError, match=r"another selection: selection.count: 40 there, 41 here.*new --output"):
        select(dataclasses.replace(ONE, count=41), [pool], output)
    with pytest.raises(ValueError, match=r"another selection: pool: .*"):
        select(ONE, [pool / "a.jsonl"], output)
    assert before == {path: path.read_bytes() for path in before}
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files but no selection.json"):
        select(ONE, [pool], tmp_path)


def test_only_steps_that_differ_are_computed_again(done, pool, tmp_path):
    output, _ = done
    before = {path.name for path in (output / "steps").iterdir()}
    select(
        dataclasses.replace(ONE, rules=TextRules(off=("refusal",))), [pool], tmp_path / "out", steps=output / "steps"
    )
    new = {path.name.partition("-")[0] for path in (output / "steps").iterdir() if path.name not in before}
    assert new == {"rules", "scores", "choice"}
    exact = dataclasses.replace(ONE, duplicates=Duplicates(near=False))
    report = select(exact, [pool], tmp_path / "exact")
    rows = {row["reason"]: row["out"] for row in report["steps"]}
    assert (rows["exact duplicate"], rows["near duplicate"]) == (5, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    cfg = small.config(vocab=264)
    return saved(tmp_path_factory.mktemp("base") / "run", cfg, small.params(cfg), to_files(ByteVocabulary())), cfg


LONGEST = 160


def direct(cfg, params, ids, weights):
    """Mean loss of the tokens with weight, by the logits of the whole sequence, padded so that one shape compiles."""
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(ids)] = ids
    log_probs = np.asarray(jax.nn.log_softmax(small.apply(cfg, params, padded)[0]))
    return -sum(log_probs[i - 1, ids[i]] for i in range(1, len(ids)) if weights[i]) / sum(weights)


@pytest.mark.integration
def test_losses_and_hidden_states_are_those_of_the_model(checkpoint):
    workdir, cfg = checkpoint
    base = Base(ScoringBase(str(workdir), template="chatml", max_length=200, rows=4))
    params = small.params(cfg)
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    talks = [parse({"messages": turns}, ""), parse({"messages": turns * 2}, "")]
    talks.append(parse({"instruction": "x" * 300, "output": "too late to be read"}, ""))
    talks.append(parse({"instruction": "a <|im_end|> inside", "output": "refused"}, ""))
    found, hidden = base.losses(talks), base.hidden(talks)
    encoded = [base.encoder.encode(conversation.messages) for conversation in talks[:2]]
    prefix = base.encoder.vocabulary.special.prefix_id
    answer = encoded[0].ids[encoded[0].weights > 0].tolist()
    alone = direct(cfg, params, [prefix, *answer], [0] + [1] * len(answer))
    for number, one in enumerate(encoded):
        after = direct(cfg, params, one.ids.tolist(), one.weights.tolist())
        assert found.after_prompt[number] == pytest.approx(after, rel=1e-4)
        assert found.alone[number] == pytest.approx(alone, rel=1e-4)  # both turns have the same answer
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(encoded[1].ids)] = encoded[1].ids
    x_BTD, _ = jax.jit(lambda tokens: Transformer(cfg).apply({"params": params}, tokens, method="hidden"))(padded)
    wanted = np.asarray(x_BTD[0, : len(encoded[1].ids)]).mean(axis=0)
    np.testing.assert_allclose(hidden[1], wanted, rtol=1e-3, atol=1e-5)
    assert np.isnan(found.after_prompt[2:]).all() and np.isnan(hidden[3]).all() and not np.isnan(hidden[2]).any()


@pytest.mark.integration
def test_a_base_scores_and_compares(checkpoint, pool, tmp_path):
    base = ScoringBase(str(checkpoint[0]), max_length=128)
    config = dataclasses.replace(ONE, count=10, base=base, score=SampleScore("ifd"), precut=24)
    report = select(config, [pool], tmp_path / "out")
    assert report["features"] == "hidden" and report["score"]["order"] == "high"
    rows = {row["reason"]: row["out"] for row in report["steps"]}
    chosen = lines(tmp_path / "out")
    assert 0 < len(chosen) <= 10 and all(0 < line["selection"]["ifd"] <= 1 for line in chosen)
    assert rows["score too high"] + rows["no score"] + len(chosen) <= 24
    again = select(config, [pool], tmp_path / "again")
    assert again == report
    assert (tmp_path / "out/selected.jsonl").read_bytes() == (tmp_path / "again/selected.jsonl").read_bytes()


def test_a_base_with_a_template_of_its_own_that_is_not_used_is_named(pool, tmp_path):
    vocabulary = load_vocabulary(hub.write_tokenizer(tmp_path / "tokenizer"))
    assert isinstance(vocabulary, TokenizerVocabulary)
    special = dataclasses.replace(vocabulary.special, chat_template=TELE_FLM.source.replace("_bot", "_me"))
    cfg = small.config(vocab=vocabulary.size)
    files = to_files(TokenizerVocabulary(vocabulary.model, special))
    run = saved(tmp_path / "run", cfg, small.params(cfg), files)
    said, hashed = [], dataclasses.replace(ONE.diversity, features="hashed")
    for template in ("tele_flm", "tokenizer"):
        base = ScoringBase(str(run), template=template, max_length=64)
        config = dataclasses.replace(ONE, base=base, diversity=hashed)
        select(config, [pool], tmp_path / f"by_{template}", say=said.append)
    assert [text for text in said if "ScoringBase.template = 'tokenizer'" in text] == said[:1]


def test_a_checkpoint_that_is_none_or_has_no_vocabulary_is_refused(checkpoint, pool, tmp_path):
    with pytest.raises(CheckpointError, match="none"):
        select(dataclasses.replace(ONE, base=ScoringBase(str(tmp_path / "none"))), [pool], tmp_path / "out")
    cfg = small.config(vocab=264)
    bare = saved(tmp_path / "bare", cfg, small.params(cfg), {})
    with pytest.raises(VocabularyError, match=r"holds a vocabulary.* for a selection by ScoringBase.tokenizer"):
        select(dataclasses.replace(ONE, base=ScoringBase(str(bare))), [pool], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_and_the_report_says_why(pool, tmp_path, capsys):
    gin.clear_config()
    given = ["select_sft.selection = @Selection()", "Selection.rules = @TextRules()", "TextRules.least_answer = 9_999"]
    with pytest.raises(SystemExit) as stop:
        runs.run_select([], [*given, "Selection.processes = 1"], [str(pool)], str(tmp_path / "out"), None)
    gin.clear_config()
    assert stop.value.code == 1 and "0 are chosen" in capsys.readouterr().out
    assert "| rules | answer length | 124 | 0 |" in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/selected.jsonl").read_text() == ""


def test_the_program_selects_with_the_shipped_recipe(pool, tmp_path, capsys):
    def launched(*bindings):
        gin.clear_config()
        given = ["Selection.processes = 1", "Diversity.width = 64", *bindings]
        runs.run_select([str(ROOT / "gin_configs/sft/select.gin")], given, [str(pool)], str(tmp_path / "out"), None)
        gin.clear_config()

    launched()
    said = capsys.readouterr().out
    assert "5 exact duplicates and 5 near duplicates" in said
    assert "30,735 were asked for, and the pool has no more" in said
    with pytest.raises(SystemExit) as stop:
        launched("Selection.count = 5")
    assert stop.value.code == 1
    assert "holds another selection: selection.count: 30735 there, 5 here" in capsys.readouterr().err
