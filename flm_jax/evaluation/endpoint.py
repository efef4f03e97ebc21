"""A client of chat endpoints of OpenAI's form: many calls at a time, with retries, pauses and limits."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from flm_jax.evaluation.chat_request import EndpointConfig, EndpointError, Response, Sender, StoppedError

# Seconds: the longest wait between attempts that is chosen here, and the longest that a server may ask for.
LONGEST_BACKOFF, LONGEST_WAIT = 60.0, 900.0
# So many questions in a row without any reply, and the endpoint is taken to be down.
GIVE_UP = 10
_ALL = (300, 301, 302, 303, 307, 308, 401, 403, 404, 405)  # as a first reply: no other call would do better


class UnreadableError(ValueError):
    """A reply holds no verdict; the message says why, in a few words."""


class Outcome(NamedTuple):
    """What came of a call.

    Attributes:
      verdict: what `read` made of the reply; None: there is none.
      fault: why there is none, in a few words; '' if there is one.
      reply: the text of the last reply, or the beginning of what came in its place.
      attempts: how many requests were sent.
      usage: tokens of prompts and of replies as the endpoint counts them, over all attempts.
    """

    verdict: Any
    fault: str
    reply: str
    attempts: int
    usage: tuple[int, int]


class Endpoint:
    """A client of one endpoint.

    Attributes:
      config: where and how.
      sent: how many requests were sent.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config, self.sent = config, 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._sender = Sender(config)
        self._not_before = 0.0
        self._replied, self._failures, self._down = False, 0, ""
        self._jitter = random.Random()

    def ask_all(
        self,
        prompts: Mapping[str, str],
        read: Callable[[str], Any],
        keep: Callable[[str, Outcome], None],
    ) -> dict[str, Outcome]:
        """The outcome of each prompt, by its name; called once.

        Args:
          prompts: texts, each sent as a user's message.
          read: makes a verdict of a reply, or raises `UnreadableError`.
          keep: called in any thread with each outcome, as soon as it is known.

        Raises:
          EndpointError: the endpoint answers in a way that no call would be better with.
        """
        found: dict[str, Outcome] = {}

        def one(name: str) -> None:
            try:
                outcome = self._ask(prompts[name], read)
            except StoppedError:
                return
            keep(name, outcome)
            found[name] = outcome

        pool = ThreadPoolExecutor(self.config.concurrency, "endpoint")
        try:
            calls = [pool.submit(one, name) for name in prompts]
            done, _ = wait(calls, return_when=FIRST_EXCEPTION)
            for call in done:
                call.result()
        finally:
            self.stop()
            pool.shutdown(cancel_futures=True)
        return {name: found[name] for name in prompts}

    def stop(self) -> None:
        """Ends all calls: those that wait, and those that are being answered."""
        self._stop.set()
        self._sender.stop()

    def _ask(self, prompt: str, read: Callable[[str], Any]) -> Outcome:
        attempts, usage = 0, (0, 0)
        response, fault = Response(""), ""
        for attempt in range(self.config.retries + 1):
            if not self._admitted(0.0 if attempt == 0 else self._delay(attempt)):
                fault = self._refusal(fault)
                break
            attempts += 1
            response = self._sender.post(prompt)
            usage = (usage[0] + response.usage[0], usage[1] + response.usage[1])
            self._note(response)
            fault = response.fault
            if not fault:
                try:
                    verdict = read(response.text)
                except UnreadableError as error:
                    fault = str(error)
                else:
                    return Outcome(verdict, "", response.text, attempts, usage)
            if not response.again:
                break
        return Outcome(None, fault, response.text, attempts, usage)

    def _delay(self, attempt: int) -> float:
        """Seconds before an attempt: twice as long each time, and random, so that calls do not come in waves."""
        longest = min(LONGEST_BACKOFF, self.config.backoff * 2 ** (attempt - 1))
        return longest * self._jitter.uniform(0.5, 1.0)

    def _admitted(self, delay: float) -> bool:
        """Waits `delay`, and as long as the endpoint has asked for; False if no more requests are to be sent."""
        until = time.monotonic() + delay
        while not self._stop.is_set():
            with self._lock:
                left = max(until, self._not_before) - time.monotonic()
                if self._down or (self.config.max_calls is not None and self.sent >= self.config.max_calls):
                    return False
                if left <= 0:
                    self.sent += 1
                    return True
            self._stop.wait(left)
        raise StoppedError

    def _refusal(self, fault: str) -> str:
        with self._lock:
            return self._down or fault or f"not asked: --max_calls={self.config.max_calls} reached"

    def _note(self, response: Response) -> None:
        """Keeps what a response says about the endpoint as a whole."""
        with self._lock:
            if response.status in _ALL and not self._replied:
                raise EndpointError(self._complaint(response))
            if response.status == 200:
                self._replied, self._failures = True, 0
            else:
                self._failures += 1
            if response.after is not None:
                self._not_before = max(self._not_before, time.monotonic() + min(response.after, LONGEST_WAIT))
                if response.after > LONGEST_WAIT:
                    self._down = f"not asked: the endpoint says to wait {response.after:.0f} s"
            if self._failures >= GIVE_UP * (self.config.retries + 1):
                self._down = self._down or f"not asked: {self._failures} requests in a row failed, {response.fault}"

    def _complaint(self, response: Response) -> str:
        config = self.config
        said = " ".join(response.text.split())[:300]
        why = {
            401: "check the key" if config.key else "it needs a key: set the environment variable that --key_env names",
            403: "the key has no right to it",
            404: f"is there a model {config.model!r}, and does the URL end as the API's does, often in /v1?",
            405: "does the URL end as the API's does, often in /v1?",
        }.get(response.status, "it sends the request elsewhere: give the URL of that place, if you trust it")
        return f"{config.url} answers with status {response.status}: {why}{f' It says: {said}' if said else ''}"
