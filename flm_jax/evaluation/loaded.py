"""A checkpoint's model, loaded to be evaluated: its vocabulary, its context length, the dtype that it computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flm_jax.config import ModelConfig
from flm_jax.data import hub
from flm_jax.data.train_vocabulary import load_vocabulary
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.evaluation.scoring import Scorer, check_vocabulary
from flm_jax.generation import Generator
from flm_jax.model import Masks, Params
from flm_jax.records.foreign_json import check, parse_json
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.source_checkpoint import CONFIG, SourceCheckpoint, read_source

# Upper bound of the default context length, for models made for contexts that are too long to evaluate by default.
LONGEST_BY_DEFAULT = 4096


class LoadedModel(NamedTuple):
    """A checkpoint's model on a mesh.

    Attributes:
      source: the checkpoint.
      cfg: the model, as it is computed.
      params: its parameters.
      masks: growth masks, during their ramp.
      vocabulary: the checkpoint's own, or the one that was given.
      length: the longest sequence that the model reads, in tokens.
      mesh: where the parameters are.
      note: a sentence if the vocabulary is not known to be the checkpoint's, else ''.
      origin: repository and commit of a vocabulary from the Hugging Face hub, else ''.
    """

    source: SourceCheckpoint
    cfg: ModelConfig
    params: Params
    masks: Masks | None
    vocabulary: Vocabulary
    length: int
    mesh: Mesh
    note: str
    origin: str = ""

    def scorer(self, rows: int) -> Scorer:
        """What scores windows of tokens with the model, `rows` per batch."""
        return Scorer(self.cfg, self.params, self.mesh, self.length, rows, self.masks)

    def generator(self, rows: int = 16, apart: bool | None = None) -> Generator:
        """What answers prompts with the model, `rows` per batch; `apart` is that of `Generator`."""
        return Generator(self.cfg, self.params, self.vocabulary, self.mesh, self.masks, rows, apart)

    def record(self) -> dict[str, Any]:
        """What was evaluated, and how, JSON-able."""
        return {
            "checkpoint": str(self.source.directory),
            "step": self.source.step,
            "digest": self.source.digest,
            "tokenizer": {
                "kind": self.vocabulary.kind,
                "size": self.vocabulary.size,
                "digest": self.vocabulary.digest,
                **({"origin": self.origin} if self.origin else {}),
            },
            "max_length": self.length,
            "dtype": self.cfg.compute_dtype,
        }

    def sentence(self) -> str:
        """The same in words."""
        return (
            f"{self.source.directory}: {self.vocabulary.kind} vocabulary of {self.vocabulary.size} ids, sequences of "
            f"{self.length} tokens, computed in {self.cfg.compute_dtype}."
        )


def load_model(
    checkpoint: str | Path,
    tokenizer: str | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    mesh: MeshConfig | None = None,
) -> LoadedModel:
    """Loads a checkpoint's model; every bit of its parameters is checked.

    Args:
      checkpoint: a step, a stage's directory or a work directory.
      tokenizer: another vocabulary than the checkpoint's own: a checkpoint, a directory with tokenizer.json, a
        SentencePiece model file, or a repository of the Hugging Face hub as org/name@revision.
      max_length: the longest sequence to read, in tokens; None: as `find_length`.
      dtype: what to compute in; None: the dtype of the checkpoint's parameters.
      mesh: how devices are laid out.

    Raises:
      ValueError: the vocabulary is not known or does not fit the model.
      FileNotFoundError: there is nothing at `tokenizer`.
      HubError: the repository cannot be fetched.
      DamagedError: the checkpoint is not as it was saved.
    """
    source = read_source(checkpoint)
    cfg = computed_in(source.cfg, dtype)
    vocabulary = source.vocabulary if tokenizer is None else load_vocabulary(tokenizer)
    note = "" if tokenizer is None else source.other_vocabulary(vocabulary)
    origin = "" if tokenizer is None else hub.origin(tokenizer) or ""
    check_vocabulary(vocabulary, cfg.vocab)
    length = max_length or find_length(source)
    placed = make_mesh(mesh)
    with jax.set_mesh(placed):
        params = source.restore_params(placed)
    return LoadedModel(source, cfg, params, source.masks(), vocabulary, length, placed, note, origin)


def computed_in(cfg: ModelConfig, dtype: str | None) -> ModelConfig:
    """The model as it is evaluated: in `dtype`, or in the dtype of its parameters."""
    chosen = dtype or cfg.param_dtype
    # This machine, this dtype or the lengths of the texts may not suit the kernel that the model was trained with.
    return cfg.replace(compute_dtype=chosen, attention="auto" if cfg.attention == "cudnn" else cfg.attention)


def find_length(source: SourceCheckpoint) -> int:
    """The context length that a checkpoint's model was made for, in tokens, at most LONGEST_BY_DEFAULT.

    Raises:
      ValueError: neither the checkpoint's config.json nor the record of its data has it.
    """
    config = parse_json(source.files.get(CONFIG, b"{}"), f"{source.directory}: {CONFIG}")
    said = [config.get("max_position_embeddings"), source.context]
    where = f"{source.directory}: the length that its model was made for"
    length = max((n for n in said if n is not None and check(n, int, where)), default=None)
    if length is None:
        raise ValueError(
            f"The context length of the model of {source.directory} is not known: neither a config.json in the "
            "checkpoint nor the recorded data of its run gives it; set --max_length."
        )
    return min(length, LONGEST_BY_DEFAULT)
