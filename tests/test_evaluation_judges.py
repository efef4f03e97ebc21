"""Judges: what an endpoint is asked and how its reply is read, both orders, what is kept, likelihoods."""

import json
from types import SimpleNamespace

import pytest

from flm_jax.chat.conversation import Message
from flm_jax.evaluation.answers import NO_ANSWER, Answer, from_record, read_answers
from flm_jax.evaluation.chat_request import EndpointConfig
from flm_jax.evaluation.endpoint import UnreadableError
from flm_jax.evaluation.endpoint_judge import EndpointJudge, about_tokens
from flm_jax.evaluation.judge_prompt import JudgePrompt, JudgePromptError
from flm_jax.evaluation.judges import by_rules, read_judge
from flm_jax.evaluation.questions import Question, QuestionError
from flm_jax.records.kept import KeptLines
from tests.chat_server import Reply, chat_server

SCORE, PAIRS = JudgePrompt.load("score"), JudgePrompt.load("pairwise")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def question(name="1", kind="judged", reference=("gold",), **fields):
    return Question(name, "c", (Message("user", f"What is {name}?"),), kind, reference, **fields)


SCORES = {
    'Good. {"score": 7}': 7.0,
    '{"score": "7"}': 7.0,
    "{'事实正确性': 3, '综合得分': 6}": 6.0,
    "Rating: [[8]]": 8.0,
    "[[7.5]]": 7.5,
    '{"score": 7} and again {"score": 7.0}': 7.0,
    '<think>maybe {"score": 3}</think>{"score": 9}': 9.0,
    '```json\n{\n  "score": 10,\n  "why": "x"\n}\n```': 10.0,
}


@pytest.mark.parametrize(("reply", "score"), SCORES.items())
def test_scores_are_read_in_the_forms_that_judges_write(reply, score):
    assert SCORE.read(reply) == score


@pytest.mark.parametrize(
    "reply",
    ["", "7", "7/10", "score: 7", '{"score": 1', '{"score": N}', '{"score": 7} {"score": 3}', '{"score": 0}',
     '{"score": -3}', '{"score": 11}', '{"score": null}', "<html>7</html>", '{"verdict": "A"}'],
)  # fmt: skip
def test_no_score_is_guessed(reply):
    with pytest.raises(UnreadableError):
        SCORE.read(reply)


def test_verdicts_of_comparisons():
    replies = {'{"verdict": "A"}': "A", "so [[b]]": "B", "[[C]]": "tie", '{"verdict": "TIE"}': "tie"}
    assert {reply: PAIRS.read(reply) for reply in replies} == replies
    for reply in ("A", "A is better", '{"verdict": "D"}', '{"verdict": "A"} {"verdict": "B"}', '{"score": 7}'):
        with pytest.raises(UnreadableError):
            PAIRS.read(reply)


def test_shipped_prompts_show_what_is_judged_and_hold_no_verdict():
    asked = question()
    score, pair = SCORE.render(asked, "mine"), PAIRS.render(asked, "mine", "theirs", with_reference=False)
    assert all(part in score for part in ("What is 1?", "mine", "gold", '"c"'))
    assert pair.index("mine") < pair.index("theirs") and "gold" not in pair and "reference" not in pair
    for prompt, text in ((SCORE, score), (PAIRS, pair)):
        with pytest.raises(UnreadableError):  # a judge that repeats its prompt gives no verdict
            prompt.read(text)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ question }} {{ anwser }}", "'anwser' is undefined"),
        ("{{ question }}", r"does not show \{\{ answer \}\}"),
        ("{{ question }\n", "line 1"),
        ("{{ question.__class__.__mro__ }}{{ answer }}", "unsafe"),
        ("{{ question }}{{ answer }}{{ 1 / 0 }}", "cannot be filled in: division by zero"),
    ],
)
def test_a_prompt_of_ones_own_is_tried(tmp_path, source, says):
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    with pytest.raises(JudgePromptError, match=says):
        JudgePrompt.load("score", path)


def test_a_prompt_of_ones_own_is_used(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ category }}/{{ subcategory }}: {{ question }} {{ answer }}")
    assert JudgePrompt.load("score", path).render(question(subcategory="s"), "a") == "c/s: What is 1? a\n"
    with pytest.raises(FileNotFoundError, match=r"nowhere.jinja"):
        JudgePrompt.load("score", tmp_path / "nowhere.jinja")


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("rules", ("rules", "", "")),
        ("likelihood:runs/x:1", ("likelihood", "runs/x:1", "")),
        ("endpoint:gpt-4@https://x/v1", ("endpoint", "gpt-4", "https://x/v1")),
        ("endpoint:@cf/m@http://x:80/v1", ("endpoint", "@cf/m", "http://x:80/v1")),
    ],
)
def test_the_judges_of_the_flag(given, parts):
    assert read_judge(given) == parts


@pytest.mark.parametrize("given", ["", "rule", "rules:x", "likelihood:", "endpoint:gpt-4", "endpoint:gpt-4@host/v1"])
def test_other_judges_are_refused(given):
    with pytest.raises(ValueError, match="is none of rules, likelihood:CHECKPOINT and endpoint:MODEL@URL"):
        read_judge(given)


def judge(server_url="http://x/v1", prompt=SCORE, questions=None, own=None, others=None, **config):
    questions = questions or [question(name) for name in "12"]
    own = own or {q.id: Answer(f"mine {q.id}") for q in questions}
    config = EndpointConfig("m", server_url, retries=0, backoff=0.01, **config)
    return EndpointJudge(config, prompt, questions, own, others)


def asked(one, path):
    with KeptLines(path, "key") as lines:
        before = dict(lines.records)
        return one.judgements({**before, **one.ask(before, lines.append)})


def test_scores_of_both_systems(tmp_path):
    others = {"1": Answer("theirs 1"), "2": NO_ANSWER}
    scores = {"mine 1": 4, "mine 2": 9, "theirs 1": 8}

    def answer(prompt, before):
        return Reply(json.dumps({"score": next(n for text, n in scores.items() if text in prompt)}))

    with chat_server(answer) as server:
        found = asked(judge(server.url, others=others), tmp_path / "calls.jsonl")
    assert [(j.own, j.reference, j.unjudged) for j in found] == [(4.0, 8.0, ""), (9.0, None, "reference: no answer")]
    assert found[0].measure == "score" and server.asked.total() == 3


@pytest.mark.parametrize(
    ("prefers", "own", "disagreed"),
    [("mine", 1.0, False), ("gold", 0.0, False), ("A", 0.5, True), ("B", 0.5, True), ("tie", 0.5, False)],
)
def test_answers_are_compared_in_both_orders(tmp_path, prefers, own, disagreed):
    """A judge that prefers a place, and not an answer, decides nothing."""

    def answer(prompt, before):
        first = prompt.split("<answer_of_A>")[1].split("</answer_of_A>")[0]
        verdict = prefers if prefers in ("A", "B", "tie") else "A" if prefers in first else "B"
        return Reply(json.dumps({"verdict": verdict}))

    with chat_server(answer) as server:
        found = asked(judge(server.url, PAIRS), tmp_path / "calls.jsonl")
    assert [(j.own, j.disagreed) for j in found] == [(own, disagreed)] * 2 and server.asked.total() == 4


def test_a_comparison_without_one_of_its_verdicts_is_none(tmp_path):
    def answer(prompt, before):
        return Reply("no idea") if "mine 1" in prompt.split("answer_of_B")[1] else Reply('{"verdict": "A"}')

    questions = [question("1"), question("2", reference=())]
    with chat_server(answer) as server:
        found = asked(judge(server.url, PAIRS, questions), tmp_path / "calls.jsonl")
    assert [(j.own, j.unjudged) for j in found] == [(None, "no verdict in a reply"), (None, "reference: no reference")]


def test_what_is_kept_is_not_asked_again_and_what_failed_is(tmp_path):
    path, fails = tmp_path / "calls.jsonl", {"mine 2"}

    def answer(prompt, before):
        return Reply(status=500) if any(text in prompt for text in fails) else Reply()

    with chat_server(answer) as server:
        assert [j.own for j in asked(judge(server.url), path)] == [7.0, None]
        fails.clear()
        again = asked(judge(server.url), path)
        assert [j.own for j in again] == [7.0, 7.0] and sorted(server.asked.values()) == [1, 2]
        with KeptLines(path, "key") as lines:
            assert judge(server.url).left(lines.records) == []
            # Another prompt, model or setting is another call.
            assert len(judge(server.url, options={"temperature": 1}).left(lines.records)) == 2
    found = sorted((r["id"], r["part"], r["verdict"]) for r in map(json.loads, path.read_text().splitlines()))
    assert found == [("1", "own", 7.0), ("2", "own", 7.0)]


def test_calls_that_were_never_sent_are_not_kept(tmp_path):
    path = tmp_path / "calls.jsonl"
    with chat_server() as server:
        found = asked(judge(server.url, max_calls=1, concurrency=1), path)
    assert [j.own for j in found] == [7.0, None] and found[1].unjudged == "not asked: --max_calls=1 reached"
    assert len(path.read_text().splitlines()) == 1


def test_equal_prompts_are_asked_once(tmp_path):
    same = [Question(name, "c", (Message("user", "Who?"),)) for name in "123"]
    with chat_server() as server:
        found = asked(judge(server.url, questions=same, own={q.id: Answer("I") for q in same}), tmp_path / "c.jsonl")
    assert [j.own for j in found] == [7.0] * 3 and server.asked.total() == 1


def test_tokens_are_estimated():
    assert about_tokens("") == 0 and about_tokens("word" * 5) == 5 and about_tokens("专业ab") == 3


def test_lines_that_were_cut_off_are_removed_and_replaced_ones_too(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a", "n": 1}\n{"id": "b", "n": 2}\n{"id": "c", "n"')
    with KeptLines(path, "id") as lines:
        assert list(lines.records) == ["a", "b"]
        lines.append({"id": "a", "n": "\ud800"})
        with pytest.raises(ValueError, match="is being written by another process"):
            KeptLines(path, "id")
    assert path.read_text() == '{"id": "a", "n": "\\ud800"}\n{"id": "b", "n": 2}\n'
    path.write_text('{"id": "a"}\nx\n{"id": "b"}\n')
    with pytest.raises(ValueError, match=r"x.jsonl:2 is not JSON"):
        KeptLines(path, "id")
    assert path.read_text() == '{"id": "a"}\nx\n{"id": "b"}\n'


def test_rules_of_both_systems():
    questions = [question("1", "numeric", ("2",)), question("2", "exact", ("a",)), question("3")]
    own = {"1": Answer("It is 2"), "2": Answer(None, "a question longer than the model reads")}
    found = list(by_rules(questions, own, {"1": Answer("3")}))
    assert [(j.own, j.reference, j.unjudged) for j in found] == [
        (1.0, 0.0, ""),
        (None, None, "a question longer than the model reads"),
    ]


def test_a_choice_by_likelihood_goes_before_its_text():
    asked = question("1", "choice", ("x",), choices=("x", "y"))
    found = next(by_rules([asked], {"1": Answer("x", choice=1, choice_per_byte=0)}, None))
    assert (found.own, found.per_byte) == (0.0, 1.0)


def test_answers_of_any_system_are_read(tmp_path):
    path, errors = tmp_path / "a.jsonl", []
    skipped = SimpleNamespace(add=lambda error: errors.append(str(error).split("a.jsonl:")[1][:10]))
    questions = [question("1"), question("2"), question("3", "choice", ("x",), choices=("x", "y"))]

    def read(*lines):
        path.write_text("".join(line + "\n" for line in lines))
        return read_answers(path, questions, skipped)

    good = (
        '{"question_id": 1, "output": "x"}',
        '{"id": "2", "answer": null, "missing": "m"}',
        '{"id": 9, "answer": ""}',
    )
    assert read(*good) == {"1": Answer("x"), "2": Answer(None, "m")} and not errors
    bad = ('{"id": 1, "answer": 3}', '{"id": 2}', '{"id": 3, "answer": "x", "choice": 2}', "[]", '{"answer": "x"}')
    assert read(*bad, '{"id": 1, "answer": ""}', '{"id": 1, "answer": "x"}') == {"1": Answer("")}
    assert errors == ["1: no answ", "2: no answ", "3: no answ", "4: a broke", "5: no id: ", "7: an id t"]
    with pytest.raises(
        ValueError, match="answers none of the questions, 3 in all; it has answers to others, such as '9'"
    ):
        read('{"id": 9, "answer": ""}')
    with pytest.raises(QuestionError, match="'choice' and 'per_byte' must be"):
        from_record({"answer": "x", "choice": True}, "f:1")
