"""Text and results where names, lines and places are not as expected."""

import dataclasses
import json
import os
from pathlib import Path

import gin
import pytest

from flm_jax.cli import errors, runs
from flm_jax.data import prepare
from flm_jax.data.reading import read_files, read_lines
from flm_jax.data.rows import Jsonl
from flm_jax.data.text import SPLITS, TextFolder
from flm_jax.data.train_vocabulary import Bytes, SentencePiece, build_vocabulary
from tests.preparing import write_faulty

ROOT = Path(__file__).resolve().parent.parent

STRANGE = b"caf\xe9"  # Latin-1, and not UTF-8


@pytest.mark.parametrize("beside", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "0" + "}" * 100_000])
def test_a_line_with_deep_nesting_beside_its_text_is_named(tmp_path, beside):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + f'{{"text": "fine", "meta": {beside}}}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 nests lists and objects more than 64 deep at column"):
        list(Jsonl(str(tmp_path)).lines())


def test_a_line_with_numbers_that_only_python_writes_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine", "score": NaN}\n')
    assert [text for _, text in Jsonl(str(tmp_path)).lines()] == ["fine"]


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["folder", "lines"])
def test_names_of_files_need_not_be_utf8(tmp_path, kind):
    for number in range(4):
        text = f"document {number}"
        name = STRANGE + (b"%d.txt" if kind == "folder" else b"%d.jsonl") % number
        (tmp_path / os.fsdecode(name)).write_text(text if kind == "folder" else json.dumps({"text": text}) + "\n")
    corpus = TextFolder(str(tmp_path)) if kind == "folder" else Jsonl(str(tmp_path))
    read = read_files if kind == "folder" else read_lines
    found = {split: [x["targets"].decode() for x in read(corpus, split, False).as_numpy_iterator()] for split in SPLITS}
    assert found == {split: list(corpus.documents(split)) for split in SPLITS}
    assert sorted(text for texts in found.values() for text in texts) == [f"document {n}" for n in range(4)]


@pytest.mark.integration
def test_faulty_lines_are_left_out_of_a_stream_too(tmp_path, caplog):
    allowed = write_faulty(tmp_path / "faulty")
    (tmp_path / "faulty" / "b.jsonl.gz").unlink()  # compressed lines are not streamed
    corpus = Jsonl(str(tmp_path / "faulty"), heldout_percent=20, most_faulty=allowed)
    for split in SPLITS:
        found = [example["targets"].decode() for example in read_lines(corpus, split, False).as_numpy_iterator()]
        assert found == list(corpus.documents(split)) and found
    assert caplog.text.count("13 lines left out") == 1
    with pytest.raises(ValueError, match="more faulty lines than the 3 that Jsonl.most_faulty allows"):
        read_lines(dataclasses.replace(corpus, most_faulty=3), "train", False)


def test_names_that_are_not_utf8_are_printed(capsys):
    with errors.started():
        print(os.fsdecode(STRANGE))
    assert capsys.readouterr().out == "caf\\udce9\n"


def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "is a directory; give the name of a file"),
        (tmp_path / "absent" / "x.json", "there is no directory"),
        ("/proc/x.json", "/proc cannot be written to"),  # not even as root
    ):
        with pytest.raises(ValueError, match=message):
            runs.check_json_file(str(path))
    runs.check_json_file(str(tmp_path / "x.json"))
    runs.check_json_file(str(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_evaluation_and_verification_look_at_the_place_first(tmp_path, capsys):
    for run in (
        lambda: runs.run_evaluate("absent", None, "/proc/x.json", [], []),
        lambda: runs.run_verify("absent", "absent", "/proc/x.json", [], []),
    ):
        with pytest.raises(SystemExit):
            run()
        assert "--json=/proc/x.json: /proc cannot be written to; give another" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    recipe = f"{ROOT}/gin_configs/recipes/minimal.gin"
    for path, said in (
        (f"{tmp_path}/file", f"{tmp_path}/file is not a directory; give another one."),
        (f"{tmp_path}/file/run", f"{tmp_path}/file is not a directory; give another one."),
        ("/proc/x", "/proc cannot be written to; give another directory."),
    ):
        for flag, run in (
            ("workdir", lambda path=path: runs.run_train([recipe], ["TextFolder.path = 'x'"], path, False)),
            ("workdir", lambda path=path: runs.run_grow("absent", path, [], [])),
            ("workdir", lambda path=path: runs.run_import("absent", path, None)),
            ("to_hf", lambda path=path: runs.run_export("absent", path, None, None, 1)),
        ):
            gin.clear_config()
            with pytest.raises(SystemExit):
                run()
            gin.clear_config()
            assert capsys.readouterr().err == f"error: --{flag}={path}: {said}\n"


@pytest.mark.parametrize("vocabulary", [Bytes(), SentencePiece(size=300)])
def test_a_cache_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, vocabulary, monkeypatch):
    (tmp_path / "a.txt").write_text("a text")
    monkeypatch.setattr(prepare, "load_tensorflow", lambda: pytest.fail("TensorFlow was loaded"))
    for function in (prepare.prepare, lambda corpus, config, cache: build_vocabulary(config, corpus, cache)):
        if function is prepare.prepare or isinstance(vocabulary, SentencePiece):
            with pytest.raises(
                ValueError, match=r"^DataConfig.cache_dir = '/proc/c': /proc cannot be written to; give "
            ):
                function(TextFolder(str(tmp_path)), vocabulary, "/proc/c")
