"""Grows a checkpoint into a new work directory, outside a run: in memory, or streamed from disk to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from flm_jax import costs
from flm_jax.checkpoint import CheckpointError, Checkpoints
from flm_jax.checkpoint.find import STAGES, stage_directory
from flm_jax.checkpoint_growth.record import GrowthRecord
from flm_jax.checkpoint_growth.streaming import CHUNK_BYTES, finish, grow_streamed, unfinished
from flm_jax.checkpoint_growth.verify import failures_text, observe_before, verification_text, verify_growth
from flm_jax.config import ModelConfig
from flm_jax.data.config import DataConfig
from flm_jax.distributed import print0
from flm_jax.growth.distance import settle
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.plan import Growth, changed
from flm_jax.growth.rescaling import check_continues
from flm_jax.progress import phases
from flm_jax.records import write_identity, write_record
from flm_jax.sharding import MeshConfig, make_mesh, put_batch
from flm_jax.source_checkpoint import CheckpointMeta, SourceCheckpoint, read_source, signature_texts
from flm_jax.state import kept
from flm_jax.step import make_grower

RECORD, STAGE = "growth.json", "grown"
Describe = Callable[[Lineage, tuple[float, ...], Mapping[str, Any]], GrowthRecord]


def grow_checkpoint(
    source: str | Path,
    workdir: str | Path,
    target: ModelConfig | Mapping[str, Any],
    growth: Growth,
    seed: int = 0,
    mesh: MeshConfig | None = None,
    data: DataConfig | None = None,
    tolerance: float = 1e-5,
    records: Mapping[str, str] | None = None,
    streamed: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Any]:
    """Grows a checkpoint, optimizer state included, into step 0 of a new work directory; the source is only read.

    A streamed growth may be larger than memory: the result is the same, bit for bit, but neither model is run. If it is
    killed, the same call resumes it.

    Args:
      source: a step, a stage's directory or a work directory.
      workdir: new, or empty.
      target: the shape to grow to; or the fields in which it differs from the source's.
      growth: how to grow.
      seed: for drawn entries.
      mesh: how devices are laid out.
      data: held-out text for distances and verification; None: that of the token store that the source records, if it
        is still there, else random tokens.
      tolerance: largest relative difference of logits that a preserving method may show, in float32.
      records: texts to keep in the work directory, by file name.
      streamed: grow block by block from disk to disk; no model is run, so neither a mesh nor data is used.
      chunk_bytes: the largest block of a streamed growth.

    Returns:
      The record of the growth (see `GrowthRecord`), also written to the work directory as growth.json. `Recipe.start`
      continues from that directory.

    Raises:
      ValueError: the growth does not fit the source, it is streamed and needs distances, or the work directory is in
        use.
      DamagedError: the source is not as it was saved.
      CheckpointError: the source does not record its model, or the growth breaks its promise; nothing is written.
    """
    if streamed and (mesh is not None or data is not None):
        raise ValueError("A streamed growth runs no model: it has no use for a mesh, nor for data. Leave them out.")
    workdir = Path(workdir).expanduser()
    directory = workdir / STAGES / stage_directory(0, STAGE)
    if workdir.exists() and any(workdir.iterdir()) and not (streamed and _begun(workdir, directory)):
        raise ValueError(f"{workdir} is not empty; grow into a new directory.")
    checkpoint = read_source(source)
    checkpoint.check_settled()
    wanted = changed(checkpoint.cfg, target, growth) if isinstance(target, Mapping) else target
    lineage = checkpoint.lineage.grown(wanted, growth)
    check_continues(lineage, checkpoint.meta.optimizer)
    if not lineage.outline:
        raise ValueError(
            f"Nothing grows: the checkpoint has the target's shape already, {costs.shape_line(checkpoint.cfg)}."
        )

    if checkpoint.unknown_vocabulary:
        print0(f"The grown checkpoint will hold no vocabulary. {checkpoint.unknown_vocabulary}")

    def describe(lineage: Lineage, distances: tuple[float, ...], found: Mapping[str, Any]) -> GrowthRecord:
        fields = dict(source=str(checkpoint.directory), source_digest=checkpoint.digest, seed=seed, distances=distances)
        return GrowthRecord.of(STAGE, lineage, found, **fields)

    if streamed:
        record = _grow_streamed(checkpoint, lineage, directory, seed, chunk_bytes, describe, workdir)
    else:
        record = _grow_in_memory(checkpoint, lineage, directory, seed, mesh, data, tolerance, describe)
    write_identity(workdir, RECORD, record.record())
    for name, text in (records or {}).items():
        write_record(workdir, name, text)
    finish(directory)
    return record.record()


def _begun(workdir: Path, directory: Path) -> bool:
    """Whether a work directory holds nothing but a streamed growth that did not finish."""
    # The record and texts may be there already: the journal is deleted last.
    inside = [path.relative_to(workdir).parts for path in (*workdir.iterdir(), *workdir.glob("*/*")) if path.is_dir()]
    alone = sorted(inside) == [(STAGES,), (STAGES, directory.name)]
    return alone and unfinished(directory)


def _grow_streamed(
    source: SourceCheckpoint,
    lineage: Lineage,
    directory: Path,
    seed: int,
    chunk_bytes: int,
    describe: Describe,
    workdir: Path,
) -> GrowthRecord:
    if not lineage.is_settled:
        raise ValueError(
            "Growth.depth='distance' needs a run of the source model, which a streamed growth does without: measure "
            "where it fits in memory (flm_jax.growth.distance.settle), and give Growth.depth as the copies that follow "
            "each layer; or take a place, such as 'interleave'."
        )

    def described(verified: Mapping[str, Any]) -> GrowthRecord:
        command = f"python experiments/verify.py --source={source.directory} --target={workdir}"
        run = {"models": "not run: they may not fit in memory; where they do, run the command", "command": command}
        method = {"method": lineage.last_growth.name, "preserving": lineage.preserving}
        return describe(lineage, (), {**method, "streamed": verified, **run})

    def meta(verified: Mapping[str, Any]) -> Mapping[str, Any]:
        about: dict[str, Any] = {"data": source.meta.data, "optimizer": source.meta.optimizer}
        return CheckpointMeta(STAGE, lineage, provenance=described(verified).record(), **about).record()

    return described(grow_streamed(source, lineage, directory, seed, meta, chunk_bytes))


def memory_warning(old: ModelConfig, new: ModelConfig, trained: bool, free: int | None) -> str | None:
    """What to say before a growth in memory that may not fit; None: nothing.

    Args:
      old: the model before growth.
      new: the grown model.
      trained: whether there is optimizer state.
      free: bytes of memory that are free; None: not known.
    """
    # Both states; a copy of the new one that is saved; for the verification its parameters, their gradients and
    # updates in float32.
    states = [(3 if trained else 1) * 4 * costs.param_count(cfg) for cfg in (old, new)]
    needed = states[0] + 2 * states[1] + 3 * 4 * costs.param_count(new)
    if free is None or needed <= free:
        return None
    return (
        f"Growing in memory takes about {costs.size(needed)}, and {costs.size(free)} are free: the system may end the "
        "program. Block by block it takes little: grow.streamed = True."
    )


def free_memory() -> int | None:
    """Bytes of the host's memory that programs can still get; None: models run elsewhere, or it is not known."""
    if jax.default_backend() != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _grow_in_memory(
    source: SourceCheckpoint,
    lineage: Lineage,
    directory: Path,
    seed: int,
    mesh: MeshConfig | None,
    data: DataConfig | None,
    tolerance: float,
    describe: Describe,
) -> GrowthRecord:
    placed = make_mesh(mesh)
    if warning := memory_warning(source.cfg, lineage.cfg, source.trained, free_memory()):
        print0(warning)
    text = verification_text(source, data, placed)
    names = ("reading the source", "running it", "growing it", "running the grown model", "saving it")
    with jax.set_mesh(placed), phases(*names) as begin:
        begin()
        state = source.restore(placed, optimizer=None)
        begin()
        batch = put_batch(text.few, placed)
        lineage, distances = settle(lineage, state.params, batch.inputs_BT, batch.segments_BT)
        CheckpointMeta(STAGE, lineage).record()  # Refuses a ramp that does not fit, before anything is grown.
        before = observe_before(lineage, state.params, text, placed)
        begin()
        optimizer = source.meta.optimizer
        grower = make_grower(lineage, placed, weights=not source.trained, optimizer=optimizer)
        grown = grower(state, jax.random.key(seed))
        begin()
        found = verify_growth(lineage, before, grown, text, placed, tolerance, optimizer=optimizer)
        record = describe(lineage, distances, found)
        if not found["holds"]:
            raise CheckpointError(f"The growth does not hold, and nothing was written: {failures_text(found)}")
        begin()
        about: dict[str, Any] = {"provenance": record.record(), "data": source.meta.data, "optimizer": optimizer}
        meta = CheckpointMeta(STAGE, lineage, **about).record()
        blobs = source.files_with(None)
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(0, kept(grown), signatures=signature_texts(lineage.cfg), meta=meta, blobs=blobs)
            checkpoints.wait()
    return record
