"""A judge behind a chat endpoint: what it is asked, and the judgements that its verdicts make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flm_jax.distributed import from_primary, is_primary
from flm_jax.evaluation.answers import NO_ANSWER, Answer
from flm_jax.evaluation.chat_request import EndpointConfig
from flm_jax.evaluation.endpoint import Endpoint, Outcome
from flm_jax.evaluation.judge_prompt import PAIRWISE, SCORE, TIE, A, B, JudgePrompt
from flm_jax.evaluation.judges import SCORES, WINS, Judgement, missing_answer, opponents
from flm_jax.evaluation.questions import JUDGED, Question
from flm_jax.files import sha256_json
from flm_jax.progress import count_bar
from flm_jax.records import counted
from flm_jax.records.kept import KeptLines


class Call(NamedTuple):
    """One thing to ask an endpoint.

    Attributes:
      question: the id of the question.
      part: which of its calls: 'own' or 'reference' for scores; 'first' or 'second', the place of the system's answer.
      key: equal for equal prompts to the same model, whose verdicts are kept under it.
      prompt: the text.
    """

    question: str
    part: str
    key: str
    prompt: str


OWN, REFERENCE, FIRST, SECOND = "own", "reference", "first", "second"


class EndpointJudge:
    """A judge behind an endpoint: what it is to be asked, and the judgements that its verdicts make.

    Attributes:
      config: the endpoint.
      calls: all of them, those included whose verdicts are kept.
    """

    def __init__(
        self,
        config: EndpointConfig,
        prompt: JudgePrompt,
        questions: Sequence[Question],
        answers: Mapping[str, Answer],
        others: Mapping[str, Answer] | None,
    ) -> None:
        """Writes the prompts.

        Args:
          config: the endpoint.
          prompt: the prompt; its mode says whether answers are scored or compared.
          questions: the questions; those of the kind `judged` are judged.
          answers: the system's answers.
          others: those of the reference system, if there is one.
        """
        self.config, self._prompt = config, prompt
        self._questions = [q for q in questions if q.kind == JUDGED]
        self._own = {q.id: answers.get(q.id, NO_ANSWER) for q in self._questions}
        self._other: Mapping[str, Answer | None]
        if prompt.mode == PAIRWISE:
            self._other = opponents(self._questions, others)
        else:
            self._other = {q.id: None if others is None else others.get(q.id, NO_ANSWER) for q in self._questions}
        self.calls = [call for q in self._questions for call in self._calls(q, others is not None)]

    def _calls(self, question: Question, with_reference: bool) -> Iterator[Call]:
        own, other = self._own[question.id], self._other[question.id]
        if self._prompt.mode == SCORE:
            for part, answer in ((OWN, own), (REFERENCE, other)):
                if answer is not None and answer.text is not None:
                    yield self._call(question, part, self._prompt.render(question, answer.text))
        elif not missing_answer(own, other):
            assert own.text is not None and other is not None and other.text is not None
            for part, pair in ((FIRST, (own.text, other.text)), (SECOND, (other.text, own.text))):
                yield self._call(question, part, self._prompt.render(question, *pair, with_reference=with_reference))

    def _call(self, question: Question, part: str, prompt: str) -> Call:
        asked = [self.config.model, self.config.url, dict(self.config.options), self._prompt.mode, prompt]
        return Call(question.id, part, sha256_json(asked)[:32], prompt)

    def left(self, kept: Mapping[str, Mapping[str, Any]]) -> list[Call]:
        """The calls that have no verdict yet, each prompt once."""
        found = {call.key: call for call in self.calls if kept.get(call.key, {}).get("verdict") is None}
        return list(found.values())

    def ask(
        self, kept: Mapping[str, Mapping[str, Any]], keep: Callable[[dict[str, Any]], None]
    ) -> dict[str, dict[str, Any]]:
        """Asks what is left, and returns a record of each such call by its key.

        Args:
          kept: records of calls by key, of runs before.
          keep: called in any thread with each record of a call for which a request was sent, as soon as it is known.

        Raises:
          EndpointError: the endpoint cannot be used.
        """
        calls = {call.key: call for call in self.left(kept)}
        records = {}

        def done(key: str, outcome: Outcome) -> None:
            call, (prompt_tokens, reply_tokens) = calls[key], outcome.usage
            about = {"key": key, "id": call.question, "part": call.part, "verdict": outcome.verdict}
            tokens = {"prompt_tokens": prompt_tokens, "reply_tokens": reply_tokens}
            spent = {"fault": outcome.fault, "attempts": outcome.attempts, **tokens}
            records[key] = {**about, **spent, "reply": outcome.reply}
            if outcome.attempts:
                keep(records[key])

        prompts = {key: call.prompt for key, call in calls.items()}
        Endpoint(self.config).ask_all(prompts, self._prompt.read, done)
        return records

    def judgements(self, kept: Mapping[str, Mapping[str, Any]]) -> list[Judgement]:
        """The judgement of each question, from the records of calls."""
        parts: dict[str, dict[str, Mapping[str, Any]]] = {}
        for call in self.calls:
            parts.setdefault(call.question, {})[call.part] = kept.get(call.key, {"fault": "not asked"})
        make = self._score if self._prompt.mode == SCORE else self._comparison
        return [make(question, parts.get(question.id, {})) for question in self._questions]

    def _score(self, question: Question, calls: Mapping[str, Mapping[str, Any]]) -> Judgement:
        own, other = self._own[question.id], self._other[question.id]
        values: list[float | None] = []
        faults = [missing_answer(own, other)]
        for part in (OWN, REFERENCE):
            verdict = calls.get(part, {}).get("verdict")
            values.append(None if verdict is None else float(verdict))
            if part in calls and verdict is None:
                faults.append(("reference: " if part == REFERENCE else "") + str(calls[part]["fault"]))
        fault = next((fault for fault in faults if fault), "")
        return Judgement(question, SCORES, values[0], values[1], fault)

    def _comparison(self, question: Question, calls: Mapping[str, Mapping[str, Any]]) -> Judgement:
        own, other = self._own[question.id], self._other[question.id]
        if missing := missing_answer(own, other):
            return Judgement(question, WINS, None, unjudged=missing)
        verdicts = [calls[part].get("verdict") for part in (FIRST, SECOND)]
        if None in verdicts:
            return Judgement(question, WINS, None, unjudged=str(calls[(FIRST, SECOND)[verdicts.index(None)]]["fault"]))
        value = 1.0 if verdicts == [A, B] else 0.0 if verdicts == [B, A] else 0.5
        return Judgement(question, WINS, value, disagreed=value == 0.5 and verdicts != [TIE, TIE])


def announcement(judge: EndpointJudge, path: Path) -> str:
    """What will be asked, in words: where, how many calls, about how many tokens.

    Args:
      judge: the judge.
      path: the file with the calls of runs before; it need not exist.
    """
    config, kept = judge.config, {}
    if is_primary() and path.exists():
        with KeptLines(path, "key") as lines:
            kept = lines.records
    left = judge.left(kept)
    tokens = sum(about_tokens(call.prompt) for call in left)
    key = f"the key in {config.key.name}" if config.key else "no key"
    most = "" if config.max_calls is None else f", at most {counted(config.max_calls, 'request')}"
    replies = config.options.get("max_tokens", config.options.get("max_completion_tokens"))
    limit = f", up to {counted(replies, 'token')} in each reply" if isinstance(replies, int) else ""
    text = (
        f"Endpoint: {config.model} at {config.url}, with {key}. {counted(len(judge.calls), 'call')} in all, "
        f"{counted(len(judge.calls) - len(left), 'verdict is', 'verdicts are')} kept; "
        f"{counted(len(left), 'call')} to make{most}: about "
        f"{counted(tokens, 'token')} in the prompts{limit}."
    )
    return text + (" The key is sent unencrypted: the URL has http." if config.key and config.unencrypted else "")


def verdicts(judge: EndpointJudge, path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The verdicts of all calls by key, and what they cost; only process 0 asks.

    Args:
      judge: the judge.
      path: the file that keeps each call as it comes; what it holds is not asked again.

    Raises:
      EndpointError: the endpoint cannot be used.
    """

    def ask() -> list[Any]:
        with KeptLines(path, "key") as lines:
            before = dict(lines.records)
            with count_bar("verdicts", "call", len(judge.left(before))) as bar:

                def keep(record: dict[str, Any]) -> None:
                    lines.append(record)
                    bar.update(1)

                asked = judge.ask(before, keep)
        mine = {call.key for call in judge.calls}
        records = {key: record for key, record in {**before, **asked}.items() if key in mine}
        short = {key: {"verdict": r.get("verdict"), "fault": r.get("fault")} for key, r in records.items()}
        sums = {"requests": "attempts", "prompt_tokens": "prompt_tokens", "reply_tokens": "reply_tokens"}
        spent = {name: sum(record[field] for record in asked.values()) for name, field in sums.items()}
        return [short, {"calls": len(judge.calls), "kept": len(mine) - len(asked), "this_run": spent}]

    found, spent = from_primary("verdicts", ask)
    return found, spent


def about_tokens(text: str) -> int:
    """About how many tokens a text has: a quarter of its ASCII characters, and one for each other one."""
    ascii_count = len(text.encode("ascii", "ignore"))
    return -(-ascii_count // 4) + len(text) - ascii_count
