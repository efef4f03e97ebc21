"""Export: a checkpoint to Hugging Face model files, which transformers loads without code of flm_jax."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import costs
from flm_jax.checkpoint import blocks, checksum, manifest
from flm_jax.checkpoint.manifest import CheckpointError, DamagedError, read_manifest
from flm_jax.config import ModelConfig
from flm_jax.convert import families
from flm_jax.convert.fold import factors
from flm_jax.convert.layout import Part, parts, tensors
from flm_jax.convert.pieces import block_checksum, cast, check_dtype, in_parallel
from flm_jax.convert.safetensors_writer import Writer
from flm_jax.files import atomic_write, missing_room
from flm_jax.progress import byte_bar
from flm_jax.source_checkpoint import SourceCheckpoint, read_source

SHARD_BYTES = 5 * 10**9
# Bound on the transposed copy of a tensor in memory. It matters where the checkpoint's chunks are not ranges of the
# tensor's rows (those of an import are); a tensor larger than this is read once per this number of bytes.
HELD_BYTES = 512 << 20
READ_BYTES = 16 << 20


def export_model(
    source: str | Path,
    target: str | Path,
    architecture: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    held_bytes: int = HELD_BYTES,
) -> dict[str, Any]:
    """Writes a checkpoint's weights as config.json and safetensors, with the tokenizer that it was imported with.

    Kept widths and multipliers are folded into the weights (see `fold`). Weights without a factor stay the same, bit
    for bit if the dtype does not change.

    Args:
      source: a step, a stage's directory or a work directory, after the ramp of its masks; it is only read.
      target: a new or empty directory.
      architecture: the architecture to write (`families.FAMILIES`); None: the one it was imported from, or the first
        that can express the model. As TeleFLMForCausalLM, multipliers are written as multipliers and not folded.
      dtype: of the weights; None: that of the parameters.
      shard_bytes: bound on the bytes of a file, unless a single tensor is larger.
      held_bytes: bound on the bytes of one tensor in memory; a larger tensor is read several times, unless its chunks
        are ranges of its rows.

    Returns:
      A record of what was written, JSON-able.

    Raises:
      ValueError: the target is not empty, the masks are not at the end of their ramp, or no architecture can express
        the model.
      DamagedError: the checkpoint is not as it was saved; the target is removed.
      CheckpointError: as `read_source`, or the disk has not enough room.
    """
    target = Path(target).expanduser()
    if target.is_file():
        raise ValueError(f"{target} is a file; export into a new directory.")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; export into a new directory.")
    origin = read_source(source)
    if origin.step < origin.meta.ramp_steps:
        raise ValueError(
            f"{origin.directory} is at step {origin.step}, and its masks rise over {origin.meta.ramp_steps} steps: "
            "take a later checkpoint, because other programs do not support masks."
        )
    before = origin.meta.converted or _recorded(origin)
    family, by, cfg = _plain(origin.cfg, architecture, before)
    dtype = check_dtype(dtype or cfg.param_dtype)
    context = (origin.meta.data or {}).get("context")
    config = families.config_json(cfg, family, dtype, context, before)
    planned = tensors(cfg, np.dtype(jnp.dtype(dtype)))
    needed = sum(math.prod(like.shape) * like.dtype.itemsize for like in planned.values())
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        if missing := missing_room(target, needed):
            raise CheckpointError(f"{missing}.")
        with Writer(target, planned, shard_bytes) as writer, byte_bar(needed, 0, "converting") as shown:
            for nbytes in _export(origin, by, writer, np.dtype(jnp.dtype(dtype)), held_bytes):
                shown.update(nbytes)
        files = {name: content for name, content in origin.files.items() if name != families.CONFIG}
        for name, content in files.items():
            atomic_write(target / name, content)
        atomic_write(target / families.CONFIG, json.dumps(config, indent=2) + "\n")
    except BaseException:
        if made:
            shutil.rmtree(target, ignore_errors=True)
        else:
            for path in target.iterdir():
                path.unlink()
        raise
    leaves = jax.tree.leaves(by)
    return {
        "source": str(origin.directory),
        "architecture": family.architecture,
        "model": costs.shape_line(cfg),
        "params": costs.param_count(cfg),
        "dtype": dtype,
        "tensors": len(planned),
        "bytes": needed,
        "folded": sum(f != 1 for f in leaves),
        "files": [families.CONFIG, *sorted(files)],
        "tokenizer": any(name.startswith("tokenizer.") for name in files),
    }


def _recorded(origin: SourceCheckpoint) -> Mapping[str, Any]:
    """The config.json that the weights were imported with, before any growth or training; empty if there was none."""
    text = origin.files.get(families.CONFIG)
    return json.loads(text) if text else {}


def _plain(cfg: ModelConfig, architecture: str | None, before: Mapping[str, Any]) -> Any:
    """The family to write, the factor of each parameter, and the configuration to write."""
    came = (before.get("architectures") or [None])[0]
    own = families.TELE_FLM.architecture
    keeps = (architecture or came) == own
    by, plain = factors(cfg, multipliers=not keeps)
    return families.choose(plain, architecture or (own if keeps else None), before), by, plain


def _export(origin: SourceCheckpoint, by: Any, writer: Writer, dtype: np.dtype, held_bytes: int) -> Iterator[int]:
    """Writes every tensor and verifies the checksums of what it reads; yields the bytes of each range of rows."""
    old = origin.cfg
    saved = read_manifest(origin.directory)
    every = list(parts(old))
    wanted = {f"params/{p.path}": jax.ShapeDtypeStruct(p.whole, p.dtype) for p in every}
    manifest.compare(saved.leaves, wanted, where=str(origin.directory), partial=True)
    if faults := manifest.file_faults(origin.directory, saved, contents=True):
        raise DamagedError("; ".join(faults[:3]))
    leaves = blocks.open_leaves(origin.directory / "arrays", wanted)
    for part, factor in zip(every, jax.tree.leaves(by), strict=True):
        path = f"params/{part.path}"
        total = (0, 0)
        share, size = _share(leaves[path], part, held_bytes), part.shape[part.dim]
        slabs = [(lead, at, min(at + share, size)) for lead in part.leads for at in range(0, size, share)]

        def one(slab: Any, part: Part = part, factor: float = factor, path: str = path) -> Any:
            lead, start, stop = slab
            rows = np.empty(((stop - start) * part.row_step, *part.theirs[1:]), dtype)
            sums = (0, 0)
            for first, block in _pieces(leaves[path], part, lead, start, stop):
                sums = checksum.add(sums, block_checksum(part, block, lead, first, start))
                if factor != 1:
                    block = block.astype(np.float32) * np.float32(factor)
                part.to_theirs(cast(block, dtype, part.name(lead)), rows, first)
            writer.write(part.name(lead), start * part.row_step, rows)
            return sums, rows.nbytes

        for sums, nbytes in in_parallel(one, iter(slabs)):
            total = checksum.add(total, sums)
            yield nbytes
        if checksum.digest(total) != saved.leaves[path].checksum:
            raise DamagedError(f"{origin.directory}: the values of {path} have changed")


def _share(leaf: blocks.StoredLeaf, part: Part, held_bytes: int) -> int:
    """The number of indices along `part.dim` held at a time: whole chunks if they fit, so that none is read twice."""
    chunk = leaf.chunks[part.dim + bool(part.layers)] if part.dim else 1
    return max(min(max(READ_BYTES // (chunk * part.index_bytes), 1) * chunk, held_bytes // part.index_bytes), 1)


def _pieces(
    leaf: blocks.StoredLeaf, part: Part, lead: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks that cover indices start to stop along `part.dim`, each with its first index along dimension 0."""
    if part.dim == 0:
        out = np.empty((stop - start, *part.shape[1:]), part.dtype)
        leaf.read(lead, start, out)
        yield 0, out
        return
    axis = part.dim + len(lead)
    chunk = leaf.chunks[axis]
    columns = _columns(leaf, lead, axis, start // chunk, -(-stop // chunk))
    begin, shape = start // chunk * chunk, columns.shape[len(lead) :]
    step = max(READ_BYTES // (math.prod(shape[1:]) * part.dtype.itemsize), 1)
    for first in range(0, shape[0], step):
        out = np.empty((min(step, shape[0] - first), *shape[1:]), part.dtype)
        columns.read(lead, first, out)
        yield first, out[(slice(None),) * part.dim + (slice(start - begin, stop - begin),)]


def _columns(leaf: blocks.StoredLeaf, lead: tuple[int, ...], axis: int, start: int, stop: int) -> blocks.StoredLeaf:
    """A view of a leaf with only the chunks of one layer, and chunks start to stop along an axis."""
    chunk = leaf.chunks[axis]
    grid = [range(-(-size // of)) for size, of in zip(leaf.shape, leaf.chunks, strict=True)]
    grid[: len(lead)] = [range(at // of, at // of + 1) for at, of in zip(lead, leaf.chunks[: len(lead)], strict=True)]
    grid[axis] = range(start, stop)
    runs = {}
    for index in itertools.product(*grid):
        if run := leaf.runs.get(".".join(map(str, index))):
            runs[".".join(map(str, (*index[:axis], index[axis] - start, *index[axis + 1 :])))] = run
    along = min(stop * chunk, leaf.shape[axis]) - start * chunk
    return dataclasses.replace(leaf, shape=(*leaf.shape[:axis], along, *leaf.shape[axis + 1 :]), runs=runs)
