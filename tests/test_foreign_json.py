"""The parser of JSON from files: what it takes, and that it refuses the rest by one sentence that says where."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_jax.records.foreign_json import DEPTH, JsonError, check, field, parse_json, read_json
from tests import small

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@small.examples(100)
@given(VALUES)
def test_what_python_writes_is_read(value):
    for text in (json.dumps(value), json.dumps(value, indent=1)):
        assert parse_json(text.encode(), "it", None) == value


def test_depth_is_bounded_wherever_brackets_stand():
    inside = json.dumps({"text": "[{" * 500, 'a"[': "\\" * 7 + '"]{'})
    assert parse_json(inside, "it")["text"] == "[{" * 500  # brackets in strings are no depth
    assert parse_json("[" * DEPTH + "]" * DEPTH, "it", list)
    assert len(parse_json(f"[{'[],' * 1000}[]]", "it", list)) == 1001
    for text in ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), '{"a":' * 100_000, "[" * 10**6, '{"a":[' * (DEPTH // 2) + "[["):
        with pytest.raises(JsonError, match=f"it nests lists and objects more than {DEPTH} deep at column"):
            parse_json(text, "it", None)


def test_unclosed_strings_are_looked_at_once():
    for text in ('{"' + '\\"' * 300_000, '["' * 300_000, "{" * DEPTH + '"\\'):
        with pytest.raises(JsonError):
            parse_json(text, "it", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "f is not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'{"a": 1,\n\n "b": x}', "at line 3, column 7"),
        (b'{"a": 1\n', "f is not JSON: Expecting ',' delimiter at column 8"),  # a line, with its end
        (b"", "f is not JSON: Expecting value at column 1"),
        (b'{"a": 1, "b": {"c": 0, "c": 0}}', "f has 'c' twice in one object"),
        (b'{"a": NaN}', "f holds the number NaN, and only finite numbers are allowed"),
        (b'{"a": -Infinity}', "f holds the number -Infinity"),
        (b'{"a": 1e999}', "f holds the number 1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "f is not JSON that can be read: Exceeds the limit"),
        (b"\xff{}", "f is not UTF-8 text: invalid start byte at byte 0"),
        (b"[]", r"f is \[\]; it must be: object"),
        (b"null", "f is None; it must be: object"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(JsonError, match=message):
        parse_json(text, "f")


def test_numbers_that_python_writes_are_read_where_that_is_asked_for():
    assert str(parse_json(b'{"a": [NaN, -Infinity, 1e999]}', "it", finite=False)) == "{'a': [nan, -inf, inf]}"


def test_types():
    assert check(True, bool, "x") is True and check(3, float, "x") == 3 and check(None, (int, type(None)), "x") is None
    for value, kind, message in (
        (True, int, "x is True; it must be: integer"),
        (True, float, "x is True; it must be: number"),
        (1.0, int, "x is 1.0; it must be: integer"),
        (1, bool, "x is 1; it must be: true or false"),
        ("a" * 99, (int, type(None)), r"x is 'a+\.\.\.; it must be: integer or null"),
    ):
        with pytest.raises(JsonError, match=message):
            check(value, kind, "x")
    with pytest.raises(JsonError, match="x lacks the field 'a'"):
        field({}, "a", int, "x")
    with pytest.raises(JsonError, match="x: the field 'a' is 'b'; it must be: integer"):
        field({"a": "b"}, "a", int, "x")


def test_files_are_regular_and_bounded(tmp_path):
    (tmp_path / "a").write_text("{}   ")
    assert read_json(tmp_path / "a") == {}
    with pytest.raises(JsonError, match="a cannot be read: more than the 4 bytes that it may have"):
        read_json(tmp_path / "a", most=4)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros", "."):
        with pytest.raises(JsonError, match="not a regular file"):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent")
