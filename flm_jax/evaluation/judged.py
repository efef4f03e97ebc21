"""Evaluates answers by category: questions, answers, a judge, and the report, kept in a directory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_jax.chat.checkpoint_template import chat_template_of
from flm_jax.chat.template import ChatEncoder
from flm_jax.data.json_lines import Skipped, in_words
from flm_jax.distributed import is_primary
from flm_jax.evaluation.answering import ANSWERS, MADE_BY, answers_of, longest_answer
from flm_jax.evaluation.answers import Answer, read_answers
from flm_jax.evaluation.api_key import ApiKey
from flm_jax.evaluation.chat_request import EndpointConfig
from flm_jax.evaluation.compare import tables
from flm_jax.evaluation.endpoint_judge import EndpointJudge, announcement, verdicts
from flm_jax.evaluation.judge_prompt import PAIRWISE, SCORE, JudgePrompt
from flm_jax.evaluation.judges import (
    ENDPOINT,
    LIKELIHOOD,
    RULES,
    Judgement,
    by_likelihood,
    by_rules,
    opponents,
    read_judge,
)
from flm_jax.evaluation.loaded import find_length, load_model
from flm_jax.evaluation.questions import JUDGED, Question, read_questions
from flm_jax.evaluation.report import REPORT, as_markdown, as_record, as_text
from flm_jax.files import atomic_write, write_json
from flm_jax.progress import count_bar
from flm_jax.records import counted
from flm_jax.sharding import MeshConfig
from flm_jax.source_checkpoint import read_source

CALLS, VERDICTS = "calls.jsonl", "verdicts.jsonl"
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class JudgeRequest:
    """What answers to judge, and how.

    Attributes:
      questions: the file of questions.
      output: the directory that answers, verdicts and the report are kept in.
      judge: `rules`, `likelihood:CHECKPOINT` or `endpoint:MODEL@URL`, for questions of the kind `judged`; the other
        kinds are judged by rules.
      answers: a file of answers; None: a checkpoint answers.
      reference_answers: a file with the answers of the system to compare with; None: no system.
      template: the chat template of the checkpoint that answers; None: its own.
      judge_template: the same for the checkpoint that judges.
      tokens: the most tokens of an answer.
      tokenizer: another vocabulary than the checkpoint's own.
      batch_size: rows per batch, on all devices together.
      max_length: the longest sequence that the checkpoint reads, in tokens; None: as `find_length`.
      dtype: what it computes in; None: the dtype of its parameters.
      mode: SCORE or PAIRWISE, of an endpoint.
      judge_prompt: a file with the prompt of an endpoint; None: the one that is shipped.
      judge_options: more fields of requests; None: those of `EndpointConfig`.
      key_env: the environment variable with the endpoint's key; None: KEY_VARIABLE, if it is set; '': no key.
      concurrency: calls at a time.
      retries: attempts after the first one.
      timeout: seconds until a request is given up.
      max_calls: the most requests; None: any number.
      dry_run: whether to stop before an answer is made or an endpoint is asked.
      most_faulty: the most faulty lines of all files together that are left out; None: any number.
      seed: of the bootstrap.
      backoff: seconds before a first retry, about.
    """

    questions: str
    output: str
    judge: str = RULES
    answers: str | None = None
    reference_answers: str | None = None
    template: str | None = None
    judge_template: str | None = None
    tokens: int = 512
    tokenizer: str | None = None
    batch_size: int = 8
    max_length: int | None = None
    dtype: str | None = None
    mode: str = SCORE
    judge_prompt: str | None = None
    judge_options: Mapping[str, Any] | None = None
    key_env: str | None = None
    concurrency: int = 8
    retries: int = 5
    timeout: float = 120.0
    max_calls: int | None = None
    dry_run: bool = False
    most_faulty: int | None = 0
    seed: int = 0
    backoff: float = 1.0


def judge_answers(
    checkpoint: str | None,
    request: JudgeRequest,
    mesh: MeshConfig | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The report of judging the answers of a checkpoint, or of a file; it is also written to the output directory.

    Args:
      checkpoint: what answers; None: `request.answers` holds the answers.
      request: what to judge, and how.
      mesh: how devices are laid out.
      say: called with each result as text, as soon as it is known.

    Raises:
      ValueError: a file, flag or endpoint is not as it must be, or nothing can be judged.
      FileNotFoundError: a file does not exist.
      DamagedError: a checkpoint is not as it was saved.
    """
    kind, target, url = read_judge(request.judge)
    prompt = JudgePrompt.load(request.mode, request.judge_prompt) if kind == ENDPOINT else None
    config = _endpoint(request, target, url) if kind == ENDPOINT else None
    compares = kind == LIKELIHOOD or (kind == ENDPOINT and request.mode == PAIRWISE)
    skipped, output = (
        Skipped(request.most_faulty, advice="; --most_faulty allows more"),
        Path(request.output).expanduser(),
    )
    _check_output(output)
    questions = read_questions(request.questions, skipped, compares and request.reference_answers is None)
    kinds = Counter(q.kind for q in questions)
    left_out = kinds[JUDGED] if kind == RULES else 0
    if left_out == len(questions):
        raise ValueError(
            f"{request.questions} holds only questions of the kind '{JUDGED}', for which there are no rules: "
            "give --judge=endpoint:MODEL@URL or --judge=likelihood:CHECKPOINT"
        )
    say(f"{request.questions}: {counted(len(questions), 'question')}; kinds: {in_words(kinds.items())}.")
    if left_out:
        none = counted(left_out, "of them is", "of them are")
        say(f"{none} not judged: for the kind '{JUDGED}' there are no rules; another --judge judges it.")
    others = None if request.reference_answers is None else read_answers(request.reference_answers, questions, skipped)
    made: dict[str, Any] = {"file": request.answers}
    if request.answers is not None:
        answers = read_answers(request.answers, questions, skipped)
    elif request.dry_run:
        length = request.max_length or find_length(read_source(str(checkpoint)))
        answers = _expected(output, questions, min(request.tokens, length))
    else:
        answers, made = _of_checkpoint(str(checkpoint), request, mesh, questions, output, say)
    if skipped.counts:
        say(f"{skipped.summary()}.")
    judge = EndpointJudge(config, prompt, questions, answers, others) if config and prompt else None
    if judge:
        say(announcement(judge, output / CALLS))
    if request.dry_run:
        say("A dry run: nothing was asked.")
        return {"dry_run": True, "questions": len(questions), "calls": len(judge.calls) if judge else 0}
    judgements = list(by_rules(questions, answers, others))
    spent: dict[str, Any] = {}
    if kind == LIKELIHOOD:
        judgements += _by_likelihood(target, request, mesh, questions, answers, others, say)
    elif judge:
        found, spent = verdicts(judge, output / CALLS)
        judgements += judge.judgements(found)
    found_tables = tables(judgements, request.seed)
    settings = {
        "questions": {"path": request.questions, "count": len(questions), "kinds": dict(kinds), "left_out": left_out},
        "faulty_lines": dict(skipped.counts),
        "answers": made,
        "reference_answers": request.reference_answers,
        "judge": {"judge": request.judge, **spent},
        "seed": request.seed,
    }
    report = as_record(settings, found_tables, judgements)
    if is_primary():
        lines = (json.dumps(judgement.record(), ensure_ascii=False) + "\n" for judgement in judgements)
        atomic_write(output / VERDICTS, "".join(lines))
        write_json(output / f"{REPORT}.json", report)
        atomic_write(output / f"{REPORT}.md", as_markdown(report, found_tables))
    say(f"\n{as_text(report, found_tables)}\n")
    say(f"Written to {output}: {', '.join(_written(output))}.")
    return report


def _check_output(output: Path) -> None:
    """Refuses a directory that holds something else than judged answers.

    Raises:
      ValueError: it does.
    """
    held = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if held and not held & {ANSWERS, CALLS, VERDICTS, MADE_BY}:
        raise ValueError(
            f"--output={output} holds {sorted(held)[0]!r} and no judged answers: give a new or empty directory"
        )


def _written(output: Path) -> list[str]:
    names = (f"{REPORT}.md", f"{REPORT}.json", VERDICTS, CALLS, ANSWERS)
    return [name for name in names if (output / name).exists()]


def _endpoint(request: JudgeRequest, model: str, url: str) -> EndpointConfig:
    name = KEY_VARIABLE if request.key_env is None else request.key_env
    key = ApiKey.from_environment(name, needed=request.key_env is not None)
    given = {} if request.judge_options is None else {"options": dict(request.judge_options)}
    return EndpointConfig(
        model,
        url,
        key,
        timeout=request.timeout,
        retries=request.retries,
        concurrency=request.concurrency,
        max_calls=request.max_calls,
        backoff=request.backoff,
        **given,
    )


def _of_checkpoint(
    checkpoint: str,
    request: JudgeRequest,
    mesh: MeshConfig | None,
    questions: Sequence[Question],
    output: Path,
    say: Callable[[str], None],
) -> tuple[dict[str, Answer], dict[str, Any]]:
    model = load_model(checkpoint, request.tokenizer, request.max_length, request.dtype, mesh)
    if model.note:
        say(model.note)
    template = chat_template_of(model.source, request.template, model.vocabulary)
    encoder = ChatEncoder(template, model.vocabulary)
    most = longest_answer(model, encoder, questions, request.tokens)
    bound = f" Answers have at most {counted(most, 'token')}" if most else " No answer is written"
    if 0 < most < request.tokens:
        bound += f", not {request.tokens:,}: question and answer together fit into {model.length:,} (--max_length)"
    say(f"{model.sentence()} Template {template.name}.{bound}.")
    return answers_of(model, encoder, questions, request.tokens, request.batch_size, output)


def _expected(output: Path, questions: Sequence[Question], tokens: int) -> dict[str, Answer]:
    """Answers to count tokens by before they are made: those that are kept, others as long as they may get."""
    path = output / ANSWERS
    found = read_answers(path, questions, Skipped(None)) if path.exists() and path.stat().st_size else {}
    longest = Answer("word" * tokens)
    return {q.id: found.get(q.id, longest) for q in questions}


def _by_likelihood(
    checkpoint: str,
    request: JudgeRequest,
    mesh: MeshConfig | None,
    questions: Sequence[Question],
    answers: Mapping[str, Answer],
    others: Mapping[str, Answer] | None,
    say: Callable[[str], None],
) -> list[Judgement]:
    model = load_model(checkpoint, dtype=request.dtype, mesh=mesh)
    template = chat_template_of(model.source, request.judge_template, model.vocabulary)
    say(f"Judge: {model.sentence()} Conversations are written by the template {template.name}.")
    scorer, encoder = model.scorer(request.batch_size), ChatEncoder(template, model.vocabulary)
    with count_bar("likelihoods", "answer") as bar:
        return by_likelihood(questions, answers, opponents(questions, others), scorer, encoder, bar.update)
