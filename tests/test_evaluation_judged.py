"""Answers of a checkpoint, their judges and the report: computed directly, resumed, killed, from the command line."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flm_jax.chat.conversation import Message
from flm_jax.chat.template import TELE_FLM, ChatEncoder
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.data.vocabulary_files import to_files
from flm_jax.evaluation import JudgeRequest, judge_answers
from flm_jax.evaluation.answering import answer_all, encode_questions, longest_answer
from flm_jax.evaluation.answers import Answer
from flm_jax.evaluation.judges import by_likelihood, opponents
from flm_jax.evaluation.likelihood import choice_log_probs, mean_log_probs
from flm_jax.evaluation.loaded import LoadedModel
from flm_jax.evaluation.questions import CHOICE, JUDGED, Question
from flm_jax.evaluation.scoring import Window
from tests import small
from tests.chat_server import Reply, chat_server, waited
from tests.environment import as_user
from tests.scores import EIGHT, ONE, mesh_of, saved

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, LENGTH = ByteVocabulary(), 96
CFG = small.shape(init_std_vector=1.0)
KEY = "sk-0123456789-secret"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def params():
    return small.params(CFG)


def loaded(params, mesh=ONE):
    return LoadedModel(None, CFG, params, None, VOCABULARY, LENGTH, mesh_of(mesh), "")


@pytest.fixture(scope="module")
def run(tmp_path_factory, params):
    """A checkpoint whose record says which template it was tuned with."""
    data = {"context": LENGTH, "corpus": {"template": TELE_FLM.record()}}
    return saved(tmp_path_factory.mktemp("run") / "run", CFG, params, to_files(VOCABULARY), data=data)


@pytest.fixture(scope="module")
def greedy(params):
    """The likeliest continuation of a prompt, by the whole forward pass for each token."""

    def continued(prompt, tokens):
        row_1T = np.zeros((1, LENGTH), np.int32)
        row_1T[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + tokens):
            row_1T[0, at] = int(small.apply(CFG, params, row_1T)[0, at - 1].argmax())
        return row_1T[0, len(prompt) : len(prompt) + tokens].tolist()

    return continued


def question(name, text="Who?", kind="judged", reference=(), category="c", **fields):
    return Question(name, category, (Message("user", text),), kind, reference, **fields)


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["1", "8"])
def test_answers_are_the_likeliest_continuations_up_to_their_ends(params, greedy, mesh):
    prompts = [VOCABULARY.encode(text) for text in ("Who?", "It grows, and goes on", "x", "y" * 30)]
    direct = [greedy(prompt, 40) for prompt in prompts]
    stop = direct[0][5]
    found = dict(answer_all(loaded(params, mesh), prompts, (stop,), (), 40, 2))
    for number, ids in enumerate(direct):
        end = ids.index(stop) if stop in ids else None
        assert found[number].ids == ids[:end] and found[number].ended == (end is not None), number
        assert found[number].text == VOCABULARY.decode(i for i in ids[:end] if i < VOCABULARY.size)
    assert found[0].ended and not all(written.ended for written in found.values())  # some take another round


def test_an_answer_ends_at_a_text_of_several_tokens_and_where_the_model_reads_no_further(params, greedy):
    prompt = VOCABULARY.encode("Who?" * 22)
    direct = greedy(prompt, LENGTH - len(prompt))
    written = dict(answer_all(loaded(params), [prompt], (), (), 40, 1))[0]
    assert written.ids == direct and len(direct) == 8 and not written.ended
    text = written.text
    at = next(i for i in range(1, len(text) - 1) if text.find(text[i : i + 2]) == i)
    cut = dict(answer_all(loaded(params), [prompt], (), (text[at : at + 2],), 40, 1))[0]
    assert cut.text == text[:at] and cut.ended


def test_choices_have_the_log_probabilities_that_the_model_gives(params):
    prompts = [VOCABULARY.encode(text) for text in ("Who?", "It grows")]
    choices = [("on", "off it goes"), ("x", "y", "zé")]
    found = choice_log_probs(loaded(params).scorer(2), VOCABULARY, prompts, choices)
    for prompt, texts, scores in zip(prompts, choices, found, strict=True):
        for text, score in zip(texts, scores, strict=True):
            ids = prompt + VOCABULARY.encode(text)
            log_probs = jax.nn.log_softmax(small.apply(CFG, params, np.array([ids[:-1]], np.int32))[0], -1)
            direct = sum(float(log_probs[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
            assert score == pytest.approx(direct, rel=1e-4)


def test_likelihoods_of_answers_count_what_ends_them(params):
    encoder, scorer = ChatEncoder(TELE_FLM, VOCABULARY), loaded(params).scorer(2)
    asked = question("1")
    prompt = encoder.prompt(asked.messages)
    own, empty, long = mean_log_probs(scorer, encoder, [(asked.messages, text) for text in ("I", "", "I" * 99)])
    for text, mean in (("I", own), ("", empty)):
        ids = [*VOCABULARY.encode(text), VOCABULARY.eos_id]
        assert mean == pytest.approx(scorer.score([Window(prompt, ids)])[0].log_prob / len(ids), rel=1e-5)
    assert long == "longer than the judge reads"


def test_the_judge_by_likelihood_prefers_what_is_likelier(params):
    encoder, scorer = ChatEncoder(TELE_FLM, VOCABULARY), loaded(params).scorer(2)
    texts = ["I", "you", "they all"]
    means = mean_log_probs(scorer, encoder, [(question("1").messages, text) for text in texts])
    worst, best = (texts[int(pick(means))] for pick in (np.argmin, np.argmax))
    questions = [question(n, reference=(worst,)) for n in "1234"] + [question("5", "?", "exact", ("a",))]
    answers = {"1": Answer(best), "2": Answer(worst), "4": Answer("I" * 99)}
    found = by_likelihood(questions, answers, opponents(questions, None), scorer, encoder)
    assert [(j.own, j.unjudged) for j in found] == [
        (1.0, ""),
        (0.5, ""),
        (None, "no answer"),
        (None, "longer than the judge reads"),
    ]
    swapped = by_likelihood(questions[:1], {"1": Answer(worst)}, {"1": Answer(best)}, scorer, encoder)
    assert swapped[0].own == 0.0


def test_questions_that_cannot_be_asked_are_named():
    questions = [question("1"), question("2", "x" * 200), question("3", "a <_user> b")]
    found = encode_questions(ChatEncoder(TELE_FLM, VOCABULARY), questions, LENGTH)
    assert list(found.ids) == ["1"]
    assert found.missing == {"2": "a question longer than the model reads", "3": "contains a marker"}


FILE = [
    {"id": "1", "category": "chat", "question": "Who?", "reference": "I."},
    {"id": "2", "category": "maths", "question": "1+1?", "reference": 2, "kind": "numeric"},
    {"id": "3", "category": "maths", "question": "Or?", "reference": "A", "choices": ["x", "yy"]},
    {"id": "4", "category": "chat", "question": "x" * 200, "reference": "I."},
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in FILE))
    return path


def test_the_longest_answer_fits_into_the_context_with_its_question():
    encoder = ChatEncoder(TELE_FLM, VOCABULARY)
    model = LoadedModel(None, CFG, None, None, VOCABULARY, LENGTH, None, "")
    asked = [
        Question(str(i), "c", (Message("user", text),), kind, reference, choices)
        for i, (text, kind, reference, choices) in enumerate(
            [("x" * 40, JUDGED, (), ()), ("x" * 300, JUDGED, (), ()), ("x", CHOICE, ("a",), ("a", "b"))]
        )
    ]
    room = LENGTH - len(encoder.prompt(asked[0].messages))
    assert longest_answer(model, encoder, asked, 512) == room < 60
    assert longest_answer(model, encoder, asked, 8) == 8
    assert longest_answer(model, encoder, asked[1:], 8) == 0, "one does not fit, one is chosen and not written"


def asking(questions, output, **changes):
    return JudgeRequest(str(questions), str(output), **{**dict(tokens=8, batch_size=2, backoff=0.01), **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_checkpoint_answers_once_and_is_judged_by_rules(run, questions, greedy, tmp_path, monkeypatch):
    said, out = [], tmp_path / "out"
    report = judge_answers(str(run), asking(questions, out), say=said.append)
    answers = {line["id"]: line for line in lines(out / "answers.jsonl")}
    prompt = ChatEncoder(TELE_FLM, VOCABULARY).prompt([Message("user", "Who?")])
    direct = greedy(prompt, 8)
    end = direct.index(VOCABULARY.eos_id) if VOCABULARY.eos_id in direct else None
    assert answers["1"]["answer"] == VOCABULARY.decode(i for i in direct[:end] if i < VOCABULARY.size)
    assert answers["3"]["answer"] == ["x", "yy"][answers["3"]["choice"]] and len(answers["3"]["log_probs"]) == 2
    assert answers["4"]["answer"] is None and answers["4"]["missing"] == "a question longer than the model reads"
    assert json.loads(json.dumps(report)) == json.loads((out / "report.json").read_text())
    assert report["answers"]["template"]["name"] == "tele_flm" and report["questions"]["left_out"] == 2
    assert [(j["id"], j["measure"]) for j in lines(out / "verdicts.jsonl")] == [("2", "accuracy"), ("3", "accuracy")]
    assert report["tables"][0]["overall"]["per_byte"] in (0.0, 1.0)
    text = "\n".join(said)
    assert "Answers have at most 8 tokens." in text
    assert "2 of them are not judged" in text and "maths" in text and "# Answers" in (out / "report.md").read_text()

    # Again: nothing is generated, but for a question that has changed.
    from flm_jax.evaluation import answering

    made, real = [], answering.answer_all
    monkeypatch.setattr(
        answering, "answer_all", lambda model, prompts, *rest: made.append(len(prompts)) or real(model, prompts, *rest)
    )
    before = (out / "answers.jsonl").read_bytes()
    assert judge_answers(str(run), asking(questions, out))["tables"] == report["tables"]
    assert made == [0] and (out / "answers.jsonl").read_bytes() == before
    questions.write_text(questions.read_text().replace("Who?", "Why?"))
    judge_answers(str(run), asking(questions, out))
    assert made == [0, 1] and len(lines(out / "answers.jsonl")) == 4
    with pytest.raises(
        ValueError, match=r"holds answers that were made otherwise: tokens: 8 there, 9 here.*--answers="
    ):
        judge_answers(str(run), asking(questions, out, tokens=9))
    with pytest.raises(ValueError, match="template"):
        judge_answers(str(run), asking(questions, out, template="chatml"))


def test_a_checkpoint_judges_by_likelihood(run, questions, tmp_path):
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("".join(json.dumps({"id": line["id"], "answer": "I."}) + "\n" for line in FILE))
    request = asking(questions, tmp_path / "out", answers=str(theirs), judge=f"likelihood:{run}")
    report = judge_answers(None, request)
    wins = next(table for table in report["tables"] if table["measure"] == "wins")["overall"]
    assert (wins["n"], wins["ties"]) == (1, 1)  # the reference itself
    assert report["unjudged"] == {"longer than the judge reads": 1}


def launched(checkpoint, request, json_file):
    import gin

    from flm_jax.cli import runs

    gin.clear_config()
    try:
        runs.run_judge(checkpoint, request, json_file, [], [])
    finally:
        gin.clear_config()


@pytest.fixture
def answered(tmp_path, questions):
    """Questions for an endpoint, with a file of answers."""
    texts = [{"id": i, "category": f"c{i % 2}", "question": f"Question {i}?", "reference": "r"} for i in range(12)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in texts))
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"id": line["id"], "answer": f"answer {line['id']}."}) + "\n" for line in texts))
    return questions, path


def test_a_dry_run_asks_nothing_and_counts_what_would_be_asked(answered, run, tmp_path, capsys):
    said = []
    with chat_server() as server:
        judge = f"endpoint:m@{server.url}"
        request = asking(answered[0], tmp_path / "out", answers=str(answered[1]), judge=judge, dry_run=True)
        assert judge_answers(None, request, say=said.append)["calls"] == 12
        unanswered = dataclasses.replace(request, answers=None, mode="pairwise")
        assert judge_answers(str(run), unanswered, say=said.append)["calls"] == 24
    assert not server.requests and not (tmp_path / "out").exists()
    assert "12 calls in all, 0 verdicts are kept; 12 calls to make: about " in "\n".join(said)


def test_the_key_is_in_no_file_and_in_no_output(answered, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_KEY", KEY)
    echo = {3: Reply(f'{KEY} {{"score": 4}}'), 4: Reply(status=400, raw=KEY.encode()), 5: Reply(f"nothing, {KEY}")}

    def answer(prompt, before):
        return next((reply for n, reply in echo.items() if f"answer {n}." in prompt), Reply())

    with chat_server(answer) as server:
        request = asking(answered[0], tmp_path / "out", answers=str(answered[1]), judge=f"endpoint:m@{server.url}")
        request = dataclasses.replace(request, key_env="MY_KEY", retries=1)
        launched(None, request, str(tmp_path / "found.json"))
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["judged"] == 10 and found["unjudged"] == {"status 400": 1, "no verdict in a reply": 1}
    with chat_server(lambda p, n: Reply(status=401, raw=KEY.encode())) as server, pytest.raises(SystemExit):
        launched(None, dataclasses.replace(request, judge=f"endpoint:m@{server.url}"), None)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    shown = capsys.readouterr()
    assert "status 401: check the key" in shown.err and len(written) >= 6
    assert KEY not in shown.out + shown.err + caplog.text
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def test_a_killed_run_goes_on_without_making_a_call_twice(answered, tmp_path):
    """Six calls are answered, two more hang; the run is killed, and goes on."""
    out, hang, order = tmp_path / "out", [True], itertools.count()

    def answer(prompt, before):
        return Reply(delay=60) if next(order) >= 6 and hang[0] else Reply()

    with chat_server(answer) as server:
        judge = f"endpoint:m@{server.url}"
        flags = dict(prompts=answered[0], answers=answered[1], output=out, judge=judge, concurrency=2)
        command = [sys.executable, "experiments/evaluate.py", *(f"--{name}={value}" for name, value in flags.items())]
        environment = {**as_user(), "PYTHONPATH": str(ROOT), "no_proxy": "*", "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        try:
            waited(lambda: server.asked.total() == 8 or process.poll() is not None)
            waited(lambda: len(lines(out / "calls.jsonl")) == 6)
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        kept = {line["id"] for line in lines(out / "calls.jsonl")}
        with (out / "calls.jsonl").open("a") as file:
            file.write('{"key": "cut o')  # as a kill while writing leaves it
        hang[0] = False
        report = judge_answers(None, asking(answered[0], out, answers=str(answered[1]), judge=judge))
    assert report["judged"] == 12 and report["judge"]["kept"] == 6 and len(lines(out / "calls.jsonl")) == 12
    twice = [n for n in range(12) for prompt, count in server.asked.items() if f"answer {n}." in prompt and count > 1]
    assert len(twice) == 2 and not kept & {str(n) for n in twice}


def test_a_run_without_any_verdict_fails(answered, tmp_path, capsys):
    with chat_server(lambda p, n: Reply("no idea")) as server:
        request = asking(answered[0], tmp_path / "out", answers=str(answered[1]), judge=f"endpoint:m@{server.url}")
        with pytest.raises(SystemExit) as stop:
            launched(None, dataclasses.replace(request, retries=0), None)
    shown = capsys.readouterr()
    assert stop.value.code == 1 and "no answer could be judged" in shown.err
    assert "unjudged: questions on which the answer was not judged: no verdict in a reply (12)." in shown.out


FLAGS = {
    "--prompts=q.jsonl --answers=a.jsonl": "--output=DIR",
    "--prompts=q.jsonl --output=o": "say what answers: --checkpoint, or --answers",
    "--prompts=q.jsonl --output=o --checkpoint=x --text=t": "--prompts goes without",
    "--checkpoint=x --text=t --judge=rules": "--judge is for judged answers: give --prompts too",
    "--text=t": "say which checkpoint",
}


@pytest.mark.parametrize("given", FLAGS)
def test_flags_that_do_not_go_together(given):
    command = [sys.executable, "experiments/evaluate.py", *given.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and FLAGS[given] in done.stdout + done.stderr


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "report.md").write_text("of a selection")
    request = JudgeRequest(questions=str(tmp_path / "none.jsonl"), output=str(tmp_path), answers="x")
    with pytest.raises(ValueError, match="holds 'report.md' and no judged answers: give a new or empty directory"):
        judge_answers(None, request)
    assert (tmp_path / "report.md").read_text() == "of a selection"
