"""The client of chat endpoints against a server of that protocol: what servers do, and what is made of it."""

import json
import logging
import threading
import time
import traceback

import pytest

from flm_jax.evaluation import chat_request, endpoint
from flm_jax.evaluation.api_key import ApiKey
from flm_jax.evaluation.chat_request import EndpointConfig, EndpointError
from flm_jax.evaluation.endpoint import Endpoint, UnreadableError
from flm_jax.evaluation.judge_prompt import JudgePrompt
from tests.chat_server import Reply, chat_server

KEY = "sk-0123456789-secret"
READ = JudgePrompt.load("score").read


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def ask(server, prompts=("x",), read=READ, **changes):
    """The outcomes of prompts, and the client."""
    fields = dict(key=ApiKey("KEY", KEY), retries=2, backoff=0.01, timeout=5.0)
    client = Endpoint(EndpointConfig("m", server.url, **{**fields, **changes}))
    return client.ask_all({p: p for p in prompts}, read, lambda name, outcome: None), client


def test_a_request_is_as_the_protocol_says_and_a_reply_is_read():
    with chat_server() as server:
        found, client = ask(server, options={"temperature": 0.5})
    path, headers, sent = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert sent == {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0.5}
    assert found["x"] == (7.0, "", '{"score": 7}', 1, (11, 5)) and client.sent == 1


def test_several_calls_run_at_a_time_and_each_outcome_is_kept_at_once():
    together, kept = threading.Barrier(4), []
    with chat_server(lambda prompt, before: (together.wait(10), Reply())[1]) as server:
        config = EndpointConfig("m", server.url, concurrency=4)
        found = Endpoint(config).ask_all({str(i): str(i) for i in range(8)}, READ, lambda name, _: kept.append(name))
    # The server may still be ending a call when the next one begins.
    assert 4 <= server.most < 8 and sorted(kept) == sorted(found) == [str(i) for i in range(8)]


NOISE = {
    "status 500": Reply(status=500, raw=b"<html>Internal Server Error</html>"),
    "status 503": Reply(status=503, raw=b""),
    "status 408": Reply(status=408),
    "a reply of another form": Reply(raw=b"<html><body>It works!</body></html>"),
    "a reply of another form ": Reply(raw=b'{"choices": []}'),
    "a reply of another form  ": Reply(raw=b'{"choices": [{"message": {"content": "{'),
    "a reply of another form   ": Reply(raw=b"\xff\xfe\x00" * 9),
    "a reply of another form    ": Reply(raw=b"[" * 100_000),
    "an empty reply": Reply("  \n"),
    "an empty reply ": Reply(raw=b'{"choices": [{"message": {"content": null}}]}'),
    "a reply that was cut off": Reply('{"score": 1}', finish="length"),
    "no verdict in a reply": Reply("I would say 7."),
    "several verdicts in a reply": Reply('{"score": 7} or rather {"score": 8}'),
    "a score outside 1 to 10": Reply('{"score": 100}'),
    "no reply": Reply(hang_up=True),
}


@pytest.mark.parametrize("fault", NOISE)
def test_noise_is_asked_again_up_to_a_limit_and_never_taken_for_a_verdict(fault):
    with chat_server(lambda prompt, before: NOISE[fault] if prompt == "bad" or before == 0 else Reply()) as server:
        found, _ = ask(server, ("bad", "good"), concurrency=1)
    assert found["bad"].verdict is None and found["bad"].fault.startswith(fault.strip())
    assert found["bad"].attempts == 3 == server.asked["bad"]
    assert found["good"].verdict == 7.0 and found["good"].attempts == 2


def test_a_refusal_of_one_prompt_is_not_asked_again():
    with chat_server(lambda p, n: Reply(status=400, raw=b"too long") if p == "bad" else Reply()) as server:
        found, _ = ask(server, ("bad", "good"))
    assert found["bad"][:4] == (None, "status 400", "too long", 1) and found["good"].verdict == 7.0


@pytest.mark.parametrize(
    "reply", [Reply(delay=30), Reply(drip=0.05), Reply(raw=b"x" * 200, drip=0.05)], ids=["hangs", "drips", "noise"]
)
def test_a_slow_reply_is_given_up_after_the_whole_time(reply):
    before = time.monotonic()
    with chat_server(lambda p, n: reply) as server:
        found, _ = ask(server, timeout=0.4, retries=1)
    assert found["x"].fault == "no reply in 0.4 s" and found["x"].attempts == 2
    assert time.monotonic() - before < 5


def test_a_long_reply_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(chat_request, "MOST_BYTES", 1000)
    with chat_server(lambda p, n: Reply("x" * 5000)) as server:
        assert ask(server, retries=0)[0]["x"].fault == "a reply too long"


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_rate_limit_pauses_all_calls_as_long_as_the_server_says(form):
    import email.utils

    times = []

    def answer(prompt, before):
        times.append(time.monotonic())
        if len(times) > 1:
            return Reply()
        after = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)  # in whole seconds
        return Reply(status=429, headers={"Retry-After": after})

    with chat_server(answer) as server:
        found, _ = ask(server, ("a", "b", "c"), concurrency=1)
    assert [found[p].verdict for p in "abc"] == [7.0] * 3 and found["a"].attempts == 2
    assert times[1] - times[0] >= 0.95


@pytest.mark.parametrize("value", ["soon", "", "-5", "1e9", "99999999999999999999 Jan 2020"])
def test_a_retry_after_that_says_nothing_is_no_reason_to_stop(value):
    with chat_server(lambda p, n: Reply(status=429, headers={"Retry-After": value}) if n == 0 else Reply()) as server:
        assert ask(server)[0]["x"].verdict == 7.0


def test_a_server_that_wants_a_day_is_not_waited_for():
    with chat_server(lambda p, n: Reply(status=429, headers={"Retry-After": "86400"})) as server:
        found, _ = ask(server, ("a", "b"), concurrency=1)
    assert server.asked.total() == 1
    assert found["a"].fault == found["b"].fault == "not asked: the endpoint says to wait 86400 s"


def test_the_number_of_requests_is_bounded_retries_among_them():
    with chat_server(lambda p, n: Reply(status=500) if p == "a" else Reply()) as server:
        found, client = ask(server, "abcde", concurrency=1, max_calls=4)
    assert server.asked.total() == client.sent == 4
    assert (found["a"].fault, found["b"].verdict) == ("status 500", 7.0)
    assert found["e"].fault == "not asked: --max_calls=4 reached" and found["e"].attempts == 0


def test_an_endpoint_that_is_down_is_not_asked_for_ever(monkeypatch):
    monkeypatch.setattr(endpoint, "GIVE_UP", 2)
    with chat_server(lambda p, n: Reply(status=502)) as server:
        found, _ = ask(server, "abcdef", concurrency=1)
    assert server.asked.total() == 6  # of two prompts, three each
    assert found["f"].fault == "not asked: 6 requests in a row failed, status 502"


@pytest.mark.parametrize(
    ("status", "says"), [(401, "check the key"), (404, "is there a model 'm'"), (302, "elsewhere"), (405, "/v1")]
)
def test_what_no_call_would_do_better_with_ends_all_at_once(status, says):
    with chat_server() as other:
        reply = Reply(status=status, raw=f"no {KEY}!".encode(), headers={"Location": other.url})
        match = f"status {status}: .*{says}.*no \\[key\\]!"
        with chat_server(lambda p, n: reply) as server, pytest.raises(EndpointError, match=match):
            ask(server, [str(i) for i in range(50)], concurrency=2)
    # Calls that were on their way when the first reply came are answered too; on a busy machine there are more of them.
    assert server.asked.total() <= 10 and not other.requests


def test_a_server_that_is_not_there():
    with chat_server() as server:
        pass
    assert ask(server, retries=0)[0]["x"].fault == "no reply: connection refused"


def test_an_error_while_keeping_ends_the_calls_that_wait():
    def fail(name, outcome):
        raise OSError("the disk is full")

    before = time.monotonic()
    with chat_server(lambda p, n: Reply(delay=0 if p == "a" else 30)) as server:
        client = Endpoint(EndpointConfig("m", server.url, concurrency=2))
        with pytest.raises(OSError, match="the disk is full"):
            client.ask_all({p: p for p in "abcd"}, READ, fail)
    assert time.monotonic() - before < 10


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    with chat_server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "elsewhere.invalid")
        config = EndpointConfig("m", "http://judge.invalid/v1/", retries=0)
        found = Endpoint(config).ask_all({"x": "x"}, READ, lambda *_: None)
    assert found["x"].verdict == 7.0 and proxy.requests[0][0] == "http://judge.invalid/v1/chat/completions"
    assert "Authorization" not in proxy.requests[0][1]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://x/v1", "none of an endpoint"),
        ("http://:80/v1", "none of an endpoint"),
        ("http://x:port/v1", "none of an endpoint"),
        (f"https://{KEY}@x/v1", "has a user"),
        (f"https://x/v1?api_key={KEY}", "a query"),
    ],
)
def test_urls_that_are_refused_are_not_shown(url, says):
    with pytest.raises(EndpointError, match=says) as error:
        EndpointConfig("m", url)
    assert KEY not in str(error.value)


def test_what_a_request_is_made_of_cannot_be_set():
    with pytest.raises(EndpointError, match="'messages' cannot be set"):
        EndpointConfig("m", "http://x/v1", options={"messages": []})


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    assert ApiKey.from_environment("MY_KEY", True).reveal() == KEY
    assert ApiKey.from_environment("", True) is None and ApiKey.from_environment("NO_KEY", False) is None
    with pytest.raises(ValueError, match="no environment variable NO_KEY"):
        ApiKey.from_environment("NO_KEY", True)
    for bad in (KEY + "\n", f"{KEY} x", f"{KEY}…"):
        monkeypatch.setenv("MY_KEY", bad)
        with pytest.raises(ValueError, match="the key in MY_KEY has") as error:
            ApiKey.from_environment("MY_KEY", True)
        assert KEY not in "".join(traceback.format_exception(error.value))


def test_no_text_holds_the_key(caplog, capsys):
    """Neither logs nor outcomes nor tracebacks, local variables of our own frames included."""
    caplog.set_level(logging.DEBUG)
    echo = {"first": Reply(f'you sent {KEY} {{"score": 5}}'), "second": Reply(status=500, raw=f"bad {KEY}".encode())}
    with chat_server(lambda p, n: echo[p]) as server:
        found, client = ask(server, echo)
    texts = [repr(found), repr(client.config), caplog.text, *capsys.readouterr()]
    assert found["first"].verdict == 5.0 and "[key]" in found["first"].reply and "[key]" in found["second"].reply
    with chat_server(lambda p, n: Reply(status=401, raw=KEY.encode())) as server, pytest.raises(EndpointError) as error:
        ask(server)
    shown = traceback.TracebackException.from_exception(error.value, capture_locals=True)
    shown.stack = traceback.StackSummary.from_list([frame for frame in shown.stack if "tests" not in frame.filename])
    texts.append("".join(shown.format()))
    assert not [text for text in texts if KEY in text]
    with pytest.raises(TypeError):
        json.dumps(client.config.key)
    import pickle

    with pytest.raises(TypeError, match="not written"):
        pickle.dumps(client.config.key)


def test_a_reader_may_say_why_a_reply_is_none():
    def read(reply):
        raise UnreadableError("nothing to see")

    with chat_server() as server:
        assert ask(server, read=read, retries=0)[0]["x"].fault == "nothing to see"
