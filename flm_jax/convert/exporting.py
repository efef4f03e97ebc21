"""Export: a checkpoint to Hugging Face model files, which transformers loads without code of flm_jax."""

from __future__ import annotations

import collections
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import costs
from flm_jax.chat.checkpoint_template import chat_template_of
from flm_jax.chat.template import ChatEncoder
from flm_jax.checkpoint import blocks, checksum, manifest
from flm_jax.checkpoint.manifest import CheckpointError, DamagedError, read_manifest
from flm_jax.config import ModelConfig
from flm_jax.convert import families, tokenizer
from flm_jax.convert.companions import FILES
from flm_jax.convert.fold import factors
from flm_jax.convert.layout import parts, tensors
from flm_jax.convert.pieces import block_checksum, cast, check_dtype, check_finite, in_parallel
from flm_jax.convert.tensors import SHARD_BYTES, save
from flm_jax.data import vocabulary_files
from flm_jax.data.special import CHAT_TEMPLATE
from flm_jax.data.vocabulary import TOKENIZER
from flm_jax.files import atomic_write, missing_room
from flm_jax.progress import byte_bar
from flm_jax.records import counted
from flm_jax.records.foreign_json import parse_json
from flm_jax.source_checkpoint import SourceCheckpoint, read_source

READ_BYTES = 16 << 20


def export_model(
    source: str | Path,
    target: str | Path,
    architecture: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes a checkpoint's weights as config.json and safetensors, with the tokenizer that it was trained with.

    Of the files in the checkpoint, only those that belong to a model (`companions.FILES`) are written.

    Kept widths and multipliers are folded into the weights (see `fold`). Weights without a factor stay the same, bit
    for bit if the dtype does not change.

    Args:
      source: a step, a stage's directory or a work directory, after the ramp of its masks; it is only read.
      target: a new or empty directory.
      architecture: the architecture to write (`families.FAMILIES`); None: the one it was imported from, or the first
        that can express the model. Multipliers that it has as settings are written as such and not folded.
      dtype: of the weights; None: that of the parameters.
      shard_bytes: bound on the bytes of a file, unless a single tensor is larger.

    Returns:
      A record of what was written, JSON-able.

    Raises:
      ValueError: the target is not empty, the masks are not at the end of their ramp, or no architecture can express
        the model; or a weight is NaN or infinite.
      DamagedError: the checkpoint is not as it was saved; the target is removed.
      CheckpointError: as `read_source`, or the disk has not enough room.
    """
    target = Path(target).expanduser()
    if target.is_file():
        raise ValueError(f"{target} is a file; export into a new directory.")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; export into a new directory.")
    checkpoint = read_source(source)
    if checkpoint.step < checkpoint.meta.ramp_steps:
        raise ValueError(
            f"{checkpoint.directory} is at step {checkpoint.step}, and its masks rise over "
            f"{counted(checkpoint.meta.ramp_steps, 'step')}: take a later checkpoint, because other "
            "programs do not support masks."
        )
    if not checkpoint.cfg.layers:
        raise ValueError(
            f"{checkpoint.directory} holds a model without layers, and other programs expect some: grow it first."
        )
    before = checkpoint.meta.converted or _recorded(checkpoint)
    family, by, cfg = _plain(checkpoint.cfg, architecture, before)
    dtype = check_dtype(dtype or cfg.param_dtype)
    context = checkpoint.context
    config = families.config_json(cfg, family, dtype, context, before)
    ids, files, fault = _tokenizer(checkpoint, config)
    config |= ids
    ids, chat = _chat(checkpoint)
    config, files = config | ids, {**files, **chat}
    planned = tensors(cfg, np.dtype(jnp.dtype(dtype)))
    needed = sum(math.prod(like.shape) * like.dtype.itemsize for like in planned.values())
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        if missing := missing_room(target, needed):
            raise CheckpointError(f"{missing}.")
        with byte_bar(needed, 0, "converting") as shown:
            save(target, planned, _filler(checkpoint, by, shown.update), shard_bytes)
        for name, content in files.items():
            atomic_write(target / name, content)
        atomic_write(target / families.CONFIG, json.dumps(config, indent=2) + "\n")
    except BaseException:
        if made:
            shutil.rmtree(target, ignore_errors=True)
        else:  # it was empty, and what was written is known
            for name in (*FILES, *(path.name for path in target.glob("model*.safetensors*"))):
                (target / name).unlink(missing_ok=True)
        raise
    leaves = jax.tree.leaves(by)
    return {
        "source": str(checkpoint.directory),
        "architecture": family.architecture,
        "model": costs.shape_line(cfg),
        "params": costs.param_count(cfg),
        "dtype": dtype,
        "tensors": len(planned),
        "bytes": needed,
        "folded": sum(f != 1 for f in leaves),
        "files": [families.CONFIG, *sorted(files)],
        "tokenizer": TOKENIZER in files,
        "tokenizer_fault": fault,
    }


def _tokenizer(source: SourceCheckpoint, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes], str]:
    """The ids of special tokens to set in config.json, the files beside it, and why there is no tokenizer.json, if so.

    A tokenizer that is used as it was imported is written as it came, and ids that config.json has stay. Others are
    written with the ids that the model was trained with.
    """
    files = {name: source.files[name] for name in FILES if name in source.files and name != families.CONFIG}
    if source.unknown_vocabulary:
        return {}, files, source.unknown_vocabulary
    vocabulary, where = source.vocabulary, str(source.directory)
    ids = tokenizer.special_ids(vocabulary)
    try:
        came = vocabulary_files.from_files({**files, families.CONFIG: source.files.get(families.CONFIG, b"{}")}, where)
    except vocabulary_files.VocabularyError:
        came = None
    if came is not None and (came.digest, came.special) == (vocabulary.digest, vocabulary.special):
        return {name: value for name, value in ids.items() if name not in config}, files, ""
    try:
        return ids, {**files, **tokenizer.tokenizer_files(vocabulary)}, ""
    except ValueError as error:
        return ids, files, f"{error}."


def _chat(source: SourceCheckpoint) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Of a model that was tuned on conversations: the ids that end an answer, and the file with its chat template."""
    corpus = (source.meta.data or {}).get("corpus")
    if source.unknown_vocabulary or not (isinstance(corpus, Mapping) and corpus.get("template")):
        return {}, {}
    template = chat_template_of(source)
    stops = list(ChatEncoder(template, source.vocabulary).stop_ids)
    first = source.vocabulary.eos_id
    stops = [first, *(stop for stop in stops if stop != first)]
    return {"eos_token_id": stops[0] if len(stops) == 1 else stops}, {CHAT_TEMPLATE: template.source.encode()}


def _recorded(source: SourceCheckpoint) -> Mapping[str, Any]:
    """The config.json that the weights were imported with, before any growth or training; empty if there was none."""
    text = source.files.get(families.CONFIG)
    found: dict[str, Any] = parse_json(text, f"{source.directory}: {families.CONFIG}") if text else {}
    return found


def _plain(cfg: ModelConfig, architecture: str | None, before: Mapping[str, Any]) -> Any:
    """The family to write, the factor of each parameter, and the configuration to write."""
    named = architecture or next(iter(families.architectures(before, "its config.json")), "")
    kept = families.FAMILIES[named].multipliers if named in families.FAMILIES else frozenset()
    by, plain = factors(cfg, kept)
    return families.choose(plain, architecture or (named if kept else None), before), by, plain


def _filler(source: SourceCheckpoint, by: Any, show: Callable[[int], Any]) -> Callable[[str, np.ndarray], None]:
    """A function for `tensors.save` that reads the tensor with a given name into an array.

    It verifies the checksum of a parameter after its last layer, so the layers must be asked for in order.

    Args:
      source: the checkpoint.
      by: tree of the factors of the parameters.
      show: called with the bytes of each range of rows that was read.

    Raises:
      DamagedError: the checkpoint is not as it was saved; the returned function raises it too.
    """
    saved = read_manifest(source.directory)
    every = list(parts(source.cfg))
    wanted = {f"params/{p.path}": jax.ShapeDtypeStruct(p.whole, p.dtype) for p in every}
    manifest.compare(saved.leaves, wanted, where=str(source.directory), partial=True)
    if faults := manifest.file_faults(source.directory, saved, contents=True):
        raise DamagedError("; ".join(faults[:3]))
    leaves = blocks.open_leaves(source.directory / "arrays", wanted)
    sums: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    sources = {
        part.name(lead): (part, lead, factor)
        for part, factor in zip(every, jax.tree.leaves(by), strict=True)
        for lead in part.leads
    }

    def fill(name: str, tensor: np.ndarray) -> None:
        part, lead, factor = sources[name]
        path = f"params/{part.path}"
        size = part.shape[0]
        run = max(READ_BYTES // (math.prod(part.shape[1:]) * part.dtype.itemsize), 1)

        def read(first: int) -> tuple[np.ndarray, int]:
            block = np.empty((min(run, size - first), *part.shape[1:]), part.dtype)
            leaves[path].read(lead, first, block)
            check_finite(block, name, f"{source.directory}, {path}")
            lanes = block_checksum(part, block, lead, first, 0)
            if factor != 1:
                block = block.astype(np.float32) * np.float32(factor)
            part.to_theirs(cast(block, tensor.dtype, name), tensor, first)
            return lanes, block.size * tensor.dtype.itemsize

        for lanes, nbytes in in_parallel(read, iter(range(0, size, run))):
            sums[path] = checksum.add(sums[path], lanes)
            show(nbytes)
        if lead == part.leads[-1] and checksum.digest(sums[path]) != saved.leaves[path].checksum:
            raise DamagedError(f"{source.directory}: the values of {path} have changed")

    return fill
