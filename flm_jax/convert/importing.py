"""Import: Hugging Face model files to a checkpoint, a range of rows at a time, so the model may exceed the memory."""

from __future__ import annotations

import collections
import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax import costs
from flm_jax.checkpoint import blocks, checksum
from flm_jax.checkpoint.commit import commit_step, small_files
from flm_jax.checkpoint.directory import locked
from flm_jax.checkpoint.find import STAGES, stage_directory
from flm_jax.checkpoint.manifest import CheckpointError, Leaf
from flm_jax.config import ModelConfig
from flm_jax.convert import families
from flm_jax.convert.companions import FILES, read_companions
from flm_jax.convert.layout import Part, parts
from flm_jax.convert.pieces import DTYPES, block_checksum, cast, check_dtype, check_finite, in_parallel
from flm_jax.convert.repository import located
from flm_jax.convert.tensors import Stored, few, open_shards
from flm_jax.data import hub, vocabulary_files
from flm_jax.data.tokenizer_file import token_count
from flm_jax.data.vocabulary import TOKENIZER
from flm_jax.files import missing_room
from flm_jax.growth.lineage import Lineage
from flm_jax.progress import byte_bar
from flm_jax.records import counted, meant_beside
from flm_jax.source_checkpoint import CheckpointMeta

CHUNK_BYTES = 16 << 20
STAGE = "converted"
# Buffers in old files that can be computed from the configuration; they are ignored.
_DERIVED = ".rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
    """A range of rows of one of their tensors, which becomes one stored chunk of our array.

    Attributes:
      part: the parameter.
      lead: its layer, as the first index of our array.
      start: first index along `part.dim`.
      stop: index after the last.
    """

    part: Part
    lead: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk in our layout."""
        return (self.stop - self.start) * self.part.index_bytes


def import_model(
    source: str | Path, workdir: str | Path, dtype: str | None = None, chunk_bytes: int = CHUNK_BYTES
) -> dict[str, Any]:
    """Writes step 0 of a new work directory from a directory with config.json, safetensors and tokenizer.

    The checkpoint has no optimizer state. It can be grown, verified, trained on (`Recipe.start`) and exported again.

    Args:
      source: the directory, or the name of a repository of the Hugging Face hub, such as org/name@revision, whose
        files are fetched first; it is only read, and no program in it is run.
      workdir: a new or empty directory; files that a killed import has left there are removed.
      dtype: of the parameters; None: that of the files.
      chunk_bytes: bound on the bytes of a stored chunk, and of a range of rows that is read at a time.

    Returns:
      A record of what was read and written, JSON-able; the checkpoint's provenance has it too.

    Raises:
      ValueError: the model is not supported (see `families`); a tensor is missing, unknown, or of another shape than
        config.json says; a weight is NaN or infinite; the tokenizer has more tokens than the model; the work directory
        is not empty.
      FormatError: the files are damaged, or one is a link that leads out of the directory.
      CheckpointError: the disk has not enough room, or writing failed.
      HubError: the repository cannot be fetched.
    """
    workdir = Path(workdir).expanduser()
    directory = workdir / STAGES / stage_directory(0, STAGE)
    # Before gigabytes are fetched.
    _check_new(workdir, directory)
    if dtype is not None:
        check_dtype(dtype)
    source, origin = located(source)
    cfg, config, found, files = examine(source, dtype)
    with locked(directory):
        partial = directory / "0.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            leaves = _write(cfg, found, partial, chunk_bytes)
            record = {
                "stage": STAGE,
                **origin,
                "architecture": families.family_of(config, str(source / families.CONFIG)).architecture,
                "tensors": len(found),
                "bytes": sum(tensor.nbytes for tensor in found.values()),
                "params": costs.param_count(cfg),
                "files": sorted(files),
            }
            meta = CheckpointMeta(STAGE, Lineage(cfg), provenance=record, converted=config).record()
            on_disk = {partial / "arrays" / blocks.key_of(path) for path in leaves if path != "step"}
            blobs = {**files, **_vocabulary(files, source)}
            commit_step(partial, 0, leaves, small_files(meta, blobs), on_disk)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{error.filename or directory}: {error.strerror or error}. Nothing was left in {workdir}."
            ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return {**record, "model": costs.shape_line(cfg), "dtype": cfg.param_dtype}


Found = Mapping[tuple[str, tuple[int, ...]], Stored]


def examine(source: Path, dtype: str | None = None) -> tuple[ModelConfig, dict[str, Any], Found, dict[str, bytes]]:
    """What an import would read from a directory, once everything but the values of weights has been checked.

    Returns:
      The model, its config.json, the tensor of each layer of each parameter, and the files that are taken along.

    Raises:
      ValueError: as `import_model`.
    """
    if not source.is_dir():
        raise ValueError(
            f"{source} is not a directory; give one with {families.CONFIG} and safetensors files"
            f"{meant_beside(source) or '.'}{hub.advice(source)}"
        )
    hub.check_whole(source, FILES)
    config = families.read_json(source / families.CONFIG)
    cfg = families.model_config(config, str(source / families.CONFIG))
    stored = open_shards(source)
    cfg = cfg.replace(param_dtype=_dtype(dtype, stored, source))
    _check_sizes(cfg, stored, source)
    found = _match(cfg, stored, source)
    files = read_companions(source)
    _check_tokenizer(cfg, files, source)
    return cfg, config, found, files


def _dtype(asked: str | None, stored: Mapping[str, Stored], source: Path) -> str:
    if asked is not None:
        return check_dtype(asked)
    found = collections.Counter(tensor.dtype.name for name, tensor in stored.items() if not name.endswith(_DERIVED))
    if len(found) == 1 and (name := next(iter(found))) in DTYPES:
        return name
    listed = ", ".join(f"{count} of {name}" for name, count in found.most_common())
    raise ValueError(
        f"{source} holds tensors of more than one dtype, or of another than {', '.join(DTYPES)}: {listed}. Set the "
        "dtype of the parameters with --dtype."
    )


def _check_sizes(cfg: ModelConfig, stored: Mapping[str, Stored], source: Path) -> None:
    """Compares the sizes in config.json with those of the tensors, before anything of these sizes is built.

    Raises:
      ValueError: the tensors cannot be those of such a model.
    """
    where = source / families.CONFIG
    if cfg.layers > len(stored):
        raise ValueError(
            f"{where} describes {counted(cfg.layers, 'layer')}, but the files hold only "
            f"{counted(len(stored), 'tensor')}."
        )
    held = [tensor for tensor in stored.values() if tensor.nbytes]
    longest = max((size for tensor in held for size in tensor.shape), default=0)
    entries = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in held)
    heads, vocab = cfg.heads * cfg.h_dim, cfg.vocab
    for what, size in (("hidden_size", cfg.embed), ("intermediate_size", cfg.mlp), ("vocab_size", vocab)):
        if size > 4 * longest:  # closer ones are told which tensor does not fit, by `_match`
            raise ValueError(f"{where}: {what} is {size}, but no tensor in the files is longer than {longest}.")
    # Fewer than there are in the embedding, in the queries and in one matrix of each MLP.
    least = cfg.embed * (vocab + cfg.layers * (heads + cfg.mlp))
    if least > entries:
        raise ValueError(
            f"{where} describes a model of more than {least} weights, but the files hold only {entries}; see its "
            "vocab_size, num_hidden_layers, num_attention_heads, head_dim and intermediate_size."
        )


def _match(cfg: ModelConfig, stored: Mapping[str, Stored], source: Path) -> Found:
    """The stored tensor of each layer of each parameter, by path and layer index.

    Raises:
      ValueError: a tensor is missing, has another shape, is not floating-point, or does not belong to the model.
    """
    expected = {part.name(lead): (part, lead) for part in parts(cfg) for lead in part.leads}
    if missing := [name for name in expected if name not in stored]:
        raise ValueError(
            f"{source} lacks {len(missing):,} of the {counted(len(expected), 'tensor')} that its "
            f"{families.CONFIG} describes: "
            f"{few(missing)}."
        )
    unknown = [name for name in stored if name not in expected and not name.endswith(_DERIVED)]
    if cfg.tied and "lm_head.weight" in unknown:
        _check_same(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
        unknown.remove("lm_head.weight")
    if unknown:
        raise ValueError(
            f"{source} has {counted(len(unknown), 'tensor')} that its {families.CONFIG} has no place for: "
            f"{few(unknown)}. They "
            "would be lost, so nothing is imported."
        )
    for name, (part, _) in expected.items():
        tensor = stored[name]
        if tensor.shape != part.theirs:
            raise ValueError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, but according to {families.CONFIG} it must "
                f"have {list(part.theirs)} ({part.signature})."
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
            raise ValueError(f"{tensor.file}: {name} is {tensor.dtype.name}; only weights of 16 bits or more are read.")
    return {(part.path, lead): stored[name] for name, (part, lead) in expected.items()}


def _check_same(head: Stored, embedding: Stored) -> None:
    """Checks that a head stored beside a tied embedding, as in some files, is equal to it.

    Raises:
      ValueError: it is not.
    """
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    step = max(CHUNK_BYTES // max(head.row_bytes, 1), 1)
    for start in range(0, head.count if same else 0, step):
        stop = min(start + step, head.count)
        same = same and head.rows(start, stop).tobytes() == embedding.rows(start, stop).tobytes()
    if not same:
        raise ValueError(
            f"{head.file}: lm_head.weight differs from the embedding, but {families.CONFIG} ties them; if the model "
            'has a head of its own, set "tie_word_embeddings": false.'
        )


def _check_tokenizer(cfg: ModelConfig, files: Mapping[str, bytes], source: Path) -> None:
    if TOKENIZER not in files:
        return
    file = source / TOKENIZER
    size = token_count(files[TOKENIZER], str(file))
    if size > cfg.vocab:
        raise ValueError(
            f"{file} has {size} tokens, but the model's embedding only {cfg.vocab} rows: it is not this model's "
            "tokenizer."
        )


def _vocabulary(files: Mapping[str, bytes], source: Path) -> dict[str, bytes]:
    """The record of the tokenizer as a vocabulary; none if the files do not say which token ends a document."""
    try:
        found = vocabulary_files.from_files(files, str(source))
    except vocabulary_files.VocabularyError:
        return {}  # whoever needs the vocabulary is told why, or names the token
    return {} if found is None else vocabulary_files.to_files(found)


def _check_new(workdir: Path, directory: Path) -> None:
    left = {".lock", "0.partial"}
    inside = [path for path in workdir.rglob("*") if path != directory and path != directory.parent]
    ours = all(directory in path.parents and path.relative_to(directory).parts[0] in left for path in inside)
    if workdir.exists() and not (workdir.is_dir() and ours):
        raise ValueError(f"{workdir} is not empty; convert into a new directory.")


def _write(cfg: ModelConfig, found: Found, partial: Path, chunk_bytes: int) -> dict[str, Leaf]:
    """Writes the arrays; returns the manifest's leaves with their checksums."""
    arrays, every = partial / "arrays", list(parts(cfg))
    likes = {f"params/{part.path}": jax.ShapeDtypeStruct(part.whole, part.dtype) for part in every}
    needed = sum(math.prod(like.shape) * like.dtype.itemsize for like in likes.values())
    partial.mkdir()
    if missing := missing_room(partial, needed):
        raise CheckpointError(f"{missing}.")
    step = jnp.zeros((), jnp.int32)
    runs = {part.path: _run(part, chunk_bytes) for part in every}
    chunks = {f"params/{part.path}": _chunk(part, runs[part.path]) for part in every}
    blocks.write_skeleton(arrays, {**likes, "step": step}, chunks)
    sums: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))

    def convert(tile: Tile) -> tuple[Tile, Any]:
        part = tile.part
        tensor = found[part.path, tile.lead]
        rows = tensor.rows(tile.start * part.row_step, tile.stop * part.row_step)
        check_finite(rows, tensor.name, tensor.file)
        block = cast(part.to_ours(rows), part.dtype, part.name(tile.lead))
        path = f"params/{part.path}"
        blocks.write_chunk(arrays, path, chunks[path], (*tile.lead, *_at(part, tile.start // runs[part.path])), block)
        return tile, block_checksum(part, block, tile.lead, 0, tile.start)

    with byte_bar(needed, 0, "converting") as shown:
        for tile, lanes in in_parallel(convert, _tiles(every, runs)):
            path = f"params/{tile.part.path}"
            sums[path] = checksum.add(sums[path], lanes)
            shown.update(tile.nbytes)
    leaves = {
        f"params/{part.path}": Leaf(
            part.whole, part.dtype.name, str(part.signature), checksum.digest(sums[f"params/{part.path}"])
        )
        for part in every
    }
    return {"step": Leaf((), "int32", "", checksum.digests({"step": checksum.of(step)})["step"]), **leaves}


def _run(part: Part, chunk_bytes: int) -> int:
    """The number of indices along `part.dim` per tile.

    Tiles are made about equally large, because the last chunk is stored at full size even if it is partly empty.
    """
    size, most = part.shape[part.dim], max(chunk_bytes // part.index_bytes, 1)
    return -(-size // -(-size // most))


def _chunk(part: Part, run: int) -> tuple[int, ...]:
    shape = [*((1,) if part.layers else ()), *part.shape]
    shape[part.dim + bool(part.layers)] = run
    return tuple(shape)


def _at(part: Part, number: int) -> tuple[int, ...]:
    """A chunk's index within its layer."""
    return tuple(number if dim == part.dim else 0 for dim in range(len(part.shape)))


def _tiles(every: list[Part], runs: Mapping[str, int]) -> Iterator[Tile]:
    for part in every:
        size, run = part.shape[part.dim], runs[part.path]
        for lead in part.leads:
            for start in range(0, size, run):
                yield Tile(part, lead, start, min(start + run, size))
