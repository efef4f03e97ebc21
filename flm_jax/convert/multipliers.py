"""The multipliers in a config.json: those of Tele-FLM and of Granite, read and written.

Tele-FLM: `input_mult`; `output_mult` / `mup_scale_factor`, which multiplies the logits.

Granite: `embedding_multiplier`; `logits_scaling`, which divides the logits; `residual_multiplier`; and
`attention_multiplier`, which multiplies q k in place of 1 / sqrt(head width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from flm_jax.config import ModelConfig

# Names of settings that other families must not have: a model that is written as another family is folded.
SETTINGS = (
    *("use_mup", "input_mult", "output_mult", "mup_scale_factor"),
    *("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"),
)


def of_tele_flm(embed: int, number: Callable[[str, float], float]) -> dict[str, Any]:
    """The fields of `ModelConfig` of a Tele-FLM model with `use_mup`.

    Logits are multiplied by output_mult / mup_scale_factor, where the scale factor is the width over the base width.

    Args:
      embed: the model's width.
      number: returns the number of a setting, or a default.
    """
    scale, output_mult = number("mup_scale_factor", 1.0), number("output_mult", 1.0)
    found = dict(input_mult=number("input_mult", 1.0))
    base = round(min(embed / scale, 2**31))
    if base >= 1 and embed / base == scale:
        return {**found, "base_width": base, "output_mult": output_mult}
    return {**found, "base_width": embed, "output_mult": output_mult / scale}


def of_granite(embed: int, head_dim: int, number: Callable[[str, float], float]) -> dict[str, Any]:
    """The fields of `ModelConfig` of a Granite model; its own width is its base width."""
    return dict(
        base_width=embed,
        input_mult=number("embedding_multiplier", 1.0),
        output_mult=1 / number("logits_scaling", 1.0),
        residual_mult=number("residual_multiplier", 1.0),
        attention_mult=number("attention_multiplier", 1.0) * head_dim**0.5,
    )


def to_tele_flm(cfg: ModelConfig) -> dict[str, Any]:
    """The settings of a Tele-FLM model."""
    return {
        "use_mup": True,
        "mup_scale_factor": cfg.embed / cfg.base_width,
        "input_mult": cfg.input_mult,
        "output_mult": cfg.output_mult,
    }


def to_granite(cfg: ModelConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a Granite model.

    Args:
      cfg: the model.
      before: the config.json that it was read with. A number that came in is the one that goes out, although it was
        multiplied and divided between.
    """
    found = {
        "embedding_multiplier": cfg.input_mult,
        "logits_scaling": 1 / cfg.logits_mult,
        "residual_multiplier": cfg.effective_residual_mult,
        "attention_multiplier": cfg.attention_mult / cfg.effective_head_width**0.5,
    }
    return {name: _as_before(value, before.get(name)) for name, value in found.items()}


def _as_before(value: float, before: Any) -> float:
    """`value`, or the number that was in its place before, if they are equal up to rounding."""
    is_number = isinstance(before, int | float) and not isinstance(before, bool)
    return float(before) if is_number and math.isclose(value, before, rel_tol=1e-12) else value
