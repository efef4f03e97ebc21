"""The PyTorch train step that ours is compared with: LlamaForCausalLM of transformers.

In float32, with scaled dot-product attention. Gradients are clipped at norm 1, and torch.optim.AdamW updates. The
model gets the parameters of ours, so that first losses must agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.plain_step import B1, B2, CLIP, EPS, LEARNING_RATE
from flm_jax.config import ModelConfig
from flm_jax.convert.layout import parts

# How long its threads wait actively after a step; JAX's step would be slowed down by them.
REST = 0.3


def torch_model(cfg: ModelConfig, params: Any, context: int) -> Any:
    """LlamaForCausalLM of the shape of `cfg`, with the given parameters; the logits' multiplier must be 1."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    assert cfg.logits_mult == cfg.input_mult == 1, "Llama has no multipliers"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape: dict[str, Any] = dict(
        vocab_size=cfg.vocab,
        hidden_size=cfg.embed,
        intermediate_size=cfg.mlp,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.k_heads,
        head_dim=cfg.h_dim,
        max_position_embeddings=context,
        rms_norm_eps=cfg.norm_eps,
        use_cache=False,
    )
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope, attn_implementation="sdpa")).float()
    theirs = {}
    for part, leaf in zip(parts(cfg), jax.tree.leaves(params), strict=True):
        values = np.asarray(leaf)
        for lead in part.leads:
            tensor = np.empty(part.theirs, part.dtype)
            part.to_theirs(values[lead], tensor, 0)
            theirs[part.name(lead)] = torch.from_numpy(tensor)
    model.load_state_dict(theirs)
    return model.train()


def torch_step(model: Any, x_BT: np.ndarray, y_BT: np.ndarray, compiled: bool = False) -> Callable[[], float]:
    """A callable that does one train step on the given batch and returns its loss, in nats per token.

    Args:
      model: of `torch_model`.
      x_BT: token ids.
      y_BT: the token after each.
      compiled: whether torch.compile compiles the forward and backward pass; the first step then does so.
    """
    import torch
    from torch.nn import functional

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(B1, B2), eps=EPS, weight_decay=0.0)
    x, y = (torch.from_numpy(np.array(tokens)).long() for tokens in (x_BT, y_BT))

    def loss_of(tokens: Any) -> Any:
        logits = model(input_ids=tokens).logits
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))

    forward = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step
