"""What an endpoint is asked to judge, as a jinja2 template that users may replace, and how its reply is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flm_jax.chat.template import MOST_BYTES
from flm_jax.evaluation.endpoint import UnreadableError
from flm_jax.evaluation.questions import Question
from flm_jax.files import read_bounded
from flm_jax.records import meant_beside

SCORE, PAIRWISE = "score", "pairwise"
MODES = (SCORE, PAIRWISE)
A, B, TIE = "A", "B", "tie"
LOWEST, HIGHEST = 1.0, 10.0
SHIPPED = Path(__file__).parent / "prompts"
_ANSWERS = {SCORE: ("answer",), PAIRWISE: ("answer_a", "answer_b")}
# As our own prompts ask for it; as MT-Bench's do; as AlignBench's do.
_SCORE = re.compile(
    r"""["'](?:score|rating|综合得分)["']\s*:\s*["']?(-?\d+(?:\.\d+)?)["']?\s*[,}]|\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"""
)
_VERDICT = re.compile(r"""["']verdict["']\s*:\s*["'](A|B|C|tie)["']\s*[,}]|\[\[\s*(A|B|C|tie)\s*\]\]""", re.IGNORECASE)


class JudgePromptError(ValueError):
    """A file is no prompt for a judge; the message says why."""


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt for a judge.

    Attributes:
      mode: SCORE for a score of one answer, PAIRWISE for a comparison of two.
      source: a jinja2 template with the variables `question`, `category`, `subcategory`, `reference` ('' if there is
        none) and, by mode, `answer` or `answer_a` and `answer_b`.
      name: for messages.
    """

    mode: str
    source: str
    name: str

    @classmethod
    def load(cls, mode: str, path: str | Path | None = None) -> JudgePrompt:
        """The prompt of a file, or the shipped one of a mode; it is tried.

        Raises:
          FileNotFoundError: there is no such file.
          JudgePromptError: it is no jinja2, or does not show the question and the answers.
        """
        file = SHIPPED / f"{mode}.jinja" if path is None else Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"there is no prompt for a judge {file}{meant_beside(file)}")
        try:
            source = read_bounded(file, MOST_BYTES).decode()
        except UnicodeDecodeError:
            raise JudgePromptError(f"{file} is not UTF-8 text") from None
        prompt = cls(mode, source, str(file))
        marks = {name: f"<<{name}>>" for name in ("question", *_ANSWERS[mode])}
        shown = prompt._render(category="", subcategory="", reference="", **marks)
        if missing := [name for name, mark in marks.items() if mark not in shown]:
            raise JudgePromptError(f"{file} does not show {{{{ {missing[0]} }}}}, so a judge could not judge by it")
        return prompt

    def render(self, question: Question, *answers: str, with_reference: bool = True) -> str:
        """The text that the judge gets.

        Args:
          question: the question.
          *answers: one, or two to compare.
          with_reference: whether the question's reference is shown.
        """
        return self._render(
            question=question.text,
            category=question.category,
            subcategory=question.subcategory,
            reference=" / ".join(question.reference) if with_reference else "",
            **dict(zip(_ANSWERS[self.mode], answers, strict=True)),
        )

    def read(self, reply: str) -> float | str:
        """The verdict of a reply: a score, or A, B or TIE.

        Raises:
          UnreadableError: it has no verdict, or several that differ.
        """
        reply = reply.rpartition("</think>")[2]
        if self.mode == PAIRWISE:
            letters = {(m[1] or m[2]).upper() for m in _VERDICT.finditer(reply)}
            verdicts: set[float | str] = {letter if letter in (A, B) else TIE for letter in letters}
        else:
            verdicts = {float(m[1] or m[2]) for m in _SCORE.finditer(reply)}
        if len(verdicts) != 1:
            raise UnreadableError("several verdicts in a reply" if verdicts else "no verdict in a reply")
        verdict = verdicts.pop()
        if isinstance(verdict, float) and not LOWEST <= verdict <= HIGHEST:
            raise UnreadableError("a score outside 1 to 10")
        return verdict

    def _render(self, **values: str) -> str:
        import jinja2

        try:
            return str(self._compiled.render(**values)).strip() + "\n"
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise JudgePromptError(f"{self.name} cannot be filled in: {error}") from error

    @cached_property
    def _compiled(self) -> Any:
        import jinja2
        import jinja2.sandbox

        # Prompts are passed from hand to hand like chat templates, and run no code here either.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise JudgePromptError(f"{self.name}, line {error.lineno}: {error.message}") from error
