"""The program that generates: a prompt is continued, files are answered line by line and go on where they were left."""

import io
import json
import subprocess
import sys

import gin
import pytest

from flm_jax.cli import runs
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.data.vocabulary_files import to_files
from flm_jax.generation import GenerateRequest, Generator
from flm_jax.generation.prompts import answer_prompts, as_they_are, read_prompts
from tests import small
from tests.scores import ONE, mesh_of, saved

TEXTS = ("It grows", "a", "one by one", "12 345", "and on")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    cfg = small.shape(init_std_vector=1.0)
    about = dict(data={"context": 64})
    return saved(tmp_path_factory.mktemp("run") / "run", cfg, small.params(cfg), to_files(ByteVocabulary()), **about)


def launched(checkpoint, json_file=None, bindings=(), **asked):
    gin.clear_config()
    try:
        runs.run_generate(str(checkpoint), GenerateRequest(**asked), json_file, [], list(bindings))
    finally:
        gin.clear_config()


@pytest.mark.integration
def test_a_prompt_is_continued_and_its_speed_said_beside_it(checkpoint, tmp_path, capsys):
    asked = dict(prompt="It grows", max_tokens=12, sampling=dict(temperature=2.0, seed=5))
    bindings = ("generate.sampling = @Sampling()", "Sampling.top_k = 30", "Sampling.seed = 9")
    launched(checkpoint, str(tmp_path / "found.json"), bindings, **asked)
    shown = capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    (answer,) = found["answers"]
    assert shown.out == "It grows" + answer["text"] + "\n"
    assert found["sampling"]["top_k"] == 30 and (found["sampling"]["seed"], found["sampling"]["temperature"]) == (5, 2)
    assert "tokens per second, after" in shown.err and found["speed"]["tokens"] == len(answer["tokens"]) - 1
    launched(checkpoint, **asked)
    assert capsys.readouterr().out != shown.out, "gin's top_k had an effect"
    launched(checkpoint, prompt="It grows" * 7, max_tokens=12)
    assert "The answer ends after 8 tokens, where the sequence has 64" in capsys.readouterr().err


@pytest.mark.integration
def test_a_file_is_answered_in_order_and_goes_on_where_it_was_left(checkpoint, tmp_path, capsys, monkeypatch):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    asked = dict(prompts=str(prompts), max_tokens=8, sampling=dict(temperature=1.0), batch_size=2)
    launched(checkpoint, output=str(output), **asked)
    whole = output.read_text()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [(answer["id"], answer["prompt"]) for answer in answers] == list(enumerate(TEXTS))
    assert all(answer.keys() == {"prompt", "id", "text", "tokens", "reason", "key"} for answer in answers)
    # Three answers and a half are there.
    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:3]) + lines[3][:20])
    asked_of = []
    generate = Generator.generate
    monkeypatch.setattr(
        Generator, "generate", lambda self, ids, *a, **k: asked_of.append(len(ids)) or generate(self, ids, *a, **k)
    )
    launched(checkpoint, output=str(output), **asked)
    assert output.read_text() == whole and asked_of == [2]
    launched(checkpoint, output=str(output), **asked)
    assert output.read_text() == whole and asked_of == [2], "nothing is left to answer"
    for other in (dict(max_tokens=9), dict(sampling=dict(temperature=1.0, seed=1))):
        with pytest.raises(SystemExit):
            launched(checkpoint, output=str(output), **{**asked, **other})
        assert "holds 5 answers to other prompts, or made with other settings" in capsys.readouterr().err
    assert output.read_text() == whole
    capsys.readouterr()
    launched(checkpoint, **{**asked, "batch_size": 16})
    assert capsys.readouterr().out == whole, "without --output they are printed, and no batch size changes them"


def test_an_output_is_a_file_in_a_folder_that_exists(tmp_path):
    generator = Generator(small.shape(), None, ByteVocabulary(), mesh_of(ONE))
    for path in (tmp_path, tmp_path / "nowhere" / "x.jsonl"):
        with pytest.raises(ValueError, match="give the name of a file in a folder that exists"):
            answer_prompts(generator, as_they_are(generator), [{"prompt": "a"}], 64, 8, output=path)


def test_prompts_are_the_lines_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("One é\r\n\n two \n\u2028three".encode())
    assert [record["prompt"] for record in read_prompts(tmp_path / "a.txt")] == ["One é", " two ", "\u2028three"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "x\\ny", "id": 3}\n\n')
    assert read_prompts(tmp_path / "a.jsonl") == [{"prompt": "x\ny", "id": 3}]
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n\n{"text": "x"}\n')
    (tmp_path / "c.jsonl").write_text('{"prompt": "x"}\n{"prompt"\n')
    (tmp_path / "d.txt").write_text("\n \n")
    for name, message in (("b.jsonl", "b.jsonl:3"), ("c.jsonl", "c.jsonl:2"), ("d.txt", "no prompt")):
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no file of prompts"):
        read_prompts(tmp_path / "nowhere.txt")


@pytest.mark.integration
def test_what_does_not_fit_is_said_before_anything_is_generated(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("short\n" + "long " * 14 + "\n")
    for asked, message in (
        (dict(prompts=str(tmp_path / "prompts.txt")), "Prompt 2 has 70 tokens, and the model reads 64"),
        (dict(prompts=str(tmp_path / "prompts.txt"), output=str(tmp_path)), "Prompt 2 has 70 tokens"),
        (dict(prompt="long " * 20), "The prompt has 100 tokens, and the model reads 64"),
        (dict(prompt="a", sampling=dict(top_p=0.0)), "Sampling.top_p = 0.0: use a number, greater than 0"),
        (dict(prompt="a", stops=("",)), "A stop string is empty"),
    ):
        with pytest.raises(SystemExit) as stop:
            launched(checkpoint, **asked)
        assert stop.value.code == 1
        assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.integration
def test_the_command_takes_a_prompt_from_stdin_and_refuses_two(checkpoint):
    def command(*arguments, given=""):
        line = [sys.executable, "experiments/generate.py", f"--checkpoint={checkpoint}", *arguments]
        return subprocess.run(line, input=given, capture_output=True, text=True, check=False)

    done = command("--max_tokens=3", "--temperature=0.5", given="Say é\n")
    assert done.returncode == 0 and done.stdout.startswith("Say é"), done.stderr
    assert "tokens per second" in done.stderr
    for arguments, message in (
        (("--prompt=a", "--prompts=b"), "give --prompt or --prompts, not both"),
        (("--distributed",), "several processes do not share a stdin"),
        (("--output=a",), "--output is for the answers to --prompts"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and message in done.stdout + done.stderr


@pytest.mark.integration
def test_a_prompt_in_a_conversation_is_asked_by_its_template(checkpoint, tmp_path, capsys, monkeypatch):
    seen = []
    generate = Generator.generate
    monkeypatch.setattr(
        Generator, "generate", lambda self, ids, *a, **k: seen.extend(map(list, ids)) or generate(self, ids, *a, **k)
    )
    prompts = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    prompts.write_text(json.dumps({"prompt": "One?"}) + "\n" + json.dumps({"messages": turns}) + "\n")
    asked = dict(prompts=str(prompts), max_tokens=4, chat=True, template="tele_flm")
    launched(checkpoint, **asked, system="S")
    texts = [ByteVocabulary().decode(ids) for ids in seen]
    assert texts == ["S<_user>One?<_bot>", "S<_user>a<_bot>b<_user>c<_bot>"]
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(answer["tokens"]) <= 4 for answer in answers] == [True, True]
    with pytest.raises(SystemExit):
        launched(checkpoint, **{**asked, "template": None})
    assert "give --template" in capsys.readouterr().err
    prompts.write_text(json.dumps({"prompt": "One?"}) + "\n" + json.dumps({"messages": turns[:2]}) + "\n")
    with pytest.raises(SystemExit):
        launched(checkpoint, **asked)
    assert (
        "error: Prompt 2: the conversation: roles out of order: the last turn is the assistant's"
        in capsys.readouterr().err
    )


@pytest.mark.integration
def test_a_question_and_its_answer_are_shown_on_lines_of_their_own(checkpoint, capsys):
    launched(checkpoint, prompt="One?", chat=True, template="tele_flm", max_tokens=4)
    assert capsys.readouterr().out.startswith("One?\n")


@pytest.mark.integration
def test_a_conversation_is_held_on_stdin(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\n/retry\n/reset\n<_bot>\n/quit\nnever\n"))
    launched(checkpoint, chat=True, template="tele_flm", max_tokens=6, sampling=dict(temperature=2.0))
    shown = capsys.readouterr().out
    assert shown.count("tokens per second") >= 1
    assert "[a new conversation]" in shown
    assert "contains a marker: '<_bot>'" in shown
    assert shown.rstrip().endswith("which the template itself writes]")
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\n"))
    launched(checkpoint, chat=True, template="tele_flm")
    shown = capsys.readouterr()
    assert "Answers end after 32 tokens, half of the context; --max_tokens sets this." in shown.err
    assert "tokens per second" in shown.out
