"""One request to a chat endpoint of OpenAI's form: connection, proxy, time-out, and what the reply holds.

It is built on the standard library. A request is one POST of JSON, so a client library would save little, and this way
no other code sees the key, follows a redirect with it to another host, or logs it.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flm_jax.evaluation.api_key import ApiKey
from flm_jax.records.foreign_json import JsonError, parse_json

PATH = "/chat/completions"
MOST_BYTES = 8 << 20  # of a reply
CONNECT_S = 20.0
_AGAIN = (408, 409, 425, 429)  # and everything from 500


class EndpointError(ValueError):
    """The endpoint cannot be used at all; the message says what it answers, and what may be wrong."""


@dataclass(frozen=True)
class EndpointConfig:
    """Where to send prompts, and how.

    Attributes:
      model: the model's name there.
      url: the base URL, such as https://api.openai.com/v1.
      key: None: the endpoint needs none.
      options: more fields of the request, such as temperature.
      timeout: seconds until a request is given up, from its start to the end of the reply.
      retries: attempts after the first one.
      concurrency: calls at a time.
      max_calls: the most requests in all, retries among them; None: any number.
      backoff: seconds before the first retry, about; each later one waits twice as long.
    """

    model: str
    url: str
    key: ApiKey | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 2048})
    timeout: float = 120.0
    retries: int = 5
    concurrency: int = 8
    max_calls: int | None = None
    backoff: float = 1.0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        try:
            right = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        except ValueError:
            right = False
        if not right or not self.url.isascii():
            host = f" {parts.hostname!r}" if parts.hostname else ""
            raise EndpointError(f"the judge's URL{host} is none of an endpoint, such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            # Not shown: it may be a secret.
            raise EndpointError(
                f"the URL of the endpoint at {parts.hostname} has a user, a query or a fragment: give only the base "
                "URL, and the key by the environment"
            )
        if reserved := {"model", "messages", "stream", "n"} & set(self.options):
            raise EndpointError(f"the request's {min(reserved)!r} cannot be set: it is part of how a verdict is read")

    @property
    def unencrypted(self) -> bool:
        """Whether the key would be readable on its way."""
        parts = urllib.parse.urlsplit(self.url)
        return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


class Response(NamedTuple):
    """One attempt: the reply's text, or a fault; whether it is worth another; seconds that the server asks to wait."""

    text: str
    fault: str = ""
    again: bool = True
    after: float | None = None
    usage: tuple[int, int] = (0, 0)
    status: int = 0


class StoppedError(Exception):
    """The calls are to end."""


class Sender:
    """Sends requests to one endpoint, from any thread."""

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self._lock, self._stop = threading.Lock(), False
        self._open: set[socket.socket] = set()

    def stop(self) -> None:
        """Ends the requests that are being answered; each raises `StoppedError`."""
        with self._lock:
            self._stop = True
            for held in self._open:
                _break(held)

    def post(self, prompt: str) -> Response:
        """The response to a prompt, whatever happens: no error that passes through here can hold the key.

        Raises:
          StoppedError: `stop` was called.
        """
        config = self.config
        body = {"model": config.model, "messages": [{"role": "user", "content": prompt}], **config.options}
        try:
            connection, target = self._connection()
        except (OSError, ValueError, http.client.HTTPException) as error:
            return Response("", f"no connection: {_why(error)}")
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "flm_jax"}
        if config.key:
            headers["Authorization"] = f"Bearer {config.key.reveal()}"
        # http.client lets go of the socket where the server closes after its reply, so it is held here.
        held: list[socket.socket] = []
        late = threading.Event()

        def give_up() -> None:
            late.set()
            for one in held:
                _break(one)

        timer = threading.Timer(config.timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()  # with CONNECT_S as its time-out
            connection.sock.settimeout(config.timeout)
            held.append(connection.sock)
            with self._lock:
                self._open.add(held[0])
            if self._stop or late.is_set():  # while there was no socket yet that could be broken
                raise TimeoutError
            connection.request("POST", target, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            raw = response.read(MOST_BYTES + 1)
            status, after = response.status, _seconds(response.headers.get("Retry-After"))
        except (OSError, ValueError, http.client.HTTPException) as error:
            if self._stop:
                raise StoppedError from None
            timed_out = late.is_set() or isinstance(error, TimeoutError)
            return Response("", f"no reply in {config.timeout:g} s" if timed_out else f"no reply: {_why(error)}")
        finally:
            timer.cancel()
            with self._lock:
                self._open.difference_update(held)
            connection.close()
        if late.is_set():
            return Response("", f"no reply in {config.timeout:g} s")
        if len(raw) > MOST_BYTES:
            return Response("", "a reply too long", status=status)
        found = _read_response(raw, status, after)
        return found if config.key is None else found._replace(text=config.key.removed_from(found.text))

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        """A connection, through the proxy of the environment if there is one, and what to ask for on it."""
        config = self.config
        parts = urllib.parse.urlsplit(config.url)
        host, secure = str(parts.hostname), parts.scheme == "https"
        path = parts.path.rstrip("/")
        target = path if path.endswith(PATH) else path + PATH
        proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
        via = urllib.parse.urlsplit(proxy) if proxy else None
        where = (str(via.hostname), via.port or 80) if via and via.hostname else (host, parts.port)
        if not secure:
            plain = http.client.HTTPConnection(*where, timeout=min(CONNECT_S, config.timeout))
            return plain, target if via is None else f"http://{parts.netloc}{target}"
        timeout, trusted = min(CONNECT_S, config.timeout), ssl.create_default_context()
        connection = http.client.HTTPSConnection(*where, timeout=timeout, context=trusted)
        if via is not None:
            connection.set_tunnel(host, parts.port or 443)
        return connection, target


def _read_response(raw: bytes, status: int, after: float | None) -> Response:
    """What a reply with a body holds."""
    text = raw.decode("utf-8", "replace")
    if status != 200:
        again = status in _AGAIN or status >= 500
        return Response(text[:1000], f"status {status}", again, after if again else None, status=status)
    try:
        found = parse_json(text, "the reply", finite=False)
        choice = found["choices"][0]
        content, finished = choice["message"].get("content"), choice.get("finish_reason")
    except (JsonError, LookupError, TypeError, AttributeError):
        return Response(text[:1000], "a reply of another form", status=status)
    if isinstance(content, list):
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    usage = found.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    used = tuple(n if type(n) is int and n >= 0 else 0 for n in counts)
    fault = ""
    if not isinstance(content, str) or not content.strip():
        content, fault = "", "an empty reply"
    elif finished == "length":
        fault = "a reply that was cut off"
    return Response(content, fault, status=status, usage=(used[0], used[1]))


def _seconds(header: str | None) -> float | None:
    """The seconds that a Retry-After asks for, as a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(int(header)))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _why(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted, {error.verify_message}"
    return (getattr(error, "strerror", None) or type(error).__name__).lower()


def _break(held: socket.socket) -> None:
    """Ends what another thread waits for on a connection."""
    with contextlib.suppress(OSError):
        held.shutdown(socket.SHUT_RDWR)
