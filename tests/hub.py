"""A tokenizer and models of a few thousand parameters, made by `transformers`, and what they are when imported."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.checkpoint import Checkpoints
from flm_jax.convert.importing import import_model
from flm_jax.data.vocabulary import TokenizerVocabulary
from flm_jax.growth import Lineage
from flm_jax.sharding import make_mesh
from flm_jax.source_checkpoint import CheckpointMeta, read_source
from tests import small

TEXT = "It grows, and goes on: the small model is in the large one.\nNothing that it knew is lost; 12 345 ways, été.\n"
BEGIN, END = "<s>", "</s>"
VOCAB = 97
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
MODELS = {
    "Llama": ("Llama", {}),
    "Llama, every key head its own": ("Llama", dict(num_key_value_heads=4)),
    "Llama, tied": ("Llama", dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "Llama, wide heads": ("Llama", dict(head_dim=16)),
    "Llama 3.1": ("Llama", dict(rope_parameters=LLAMA3, head_dim=16)),
    "Mistral": ("Mistral", dict(sliding_window=None)),
    "Mistral, sliding window": ("Mistral", dict(sliding_window=7, tie_word_embeddings=True)),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, tied": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "Qwen2, sliding window": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)),
    "Qwen3": ("Qwen3", dict(head_dim=16)),
    "Qwen3, tied, scaled": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "Qwen3, sliding window": (
        "Qwen3",
        dict(head_dim=16, use_sliding_window=True, sliding_window=9, max_window_layers=0),
    ),
    "Granite": (
        "Granite",
        dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.35, logits_scaling=7.0),
    ),
    "Granite, tied": (
        "Granite",
        dict(residual_multiplier=1.7, attention_multiplier=0.125, logits_scaling=0.3, tie_word_embeddings=True),
    ),
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 40))


def write_tokenizer(folder: Path, begin: bool = False, size: int = 300, metaspace: bool = False) -> Path:
    """A byte-level BPE tokenizer; with `begin` it has a token for the beginning, and puts it before every text.

    With `metaspace` it marks the beginning of words as SentencePiece does, and its decoder drops a leading space.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if metaspace:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
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


def llama(folder: Path, vocab: int = 304, positions: int = 64):
    """A random Llama in float32 with grouped queries, beside a tokenizer, and what it is here.

    Returns:
      Their model; the work directory that it was converted into; its configuration and parameters there.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    end = TokenizerVocabulary.from_directory(folder).eos_id
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(folder)
    workdir = folder.parent / f"{folder.name}_converted"
    import_model(folder, workdir)
    return reference, workdir, *read(workdir)


def theirs(family, fields, dtype="float32"):
    """A model of `transformers` with random weights, norms and biases among them."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **fields})
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if value.ndim == 1:
                value.copy_(torch.rand_like(value) + (0.5 if "norm" in name else -0.5))
    return made


def logits_of(made, tokens):
    import torch

    with torch.no_grad():
        return made(torch.tensor(tokens)).logits.to(torch.float32).numpy()


def loaded(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def read(workdir):
    """The configuration and the parameters of a checkpoint, on one device."""
    source = read_source(workdir)
    mesh = make_mesh(None, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return source.cfg, source.restore(mesh).params


def our_logits(workdir, tokens):
    cfg, params = read(workdir)
    return np.asarray(small.apply(cfg.for_comparison, params, jnp.asarray(tokens, jnp.int32)))


def keep(tmp_path, cfg, params, before=None, growth=None):
    """A checkpoint of weights, as a run or a growth leaves it."""
    lineage = Lineage(cfg) if before is None else Lineage(cfg, growth, Lineage(before))
    meta = CheckpointMeta("mine", lineage, data={"context": 128}).record()
    with Checkpoints(tmp_path / "mine" / "checkpoints" / "0_mine") as store:
        store.save(0, {"step": jnp.int32(0), "params": params}, meta=meta)
        store.wait()
    return tmp_path / "mine"


def edit(base, tmp_path, **changes):
    """A copy of a saved model whose config.json says something else."""
    shutil.copytree(base / "in", tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
    return tmp_path / "in"
