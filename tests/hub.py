"""A Hugging Face tokenizer and a Llama of a few thousand parameters, made here as the files of a model."""

import json
from pathlib import Path

import jax

from flm_jax.convert.importing import import_model
from flm_jax.data.vocabulary import TokenizerVocabulary
from flm_jax.sharding import make_mesh
from flm_jax.source_checkpoint import read_source

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


def llama(folder: Path, vocab: int = 304):
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
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    workdir = folder.parent / f"{folder.name}_converted"
    import_model(folder, workdir)
    origin, mesh = read_source(workdir), make_mesh(None, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return theirs, workdir, origin.cfg, origin.restore_params(mesh)
