"""What a config.json says of a model, with what it leaves out, and the names and shapes of its tensors."""

import dataclasses
import json

import pytest
import torch
import transformers

from flm_jax.config import ModelConfig
from flm_jax.convert import families
from flm_jax.convert.layout import parts
from tests.hub import LLAMA3, MODELS, SHAPE

pytestmark = pytest.mark.integration


def test_the_published_multipliers_of_tele_flm():
    config = dict(
        architectures=["TeleFLMForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_teleflm.TeleFLM"},
        **(SHAPE | dict(hidden_size=20_480, num_attention_heads=160, num_key_value_heads=160)),
        use_mup=True,
        input_mult=1.0,
        output_mult=2.0,
        mup_scale_factor=80.0,
    )
    cfg = families.model_config(config, "config.json")
    assert (cfg.base_width, cfg.logits_mult) == (256, 0.025)
    assert families.model_config(config | dict(use_mup=False), "config.json").logits_mult == 1.0


def test_configurations_say_what_they_mean_when_fields_are_left_out():
    """Real files leave out what is their family's default."""
    base = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    read = lambda family, **more: families.model_config(  # noqa: E731
        {"architectures": [f"{family}ForCausalLM"], **base, **more}, "config.json"
    )
    assert (read("Llama").k_heads, read("Llama").h_dim, read("Llama").norm_eps) == (4, 12, 1e-6)
    assert read("Mistral").sliding_window == 4096
    assert read("Mistral", sliding_window=None).sliding_window is None
    assert read("Qwen3").h_dim == 128
    assert read("Qwen2", sliding_window=5, max_window_layers=0).sliding_window is None
    assert read("Qwen2", use_sliding_window=True, max_window_layers=0).sliding_window == 4096
    assert read("Qwen3", use_sliding_window=True, max_window_layers=None).sliding_window is None  # 28 layers see all
    granite = read("Granite", attention_multiplier=0.5, logits_scaling=8)
    assert (granite.input_mult, granite.residual_mult, granite.logits_mult) == (1, 1, 0.125)
    assert granite.attention_mult == 0.5 * 12**0.5 and granite.scores_width == pytest.approx(4)
    assert read("Granite").scores_width == pytest.approx(1)
    assert read("Llama", rope_theta=5e5).rope_theta == 5e5
    assert read("Llama", rope_theta=10**10).rope_theta == 1e10
    assert read("Llama", rope_scaling=None, rope_parameters=dict(rope_theta=7.0)).rope_theta == 7.0
    scaled = read("Llama", rope_theta=9.0, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})
    assert (scaled.rope_theta, scaled.rope_scaling.factor) == (9.0, 8.0)


def test_every_parameter_of_every_family_has_a_name_of_its_own():
    for family, fields in MODELS.values():
        config = getattr(transformers, f"{family}Config")(**{**SHAPE, **fields})
        cfg = families.model_config(
            {"architectures": [f"{family}ForCausalLM"], **json.loads(config.to_json_string())}, "config.json"
        )
        names = [part.name(lead) for part in parts(cfg) for lead in part.leads]
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(config)
        shapes = {name: tuple(value.shape) for name, value in made.named_parameters()}
        assert len(names) == len(set(names))
        assert shapes == {part.name(lead): part.theirs for part in parts(cfg) for lead in part.leads}


def test_no_field_of_a_model_is_forgotten_on_the_way_out():
    """A field that is added to the model must be folded, written, or refused."""
    known = {"embed", "layers", "heads", "mlp", "vocab", "kv_heads", "head_dim", "tied", "norm_eps", "rope_theta"}
    known |= {
        "rope_scaling",
        "norm_width",
        "head_width",
        "base_width",
        "base_layers",
        *families.SPECIAL,
    }  # what decides the function
    known |= {"init_std", "init_std_vector", "compute_dtype", "param_dtype", "remat", "attention", "scan_unroll"}
    assert known == {field.name for field in dataclasses.fields(ModelConfig)}
