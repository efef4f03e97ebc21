"""`Generator`: a model with its vocabulary on a mesh, for repeated use; answers in batches, or one while it is made."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flm_jax.config import ModelConfig
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.distributed import fetch
from flm_jax.generation import decode
from flm_jax.generation.layers import layers_apart, worth_apart
from flm_jax.generation.sampling import GREEDY, Sampling
from flm_jax.generation.text import StopStrings, TextStream
from flm_jax.model import Layers, Masks, Params
from flm_jax.records import counted

Reason = Literal["end", "stop", "length"]
# Tokens per call where stop strings are looked for between calls: what is computed after one is thrown away.
MOST_WITH_STOPS = 16


class Answer(NamedTuple):
    """What continues a prompt.

    Attributes:
      ids: its tokens, without the one that ended it; with a stop string, up to the token that completed it.
      text: what they add to the prompt's text, up to a stop string.
      reason: what ended it: one of the end ids, a stop string, or its length.
    """

    ids: list[int]
    text: str
    reason: Reason

    @property
    def ended(self) -> bool:
        """Whether it came to its end, and was not cut off."""
        return self.reason != "length"


class Piece(NamedTuple):
    """A part of an answer while it is made: new text, perhaps none, and with the last one what ended the answer."""

    text: str
    answer: Answer | None = None


class Speed(NamedTuple):
    """How long the last call took.

    Attributes:
      prompt_tokens: tokens of the prompts.
      begin_seconds: for reading the prompts and, if shapes were new, compiling.
      tokens: tokens of the answers that were computed after the first one of each.
      seconds: for those.
    """

    prompt_tokens: int = 0
    begin_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of all rows together, without prompts and compilation; None: there were none."""
        return self.tokens / self.seconds if self.tokens else None

    def plus(self, other: Speed) -> Speed:
        """Of both calls together."""
        return Speed(
            self.prompt_tokens + other.prompt_tokens,
            self.begin_seconds + other.begin_seconds,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
        )

    def record(self) -> dict[str, Any]:
        """The fields as JSON-able data, with the tokens per second."""
        return {**self._asdict(), "tokens_per_second": self.tokens_per_second}

    def __str__(self) -> str:
        rate = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.1f} tokens per second"
        return (
            f"{counted(self.tokens, 'token')} in {self.seconds:.1f} s{rate}, after {self.begin_seconds:.1f} s for "
            f"{counted(self.prompt_tokens, 'token')} of prompts and compilation"
        )


class _Row:
    """A prompt and its answer in the making."""

    def __init__(
        self,
        prompt: Sequence[int],
        number: int,
        text: TextStream,
        stops: StopStrings,
        ends: frozenset[int],
        most: int,
    ) -> None:
        self.prompt, self.number, self.ends, self.most = prompt, number, ends, most
        self._text, self._stops = text, stops
        self.ids: list[int] = []
        self._shown: list[str] = []
        self.answer: Answer | None = None

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that can be shown."""
        if token in self.ends:
            return self._close("end")
        self.ids.append(token)
        new = self._show(self._stops.push(self._text.push(token)))
        if self._stops.found:
            return new + self._close("stop")
        return new + self._close("length") if len(self.ids) == self.most else new

    def _show(self, text: str) -> str:
        self._shown.append(text)
        return text

    def _close(self, reason: Reason) -> str:
        new = self._show(self._stops.push(self._text.end(), last=True))
        # The bytes that were left may complete a stop string; the answer ended before, if it ended by itself.
        self.answer = Answer(self.ids, "".join(self._shown), "stop" if self._stops.found else reason)
        return new


class Generator:
    """A model that answers prompts.

    Attributes:
      rows: prompts per batch, on all devices together.
      speed: of the last call.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        vocabulary: Vocabulary,
        mesh: Mesh,
        masks: Masks | None = None,
        rows: int = 16,
        apart: bool | None = None,
    ) -> None:
        """Wraps a model.

        Args:
          cfg: the model.
          params: its parameters, on `mesh`.
          vocabulary: its vocabulary.
          mesh: the mesh.
          masks: growth masks, during their ramp.
          rows: prompts per batch; rounded up to a multiple of data x fsdp.
          apart: whether tokens are made with each layer's parameters as arrays of their own, which is for one CPU;
            None: in calls that are long enough (`worth_apart`).

        Raises:
          ValueError: `apart`, and the mesh is not one CPU; raised by the first call.
        """
        self.cfg, self.params, self.vocabulary, self.mesh, self.masks = cfg, params, vocabulary, mesh, masks
        self._apart = apart
        self._shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.rows = -(-rows // self._shards) * self._shards
        self.speed = Speed()

    def _layers(self, steps: int) -> Layers | None:
        """The parameters of each block for a call that makes so many tokens per row at most; None: stacked ones do."""
        apart = worth_apart(self.params, self.mesh, steps) if self._apart is None else self._apart
        return self._layers_apart if apart else None

    @functools.cached_property
    def _layers_apart(self) -> Layers:
        return layers_apart(self.params, self.mesh)

    def prompt_ids(self, text: str) -> list[int]:
        """The tokens of a prompt, begun as the vocabulary begins a text; at least one."""
        special = self.vocabulary.special
        return [*special.begin, *self.vocabulary.encode(text)] or [special.prefix_id]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling = GREEDY,
        max_tokens: int | Sequence[int] = 256,
        stops: Sequence[str] = (),
        ends: Collection[int] | None = None,
        numbers: Sequence[int] | None = None,
        in_context: bool = True,
    ) -> list[Answer]:
        """The answer to each prompt, in the given order; arguments and errors are those of `answers`."""
        found = dict(self.answers(prompts, sampling, max_tokens, stops, ends, numbers, in_context))
        return [found[i] for i in range(len(prompts))]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling = GREEDY,
        max_tokens: int | Sequence[int] = 256,
        stops: Sequence[str] = (),
        ends: Collection[int] | None = None,
        numbers: Sequence[int] | None = None,
        in_context: bool = True,
    ) -> Iterator[tuple[int, Answer]]:
        """Yields the index of each prompt and its answer, batch after batch, the longest prompts first.

        Args:
          prompts: token ids, at least one each.
          sampling: how tokens are chosen.
          max_tokens: the length of an answer at most; one for all, or one per prompt.
          stops: texts that end an answer.
          ends: ids that end an answer; None: those of the vocabulary.
          numbers: of the prompts, below 2**32: with `sampling.seed` they decide the random numbers of each; None: 0, 1,
            2, ...
          in_context: whether the text of an answer is what it adds to its prompt; otherwise it is decoded alone.

        Raises:
          ValueError: a prompt has no tokens, a number is out of range, an answer has room for none, or a stop is empty.
        """
        self.speed = Speed()
        numbers = range(len(prompts)) if numbers is None else numbers
        most = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        rows = [self._row(prompt, most[i], stops, ends, numbers[i], in_context) for i, prompt in enumerate(prompts)]
        # Prompts of similar length go together; the longest first, so that too little memory shows at once.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        batches = [order[start : start + self.rows] for start in range(0, len(order), self.rows)]
        layers = self._layers(sum(max(most[i] for i in batch) for batch in batches))
        for batch in batches:
            chosen = [rows[i] for i in batch]
            for tokens_BM in self._tokens(chosen, sampling, MOST_WITH_STOPS if stops else decode.MOST, layers):
                # A batch is filled up with rows that belong to no prompt.
                for row, tokens in zip(chosen, tokens_BM[: len(chosen)].tolist(), strict=True):
                    for token in tokens:
                        if row.answer is None and token != decode.ENDED:
                            row.push(token)
            for i, row in zip(batch, chosen, strict=True):
                assert row.answer is not None
                yield i, row.answer

    def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling = GREEDY,
        max_tokens: int = 256,
        stops: Sequence[str] = (),
        ends: Collection[int] | None = None,
        number: int = 0,
    ) -> Iterator[Piece]:
        """Yields the answer to one prompt token by token; the last piece holds it whole. Stop when you like.

        It is the answer that `answers` gives to this prompt under this number. Arguments are those of `answers`.
        """
        self.speed = Speed()
        row = self._row(prompt, max_tokens, stops, ends, number)
        for tokens_BM in self._tokens([row], sampling, 1, self._layers(max_tokens)):
            for token in tokens_BM[0].tolist():
                if row.answer is None and token != decode.ENDED:
                    text = row.push(token)
                    yield Piece(text, row.answer)

    def _row(
        self,
        prompt: Sequence[int],
        most: int,
        stops: Sequence[str],
        ends: Collection[int] | None,
        number: int,
        in_context: bool = True,
    ) -> _Row:
        if not prompt:
            raise ValueError("A prompt has no tokens: begin it with the vocabulary's prefix, as prompt_ids does.")
        if most < 1:
            raise ValueError(f"max_tokens={most}: an answer has at least 1 token.")
        if not 0 <= number < 2**32:
            raise ValueError(f"The number of a prompt is from 0 to 2**32 - 1, and {number} is not.")
        text = TextStream(self.vocabulary, prompt if in_context else ())
        ends = self.vocabulary.special.stop_ids if ends is None else ends
        return _Row(prompt, number, text, StopStrings(stops), frozenset(ends), most)

    def _tokens(
        self, rows: Sequence[_Row], sampling: Sampling, piece: int, layers: Layers | None
    ) -> Iterator[np.ndarray]:
        """Yields the next tokens of a batch, (B, some) int32, until all `rows` have their answers; `piece` per call."""
        since = time.perf_counter()
        count = min(decode.bucket(len(rows), self._shards), self.rows)
        prompt_BT, start_B = decode.padded([row.prompt for row in rows], count)
        longest = max(row.most for row in rows)
        slots = decode.bucket(prompt_BT.shape[1] + longest, decode.SMALLEST_CACHE)
        form, values = sampling.form, sampling.values
        ends = sorted(rows[0].ends)  # the same for all
        ends_E = np.full(decode.bucket(len(ends), 8), decode.ENDED, np.int32)
        ends_E[: len(ends)] = ends
        numbers = [row.number for row in rows] + [0] * (count - len(rows))

        def extended(batch: decode.Rows, limit: int) -> tuple[jax.Array, decode.Rows]:
            ended_B = np.array([row.answer is not None for row in rows] + [True] * (count - len(rows)))
            given: Any = (batch, ended_B, ends_E, np.int32(limit), values, self.masks)
            with jax.set_mesh(self.mesh):
                return decode.extend(self.cfg, self.params, *given, form, layers=layers)

        with jax.set_mesh(self.mesh):
            given: Any = (prompt_BT, start_B, sampling.keys(jnp.asarray(numbers, jnp.uint32)), values, self.masks)
            batch = decode.read(self.cfg, self.params, *given, slots=slots, form=form)
        first_B = fetch(batch.token_B)
        yield first_B[:, None]
        if not all(row.answer for row in rows):
            _, batch = extended(batch, 0)  # no tokens: compiles, so that what follows can be timed
        read = sum(len(row.prompt) for row in rows)
        self.speed = self.speed.plus(Speed(read, time.perf_counter() - since))
        made = 1
        while not all(row.answer for row in rows):
            since = time.perf_counter()
            limit = min(piece, longest - made)
            tokens, batch = extended(batch, limit)
            tokens_BM = fetch(tokens)[:, :limit]
            done = Speed(tokens=int(np.sum(tokens_BM != decode.ENDED)), seconds=time.perf_counter() - since)
            self.speed = self.speed.plus(done)
            yield tokens_BM
            made += limit
