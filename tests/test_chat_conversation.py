"""Conversations from JSON lines: the three formats, their faults by file and line, compressed files."""

import gzip
import json
import pickle

import pytest

from flm_jax.chat.conversation import Conversation, ConversationError, Message, parse, read_conversations
from flm_jax.data.json_lines import LineError, Skipped

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
TURNS = (Message(USER, "One and one?"), Message(ASSISTANT, "Two."))
OPENAI = {"messages": [{"role": m.role, "content": m.content} for m in TURNS]}
SHAREGPT = {"conversations": [{"from": "human", "value": "One and one?"}, {"from": "gpt", "value": "Two."}]}
ALPACA = {"instruction": "One and one?", "input": "", "output": "Two."}


def write(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.mark.parametrize("record", [OPENAI, SHAREGPT, ALPACA], ids=["openai", "sharegpt", "alpaca"])
def test_each_format_is_recognised_and_other_fields_are_kept(record):
    found = parse({**record, "domain": "maths"}, "f:1")
    assert found.messages == TURNS
    assert found.fields == {"domain": "maths"}
    assert parse(found.record(), "f:1") == found


def test_a_system_turn_and_earlier_turns_come_first():
    more = {"system": "Be brief.", "history": [["Hello", "Hi."]], "input": "In digits."}
    found = parse({**ALPACA, **more}, "f:1")
    assert [m.role for m in found.messages] == [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    assert found.messages[3].content == "One and one?\n\nIn digits."
    assert parse({**SHAREGPT, "system": "Be brief."}, "f:1").messages[0] == Message(SYSTEM, "Be brief.")
    parts = [{"type": "text", "text": "One and "}, {"type": "text", "text": "one?"}]
    split = {
        "messages": [{"role": "developer", "content": "x"}, {"role": "USER", "content": parts}, OPENAI["messages"][1]]
    }
    assert parse(split, "f:1").messages[1:] == TURNS


def turns(*roles, content="text"):
    return {"messages": [{"role": role, "content": content} for role in roles]}


FAULTS = {
    '{"messages": x}': (
        "a broken line",
        r"pool\.jsonl:2: a broken line: it is not JSON: Expecting value at column 14;",
    ),
    "{": ("a broken line", "at column 2; none may be left out"),
    "[1]": ("a broken line", r"it is \[1\]; it must be: object"),
    '{"text": "x"}': ("no conversation", r"the fields are \['text'\]"),
    '{"messages": []}': ("no conversation", "must be a list of turns"),
    '{"messages": [{"role": "user"}]}': ("no conversation", "turn 1 of 'messages' must have 'role' and 'content'"),
    json.dumps(turns("user", "tool")): ("unknown role", "turn 2 is of 'tool'"),
    json.dumps(turns("user")): ("no answer", "no turn is the assistant's"),
    json.dumps(turns("user", "assistant", "user")): ("no answer", "the last turn is the user's"),
    json.dumps(turns("assistant", "user")): (
        "roles out of order",
        "turn 1 is the assistant's and should be the user's",
    ),
    json.dumps(turns("user", "assistant", "assistant")): ("roles out of order", "turn 3"),
    json.dumps(turns("user", "system", "assistant")): ("roles out of order", "turn 2 is the system's"),
    json.dumps(turns("user", "assistant", content=" \n")): ("empty turn", "message 1, the user's, has no text"),
    json.dumps(turns("user", "assistant", content=7)): ("no text", "turn 1 is int"),
    json.dumps(turns("user", "assistant", content="\ud800")): ("no text", "half of a surrogate pair"),
    '{"instruction": "x", "output": "y", "history": [["a"]]}': ("no conversation", "'history' must be a list of pairs"),
}


@pytest.mark.parametrize("line", FAULTS)
def test_a_fault_is_named_by_file_and_line_and_counted(line, tmp_path):
    reason, detail = FAULTS[line]
    path = write(tmp_path / "pool.jsonl", [OPENAI, line, "", SHAREGPT])
    skipped = Skipped(limit=1)
    assert len(list(read_conversations(path, skipped))) == 2
    assert skipped.counts == {reason: 1}
    with pytest.raises(LineError, match=detail) as error:
        list(read_conversations(path, Skipped()))
    assert f"{path}:2: " in str(error.value)
    assert skipped.summary() == f"1 line left out: {reason} (1)"


def test_too_many_faults_stop_the_reading(tmp_path):
    path = write(tmp_path / "pool.jsonl", [OPENAI, *["{"] * 5])
    with pytest.raises(LineError, match=r"3 lines are left out, more than the 2 allowed; the last: .*pool.jsonl:4"):
        list(read_conversations(path, Skipped(limit=2)))
    skipped = Skipped(limit=None)
    assert len(list(read_conversations(path, skipped))) == 1
    assert (skipped.counts["a broken line"], len(skipped.examples["a broken line"])) == (5, 3)


def test_compressed_files_and_folders_are_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    write(tmp_path / "b.jsonl", [OPENAI])
    line = (json.dumps(SHAREGPT) + "\n").encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(line) + zstandard.compress(line))
    (tmp_path / "notes.txt").write_text("no conversation")
    found = list(read_conversations(tmp_path, Skipped()))
    assert [c.messages for c in found] == [TURNS] * 4
    assert [c.where.rsplit("/", 1)[1] for c in found] == ["a.jsonl.gz:1", "b.jsonl:1", "c.jsonl.zst:1", "c.jsonl.zst:2"]


def test_answers_and_lines():
    found = Conversation((*TURNS, Message(USER, "é?"), Message(ASSISTANT, "É.")), fields={"id": 7})
    assert found.answers == ("Two.", "É.")
    assert json.loads(found.line()) == found.record()
    assert "É" in found.line()


def test_a_fault_passes_between_processes():
    error = ConversationError("f:1", "no answer", "no turn is the assistant's")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.where, again.reason) == (str(error), "f:1", "no answer")
