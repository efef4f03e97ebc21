"""Configurations as records: read back, completed with fields gained since, refused where unknown."""

import dataclasses
import json

import pytest

from flm_jax import records
from flm_jax.cli import configure  # noqa: F401  # Every configuration class is imported with it.
from flm_jax.config import ModelConfig, RopeScaling
from flm_jax.data.config import DataConfig
from flm_jax.data.mixture import Source
from flm_jax.data.text import StandardLibrary, TextFolder
from flm_jax.data.train_vocabulary import Pretrained
from flm_jax.growth import Growth
from flm_jax.recipe import Recipe, Stage
from flm_jax.savings.target import GrowthPoint, Target
from tests import small

# What classes without defaults for every field are made of.
TARGET = dict(name="a", model=small.config(), data=DataConfig(context=128), batch_size=4)
GIVEN = {
    "ModelConfig": dict(embed=8, layers=1, heads=2, mlp=8, vocab=9),
    "RopeScaling": dict(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8),
    "Stage": dict(name="a", model=small.config(), steps=2, batch_size=4),
    "Recipe": dict(stages=(Stage("a", small.config(rope_scaling=small.SCALING), 2, 4),)),
    "TextFolder": dict(path="texts"),
    "Conversations": dict(path="talks"),
    "HubDataset": dict(path="org/name"),
    "Jsonl": dict(path="a.jsonl"),
    "Parquet": dict(path="a.parquet"),
    "Records": dict(path="records"),
    "Source": dict(name="a", corpus=StandardLibrary()),
    "Mixture": dict(sources=(Source("a", StandardLibrary()),)),
    "Tfds": dict(name="a"),
    "SeqioTask": dict(name="a"),
    "Pretrained": dict(path="a"),
    "ScoringBase": dict(checkpoint="runs/base"),
    "Range": dict(low=1.0, high=2.0),
    "Halving": dict(rungs=[{"Stage.steps": 1}, {"Stage.steps": 2}]),
    "Sweep": dict(seeds=[0, 1]),
    "Target": TARGET,
    "Study": dict(target=Target(**TARGET)),
    "GrowthPoint": dict(at=0.5, growth=Growth("zero")),
    "GrowthPlan": dict(start={"layers": 1}, points=[GrowthPoint(0.5, Growth("zero"))]),
    "PlanGrid": dict(starts={"one": {"layers": 1}}, times=[0.5], growths={"zero": Growth("zero")}),
    "Tuning": dict(rate=1e-2),
}
# Where a thing lies is no part of what it is: these records cannot be read back alone.
NOT_RECORDED = {
    "Conversations", "TextFolder", "HubDataset", "Jsonl", "Parquet", "Records", "Pretrained", "ScoringBase",
}  # fmt: skip


def made(cls):
    return cls(**GIVEN.get(cls.__name__, {}))


@pytest.mark.parametrize("cls", records.classes(), ids=lambda c: c.__name__)
def test_every_configuration_is_read_back_from_its_record(cls):
    value = made(cls)
    record = records.as_dict(value)
    assert record["class"] == cls.__name__
    if cls.__name__ not in NOT_RECORDED:
        assert records.as_dict(records.from_dict(record)) == record
        assert records.from_dict(record) == value or cls.__name__ == "Recipe"


@pytest.mark.parametrize("cls", records.classes(), ids=lambda c: c.__name__)
def test_an_older_record_is_completed_with_the_fields_its_class_has_gained(cls):
    """Corpora and vocabularies included: each field that has a default may be missing from a record."""
    record = records.as_dict(made(cls))
    for field in dataclasses.fields(cls):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if field.name in record and has_default:
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            older = {name: value for name, value in record.items() if name != field.name}
            assert records.completed(older)[field.name] == records.as_dict(default)


def test_a_work_directory_of_an_older_corpus_is_still_ones_own(tmp_path):
    recipe = records.as_dict(Recipe(stages=(Stage("a", small.config(), 2, 4),), data=DataConfig(TextFolder("texts"))))
    older = {**recipe, "data": {**recipe["data"], "corpus": {"class": "TextFolder"}}}
    records.write_identity(tmp_path, records.RECIPE, older)
    records.check_identity(tmp_path, records.RECIPE, recipe, "another recipe")
    other = {**recipe, "data": {**recipe["data"], "corpus": records.as_dict(TextFolder("texts", pattern="*.md"))}}
    with pytest.raises(ValueError, match="data.corpus.pattern"):
        records.check_identity(tmp_path, records.RECIPE, other, "another recipe")


def test_unknown_classes_and_fields_are_refused_by_name():
    with pytest.raises(ValueError, match="'Corpus2'; this version knows Bytes, Conversations, DataConfig"):
        records.from_dict({"class": "Corpus2"})
    with pytest.raises(ValueError, match="RopeScaling the fields theta, which it does not have here"):
        records.from_dict({**records.as_dict(small.SCALING), "theta": 2})
    assert isinstance(records.from_dict(records.as_dict(small.SCALING)), RopeScaling)


def test_two_classes_of_one_name_are_refused():
    class Other:
        size: int = 0

    Other.__name__ = ModelConfig.__name__
    with pytest.raises(ValueError, match="has the name of flm_jax.config.ModelConfig"):
        records.recorded(Other)


def test_the_identity_of_a_work_directory_is_whole_or_not_there(tmp_path, monkeypatch):
    """A disk that fills while it is written leaves the one from before, and no draft."""
    records.write_identity(tmp_path, records.RECIPE, {"class": "Recipe", "seed": 1})
    before = (tmp_path / records.RECIPE).read_text()
    with monkeypatch.context() as patch:
        patch.setattr("flm_jax.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            records.write_identity(tmp_path, records.RECIPE, {"class": "Recipe", "seed": 2})
    assert (tmp_path / records.RECIPE).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == [records.RECIPE]


def test_a_tokenizers_record_does_not_say_where_it_lies():
    assert records.as_dict(Pretrained("here")) == records.as_dict(Pretrained("there"))


@pytest.mark.integration
def test_the_cache_may_move(recipe):
    moved = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, cache_dir="elsewhere"))
    assert records.as_dict(moved) == records.as_dict(recipe)


@pytest.mark.integration
def test_a_record_from_before_a_field_was_there_is_the_same_recipe(tmp_path):
    """A configuration that gains a field is, at its default, what it was: runs begun before go on."""
    stage = Stage("first", small.shape(), 4, 8, growth=None)
    mine = records.as_dict(Recipe(stages=(stage,)))
    old = json.loads(json.dumps(mine))
    for name in ("qkv_bias", "qk_norm", "sliding_window", "rope_scaling"):
        del old["stages"][0]["model"][name]
    del old["eval_every"]
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    records.check_identity(tmp_path, "recipe.json", mine, "another recipe")
    changed = records.as_dict(Recipe(stages=(dataclasses.replace(stage, model=small.shape(qkv_bias=True)),)))
    with pytest.raises(ValueError, match="model.qkv_bias: False there, True here"):
        records.check_identity(tmp_path, "recipe.json", changed, "another recipe")
