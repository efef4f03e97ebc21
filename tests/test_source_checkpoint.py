"""A checkpoint is whole by itself: what it needs to be used lies in its step, and nothing outside is looked at."""

import dataclasses
import json
import shutil
from pathlib import Path

import gin
import jax
import pytest

from flm_jax import train as training
from flm_jax.checkpoint import CheckpointError, DamagedError
from flm_jax.checkpoint_growth import grow_checkpoint
from flm_jax.checkpoint_growth.verify import verification_text
from flm_jax.cli import runs
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import TextFolder
from flm_jax.data.train_vocabulary import Bytes, Pretrained, SentencePiece, checkpoint_vocabulary, load_vocabulary
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.data.vocabulary_files import RECORD, VocabularyError, from_files, to_files
from flm_jax.evaluation import EvalRequest, evaluate_checkpoint
from flm_jax.growth import Growth, Lineage
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.source_checkpoint import CheckpointMeta, read_source
from tests import hub, small
from tests.golden_run import RUN as GOLDEN

pytestmark = pytest.mark.integration

ONE = MeshConfig(data=1)
HOW = Run(mesh=MeshConfig(), checkpoint_every=5, keep=2, log_every=5, sample_tokens=4)
SHAPE = small.shape(vocab=304, embed=16, layers=1, mlp=24)
LARGER = {"mlp": 32}
HELD = "the small model and nothing had happened: it grows\n"


def recipe(texts: Path, cache: Path, **changes) -> Recipe:
    data = DataConfig(TextFolder(str(texts)), changes.pop("vocabulary", None), context=16, cache_dir=str(cache))
    fast = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
    return Recipe((Stage("one", SHAPE, 4, 8, fast),), data, eval_windows=8, eval_every=4, **changes)


def bits(checkpoint, tokenizer=None, **options) -> float:
    held = Path(checkpoint).parent / "held.txt"
    held.write_text(HELD)
    asked = EvalRequest(text=str(held), tokenizer=tokenizer)
    return evaluate_checkpoint(checkpoint, asked, **options)["text"]["bits_per_byte"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a SentencePiece vocabulary, what it scores, and its texts, which have changed and moved since."""
    base = tmp_path_factory.mktemp("run")
    small.write_corpus(base / "texts")
    sentences = dataclasses.replace(recipe(base / "texts", base / "cache"), seed=1)
    sentences = dataclasses.replace(sentences, data=dataclasses.replace(sentences.data, vocabulary=SentencePiece(300)))
    training.train(sentences, HOW, base / "run", {"config.gin": "import this_raises\nraise ValueError\n"})
    expected = bits(base / "run")
    (base / "texts" / "more.txt").write_text("Something else is there now, in other words. " * 40)
    assert bits(base / "run") == expected
    (base / "texts").rename(base / "moved")
    return base / "run", expected, base


def test_the_vocabulary_is_that_of_the_training_whatever_became_of_the_texts(run):
    workdir, expected, _ = run
    assert bits(workdir) == expected
    found = evaluate_checkpoint(workdir, EvalRequest(prompt="the small", tokens=3))
    assert found["generated"]["prompt"] == "the small" and found["max_length"] == 16
    source = read_source(workdir)
    assert sorted(source.files) == ["tokenizer.model", "vocabulary.json"]
    assert source.vocabulary.digest == source.meta.data["vocabulary"]["digest"]


def test_a_record_says_whose_state_it_is_and_one_without_a_word_is_of_adamw():
    meta = CheckpointMeta("one", Lineage(SHAPE), optimizer="muon")
    assert CheckpointMeta.from_record(meta.record()).optimizer == "muon"
    record = CheckpointMeta("one", Lineage(SHAPE)).record()
    assert "optimizer" not in record and CheckpointMeta.from_record(record).optimizer == "adamw"
    for wrong, message in ((1, "its optimizer"), ("sgd", "its optimizer is 'sgd'; this version knows adamw, muon")):
        with pytest.raises(ValueError, match=message):
            CheckpointMeta.from_record({**record, "optimizer": wrong})


class Shallow(tuple):
    """The parents of a path, of which only the nearest can be asked for by number."""

    def __getitem__(self, number):
        return super().__getitem__(number if number == 0 else len(self))


@pytest.mark.parametrize("name", ["4", "copied"])
def test_one_step_is_enough_wherever_it_is_copied_to(run, tmp_path, name, monkeypatch):
    workdir, expected, _ = run
    # Foreign files where a work directory would have them; and a path as shallow as can be.
    (tmp_path / "config.gin").write_text("raise ValueError('executed')\nDataConfig.context = 3\n")
    copy = shutil.copytree(workdir / "checkpoints/0_one/4", tmp_path / name)
    parents = Path.parents.fget
    monkeypatch.setattr(Path, "parents", property(lambda path: Shallow(parents(path))))
    assert bits(copy) == expected
    grow_checkpoint(copy, tmp_path / "grown", LARGER, Growth(), streamed=True)
    assert bits(tmp_path / "grown") == pytest.approx(expected, rel=1e-4)
    assert read_source(tmp_path / "grown").files == read_source(copy).files
    assert load_vocabulary(copy).digest == read_source(workdir).vocabulary.digest


def test_a_step_under_the_number_of_another_is_refused(run, tmp_path):
    copy = shutil.copytree(run[0] / "checkpoints/0_one/4", tmp_path / "5")
    with pytest.raises(DamagedError, match="is the manifest of step 4: the directory was renamed or copied"):
        read_source(copy)


def test_models_are_compared_on_the_prepared_tokens_if_they_are_there(run):
    workdir, _, base = run
    source, mesh = read_source(workdir), make_mesh(ONE, jax.devices()[:1])
    assert verification_text(source, None, mesh).name.startswith("held-out text, digest ")
    (base / "cache").rename(base / "gone")
    try:
        assert verification_text(source, None, mesh).name.startswith("random tokens: there is no token store at ")
    finally:
        (base / "gone").rename(base / "cache")
    other = dataclasses.replace(source, meta=dataclasses.replace(source.meta, data={**source.meta.data, "digest": "0"}))
    assert "holds other data than the checkpoint records" in verification_text(other, None, mesh).name
    named = recipe(base / "moved", base / "cache", vocabulary=Bytes()).data
    with pytest.raises(ValueError, match=r"is used with the bytes vocabulary of sha256 \w{64}, but was trained with"):
        verification_text(source, named, mesh)


def test_nothing_beside_a_checkpoint_is_executed(run, tmp_path, capsys):
    """The run's config.gin would raise."""
    workdir, _, _ = run
    gin.clear_config()
    try:
        runs.run_evaluate(str(workdir), EvalRequest(prompt="the", tokens=2), None, [], [])
        bindings = ["grow.target = {'mlp': 32}", "grow.growth = @Growth()"]
        runs.run_grow(str(workdir), str(tmp_path / "grown"), [], bindings)
    finally:
        gin.clear_config()
    said = capsys.readouterr().out
    assert "measured on held-out text" in said and "HOLDS" in said
    assert read_source(tmp_path / "grown").files == read_source(workdir).files


def test_a_run_goes_on_with_the_vocabulary_of_its_start(run, tmp_path, capsys, monkeypatch):
    workdir, _, base = run
    start = read_source(workdir)
    goes_on = recipe(base / "moved", tmp_path / "cache", start=str(workdir))
    found = training.train(goes_on, HOW, tmp_path / "on")
    assert found["evals"][0]["loss"] == pytest.approx(start.meta.history["evals"][-1]["loss"], abs=0.3)
    assert read_source(tmp_path / "on").files == start.files
    assert "sha256" not in capsys.readouterr().out
    # Another one only by name, and aloud.
    monkeypatch.setattr(training, "Checkpoints", lambda *_, **__: 1 / 0)
    asked = recipe(base / "moved", tmp_path / "cache", start=str(workdir), vocabulary=Bytes())
    with pytest.raises(ZeroDivisionError):
        training.train(asked, HOW, tmp_path / "bytes")
    said = capsys.readouterr().out
    assert start.vocabulary.digest in said and ByteVocabulary().digest in said
    assert sorted(start.files_with(ByteVocabulary())) == [RECORD]


def test_a_vocabulary_is_taken_from_any_checkpoint(run, tmp_path, capsys):
    workdir, expected, _ = run
    own = read_source(workdir).vocabulary.digest
    for path in (workdir, workdir / "checkpoints/0_one", workdir / "checkpoints/0_one/4"):
        assert Pretrained(str(path)).load().digest == own
    assert Pretrained(str(GOLDEN)).load().digest == ByteVocabulary().digest
    (tmp_path / "spm.model").write_bytes(read_source(workdir).files["tokenizer.model"])
    assert bits(workdir, tokenizer=str(tmp_path / "spm.model"), say=print) == expected
    assert "is used with" not in capsys.readouterr().out
    assert bits(workdir, tokenizer=str(GOLDEN), say=print) > expected
    assert "is used with the bytes vocabulary of sha256" in capsys.readouterr().out
    with pytest.raises(ValueError, match="eos_id=7: a document ends with 1 in the sentencepiece vocabulary"):
        load_vocabulary(workdir, eos_id=7)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json, and is no checkpoint either"):
        load_vocabulary(tmp_path / "nowhere")


def test_a_vocabulary_that_was_swapped_or_damaged_is_refused(run, tmp_path):
    source = read_source(run[0])
    assert from_files(source.files, "here").digest == source.vocabulary.digest
    assert from_files(to_files(ByteVocabulary(100)), "here").digest == ByteVocabulary(100).digest
    other = json.loads(source.files[RECORD]) | {"digest": "0" * 64}
    with pytest.raises(VocabularyError, match="its content has"):
        from_files({**source.files, RECORD: json.dumps(other).encode()}, "here")
    with pytest.raises(VocabularyError, match=r"vocabulary in here cannot be read: 'tokenizer\.model'"):
        from_files({RECORD: source.files[RECORD]}, "here")
    with pytest.raises(
        VocabularyError, match=r"trained with a sentencepiece vocabulary .* what is there now is a bytes"
    ):
        checkpoint_vocabulary(to_files(ByteVocabulary()), source.meta.data, "here")
    copy = shutil.copytree(run[0] / "checkpoints/0_one/4", tmp_path / "4")
    blob = copy / "blobs" / "tokenizer.model"
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match=r"tokenizer\.model is damaged"):
        evaluate_checkpoint(copy, EvalRequest(prompt="the", tokens=2))


# Checkpoints of version 0.1.0 hold no vocabulary: it is made again from their record, and compared with it.


def test_a_checkpoint_of_bytes_needs_no_texts(tmp_path):
    copy = shutil.copytree(GOLDEN / "checkpoints/0_first/4", tmp_path / "4")
    assert RECORD not in read_source(copy).files
    assert evaluate_checkpoint(copy, EvalRequest(prompt="the", tokens=2))["max_length"] == 16
    grow_checkpoint(copy, tmp_path / "grown", {"mlp": 20}, Growth(), streamed=True)
    assert read_source(tmp_path / "grown").vocabulary.digest == ByteVocabulary().digest


def test_texts_that_have_changed_are_refused_by_digest(run, tmp_path, monkeypatch):
    monkeypatch.setattr("flm_jax.data.train_vocabulary.CACHE", str(tmp_path / "cache"))
    source, (_, _, base) = read_source(run[0]), run
    with pytest.raises(
        VocabularyError, match=r"kept no vocabularies, .* \(sentencepiece, sha256 .* there is no folder"
    ):
        checkpoint_vocabulary({}, source.meta.data, "here")
    small.write_corpus(tmp_path / "texts")
    record = json.loads(json.dumps(source.meta.data))
    record["corpus"]["path"] = str(tmp_path / "texts")
    assert checkpoint_vocabulary({}, record, "here").digest == source.vocabulary.digest
    record["corpus"]["path"] = str(base / "moved")  # with a text more
    with pytest.raises(
        VocabularyError, match=r"what is there now is a sentencepiece vocabulary of 300 ids, sha256 \w+:"
    ):
        checkpoint_vocabulary({}, record, "here")


def test_the_module_of_a_seqio_task_is_not_imported_because_a_record_names_it():
    record = {"vocabulary": {"kind": "sentencepiece", "size": 9, "digest": "0"}}
    record["corpus"] = {"kind": "SeqioTask", "name": "my_task", "module": "antigravity"}
    with pytest.raises(VocabularyError, match="'antigravity' is imported only where a recipe names it"):
        checkpoint_vocabulary({}, record, "here")


def test_what_a_tokenizer_says_stays_beside_it_until_another_is_trained_with(tmp_path):
    hub.write_tokenizer(tmp_path / "hub", begin=True)
    _, converted, _, _ = hub.llama(tmp_path / "hub")
    start = read_source(converted)
    assert start.vocabulary.special.begin and start.files_with(start.vocabulary) == start.files
    other = load_vocabulary(hub.write_tokenizer(tmp_path / "other", size=290))
    files = start.files_with(other)
    assert sorted(files) == ["config.json", "tokenizer.json", "vocabulary.json"]
    assert "eos_token_id" in json.loads(start.files["config.json"]) and b"eos_token_id" not in files["config.json"]
    assert from_files(files, "here").digest == other.digest
    with pytest.raises(CheckpointError):
        read_source(tmp_path / "hub")
