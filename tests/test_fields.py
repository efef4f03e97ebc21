"""Fields of configurations: each is held to its annotation when the configuration is made, and the error teaches."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from flm_jax import records
from flm_jax.cli import configure
from flm_jax.config import ModelConfig, RopeScaling
from flm_jax.data.config import DataConfig
from flm_jax.data.rows import Jsonl
from flm_jax.data.text import StandardLibrary, TextFolder
from flm_jax.data.train_vocabulary import Bytes, Pretrained, SentencePiece
from flm_jax.growth import Growth
from flm_jax.growth.masks import Ramp
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.records.fields import fitted, hints
from flm_jax.sharding import MeshConfig
from tests import small
from tests.test_records import made

STAGE = dict(name="a", model=small.config(), steps=2, batch_size=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage(**{**STAGE, "steps": 30.5}), "Stage.steps = 30.5: use an integer, at least 1."),
        (lambda: Stage(**{**STAGE, "steps": 0}), "Stage.steps = 0: use an integer, at least 1."),
        (
            lambda: Stage(**{**STAGE, "steps": "30"}),
            "Stage.steps = '30': use an integer, at least 1; write it without quotes: 30.",
        ),
        (
            lambda: Stage(**{**STAGE, "batch_size": 8.0}),
            "Stage.batch_size = 8.0: use an integer, at least 1; write 8.",
        ),
        (lambda: Stage(**{**STAGE, "batch_size": True}), "Stage.batch_size = True: use an integer, at least 1."),
        (lambda: Stage(**{**STAGE, "name": "a/b"}), "Stage.name = 'a/b': use a text, not empty and without any of"),
        (lambda: Stage(**{**STAGE, "name": "a[1]"}), "Stage.name = 'a[1]'"),
        (lambda: Stage(**{**STAGE, "model": ModelConfig}), "Stage.model = ModelConfig: use a ModelConfig."),
        (lambda: Stage(**{**STAGE, "growth": "zero"}), "Stage.growth = 'zero': use a Growth or None."),
        (
            lambda: OptimizerConfig(learning_rate="3e-3"),
            "learning_rate = '3e-3': use a number, greater than 0; write it without quotes: 3e-3.",
        ),
        (lambda: OptimizerConfig(learning_rate=-1), "OptimizerConfig.learning_rate = -1: use a number, greater than 0"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate = nan: use a number"),
        (lambda: OptimizerConfig(learning_rate=10**400), "use a number, greater than 0"),
        (lambda: OptimizerConfig(b2=1.0), "OptimizerConfig.b2 = 1.0: use a number, at least 0 and less than 1"),
        (lambda: OptimizerConfig(warmup_from=1.5), "warmup_from = 1.5: use a number, from 0 to 1"),
        (lambda: OptimizerConfig(schedule="cosin"), "one of wsd, cosine, linear, constant; did you mean 'cosine'?"),
        (lambda: DataConfig(context="64"), "DataConfig.context = '64': use an integer, at least 1; write it without"),
        (lambda: DataConfig(streamed=1), "DataConfig.streamed = 1: use True or False."),
        (lambda: DataConfig(streamed="False"), "streamed = 'False': use True or False; write it without quotes: False"),
        (
            lambda: DataConfig(corpus="texts"),
            "DataConfig.corpus = 'texts': use a Conversations or a HubDataset or a Jsonl or a Mixture or a Parquet or "
            "a Records or a SeqioTask or a SitePackages or a StandardLibrary or a TextFolder or a Tfds.",
        ),
        (lambda: DataConfig(vocabulary=StandardLibrary()), "use a Bytes or a SentencePiece or a Pretrained or None."),
        (lambda: Recipe(stages=Stage(**STAGE)), "use a list, each entry a Stage; write brackets around a single one."),
        (lambda: Recipe(stages=[Stage(**STAGE), 3]), "Recipe.stages[1] = 3: use a Stage."),
        (lambda: Recipe(stages=[], seed=0.5), "Recipe.seed = 0.5: use an integer"),
        (lambda: Run(meshes={"a": 4}), "Run.meshes['a'] = 4: use a MeshConfig."),
        (lambda: Run(meshes=[4]), "Run.meshes = [4]: use a dict, each value a MeshConfig."),
        (lambda: MeshConfig(data=-2), "MeshConfig.data = -2: use an integer, positive, or -1 for all the devices"),
        (lambda: Growth(depth=[1, -1]), "Growth.depth[1] = -1: use an integer, at least 0."),
        (lambda: Growth(depth="tpo"), "did you mean 'top'?"),
        (lambda: Growth(methods={"embd": "zero"}), "did you mean 'embed'?"),
        (lambda: Ramp(steps=-1), "Ramp.steps = -1: use an integer, at least 0."),
        (lambda: small.config(norm_width=0), "ModelConfig.norm_width = 0: use a number, greater than 0, or None."),
        (lambda: small.config(compute_dtype="bf16"), "did you mean 'bfloat16'?"),
        (lambda: RopeScaling(0.5, 1.0, 4.0, 8), "RopeScaling.factor = 0.5: use a number, at least 1."),
        (lambda: TextFolder(3), "TextFolder.path = 3: use a text."),
        (lambda: TextFolder("a", heldout_percent=100), "heldout_percent = 100: use an integer or a number, between 0"),
        (lambda: SentencePiece(size=100), "SentencePiece.size = 100: use an integer, at least 260."),
        (lambda: Pretrained("a", eos_id=-1), "Pretrained.eos_id = -1: use an integer, at least 0, or None."),
    ],
)
def test_what_a_field_cannot_hold_is_refused_with_what_would_be_right(make, message):
    with pytest.raises(records.FieldError) as refused:
        make()
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{refused.value.owner}.{refused.value.field}")


@pytest.mark.parametrize("cls", records.classes(), ids=lambda c: c.__name__)
def test_every_field_of_every_configuration_is_checked(cls):
    """An object of no type that a field could want is refused in each of them."""
    assert set(hints(cls)) == {field.name for field in dataclasses.fields(cls)}
    for field in dataclasses.fields(cls):
        with pytest.raises(records.FieldError, match=rf"^{cls.__name__}\.{field.name} = "):
            dataclasses.replace(made(cls), **{field.name: object()})


def test_values_of_a_close_type_are_converted():
    config = OptimizerConfig(learning_rate=1, warmup_steps=np.int64(3), weight_decay=np.float32(0.5))
    assert (type(config.learning_rate), type(config.warmup_steps), type(config.weight_decay)) == (float, int, float)
    assert type(small.config(tied=np.bool_(True)).tied) is bool
    assert TextFolder(Path("texts")) == TextFolder("texts")
    assert Growth(depth=[1, 2]).depth == Growth(depth=np.array([1, 2])).depth == (1, 2)
    assert Recipe(stages=[Stage(**STAGE)]).stages == (Stage(**STAGE),)
    # Digests of data hold these as they were given.
    assert repr(Jsonl("a", heldout_percent=5).heldout_percent) == "5"


def test_a_corpus_is_whatever_has_the_methods_of_one():
    class Mine:
        def digest(self):
            return "0"

        def describe(self):
            return {}

    assert DataConfig(corpus=Mine(), vocabulary=Bytes()).context == 256


def test_the_arguments_of_programs_are_checked_like_fields():
    given = dict(target={"embed": 32}, growth=Growth())
    assert fitted(configure.grow, given) == given
    with pytest.raises(records.FieldError, match="grow.target = 'x': use a ModelConfig or a dict"):
        fitted(configure.grow, {"target": "x"})
    with pytest.raises(records.FieldError, match="verify.tolerance = -1: use a number, at least 0"):
        fitted(configure.verify, {"tolerance": -1})


def test_recorded_stands_below_dataclass():
    @dataclasses.dataclass(frozen=True)
    class Above:
        size: int = 0

    with pytest.raises(TypeError, match="write @recorded below @dataclass"):
        records.recorded(Above)
