"""What judges say of answers; the judges that need no endpoint: rules, the likelihood under a reference checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flm_jax.chat.template import ChatEncoder
from flm_jax.evaluation.answers import NO_ANSWER, Answer
from flm_jax.evaluation.likelihood import mean_log_probs
from flm_jax.evaluation.questions import CHOICE, JUDGED, Question
from flm_jax.evaluation.rules import BY_RULE, right
from flm_jax.evaluation.scoring import Scorer
from flm_jax.records import meant

RULES, LIKELIHOOD, ENDPOINT = "rules", "likelihood", "endpoint"
# What is measured: 1 for a right answer, 0 for a wrong one; a score from 1 to 10; 1, 1/2, 0 for a win, a tie, a loss.
ACCURACY, SCORES, WINS = "accuracy", "score", "wins"
# Nats per token. Two answers whose likelihoods differ by less are equally likely: rounding is below it.
TIE_NATS = 1e-3
# Of an OpenAI-compatible endpoint: the model's name may contain '@', as that of its host may not.
_ENDPOINT = re.compile(r"(?P<model>.+)@(?P<url>https?://.*)")


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one question.

    Attributes:
      question: the question.
      measure: ACCURACY, SCORES or WINS.
      own: the value of the system's answer; None: it was not judged.
      reference: the value of the reference system's answer, on the same scale; None: there is none.
      unjudged: why one of the two was not judged, in a few words.
      per_byte: for a choice by likelihood, the accuracy of the choice that is likeliest per byte.
      disagreed: whether it is a tie because the judge's verdict changed with the order of the answers.
    """

    question: Question
    measure: str
    own: float | None
    reference: float | None = None
    unjudged: str = ""
    per_byte: float | None = None
    disagreed: bool = False

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        about = {"id": self.question.id, "category": self.question.category, "kind": self.question.kind}
        values = {"measure": self.measure, "value": self.own, "reference": self.reference, "per_byte": self.per_byte}
        more = {"unjudged": self.unjudged or None, "disagreed": self.disagreed or None}
        return {**about, **values, **{name: value for name, value in more.items() if value is not None}}


def read_judge(given: str) -> tuple[str, str, str]:
    """The parts of --judge: its kind, then the checkpoint or the endpoint's model, then the endpoint's URL.

    Raises:
      ValueError: it is none of `rules`, `likelihood:CHECKPOINT` and `endpoint:MODEL@URL`.
    """
    kind, _, rest = given.partition(":")
    if kind == RULES and not rest:
        return RULES, "", ""
    if kind == LIKELIHOOD and rest:
        return LIKELIHOOD, rest, ""
    if kind == ENDPOINT and (parts := _ENDPOINT.fullmatch(rest)):
        return ENDPOINT, parts["model"], parts["url"]
    near = "" if kind in (RULES, LIKELIHOOD, ENDPOINT) else meant(kind, (RULES, LIKELIHOOD, ENDPOINT))
    raise ValueError(
        f"--judge={kind:.40}{':...' if rest else ''} is none of rules, likelihood:CHECKPOINT and endpoint:MODEL@URL, "
        f"such as endpoint:gpt-4-1106-preview@https://api.openai.com/v1{near}"
    )


def by_rules(
    questions: Sequence[Question], answers: Mapping[str, Answer], others: Mapping[str, Answer] | None
) -> Iterator[Judgement]:
    """Yields the judgements of the questions that have a rule.

    Args:
      questions: the questions.
      answers: the system's answers.
      others: those of the reference system, if there is one.
    """
    for question in questions:
        if question.kind not in BY_RULE:
            continue
        own = answers.get(question.id, NO_ANSWER)
        other = None if others is None else others.get(question.id, NO_ANSWER)
        yield Judgement(
            question,
            ACCURACY,
            _accuracy(question, own),
            None if other is None else _accuracy(question, other),
            missing_answer(own, other),
            None if own.choice_per_byte is None else float(own.choice_per_byte == question.right_choice),
        )


def _accuracy(question: Question, answer: Answer) -> float | None:
    if answer.text is None:
        return None
    if question.kind == CHOICE and answer.choice is not None:
        return float(answer.choice == question.right_choice)
    return float(right(question, answer.text))


def missing_answer(own: Answer, other: Answer | None = None) -> str:
    """Why one of two answers is missing; '' if none is."""
    if own.text is None:
        return own.missing
    return f"reference: {other.missing}" if other is not None and other.text is None else ""


def opponents(questions: Sequence[Question], others: Mapping[str, Answer] | None) -> dict[str, Answer]:
    """What answers are compared with: those of the reference system or, without one, the questions' references."""
    if others is not None:
        return {q.id: others.get(q.id, NO_ANSWER) for q in questions}
    return {q.id: Answer(q.reference[0]) if q.reference else Answer(None, "no reference") for q in questions}


def by_likelihood(
    questions: Sequence[Question],
    answers: Mapping[str, Answer],
    others: Mapping[str, Answer],
    scorer: Scorer,
    encoder: ChatEncoder,
    told: Callable[[int], object] = lambda _: None,
) -> list[Judgement]:
    """Wins, ties and losses by the mean log-probability per token under the model that judges.

    Args:
      questions: the questions; those of the kind `judged` are judged.
      answers: the system's answers.
      others: what they are compared with, by question.
      scorer: the model that judges.
      encoder: its template and vocabulary.
      told: called with numbers of answers, once they are scored.
    """
    asked = [q for q in questions if q.kind == JUDGED]
    pairs = {q.id: (answers.get(q.id, NO_ANSWER), others[q.id]) for q in asked}
    compared = [q for q in asked if not missing_answer(*pairs[q.id])]
    texts = [(q.messages, answer.text or "") for q in compared for answer in pairs[q.id]]
    means = iter(mean_log_probs(scorer, encoder, texts, told))
    found = []
    for question in asked:
        if missing := missing_answer(*pairs[question.id]):
            found.append(Judgement(question, WINS, None, unjudged=missing))
            continue
        own, other = next(means), next(means)
        if isinstance(own, str) or isinstance(other, str):
            found.append(Judgement(question, WINS, None, unjudged=own if isinstance(own, str) else str(other)))
            continue
        tied = abs(own - other) < TIE_NATS
        found.append(Judgement(question, WINS, 0.5 if tied else float(own > other)))
    return found
