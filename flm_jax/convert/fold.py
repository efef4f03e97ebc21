"""The same function by a model without multipliers and kept widths, for programs that know neither.

Each of these is a number that some parameter can take over, so folding multiplies whole parameters by numbers and
changes a few fields of the configuration. With d and D the width that norms divide by and the model's own, h and H the
width that scores are divided by the root of and the head's own:

- x / sqrt(s / d + eps) = sqrt(d / D) x / sqrt(s / D + eps d / D): scales times sqrt(d / D), eps times d / D. Norms of
  queries and keys divide by H as ever, but share the one eps of such formats: what they read is multiplied by
  sqrt(d / D), which they then undo.
- Scores over sqrt(h) are scores over sqrt(H) of queries times sqrt(H / h). Behind norms of their own, queries and keys
  share that: their scales are each multiplied by its root.
- Rotary frequencies theta^(-2i/h) are those of width H with theta^(H/h) for theta.
- The input multiplier goes into the embedding and the logits' into the head. Where one matrix is both, it takes the
  input's, and the last norm's scale their ratio.
"""

from __future__ import annotations

from typing import Any

import jax

from flm_jax.config import ModelConfig
from flm_jax.model import Params, declared
from flm_jax.signature import KINDS, Kind, Signature


def factors(cfg: ModelConfig, multipliers: bool = True) -> tuple[Any, ModelConfig]:
    """By what every parameter is multiplied, and the configuration that then computes the same.

    Args:
      cfg: the model, past the ramp of its masks.
      multipliers: whether the multipliers of embedding and logits are folded too, or stay as they are.

    Returns:
      A tree of numbers like the parameters, 1.0 for what stays bit for bit, and a configuration without `norm_width`
      and `head_width`, whose multipliers are 1 if they are folded.
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
    """Parameters and configuration of the same function in plain form; see `factors`.

    In bfloat16 what is multiplied is rounded anew: fold parameters of at least float32.
    """
    by, plain = factors(cfg, multipliers)
    return jax.tree.map(lambda x, f: x if f == 1 else x * f, params, by), plain
