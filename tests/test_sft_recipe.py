"""The recipe of tuning, on a checkpoint in the middle of its ramp and to the end, as a user starts it."""

import json
from pathlib import Path
from types import SimpleNamespace

import gin
import numpy as np
import pytest
import transformers

from flm_jax import train as training
from flm_jax.chat.template import TELE_FLM, TELECHAT
from flm_jax.cli import configure
from flm_jax.convert.exporting import export_model
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.optimizer import schedule
from flm_jax.recipe import Run
from flm_jax.source_checkpoint import read_source

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "gin_configs/sft/tele_flm_chat.gin"
# Stage `second` of the golden run, within its ramp.
BASE = next(path for path in sorted((ROOT / "tests/golden/run/checkpoints").glob("1_second/*")) if path.name != "0")


def configured(*bindings: str):
    gin.clear_config()
    try:
        configure.parse([RECIPE], bindings)
        found = configure.configured(configure.train)
        configure.check_used()
        return found
    finally:
        gin.clear_config()


def test_the_recipe_has_the_published_values():
    recipe, _ = configured(f"base = '{BASE}'", "conversations = 'talks.jsonl'")
    (stage,) = recipe.stages
    rate = schedule(stage.optimizer, stage.steps)
    assert float(rate(0)) == pytest.approx(2.7e-5)
    assert float(rate(stage.steps)) == pytest.approx(1e-9, rel=1e-3)
    assert (recipe.data.context, recipe.data.corpus.template) == (2048, "tele_flm")
    assert recipe.data.vocabulary.path == str(BASE)
    with pytest.raises(
        ValueError, match=r"needs a value for conversations: add --gin_bindings=\"conversations = '\.\.\.'"
    ):
        configured(f"base = '{BASE}'")


@pytest.mark.parametrize("template", [TELE_FLM, TELECHAT], ids=lambda t: t.name)
def test_the_sample_of_a_tuned_model_ends_with_its_answer(template, monkeypatch):
    vocabulary = ByteVocabulary()
    data = SimpleNamespace(vocabulary=vocabulary, describe=lambda: {"corpus": {"template": template.record()}})
    end = vocabulary.encode("<_end>") if template == TELECHAT else [vocabulary.eos_id]
    tokens = [*vocabulary.encode("Add."), *end, *vocabulary.encode("<_user>And?")]
    monkeypatch.setattr(training, "continued", lambda *_: np.array([tokens], np.int32))
    run = Run(prompt="What can you do?")
    assert training._sample(SimpleNamespace(cfg=None), SimpleNamespace(params=None), data, run, 0) == (
        "What can you do?\nAdd."
    )


@pytest.mark.integration
def test_a_grown_model_is_tuned_in_the_middle_of_its_ramp(tmp_path):
    source = read_source(BASE)
    assert source.masks() is not None
    left = source.rising["masks"]
    talks = [{"instruction": f"Add {a} and 1.", "output": str(a + 1)} for a in range(40)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    recipe, run = configured(
        f"base = '{BASE}'",
        f"conversations = '{tmp_path / 'talks.jsonl'}'",
        f"DataConfig.cache_dir = '{tmp_path / 'cache'}'",
        "DataConfig.context = 64",
        f"Stage.steps = {left + 4}",
        "Stage.batch_size = 8",
        "OptimizerConfig.learning_rate = 1e-2",
        "Recipe.eval_windows = 4",
        "Run.sample_tokens = 4",
    )
    report = training.train(recipe, run, tmp_path / "tuned")
    assert "What can you do?" in (tmp_path / "tuned/report.md").read_text()
    losses = [e["loss"] for e in report["evals"]]
    assert losses[-1] < losses[0]
    tuned = read_source(tmp_path / "tuned")
    assert tuned.masks() is None
    assert tuned.meta.data["corpus"]["template"] == TELE_FLM.record()
    assert tuned.vocabulary.digest == source.vocabulary.digest
    exported = export_model(tmp_path / "tuned", tmp_path / "exported")
    assert "chat_template.jinja" in exported["files"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    talk = [{"role": "user", "content": "Add 1 and 1."}]
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<_user>Add 1 and 1.<_bot>"
    assert theirs.apply_chat_template([*talk, {"role": "assistant", "content": "2"}], tokenize=False) == (
        f"{text}2{theirs.eos_token}"
    )
    assert json.loads((tmp_path / "exported/config.json").read_text())["eos_token_id"] == tuned.vocabulary.eos_id
