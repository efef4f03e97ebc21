"""The sentences under the tables of judged answers: what each column means, and counts in words."""

from flm_jax.chat.conversation import Message
from flm_jax.evaluation.compare import tables
from flm_jax.evaluation.judges import ACCURACY, Judgement
from flm_jax.evaluation.questions import NUMERIC, Question
from flm_jax.evaluation.report import as_markdown, as_record


def judgement(number, own, reference, unjudged=""):
    question = Question(str(number), "maths", (Message("user", "1 + 1?"),), NUMERIC, ("2",))
    return Judgement(question, ACCURACY, own, reference, unjudged)


def page(judgements, left_out, reference, **spent):
    found = tables(judgements)
    settings = {
        "questions": {"path": "q.jsonl", "left_out": left_out},
        "faulty_lines": {"a broken line": 1},
        "answers": {"file": "a.jsonl"},
        "reference_answers": reference,
        "judge": {"judge": "rules", **spent},
        "seed": 3,
    }
    return as_markdown(as_record(settings, found, judgements), found)


def test_what_the_columns_mean_is_said_where_they_are():
    alone = page([judgement(0, 1.0, None), judgement(1, None, None, "no answer")], 0, None)
    assert "- n: questions whose answer was judged." in alone
    assert "the results of 95 % of 10,000 bootstrap samples of the questions, seed 3." in alone
    assert "- unjudged: questions on which the answer was not judged: no answer (1)." in alone
    assert "relative" not in alone and "win/tie/loss" not in alone and "left out: 0" not in alone
    both = page([judgement(0, 1.0, 1.0), judgement(1, 1.0, None, "reference: no answer")], 2, "b.jsonl")
    assert "- relative: the sum of the values divided by that of the reference system" in both
    assert "- win/tie/loss: questions on which the answer is better than the reference's, as good, worse." in both
    assert "or the one to compare it with ('reference'), was not judged: reference: no answer (1)." in both


def test_counts_agree_with_their_nouns():
    spent = {"kept": 1, "this_run": {"requests": 1, "prompt_tokens": 1200, "reply_tokens": 1}}
    found = page([judgement(0, 1.0, None)], 1, None, **spent)
    assert "- left out: 1 question of the kind 'judged'" in found
    assert "- faulty lines left out: a broken line (1)." in found
    assert "1 request now, 1 verdict kept from before; 1,200 tokens of prompts, 1 of replies." in found
