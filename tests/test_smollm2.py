"""A real model grown and tuned, by the commands that a user would run: `make test-smollm2`, some fifteen minutes."""

import json

import pytest

from benchmarks import real_model, sft_data, smollm2
from flm_jax.convert.exporting import export_model
from flm_jax.convert.importing import import_model
from tests.environment import as_user

GREETING = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]


@pytest.fixture(autouse=True)
def started_as_by_a_user(monkeypatch):
    monkeypatch.setattr(smollm2, "ENVIRONMENT", as_user())


@pytest.mark.slow
def test_a_real_model_is_the_same_after_growing_here_and_in_transformers(tmp_path):
    found = smollm2.measure(tmp_path)
    assert not smollm2.faults(found)
    assert [growth["params"] for growth in found["grown"]] == [237_825_360] * len(smollm2.METHODS)


@pytest.mark.slow
def test_a_real_model_is_tuned_with_its_own_template_and_exported(tmp_path):
    """Three short steps: the held-out loss falls, and transformers computes the same and knows the template."""
    import transformers

    folder, base, tuned, out = (tmp_path / name for name in ("downloaded", "base", "tuned", "exported"))
    real_model.unpack(folder)
    import_model(folder, base)
    sft_data.make(tmp_path / "data", 100, 4, 0)
    bindings = {
        "base": str(base),
        "conversations": str(tmp_path / "data/pool.jsonl"),
        "DataConfig.cache_dir": str(tmp_path / "cache"),
        "Conversations.template": "tokenizer",
        "DataConfig.context": 256,
        "Stage.batch_size": 2,
        "Stage.steps": 3,
        "OptimizerConfig.learning_rate": 1e-4,
        "model_of.changes": {"compute_dtype": "float32"},
        "Recipe.eval_windows": 4,
        "Run.sample_tokens": 4,
    }
    given = [f"--gin_bindings={name} = {value!r}" for name, value in bindings.items()]
    recipe = "--gin_file=gin_configs/sft/tele_flm_chat.gin"
    smollm2.run(["experiments/train.py", recipe, f"--workdir={tuned}", *given])
    lines = map(json.loads, (tuned / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "heldout"]
    assert losses[-1] < losses[0]
    export_model(tuned, out)
    assert (out / "chat_template.jinja").read_bytes() == (folder / "chat_template.jinja").read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    assert all(after[name] == before[name] for name in ("eos_token_id", "max_position_embeddings", "vocab_size"))
    asked, answered = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, out))
    assert asked.apply_chat_template(GREETING)["input_ids"] == answered.apply_chat_template(GREETING)["input_ids"]
    theirs, base_theirs = smollm2.theirs(out)["logits"], smollm2.theirs(folder)["logits"]
    assert smollm2.apart(theirs, smollm2.ours(tuned, out)) < smollm2.TOLERANCE
    assert smollm2.apart(theirs, base_theirs) > 100 * smollm2.TOLERANCE, "it has been tuned"
