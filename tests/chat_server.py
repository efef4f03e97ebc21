"""A chat endpoint of OpenAI's form on this machine, whose replies a test writes."""

import contextlib
import http.server
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """A reply; `delay` seconds before it, and `drip` seconds after each byte of its body."""

    text: str = '{"score": 7}'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    delay: float = 0.0
    drip: float = 0.0
    finish: str = "stop"
    hang_up: bool = False


def body(reply: Reply) -> bytes:
    if reply.raw is not None:
        return reply.raw
    choice = {"index": 0, "message": {"role": "assistant", "content": reply.text}, "finish_reason": reply.finish}
    usage = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


class ChatServer:
    """The server, running.

    Attributes:
      url: its base URL.
      asked: how often each prompt came.
      requests: (path, headers, body) of each request.
      most: the most requests that it had at a time.
    """

    def __init__(self, answer: Callable[[str, int], Reply]) -> None:
        """Starts it; `answer` makes a reply to a prompt, from the prompt and how often it has come before."""
        self.asked: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.most = self._now = 0
        lock, ended = threading.Lock(), threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):  # noqa: N805
                sent = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                prompt = sent["messages"][0]["content"]
                with lock:
                    before = self.asked[prompt]
                    self.asked[prompt] += 1
                    self.requests.append((handler.path, dict(handler.headers), sent))
                    self._now += 1
                    self.most = max(self.most, self._now)
                try:
                    self._send(handler, answer(prompt, before), ended)
                finally:
                    with lock:
                        self._now -= 1

            def log_message(handler, *args):  # noqa: N805
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads, self._ended = True, ended
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _send(self, handler, reply: Reply, ended: threading.Event) -> None:
        ended.wait(reply.delay)
        with contextlib.suppress(OSError):
            if reply.hang_up:
                return
            content = body(reply)
            handler.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            if not reply.drip:
                handler.wfile.write(content)
            for i in range(len(content) if reply.drip else 0):
                handler.wfile.write(content[i : i + 1])
                handler.wfile.flush()
                if ended.wait(reply.drip):
                    break

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def chat_server(answer: Callable[[str, int], Reply] = lambda prompt, before: Reply()):
    server = ChatServer(answer)
    try:
        yield server
    finally:
        server.close()


def waited(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
