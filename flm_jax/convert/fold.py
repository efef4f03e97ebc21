"""Folds kept widths and multipliers into the parameters, for programs that support neither.

Folding multiplies whole parameters by numbers and changes some fields of the configuration; the function stays the
same. Let d be the number that norms divide by and D the model's width, h the head width in scores and rotary
frequencies and H the heads' real width:

- Norms: x / sqrt(s / d + eps) = sqrt(d / D) x / sqrt(s / D + eps d / D). So scales are multiplied by sqrt(d / D), and
  eps by d / D. Norms of queries and keys divide by H in any case, but a config.json has only one eps for all norms:
  their input is multiplied by sqrt(d / D), which cancels in these norms once eps is changed.
- Scores: q k / sqrt(h) = (q sqrt(H / h)) k / sqrt(H), so queries are multiplied by sqrt(H / h). If queries and keys
  have norms, the scales of both norms are multiplied by (H / h)^(1/4) instead.
- Rotary frequencies: theta^(-2i/h) = (theta^(H/h))^(-2i/H), so theta is replaced by theta^(H/h).
- The input multiplier is folded into the embedding, the logits' multiplier into the head. If these are one matrix
  (tied), it takes the input multiplier, and the scale of the final norm takes their ratio.
"""

from __future__ import annotations

from typing import Any

import jax

from flm_jax.config import ModelConfig
from flm_jax.model import Params, declared
from flm_jax.signature import KINDS, Kind, Signature


def factors(cfg: ModelConfig, multipliers: bool = True) -> tuple[Any, ModelConfig]:
    """The factor of every parameter, and the configuration that computes the same function with the scaled parameters.

    Args:
      cfg: the model, after the ramp of its masks.
      multipliers: whether to fold the multipliers of embedding and logits too; otherwise they stay as they are.

    Returns:
      A tree of factors like the parameters, with 1.0 for parameters that stay bit for bit, and a configuration without
      `norm_width` and `head_width`, whose multipliers are 1 if they are folded.
    """
    ratio = cfg.effective_norm_width / cfg.embed
    wider = cfg.h_dim / cfg.effective_head_width
    into, out = (cfg.input_mult, cfg.logits_mult) if multipliers else (1.0, 1.0)

    def one(sig: Signature) -> float:
        if sig.gains:
            if any(KINDS[axis] is Kind.PAIRED for axis in sig.gains):
                return float(wider**0.25)
            last = cfg.tied and not sig.stacked
            return float(ratio**0.5 * (out / into if last else 1.0))
        if "vocab" in sig.reads:
            return into
        if "vocab" in sig.writes:
            return out
        query = "heads" in sig.writes
        if cfg.qk_norm and (query or sig.contracted):
            return float(ratio**0.5)
        return float(wider**0.5) if query else 1.0

    plain = cfg.replace(
        norm_width=None,
        norm_eps=cfg.norm_eps * ratio,
        head_width=None,
        rope_theta=cfg.rope_theta**wider,
        **(dict(input_mult=1.0, output_mult=1.0, base_width=cfg.embed) if multipliers else {}),
    )
    return jax.tree.map(one, declared(cfg)[1]), plain


def fold(params: Params, cfg: ModelConfig, multipliers: bool = True) -> tuple[Params, ModelConfig]:
    """The parameters and the configuration of the same function without kept widths and multipliers; see `factors`.

    Parameters should be at least float32: in bfloat16, each product is rounded to 8 bits again.
    """
    by, plain = factors(cfg, multipliers)
    return jax.tree.map(lambda x, f: x if f == 1 else x * f, params, by), plain
