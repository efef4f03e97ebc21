"""The language model evaluation harness (lm-eval): our models as one of its models.

Importing this needs the extra `eval`; nothing else of the project imports lm-eval. What its HFLM answers to a request
is the measure: the same tokens, the same truncation, the same stops.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from flm_jax.data.vocabulary import Vocabulary
from flm_jax.evaluation.scoring import Scorer, Window, check_vocabulary, rolling_windows
from flm_jax.generate import generate
from flm_jax.sharding import put_batch

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError(f"lm-eval cannot be imported ({error}): pip install -e '.[eval]'") from error

# What is worth keeping of lm-eval's results; the rest describes the machine.
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval_version")
# Tokens that are generated before it is looked whether any request is done; then twice as many, and so on.
FIRST_STEPS = 32


@dataclass
class _Continuation:
    """One request to generate: its prompt, and what was generated so far."""

    prompt: list[int]
    most: int
    stops: list[str]
    tokens: list[int] = field(default_factory=list)
    done: bool = False


class LmEvalModel(TemplateLM):
    """A model of ours for lm-eval.

    In several processes every one of them holds every request, and all take part in every batch.
    """

    def __init__(self, scorer: Scorer, vocabulary: Vocabulary, seed: int = 0, progress: bool = True) -> None:
        """Wraps a model.

        Args:
          scorer: the model.
          vocabulary: what its ids mean.
          seed: of requests that ask for sampling.
          progress: show bars on a terminal.

        Raises:
          ValueError: the vocabulary has more ids than the model.
        """
        super().__init__()
        check_vocabulary(vocabulary, scorer.cfg.vocab)
        self.scorer, self.vocabulary, self._special = scorer, vocabulary, vocabulary.special
        self._key, self._progress = jax.random.key(seed), progress

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token is predicted from, where there is no context."""
        return self._special.prefix_id

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads at once."""
        return self.scorer.context

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return f"flm_jax_{self.vocabulary.digest[:16]}"

    def _hidden(self, asked: bool) -> bool | None:
        return True if asked or not self._progress else None  # None: hidden where there is no terminal

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with those that the tokenizer adds unless told otherwise or the text begins with the prefix."""
        del kwargs
        ids = self.vocabulary.encode(string)
        prefix = self._special.prefix
        if add_special_tokens is None:
            add_special_tokens = not (prefix and string.startswith(prefix))
        return [*self._special.begin, *ids, *self._special.end] if add_special_tokens else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores tokenised requests, (texts, context, continuation)."""
        del kwargs
        windows = [Window(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(requests), desc="scoring", disable=self._hidden(disable_tqdm)) as bar:
            found = [(score.log_prob, score.greedy) for score in self.scorer.score(windows, bar.update)]
        for (texts, *_), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, every token of them predicted once."""
        texts = [request.args[0] for request in requests]
        of_texts = [rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length) for text in texts]
        windows = [window for of_text in of_texts for window in of_text]
        with tqdm(total=len(windows), desc="scoring", disable=self._hidden(disable_tqdm)) as bar:
            scores = iter(self.scorer.score(windows, bar.update))
        sums = [sum(next(scores).log_prob for _ in of_text) for of_text in of_texts]
        for text, total in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts until a text that stops, the end of the document, or as many tokens as allowed.

        Raises:
          ValueError: a task asks for what is not here (beams, nucleus sampling), or for more tokens than the model has
            room for.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=self._hidden(disable_tqdm)) as bar:
            for numbers in groups.values():
                asked = requests[numbers[0]].args[1]
                texts = self._generate([requests[i].args[0] for i in numbers], asked, bar)
                for i, text in zip(numbers, texts, strict=True):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return found

    def _generate(self, contexts: Sequence[str], asked: dict[str, Any], bar: Any) -> list[str]:
        """Continues contexts of which the same is asked."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        stops = [stop for stop in handle_stop_sequences(wanted.pop("until"), eos=self._special.eos) if stop]
        most = wanted.pop("max_gen_toks")
        temperature = float(wanted.pop("temperature", 0.0)) * bool(wanted.pop("do_sample"))
        harmless = {"num_beams": 1} | ({} if temperature else {"top_p": None, "top_k": None})
        unknown = [name for name, x in wanted.items() if name not in harmless or harmless[name] not in (None, x)]
        if unknown:
            raise ValueError(
                f"A task asks to generate with {', '.join(sorted(unknown))}: known are until, max_gen_toks, do_sample "
                "and temperature."
            )
        if not 0 < most < self.max_length:
            raise ValueError(
                f"A task asks for {most} generated tokens, and the model reads {self.max_length} at once, prompt "
                "included: raise --max_length, or have the task set max_gen_toks."
            )
        rows = []
        for context in contexts:
            prompt = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
            rows.append(_Continuation(prompt, most, stops))
        # A special token is not written out, so one that a task stops at has to be known by its id.
        alone = [self.vocabulary.encode(stop) for stop in stops]
        ids = {*self._special.stop_ids, *(i[0] for i in alone if len(i) == 1 and not self.vocabulary.decode(i))}
        steps, left = FIRST_STEPS, rows
        while left:
            for numbers in self.scorer.batches([len(row.prompt) + len(row.tokens) for row in left]):
                self._extend([left[i] for i in numbers], min(steps, most), temperature, ids)
            bar.update(sum(row.done for row in left))
            steps, left = 2 * steps, [row for row in left if not row.done]
        texts = [self._written(row.tokens) for row in rows]
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _written(self, tokens: list[int]) -> str:
        # A model may have more rows than the tokenizer ids; HFLM leaves them out without a trace.
        return self.vocabulary.decode(token for token in tokens if token < self.vocabulary.size)

    def _extend(self, rows: list[_Continuation], steps: int, temperature: float, stop_ids: set[int]) -> None:
        """Generates some more tokens of a batch, all of it read anew, and sees which rows are done."""
        scorer = self.scorer
        texts = [row.prompt + row.tokens for row in rows]
        length = scorer.bucket(max(map(len, texts)))
        prompt_BT = np.zeros((scorer.rows, length), np.int32)
        start_B = np.full(scorer.rows, length - 1, np.int32)
        for i, text in enumerate(texts):
            prompt_BT[i, length - len(text) :], start_B[i] = text, length - len(text)
        self._key, key = jax.random.split(self._key)
        with jax.set_mesh(scorer.mesh):
            placed = put_batch(prompt_BT, scorer.mesh)
            out_BS = jax.device_get(
                generate(scorer.cfg, scorer.params, placed, steps, key, temperature, scorer.masks, start_B)
            )
        for row, new in zip(rows, out_BS[: len(rows)].tolist(), strict=True):
            row.tokens = (row.tokens + new)[: row.most]
            end = next((i for i, token in enumerate(row.tokens) if token in stop_ids), None)
            row.tokens = row.tokens[:end]
            written = self._written(row.tokens)
            row.done = end is not None or len(row.tokens) >= row.most or any(stop in written for stop in row.stops)


def run_tasks(
    model: LmEvalModel,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Runs lm-eval's tasks.

    Args:
      model: what to evaluate.
      tasks: names of tasks or groups, or patterns of them.
      include_path: a folder with tasks of one's own, as YAML.
      limit: examples a task; below 1, a share of them.
      num_fewshot: examples shown before each question; None: as each task has it.

    Returns:
      What lm-eval returns, the results of every task under "results".

    Raises:
      ValueError: a task that is not known.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include_path={include_path} is no folder; give the one that the tasks' YAML files lie in.")

    def unknown_to(manager: Any) -> list[str]:
        return [name for name in tasks if not fnmatch.filter(manager.all_tasks, name)]

    # Reading lm-eval's own thousands of tasks takes ten seconds, for which one's own may have no use.
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and unknown_to(manager):
        manager = TaskManager(include_path=include_path)
    if unknown := unknown_to(manager):
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3, cutoff=0.5)
        raise ValueError(
            f"lm-eval knows no task {unknown[0]!r}; close to it: {', '.join(map(repr, close)) or 'none'}"
            + (f", {include_path} included." if include_path else "; tasks of your own: --include_path.")
        )
    found: dict[str, Any] = simple_evaluate(
        model,
        tasks=sorted({name for pattern in tasks for name in fnmatch.filter(manager.all_tasks, pattern)}),
        num_fewshot=num_fewshot,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        task_manager=manager,
        log_samples=False,
    )
    return found


def record(results: dict[str, Any]) -> dict[str, Any]:
    """What of the results is worth keeping, JSON-able."""
    kept: dict[str, Any] = json.loads(json.dumps({key: results[key] for key in KEPT if key in results}, default=str))
    return kept


def table(results: dict[str, Any]) -> str:
    """The results as lm-eval prints them."""
    from lm_eval.utils import make_table

    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))
