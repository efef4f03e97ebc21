"""A checkpoint is evaluated: tasks of one's own, texts, its own vocabulary and length, from the command line too."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from flm_jax.data.vocabulary import ByteVocabulary, TokenizerVocabulary
from flm_jax.data.vocabulary_files import to_files
from flm_jax.evaluation import EvalRequest
from flm_jax.evaluation.evaluate import evaluate_checkpoint
from flm_jax.evaluation.loaded import LONGEST_BY_DEFAULT, find_length
from flm_jax.evaluation.scoring import bits_per_byte_of_text
from flm_jax.generation import Generator
from flm_jax.growth import Growth, Lineage, masks_at
from flm_jax.source_checkpoint import model_of, read_source
from tests import small
from tests.hub import TEXT, llama, write_tokenizer
from tests.scores import EIGHT, ONE, mesh_of, saved

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A checkpoint that holds its tokenizer, as one that came from a Hugging Face directory does."""
    return llama(write_tokenizer(tmp_path_factory.mktemp("converted") / "hub"))[1]


TASK = """
task: little_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: @FILE
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture
def tasks(tmp_path):
    lines = [{"question": "It grows, and goes", "choices": [" on", " off", " one"], "answer": i % 3} for i in range(6)]
    (tmp_path / "little.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "little.yaml").write_text(TASK.replace("@FILE", str(tmp_path / "little.jsonl")))
    return tmp_path / "tasks"


def launched(checkpoint, what, json_file=None, bindings=()):
    import gin

    from flm_jax.cli import runs

    gin.clear_config()
    try:
        runs.run_evaluate(str(checkpoint), what, json_file, [], list(bindings))
    finally:
        gin.clear_config()


def test_a_task_of_ones_own_runs_from_a_checkpoint_without_a_network(converted, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    what = EvalRequest(("little_*",), str(tasks), limit=5, text=str(tmp_path / "text.txt"), prompt="It grows", tokens=5)
    (tmp_path / "text.txt").write_text(TEXT)
    mesh = ("evaluate.mesh = @MeshConfig()", "MeshConfig.fsdp = 4", "MeshConfig.tensor = 2")
    launched(converted, what, json_file=str(tmp_path / "found.json"), bindings=mesh)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["max_length"] == 64 and found["tokenizer"]["kind"] == "tokenizer" and found["step"] == 0
    assert found["lm_eval"]["results"]["little_choices"]["acc,none"] in (0.2, 0.4)  # one of three choices each time
    assert found["lm_eval"]["n-samples"]["little_choices"]["effective"] == 5
    vocabulary = TokenizerVocabulary.from_directory(converted.parent / "hub")
    cfg, params = model_of(str(converted)), read_source(converted).restore_params(mesh_of(ONE))
    direct = bits_per_byte_of_text(cfg, params, vocabulary, [TEXT], 64, mesh_of(ONE))
    assert found["text"]["bits_per_byte"] == pytest.approx(direct.bits_per_byte, rel=1e-3)  # in bfloat16
    assert len(found["generated"]["tokens"]) == 5
    said = capsys.readouterr().out
    assert (
        f"{found['text']['bits_per_byte']:.4f} bits per byte" in said
        and "little_choices" in said
        and "It grows" in said
    )


def test_errors_are_one_sentence(converted, tasks, tmp_path, capsys, monkeypatch):
    def refused(what, **changes):
        with pytest.raises(SystemExit) as stop:
            launched(changes.pop("checkpoint", converted), dataclasses.replace(what, **changes))
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    text = EvalRequest(text=str(tmp_path / "nowhere.txt"))
    assert "there is no text file or folder" in refused(text)
    assert "holds no tokenizer.json, and is no checkpoint" in refused(text, tokenizer=str(tmp_path / "nowhere"))
    large = write_tokenizer(tmp_path / "large", size=310)
    assert "The tokenizer has 310 ids, and the model only 304" in refused(text, tokenizer=str(large))
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    (tmp_path / "notes").mkdir()
    for name in ("a.md", "b.md", "c.rst"):
        (tmp_path / "notes" / name).write_text("text")
    folder = str(tmp_path / "notes")
    assert refused(EvalRequest(text=folder)) == (
        f"error: --text={folder}: a folder is read for *.txt; it holds 2 *.md, 1 *.rst: give one of the files, or a "
        "*.jsonl.\n"
    )
    assert "is not UTF-8 text" in refused(EvalRequest(text=str(tmp_path / "latin.txt")))
    assert "is not a folder" in refused(EvalRequest(("x",), str(tmp_path / "nowhere")))

    # lm-eval's own tasks take ten seconds to read.
    from lm_eval import tasks as theirs

    manager = theirs.TaskManager
    monkeypatch.setattr(
        theirs, "TaskManager", lambda include_path, include_defaults=False: manager(None, include_path, False)
    )
    error = refused(EvalRequest(("litle_choices",), str(tasks)))
    assert f"knows no task 'litle_choices', nor does {tasks}; did you mean 'little_choices'?" in error


def test_a_run_is_evaluated_with_the_vocabulary_and_the_context_that_it_records(tmp_path, capsys):
    run = saved(tmp_path / "run", small.shape(), small.params(small.shape()), {"data": b"{}"})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    text = EvalRequest(text=str(tmp_path / "texts"))
    with pytest.raises(ValueError, match="neither holds a vocabulary nor records .* by --tokenizer"):
        evaluate_checkpoint(run, text)
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer", size=260))
    with pytest.raises(ValueError, match="context length .* is not known: .* set --max_length"):
        evaluate_checkpoint(run, dataclasses.replace(text, tokenizer=tokenizer))
    about = dict(data={"context": 16})
    run = saved(tmp_path / "whole", small.shape(), small.params(small.shape()), to_files(ByteVocabulary()), **about)
    launched(run, text, json_file=str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokenizer"]["kind"] == "bytes" and found["max_length"] == 16
    assert found["text"]["tokens"] == found["text"]["bytes"] == len(TEXT.encode())
    lines = evaluate_checkpoint(run, EvalRequest(text=str(tmp_path / "texts.jsonl")), mesh=EIGHT)
    assert lines["text"]["nats"] == pytest.approx(found["text"]["nats"], rel=1e-5)
    assert "sequences of 16 tokens" in capsys.readouterr().out


def test_a_checkpoints_tokenizer_is_a_vocabulary_to_train_with(converted):
    import gin

    from flm_jax.cli import configure

    gin.clear_config()
    try:
        bindings = ["DataConfig.vocabulary = @Pretrained()", f"Pretrained.path = {str(converted)!r}"]
        configure.parse([], [*bindings, "verify.data = @DataConfig()"])
        config = configure.verify()["data"].vocabulary
    finally:
        gin.clear_config()
    assert config.load().digest == TokenizerVocabulary.from_directory(converted.parent / "hub").digest


def test_a_model_that_could_read_very_much_does_so_where_it_is_asked_to():
    def source(trained=None, **said):
        files = {"config.json": json.dumps(said).encode()} if said else {}
        return SimpleNamespace(directory="runs/some/0", files=files, context=trained)

    assert find_length(source(max_position_embeddings=1024)) == 1024
    assert find_length(source(max_position_embeddings=131_072)) == LONGEST_BY_DEFAULT
    # A run may have trained it to read more than it did when it came.
    assert find_length(source(128, max_position_embeddings=64)) == 128
    assert find_length(source(128)) == 128
    with pytest.raises(ValueError, match="The context length of the model of runs/some/0 is not known"):
        find_length(source())


def test_a_model_in_a_ramp_is_what_its_masks_let_through(tmp_path):
    old, new = (small.shape(mlp=mlp, init_std_vector=1.0) for mlp in (40, 56))
    plan = Growth("mask", ramp_steps=4)
    params, mesh = small.params(new), mesh_of(ONE)
    run = saved(tmp_path / "run", new, params, to_files(ByteVocabulary()), Lineage(new, plan, Lineage(old)))
    (tmp_path / "a.txt").write_text(TEXT)
    found = evaluate_checkpoint(run, EvalRequest(text=str(tmp_path / "a.txt"), max_length=16))
    masked, plain = (
        bits_per_byte_of_text(new, params, ByteVocabulary(), [TEXT], 16, mesh, masks=masks).nats
        for masks in (masks_at(old, new, plan, 0), None)
    )
    assert found["text"]["nats"] == pytest.approx(masked, rel=1e-5)
    assert abs(masked - plain) > 0.1


def test_a_model_is_computed_in_the_dtype_of_its_parameters_unless_another_is_asked_for(tmp_path):
    """Runs train in bfloat16 by default; what they have learned is measured in what they are stored in."""
    cfg = small.shape(compute_dtype="bfloat16")
    params = small.params(cfg)
    run = saved(tmp_path / "run", cfg, params, to_files(ByteVocabulary()))
    (tmp_path / "a.txt").write_text(TEXT)
    asked = EvalRequest(text=str(tmp_path / "a.txt"), max_length=16)
    found = [evaluate_checkpoint(run, dataclasses.replace(asked, dtype=d)) for d in (None, "float32", "bfloat16")]
    assert [each["dtype"] for each in found] == ["float32", "float32", "bfloat16"]
    exact, same, rounded = (each["text"]["nats"] for each in found)
    wide = cfg.replace(compute_dtype="float32")
    right = bits_per_byte_of_text(wide, params, ByteVocabulary(), [TEXT], 16, mesh_of(ONE)).nats
    assert exact == same == pytest.approx(right, rel=1e-6)
    assert abs(rounded - right) > 1e-5 * right


def test_a_continuation_is_shown_while_it_is_made_with_its_spaces_and_within_the_length(tmp_path, monkeypatch):
    """The tokenizer's own decoder drops a space at the beginning of what it decodes alone."""
    vocabulary = TokenizerVocabulary.from_directory(write_tokenizer(tmp_path / "tokenizer", metaspace=True))
    cfg = small.shape(vocab=304)
    run = saved(tmp_path / "run", cfg, small.params(cfg), to_files(vocabulary))
    text = "It grows, and the small model is"
    words = vocabulary.encode(text)
    cut = next(
        i
        for i in range(3, len(words))
        if vocabulary.decode(words) != vocabulary.decode(words[:i]) + vocabulary.decode(words[i:])
    )
    prompt, rest = vocabulary.decode(words[:cut]), words[cut:]
    tokens = np.array([rest], np.int32)
    monkeypatch.setattr(Generator, "_tokens", lambda *_: iter(tokens[:, i : i + 1] for i in range(len(rest))))
    lines, shown = [], []
    asked = EvalRequest(prompt=prompt, tokens=1000, max_length=len(words))
    found = evaluate_checkpoint(run, asked, say=lines.append, show=shown.append)
    assert "".join(shown) == text + "\n"
    assert len(shown) > 3, "piece by piece"
    assert prompt + found["generated"]["text"] == text
    assert f"The answer ends after {len(rest)} tokens, where the sequence has {len(words)}" in lines[-1]
    with pytest.raises(ValueError, match=rf"The prompt has {len(words)} tokens, and the model reads 2: shorten it"):
        evaluate_checkpoint(run, dataclasses.replace(asked, prompt=text, max_length=2))


def test_evaluating_text_needs_neither_tensorflow_nor_lm_eval(converted, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    code = f"""
import sys
for name in ("tensorflow", "seqio", "lm_eval", "torch", "transformers"):
    sys.modules[name] = None  # importing it now fails
from flm_jax.evaluation.evaluate import EvalRequest, evaluate_checkpoint
from flm_jax.evaluation.loaded import LONGEST_BY_DEFAULT, find_length
evaluate_checkpoint({str(converted)!r}, EvalRequest(text={str(tmp_path / "a.txt")!r}))
try:
    evaluate_checkpoint({str(converted)!r}, EvalRequest(tasks=("x",)))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install -e '.[eval]'" in done.stdout
