"""Files of questions: our own names and AlignBench's, faults by file and line, compressed files."""

import gzip
import json

import pytest

from flm_jax.chat.conversation import Message
from flm_jax.data.json_lines import LineError, Skipped
from flm_jax.evaluation.questions import Question, parse_question, read_questions

OURS = {"id": "7", "category": "maths", "question": "One and one?", "reference": "2", "kind": "numeric"}


def write(path, *records):
    text = "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def test_a_line_of_ours_and_one_of_alignbench():
    assert parse_question(OURS, "f:1") == Question("7", "maths", (Message("user", "One and one?"),), "numeric", ("2",))
    theirs = {"question_id": 42, "category": "专业能力", "subcategory": "历史", "question": "谁？", "reference": "他。"}
    assert parse_question({**theirs, "evidences": []}, "f:1") == Question(
        "42", "专业能力", (Message("user", "谁？"),), "judged", ("他。",), subcategory="历史"
    )


def test_a_conversation_before_the_question():
    turns = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes?"), ("user", "Who?"))]
    found = parse_question({"id": 1, "category": "chat", "messages": turns}, "f:1")
    assert [m.role for m in found.messages] == ["user", "assistant", "user"] and found.reference == ()
    assert found.text == "[user]\nHi\n\n[assistant]\nYes?\n\n[user]\nWho?"


@pytest.mark.parametrize("reference", ["b", "(B)", "two", 1])
def test_a_choice_by_its_text_letter_or_number(reference):
    record = {**OURS, "kind": None, "choices": ["one", "two", "four"], "reference": reference}
    found = parse_question(record, "f:1")
    assert found.kind == "choice" and found.reference == ("two",) and found.right_choice == 1


def test_a_number_and_several_texts_are_references():
    assert parse_question({**OURS, "reference": 2.5}, "f:1").reference == ("2.5",)
    assert parse_question({**OURS, "kind": "exact", "reference": ["two", "2"]}, "f:1").reference == ("two", "2")


FAULTS = {
    "a broken line": ("{", "is not JSON"),
    "no id": ({**OURS, "id": None}, "'id' or 'question_id'"),
    "no category": ({**OURS, "category": " "}, "grouped by it"),
    "no question": ({**OURS, "question": None, "messages": []}, "must be a list of turns"),
    "empty turn": ({**OURS, "question": " "}, "message 1, the user's, has no text"),
    "no text": ({**OURS, "question": 3}, "only text is read"),
    "roles out of order": ({**OURS, "messages": [{"role": "assistant", "content": "x"}]}, "should be the user's"),
    "unknown kind": ({**OURS, "kind": "numeral"}, "did you mean 'numeric'"),
    "no reference": ({**OURS, "reference": ""}, "the kind numeric needs one"),
    "no reference ": ({**OURS, "reference": "two"}, "there is no number in 'two'"),
    "no reference  ": ({**OURS, "kind": "exact", "reference": [1]}, "or a list of texts"),
    "no reference   ": ({**OURS, "choices": ["x", "y"], "kind": "choice", "reference": "C"}, "none of the 2 choices"),
    "no choices": ({**OURS, "kind": "choice", "choices": ["x", "x"]}, "two or more different texts"),
    "no tolerance": ({**OURS, "tolerance": "1"}, "must be a number"),
    "no tolerance ": ({**OURS, "tolerance": -1}, "at least 0"),
    "no tolerance  ": ({**OURS, "kind": "exact", "tolerance": 1}, "only for the kind numeric"),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_faults_are_counted_and_name_file_and_line(tmp_path, reason):
    record, detail = FAULTS[reason]
    path = write(tmp_path / "f.jsonl", {**OURS, "id": "first"}, record, {**OURS, "id": "third"})
    skipped = Skipped(1)
    assert [q.id for q in read_questions(path, skipped)] == ["first", "third"]
    assert dict(skipped.counts) == {reason.strip(): 1}
    with pytest.raises(LineError, match=f"(?s)f.jsonl:2: {reason.strip()}.*{detail}"):
        read_questions(path, Skipped(0))


def test_an_id_twice_names_both_lines(tmp_path):
    path = write(tmp_path / "f.jsonl", OURS, {**OURS, "id": 7})
    with pytest.raises(LineError, match="f.jsonl:2: an id twice: '7' is also that of .*f.jsonl:1"):
        read_questions(path, Skipped(0))


def test_a_judge_that_compares_needs_references(tmp_path):
    path = write(tmp_path / "f.jsonl", OURS, {**OURS, "id": 8, "kind": "judged", "reference": None})
    assert len(read_questions(path, Skipped(0))) == 2
    with pytest.raises(LineError, match="f.jsonl:2: no reference.*--reference_answers"):
        read_questions(path, Skipped(0), with_reference=True)


def test_compressed_and_empty_files(tmp_path):
    assert len(read_questions(write(tmp_path / "f.jsonl.gz", OURS), Skipped(0))) == 1
    with pytest.raises(ValueError, match=r"f.jsonl holds no question; 1 line left out: no category \(1\)"):
        read_questions(write(tmp_path / "f.jsonl", {}), Skipped(None))
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "nowhere.jsonl", Skipped(0))
