"""A model of a few thousand weights in the form of other programs, made without any of them."""

import json
from pathlib import Path

import numpy as np

from flm_jax.config import ModelConfig
from flm_jax.convert import families, layout, tensors
from tests import hub

VOCAB = 304
CFG = ModelConfig(embed=8, layers=2, heads=2, mlp=12, vocab=VOCAB, kv_heads=1, base_width=8)


def weights(cfg: ModelConfig = CFG) -> dict[str, np.ndarray]:
    """Random weights by the names that other programs give them."""
    rng = np.random.default_rng(0)
    likes = layout.tensors(cfg, np.dtype(np.float32))
    return {name: rng.normal(size=like.shape).astype(np.float32) for name, like in likes.items()}


def write(folder: Path, shard_bytes: int = 10**9, values=None, tokenizer: bool = True) -> Path:
    """Writes config.json, safetensors and, if asked for, a tokenizer."""
    values = weights() if values is None else values

    def fill(name: str, tensor: np.ndarray) -> None:
        tensor[...] = values[name]

    folder.mkdir(parents=True, exist_ok=True)
    tensors.save(folder, values, fill, shard_bytes)
    config = families.config_json(CFG, families.FAMILIES["LlamaForCausalLM"], "float32", 32, {})
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        hub.write_tokenizer(folder)
    return folder


def change_json(path: Path, **changes) -> None:
    """Changes fields of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
