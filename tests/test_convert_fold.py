"""Folding kept widths and multipliers into an ordinary model: the same logits, by a decoder that knows neither."""

import pytest

from flm_jax.convert.fold import MULTIPLIERS, fold
from flm_jax.growth import (
    Growth,
)
from tests import reference, small
from tests.growing import (
    grow_pair,
    logits,
    relative,
)

pytestmark = pytest.mark.usefixtures("cheap_draws")
FOLDED = {
    "norm width": (dict(), dict(embed=30, mlp=50)),
    "norm and head width": (dict(), dict(embed=30, head_dim=12)),
    "with biases": (dict(qkv_bias=True), dict(embed=30, head_dim=12)),
    "with query and key norms": (dict(qk_norm=True), dict(embed=30, heads=3)),
    "with scaled frequencies": (dict(rope_scaling=small.SCALING), dict(embed=30, head_dim=12)),
    "tied": (dict(tied=True, input_mult=3.0), dict(embed=30)),
    "multipliers": (dict(input_mult=3.0, output_mult=0.5), dict(embed=30)),
    "multipliers in blocks": (dict(residual_mult=0.3, base_layers=3, attention_mult=0.6), dict(embed=30, head_dim=12)),
    "and query and key norms": (dict(qk_norm=True, residual_mult=2.0, attention_mult=0.6), dict(embed=30)),
}
KEPT = {"all folded": (), "Tele-FLM's kept": ("input_mult", "output_mult"), "Granite's kept": MULTIPLIERS}


@pytest.mark.battery
@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize(("fields", "changes"), FOLDED.values(), ids=FOLDED)
def test_kept_widths_and_multipliers_fold_into_an_ordinary_model(fields, changes, keep, x64):
    """By a decoder that is not ours, and knows no kept widths."""
    old = small.config(compute_dtype="float64", param_dtype="float64", **fields)
    old, params, new, grown = grow_pair((old, old.replace(**changes, kv_heads=changes.get("heads"))), Growth("zero"))
    folded, cfg = fold(grown, new, keep)
    assert (cfg.norm_width, cfg.head_width, cfg.base_layers) == (None, None, None)
    assert {name: getattr(cfg, name) for name in MULTIPLIERS if name not in keep} == {
        name: 1 for name in MULTIPLIERS if name not in keep
    }
    tokens = small.tokens((1, 9))
    expected = logits(old, params, tokens=tokens)[0]
    assert relative(expected, reference.forward(cfg, folded, tokens[0])) < 1e-12
    # What it holds in place of the widths is needed, every bit of it.
    assert relative(expected, reference.forward(cfg.replace(norm_eps=new.norm_eps), folded, tokens[0])) > 1e-5


def test_head_widths_under_query_and_key_norms_fold_too(x64):
    """They grow by masks, which are gone at the end of the ramp: the model after it is what is folded."""
    wide = dict(compute_dtype="float64", param_dtype="float64", qk_norm=True, rope_scaling=small.SCALING)
    growth = Growth("zero", methods={"head_dim": "mask"})
    _, _, new, grown = grow_pair((small.config(**wide), small.config(embed=30, head_dim=12, **wide)), growth)
    assert (new.norm_width, new.head_width) == (24, 8)
    tokens = small.tokens((1, 9))
    folded, cfg = fold(grown, new)
    assert relative(logits(new, grown, tokens=tokens)[0], reference.forward(cfg, folded, tokens[0])) < 1e-12
