"""Folds kept widths and multipliers into the parameters, for programs that support neither.

Folding multiplies whole parameters by numbers and changes some fields of the configuration; the function stays the
same. Let d be the number that norms divide by and D the model's width, h the head width in scores and rotary
frequencies and H the heads' real width:

- Norms: x / sqrt(s / d + eps) = sqrt(d / D) x / sqrt(s / D + eps d / D). So scales are multiplied by sqrt(d / D), and
  eps by d / D. Norms of queries and keys divide by H in any case, but a config.json has only one eps for all norms:
  their input is multiplied by sqrt(d / D), which cancels in these norms once eps is changed.
- Scores: a q k / sqrt(h) = (q a sqrt(H / h)) k / sqrt(H), with the attention multiplier a, so queries are multiplied
  by a sqrt(H / h). If queries and keys have norms, the scales of both norms are multiplied by the root of that instead.
- Rotary frequencies: theta^(-2i/h) = (theta^(H/h))^(-2i/H), so theta is replaced by theta^(H/h).
- The residual multiplier is folded into the parameters that write into the residual stream inside blocks.
- The input multiplier is folded into the embedding, the logits' multiplier into the head. If these are one matrix
  (tied), it takes the input multiplier, and the scale of the final norm takes their ratio.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax

from flm_jax.config import ModelConfig
from flm_jax.model import Params, declared
from flm_jax.signature import KINDS, STACK_AXIS, Kind, Role, Signature

# The multipliers that a family of models may have as settings; the others are folded into the weights.
MULTIPLIERS = ("input_mult", "output_mult", "residual_mult", "attention_mult")


def factors(cfg: ModelConfig, keep: Collection[str] = ()) -> tuple[Any, ModelConfig]:
    """The factor of every parameter, and the configuration that computes the same function with the scaled parameters.

    Args:
      cfg: the model, after the ramp of its masks.
      keep: those of `MULTIPLIERS` that are not folded.

    Returns:
      A tree of factors like the parameters, with 1.0 for parameters that stay bit for bit, and a configuration without
      `norm_width`, `head_width` and `base_layers`, whose multipliers are 1 if they are folded. A kept attention
      multiplier takes the change of the head width.
    """
    ratio = cfg.effective_norm_width / cfg.embed
    wider = cfg.h_dim / cfg.effective_head_width
    effective = (cfg.input_mult, cfg.logits_mult, cfg.effective_residual_mult, cfg.attention_mult * wider**0.5)
    values = dict(zip(MULTIPLIERS, effective, strict=True))
    into, out, residual, scores = (1.0 if name in keep else value for name, value in values.items())

    def one(sig: Signature) -> float:
        if sig.gains:
            if any(KINDS[axis] is Kind.PAIRED for axis in sig.gains):
                return float(scores**0.5)
            last = cfg.tied and not sig.stacked
            return float(ratio**0.5 * (out / into if last else 1.0))
        if "vocab" in sig.reads:
            return into
        if "vocab" in sig.writes:
            return out
        if sig.stacked and sig.role(STACK_AXIS) is Role.WRITER:
            return residual
        query = "heads" in sig.writes
        if cfg.qk_norm and (query or sig.contracted):
            return float(ratio**0.5)
        return float(scores) if query else 1.0

    plain = cfg.replace(
        norm_width=None,
        norm_eps=cfg.norm_eps * ratio,
        head_width=None,
        rope_theta=cfg.rope_theta**wider,
        base_layers=None,
        **{name: values[name] if name in keep else 1.0 for name in MULTIPLIERS if name != "output_mult"},
        **({} if "output_mult" in keep else dict(output_mult=1.0, base_width=cfg.embed)),
    )
    return jax.tree.map(one, declared(cfg)[1]), plain


def fold(params: Params, cfg: ModelConfig, keep: Collection[str] = ()) -> tuple[Params, ModelConfig]:
    """The parameters and the configuration of the same function without kept widths and multipliers; see `factors`.

    Parameters should be at least float32: in bfloat16, each product is rounded to 8 bits again.
    """
    by, plain = factors(cfg, keep)
    return jax.tree.map(lambda x, f: x if f == 1 else x * f, params, by), plain
