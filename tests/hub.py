"""A Hugging Face tokenizer and a Llama of a few thousand parameters, made here as the files of a model."""

import json
from pathlib import Path

import jax.numpy as jnp

from flm_jax.config import ModelConfig

TEXT = "It grows, and goes on: the small model is in the large one.\nNothing that it knew is lost; 12 345 ways, été.\n"
BEGIN, END = "<s>", "</s>"


def write_tokenizer(folder: Path, begin: bool = False, size: int = 300) -> Path:
    """A byte-level BPE tokenizer; with `begin` it has a token for the beginning, and puts it before every text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BEGIN, END] if begin else [END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    if begin:
        config["bos_token"] = {"__type": "AddedToken", "content": BEGIN, "special": True}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llama(eos_id: int, vocab: int = 304):
    """A random Llama in float32 with grouped queries, our configuration of it, and its parameters as ours."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )
    theirs = LlamaForCausalLM(config).eval()
    cfg = ModelConfig(
        embed=32,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp=48,
        vocab=vocab,
        base_width=32,
        rope_theta=10_000.0,
        compute_dtype="float32",
    )
    weights = {name: jnp.asarray(value.detach().numpy()) for name, value in theirs.named_parameters()}

    def stacked(name, *shape):
        layers = [weights[f"model.layers.{layer}.{name}.weight"] for layer in range(cfg.layers)]
        return jnp.stack([layer.T.reshape(shape) if shape else layer for layer in layers])

    heads = {"q": cfg.heads, "k": cfg.k_heads, "v": cfg.k_heads}
    attention = {
        name: stacked(f"self_attn.{name[0]}_proj", cfg.embed, heads[name[0]], cfg.h_dim)
        for name in ("query", "key", "value")
    }
    attention["out"] = stacked("self_attn.o_proj", cfg.heads, cfg.h_dim, cfg.embed)
    mlp = {name: stacked(f"mlp.{name}_proj", cfg.embed, cfg.mlp) for name in ("gate", "up")}
    mlp["down"] = stacked("mlp.down_proj", cfg.mlp, cfg.embed)
    params = {
        "embedding": weights["model.embed_tokens.weight"],
        "blocks": {
            "attention": attention,
            "attention_norm": {"scale": stacked("input_layernorm")},
            "mlp": mlp,
            "mlp_norm": {"scale": stacked("post_attention_layernorm")},
        },
        "final_norm": {"scale": weights["model.norm.weight"]},
        "head": weights["lm_head.weight"].T,
    }
    return theirs, cfg, params
