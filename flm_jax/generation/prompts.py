"""Prompts from a text, and from files whose answers are written line by line and go on where they were left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flm_jax.data.text import read_utf8
from flm_jax.files import sha256_json
from flm_jax.generation.engine import Answer, Generator, Speed
from flm_jax.generation.sampling import GREEDY, Sampling
from flm_jax.progress import count_bar
from flm_jax.records import as_dict, counted, foreign_json, meant_beside
from flm_jax.records.foreign_json import parse_json
from flm_jax.records.kept import kept_by_all

# The field of an answer that says to which prompt, at which place of its file, with which settings.
KEY = "key"


class Asking(NamedTuple):
    """How prompts are put to a model: continued as they are, or answered within a chat template.

    Attributes:
      ids: the tokens of a prompt's record.
      ends: ids that end an answer; None: those of the vocabulary.
      stops: texts that end an answer.
      between: what is shown between a prompt and its answer; '' where the answer continues the prompt.
    """

    ids: Callable[[Mapping[str, Any]], list[int]]
    ends: Sequence[int] | None = None
    stops: Sequence[str] = ()
    between: str = ""


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate: the answer to `prompt`, or to each of the file `prompts`.

    Attributes:
      prompt: a text to continue.
      prompts: the file of prompts, see `read_prompts`.
      output: the file that their answers are written to; None: they are printed.
      max_tokens: the length of an answer at most.
      sampling: fields of `Sampling` that were given.
      stops: texts that end an answer.
      tokenizer: another vocabulary than the checkpoint's own; see `load_model`, as for the next two.
      max_length: the longest sequence that the model reads, in tokens.
      dtype: what the model computes in.
      batch_size: prompts per batch, on all devices together.
      chat: whether prompts are what a user says in a conversation; without any, one is held in the terminal.
      template: of a conversation; None: the one that the checkpoint was tuned with.
      system: the system turn of a conversation; '': none.
    """

    prompt: str | None = None
    prompts: str | None = None
    output: str | None = None
    max_tokens: int = 256
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    tokenizer: str | None = None
    max_length: int | None = None
    dtype: str | None = None
    batch_size: int = 16
    chat: bool = False
    template: str | None = None
    system: str = ""


def as_they_are(generator: Generator, stops: Sequence[str] = ()) -> Asking:
    """Prompts are texts to continue."""
    return Asking(lambda record: generator.prompt_ids(record["prompt"]), None, stops)


def continue_prompt(
    generator: Generator,
    asking: Asking,
    prompt: str,
    length: int,
    tokens: int,
    sampling: Sampling = GREEDY,
    say: Callable[[str], None] = lambda _: None,
    show: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The continuation of a prompt, JSON-able: prompt, text, tokens (ids), reason.

    Args:
      generator: the model.
      asking: how the prompt is put to it.
      prompt: the text.
      length: the longest sequence that the model reads, in tokens.
      tokens: the length of the continuation at most; it ends earlier where prompt and continuation have `length`.
      sampling: how tokens are chosen.
      say: called with what there is to say about it, in lines.
      show: called with the prompt, then with each piece of the continuation while it is made, then with a line end.

    Raises:
      ValueError: the prompt does not fit into the model's context.
    """
    ids = asking.ids({"prompt": prompt})
    room = length - len(ids)
    if room < 1:
        raise ValueError(
            f"The prompt has {counted(len(ids), 'token')}, and the model reads {length}: shorten it, or set "
            "--max_length."
        )
    if room < tokens:
        say(f"The answer ends after {counted(room, 'token')}, where the sequence has {length}; --max_length sets this.")
    show(prompt + asking.between)
    answer = None
    for piece in generator.stream(ids, sampling, min(room, tokens), asking.stops, asking.ends):
        show(piece.text)
        answer = piece.answer
    show("\n")
    assert answer is not None
    return {"prompt": prompt, **_record(answer)}


def _record(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "tokens": answer.ids, "reason": answer.reason}


def read_prompts(path: str | Path, chat: bool = False) -> list[dict[str, Any]]:
    """The prompts of a file, as objects with the field "prompt": the lines of *.jsonl, or of any other file as texts.

    Empty lines are left out.

    Args:
      path: the file.
      chat: whether an object may have the turns of a conversation, "messages", instead.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8, holds no prompt, or a line of a *.jsonl is not as described.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of prompts {file}{meant_beside(file)}")
    lines = read_utf8(file).decode().split("\n")
    if file.suffix != ".jsonl":
        found = [{"prompt": line.rstrip("\r")} for line in lines if line.strip()]
    else:
        found = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                found.append(record := parse_json(line, where := f"{file}:{number}"))
                if not (chat and "messages" in record):
                    foreign_json.field(record, "prompt", str, where)
    if not found:
        raise ValueError(f"{file} holds no prompt.")
    return found


def answer_prompts(
    generator: Generator,
    asking: Asking,
    prompts: Sequence[Mapping[str, Any]],
    length: int,
    tokens: int,
    sampling: Sampling = GREEDY,
    output: str | Path | None = None,
    show: Callable[[str], None] = lambda _: None,
) -> Speed:
    """Answers prompts in batches, and returns the speed of all of them.

    The number of a prompt decides its random numbers, so the answers do not depend on where a run was interrupted.

    Args:
      generator: the model.
      asking: how prompts are put to it.
      prompts: objects with the field "prompt"; an answer holds their other fields too.
      length: the longest sequence that the model reads, in tokens.
      tokens: the length of an answer at most; it ends earlier where prompt and answer have `length`.
      sampling: how tokens are chosen.
      output: the file that each batch's answers are added to once it is done; prompts that it answers are skipped.
      show: without `output`, called with each answer as a line of JSON.

    Raises:
      ValueError: a prompt is none that can be asked, or does not fit into the model's context; or `output` has other
        answers.
    """
    ids = [_ids(asking, record, number) for number, record in enumerate(prompts, 1)]
    if long := [(number, len(prompt)) for number, prompt in enumerate(ids, 1) if len(prompt) >= length]:
        raise ValueError(
            f"Prompt {long[0][0]} has {long[0][1]} tokens, and the model reads {length}: shorten it, or set "
            "--max_length."
        )
    how = [as_dict(sampling), tokens, length, list(asking.stops), list(asking.ends or ())]
    keys = [sha256_json([number, dict(record), ids[number], how])[:16] for number, record in enumerate(prompts)]
    total = Speed()
    with _kept(output, show) as (known, keep), count_bar("answers", "prompt", len(prompts)) as bar:
        if others := known - set(keys):
            raise ValueError(
                f"{output} holds {counted(len(others), 'answer')} to other prompts, or made with "
                "other settings: give another "
                "--output."
            )
        left = [i for i, key in enumerate(keys) if key not in known]
        bar.update(len(prompts) - len(left))
        for start in range(0, len(left), generator.rows):
            batch = left[start : start + generator.rows]
            most = [min(tokens, length - len(ids[i])) for i in batch]
            answers = generator.generate([ids[i] for i in batch], sampling, most, asking.stops, asking.ends, batch)
            for i, answer in zip(batch, answers, strict=True):
                keep({**prompts[i], **_record(answer), KEY: keys[i]})
            total = total.plus(generator.speed)
            bar.update(len(batch))
    return total


def _ids(asking: Asking, record: Mapping[str, Any], number: int) -> list[int]:
    """The tokens of a prompt; errors say which one it is."""
    try:
        return asking.ids(record)
    except ValueError as error:
        raise ValueError(f"Prompt {number}: {error}") from error


@contextlib.contextmanager
def _kept(
    output: str | Path | None, show: Callable[[str], None]
) -> Iterator[tuple[set[str], Callable[[dict[str, Any]], None]]]:
    """The keys of the answers that a file holds, and a function that adds an answer or, without a file, shows it."""
    if output is None:
        yield set(), lambda record: show(json.dumps(record, ensure_ascii=False))
        return
    path = Path(output).expanduser()
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--output={output}: give the name of a file in a folder that exists.")
    with kept_by_all(path, KEY) as (records, keep):
        yield set(records), keep
