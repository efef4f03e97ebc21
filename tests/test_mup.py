"""The coordinate check: flat under muP, steep without its rates, and the program around it."""

import itertools
import json
import math

import gin
import numpy as np
import pytest

from flm_jax import mup
from flm_jax.cli import coordinate_check, coordinates
from flm_jax.mup import Check, Found, check, widened
from flm_jax.mup.coordinates import slope, walk
from flm_jax.optimizer import OptimizerConfig
from tests import small
from tests.commands import parsed

MODEL = small.config(embed=32, heads=4, head_dim=8, kv_heads=2, mlp=80, init_std=0.25, vocab=256)
FAST = OptimizerConfig(learning_rate=1e-2)
ASKED = dict(widths=(32, 128), steps=8, seeds=1, batch=8, context=16)


@pytest.fixture(scope="module")
def found():
    """With muP's rates, and with the same rate at every width."""
    return check(Check(MODEL, FAST, **ASKED)), check(Check(MODEL, FAST, **ASKED, same_rate=True))


def test_activations_are_flat_under_mup_and_not_with_one_rate_for_all_widths(found):
    flat, steep = found
    assert set(flat.sizes) == {"embedded", "hidden", "attention", "mlp", "logits"}
    assert flat.beyond(0.15) == {}
    assert steep.beyond(0.15).keys() >= {"attention", "mlp", "hidden"}
    assert steep.beyond(0.15)["mlp"] > 0.4
    # At the start both are the same; logits then shrink with the root of the width, as they do under muP.
    assert {kind: sizes[0] for kind, sizes in flat.sizes.items()} == {kind: s[0] for kind, s in steep.sizes.items()}
    assert flat.slopes["logits"][0] == pytest.approx(-0.5, abs=0.1)


def test_activations_of_blocks_are_flat_under_muon_too():
    """Logits of one seed are too noisy at these widths; docs/muon.md has wider models."""
    muon = OptimizerConfig(name="muon", learning_rate=1e-2)
    assert check(Check(MODEL, muon, **ASKED)).beyond(0.15).keys() <= {"logits"}


def test_sizes_are_those_of_the_model(found):
    assert all(len(sizes) == 9 and len(sizes[0]) == 2 for sizes in found[0].sizes.values())
    import jax
    import jax.numpy as jnp

    from flm_jax.model import Transformer, init_params

    cfg = widened(MODEL, 128).for_comparison
    tokens = walk(0, 8, 8, 16)[:, :-1]
    params = init_params(cfg, jax.random.key(0))
    forward = jax.jit(lambda p, tokens: Transformer(cfg).apply({"params": p}, tokens, mutable=["intermediates"]))
    logits, state = forward(params, tokens)
    seen = {"logits": logits[0], "hidden": state["intermediates"]["blocks"]["hidden_BTD"][0]}
    for kind, values in seen.items():
        assert found[0].sizes[kind][0][1] == pytest.approx(float(jnp.mean(jnp.abs(values))), rel=1e-3)


def test_a_model_at_another_width_keeps_its_proportions():
    wide = widened(MODEL, 96)
    assert (wide.embed, wide.heads, wide.k_heads, wide.h_dim, wide.mlp, wide.layers) == (96, 12, 6, 8, 240, 2)
    assert wide.base_width == MODEL.base_width
    assert widened(MODEL, 32) == MODEL
    with pytest.raises(ValueError, match="A width of 40 has no whole number of heads.*take a multiple of 16"):
        widened(MODEL, 40)
    with pytest.raises(ValueError, match="two or more that differ"):
        Check(MODEL, FAST, widths=(32, 32))


def test_slopes_are_those_of_powers_and_a_size_that_is_no_number_is_beyond_any_limit():
    assert slope((16, 32, 64), [3 * w**0.75 for w in (16, 32, 64)]) == pytest.approx(0.75)
    assert math.isnan(slope((16, 32), [1.0, math.inf])) and math.isnan(slope((16, 32), [0.0, 1.0]))
    found = Found((16, 32), {}, {"a": [0.0, math.nan], "b": [1.0, -0.2], "c": [1.0, 0.1]})
    assert found.beyond(0.1).keys() == {"a", "b"}
    assert found.beyond(1e9).keys() == {"a"}


def test_texts_are_walks_that_can_be_learned():
    tokens = walk(0, 1, 50, 30)
    after = {}
    for row in tokens:
        for a, b in itertools.pairwise(row):
            after.setdefault(int(a), set()).add(int(b))
    assert max(map(len, after.values())) == 3
    assert np.array_equal(tokens, walk(0, 1, 50, 30)) and not np.array_equal(tokens, walk(0, 2, 50, 30))


def test_the_program_prints_writes_and_exits_with_1_beyond_the_limit(found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mup, "check", lambda asked, show: found[asked.same_rate])
    gin.clear_config()
    files = (str(tmp_path / "c.png"), str(tmp_path / "c.json"))
    asked = dict(widths=[64, 128], steps=8, seeds=1)
    coordinates.run_coordinate_check([], [], {**asked, "same_rate": False}, 0.15, *files)
    out = capsys.readouterr().out
    assert "logits     slope -0.5" in out and "NOT FLAT" not in out
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "c.json").read_text())["beyond"] == {}
    with pytest.raises(SystemExit) as stop:
        coordinates.run_coordinate_check([], [], {**asked, "same_rate": True}, 0.15, *files)
    assert stop.value.code == 1
    assert "mlp" in json.loads((tmp_path / "c.json").read_text())["beyond"]
    assert "NOT FLAT" in capsys.readouterr().out
    for bindings, message in (
        (["coordinate_check.modle = 1"], "did you mean 'model'?"),
        (["coordinate_check.model = 'small'"], "use a ModelConfig or None"),
    ):
        gin.clear_config()
        with pytest.raises(SystemExit):
            coordinates.run_coordinate_check([], bindings, {**asked, "same_rate": False}, 0.1, None, None)
        assert message in capsys.readouterr().err
    gin.clear_config()


DEEP = MODEL.replace(layers=4, base_layers=4, input_mult=100.0, residual_mult=0.5)
DEPTHS = dict(depths=(4, 16), steps=8, seeds=1, batch=8, context=16)


@pytest.fixture(scope="module")
def deeper():
    """With CompleteP's multiplier, and without."""
    return check(Check(DEEP, FAST, **DEPTHS)), check(Check(DEEP, FAST, **DEPTHS, same_residual=True))


def test_activations_are_flat_over_depth_with_base_layers_and_not_without(deeper):
    flat, steep = deeper
    assert flat.at == (4, 16) and flat.axis == "depth"
    assert flat.record()["depths"] == [4, 16]
    assert flat.beyond(0.15) == {}
    assert steep.beyond(0.2).keys() >= {"hidden"}
    # At four layers both are the same model.
    assert [step[0] for step in flat.sizes["hidden"]] == [step[0] for step in steep.sizes["hidden"]]


def test_the_program_checks_depths_with_base_layers_unless_a_model_is_given(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(mup, "check", lambda check, show: asked.append(check) or Found((4, 8), {}, {}, "depth"))
    gin.clear_config()
    given = dict(depths=[4, 8], steps=1, seeds=1)
    coordinates.run_coordinate_check([], [], given, 0.1, None, None)
    coordinates.run_coordinate_check([], ["coordinate_check.model = @small_52b()"], given, 0.1, None, None)
    gin.clear_config()
    assert [(check.axis, check.model.base_layers) for check in asked] == [("depth", 4), ("depth", None)]
    assert [asked[0].model_at(size).effective_residual_mult for size in (4, 8)] == [0.5, 0.25]
    same = Check(asked[0].model, FAST, depths=(4, 8), same_residual=True)
    assert [same.model_at(size).effective_residual_mult for size in (4, 8)] == [0.5, 0.5]
    assert [asked[0].model_at(8).layers, asked[0].model_at(8).embed] == [8, asked[0].model.embed]
    for wrong in ((4,), (4, 4), (0, 4)):
        with pytest.raises(ValueError, match="The depths"):
            Check(MODEL, FAST, depths=wrong)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depths=4"], "--depths=4: give two or more different depths"),
        (["--depths=4,x"], "--depths=4,x: give integers separated by commas, such as 4,8,16"),
        (["--depths=4,8", "--widths=32,64"], "give one of them"),
        (["--depths=4,8", "--same_rate"], "--same_rate is for --widths"),
        (["--same_residual"], "--same_residual is for --depths"),
    ],
)
def test_wrong_depths_are_refused(flags, message, capsys):
    with parsed("coordinate_check", flags) as values, pytest.raises(SystemExit) as stop:
        coordinate_check.run(values)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
