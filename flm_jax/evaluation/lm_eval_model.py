"""The adapter between flm_jax's models and lm-eval, the language model evaluation harness.

Importing this module needs the extra `eval`; no other module imports lm-eval. The reference for every answer is HFLM,
lm-eval's own model class for Hugging Face: the same tokens, the same truncation, the same stop sequences.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flm_jax.data.vocabulary import Vocabulary
from flm_jax.evaluation.scoring import Scorer, Window, check_vocabulary, rolling_windows
from flm_jax.generation import Generator, Sampling
from flm_jax.records import counted, meant

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError(f"lm-eval cannot be imported ({error}): pip install -e '.[eval]' in a checkout") from error

# The keys of lm-eval's results that `record` keeps; the others describe the machine.
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval_version")


class LmEvalModel(TemplateLM):
    """A model of flm_jax with the interface of lm-eval.

    With several processes, each of them holds all requests, and all of them take part in every batch.
    """

    def __init__(self, scorer: Scorer, vocabulary: Vocabulary, seed: int = 0, progress: bool = True) -> None:
        """Wraps a model.

        Args:
          scorer: the model.
          vocabulary: its vocabulary.
          seed: for requests that ask for sampling.
          progress: whether to show progress bars on a terminal.

        Raises:
          ValueError: the vocabulary has more ids than the model.
        """
        super().__init__()
        check_vocabulary(vocabulary, scorer.cfg.vocab)
        self.scorer, self.vocabulary, self._special = scorer, vocabulary, vocabulary.special
        self._seed, self._progress = seed, progress
        self._generator = Generator(scorer.cfg, scorer.params, vocabulary, scorer.mesh, scorer.masks, scorer.rows)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that the first token is predicted from if there is no context."""
        return self._special.prefix_id

    @property
    def max_length(self) -> int:
        """The longest sequence that the model reads, in tokens."""
        return self.scorer.context

    @property
    def max_gen_toks(self) -> int:
        """The number of tokens to generate for tasks that do not set it."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in lm-eval's cache of requests."""
        return f"flm_jax_{self.vocabulary.digest[:16]}"

    def _hidden(self, asked: bool) -> bool | None:
        return True if asked or not self._progress else None  # None: hidden where there is no terminal

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The token ids of a text.

        The special tokens that the tokenizer adds are included according to `add_special_tokens`; with None, they are
        included unless the text already begins with the prefix token.
        """
        del kwargs
        ids = self.vocabulary.encode(string)
        prefix = self._special.prefix
        if add_special_tokens is None:
            add_special_tokens = not (prefix and string.startswith(prefix))
        return [*self._special.begin, *ids, *self._special.end] if add_special_tokens else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability and greediness of each tokenised request (texts, context, continuation)."""
        del kwargs
        windows = [Window(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(requests), desc="scoring", disable=self._hidden(disable_tqdm)) as bar:
            found = [(score.log_prob, score.greedy) for score in self.scorer.score(windows, bar.update)]
        for (texts, *_), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probabilities of whole texts; every token is predicted once."""
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
        """The continuation of each context, until a stop sequence, the end of the document, or the token limit.

        Raises:
          ValueError: a task asks for a method that is not implemented, such as beams, or for more tokens than fit
            into the model's context.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=self._hidden(disable_tqdm)) as bar:
            for numbers in groups.values():
                asked = requests[numbers[0]].args[1]
                texts = self._generate([requests[i].args[0] for i in numbers], numbers, asked, bar)
                for i, text in zip(numbers, texts, strict=True):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return found

    def _generate(self, contexts: Sequence[str], numbers: Sequence[int], asked: dict[str, Any], bar: Any) -> list[str]:
        """The continuations of contexts that have the same settings `asked`; `numbers` are for their random numbers."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        stops = [stop for stop in handle_stop_sequences(wanted.pop("until"), eos=self._special.eos) if stop]
        most = wanted.pop("max_gen_toks")
        sampling = self._sampling(wanted)
        if not 0 < most < self.max_length:
            raise ValueError(
                f"A task asks for {counted(most, 'generated token')}, but the model's context is "
                f"{self.max_length} tokens, prompt "
                "included: raise --max_length, or set max_gen_toks in the task."
            )
        room = self.max_length - most
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        # Decoding omits special tokens, so a stop sequence that is a special token is recognised by its id.
        alone = [self.vocabulary.encode(stop) for stop in stops]
        ends = [*self._special.stop_ids, *(i[0] for i in alone if len(i) == 1 and not self.vocabulary.decode(i))]
        texts = [""] * len(prompts)
        size = self.vocabulary.size
        given = (prompts, sampling, most, stops, ends, numbers)
        for i, answer in self._generator.answers(*given, in_context=False):
            # A model may have more rows than the tokenizer has ids; HFLM omits such tokens too.
            texts[i] = self.vocabulary.decode(token for token in answer.ids if token < size)
            bar.update()
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _sampling(self, wanted: dict[str, Any]) -> Sampling:
        """How a task wants tokens to be chosen, from the rest of its settings.

        Raises:
          ValueError: it wants something that is not implemented, or a value that makes no sense.
        """
        sampled = bool(wanted.pop("do_sample"))
        given = {name: wanted.pop(name, None) for name in ("temperature", "top_k", "top_p", "min_p")}
        penalty = wanted.pop("repetition_penalty", None) or 1.0
        if unknown := [name for name, value in wanted.items() if not (name == "num_beams" and value in (None, 1))]:
            raise ValueError(
                f"A task asks to generate with {', '.join(sorted(unknown))}; supported are until, max_gen_toks, "
                "do_sample, temperature, top_k, top_p, min_p and repetition_penalty."
            )
        if not sampled:
            return Sampling(repetition_penalty=penalty)
        # As in transformers, top_k = 0 and an absent filter keep all tokens.
        chosen = {name: value for name, value in given.items() if value is not None and (name, value) != ("top_k", 0)}
        return Sampling(**{"temperature": 1.0, **chosen}, repetition_penalty=penalty, seed=self._seed)


def run_tasks(
    model: LmEvalModel,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """The results of lm-eval tasks.

    Args:
      model: the model to evaluate.
      tasks: names of tasks or groups, or patterns of names.
      include_path: a folder with additional tasks, as YAML.
      limit: examples per task; below 1, a fraction of them.
      num_fewshot: examples shown before each question; None: the task's own number.

    Returns:
      The dict that lm-eval returns, with the results of every task under "results".

    Raises:
      ValueError: a task is unknown.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include_path={include_path} is not a folder; give the folder of the tasks' YAML files.")

    def unknown_to(manager: Any) -> list[str]:
        return [name for name in tasks if not fnmatch.filter(manager.all_tasks, name)]

    # Reading lm-eval's thousands of tasks takes ten seconds, so they are read only if a task is missing without them.
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and unknown_to(manager):
        manager = TaskManager(include_path=include_path)
    if unknown := unknown_to(manager):
        where = f", nor does {include_path}" if include_path else ", and --include_path would give it tasks of your own"
        raise ValueError(
            f"lm-eval knows no task {unknown[0]!r}{where}{meant(unknown[0], manager.all_tasks, most=3) or '.'}"
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
    """The part of the results that is kept, JSON-able."""
    kept: dict[str, Any] = json.loads(json.dumps({key: results[key] for key in KEPT if key in results}, default=str))
    return kept


def table(results: dict[str, Any]) -> str:
    """The results as the table that lm-eval prints."""
    from lm_eval.utils import make_table

    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))
