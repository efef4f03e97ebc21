"""Growing from disk to disk: the bits of a growth in memory, whatever the blocks, the kills and the damage."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    blocks,
    checksum,
    manifest,
    read_manifest,
    verify,
)
from flm_jax.checkpoint_growth import grow_checkpoint
from flm_jax.growth import Growth, Lineage
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.source_checkpoint import CheckpointMeta, read_source
from flm_jax.state import abstract_state
from flm_jax.step import make_grower
from tests import small

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("compiled_as_in_use")]

ROOT = Path(__file__).resolve().parent.parent
OLD = small.config(heads=4, kv_heads=2, embed=16, mlp=24, head_dim=4)
NEW = OLD.replace(embed=22, heads=9, kv_heads=3, head_dim=6, layers=5, mlp=31, vocab=70)
SHARDED = small.shape(embed=16, mlp=24)
SILENT = {"head_dim": "zero", "layers": "zero"}
CHUNK = 900


def save(workdir: Path, cfg, mesh=None, optimizer="adamw") -> Path:
    """A checkpoint of random values, as a run saves it."""
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    rng = np.random.default_rng(0)

    def one(like):
        value = rng.uniform(0.1, 1, like.shape) if like.shape else np.asarray(5)
        return jax.device_put(value.astype(like.dtype), like.sharding)

    with jax.set_mesh(mesh):
        state = jax.tree.map(one, abstract_state(Lineage(cfg), mesh, optimizer=optimizer))
        meta = CheckpointMeta("first", Lineage(cfg), optimizer=optimizer).record()
        with Checkpoints(workdir / "checkpoints" / "0_first") as store:
            store.save(3, state, meta=meta)
    return workdir


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("source") / "run", OLD)


def lineage_to(source: Path, target, growth) -> Lineage:
    return read_source(source).lineage.grown(target, growth)


def in_memory(source: Path, target, growth, seed=0) -> dict[str, str]:
    """The checksums of the leaves of a growth in memory."""
    lineage = lineage_to(source, target, growth)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        grower = make_grower(lineage, mesh, optimizer=read_source(source).meta.optimizer)
        grown = grower(read_source(source).restore(mesh), jax.random.key(seed))
        return checksum.digests({p: checksum.of(x) for p, x in manifest.leaf_paths(grown).items()})


def stream(source: Path, workdir: Path, target=NEW, growth=None, chunk=CHUNK, **fields):
    return grow_checkpoint(source, workdir, target, growth or Growth(), streamed=True, chunk_bytes=chunk, **fields)


def step(workdir: Path) -> Path:
    return workdir / "checkpoints" / "0_grown" / "0"


def checksums(workdir: Path) -> dict[str, str]:
    return {path: leaf.checksum for path, leaf in read_manifest(step(workdir)).leaves.items()}


PLANS = {
    "zero, carried, layers where it says": (NEW, Growth("zero", depth=(1, 2), optimizer="carry")),
    "copies, exact": (NEW, Growth("copy", methods={**SILENT, "vocab": "mean"}, optimizer="exact")),
    "noise and identity, anew": (
        NEW,
        Growth("noise", methods={**SILENT, "layers": "identity", "vocab": "zero"}, depth="top", optimizer="fresh"),
    ),
    "from above, asymmetric": (
        NEW,
        Growth("aki", methods={**SILENT, "layers": "stack", "vocab": "fresh"}, depth="stack", optimizer="asymmetric"),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_streamed_is_in_memory_bit_for_bit(name, source, tmp_path):
    target, growth = PLANS[name]
    record = stream(source, tmp_path / "grown", target, growth)
    assert checksums(tmp_path / "grown") == in_memory(source, target, growth)
    assert verify(step(tmp_path / "grown")).ok
    read = record["verification"]["streamed"]["source"]["leaves"]
    assert read == (12 if growth.optimizer == "fresh" else 37)
    assert json.loads((tmp_path / "grown" / "growth.json").read_text())["source_digest"] == read_source(source).digest


@pytest.mark.parametrize("mode", ["exact", "fresh"])
def test_a_state_of_muon_is_streamed_to_the_same_bits(mode, tmp_path):
    """Its matrices have no second moment, and it stays Muon's."""
    source = save(tmp_path / "run", OLD, optimizer="muon")
    growth = Growth("copy", methods={"layers": "zero", "vocab": "mean"}, optimizer=mode)
    target = NEW.replace(head_dim=OLD.head_dim)
    record = stream(source, tmp_path / "grown", target, growth)
    assert checksums(tmp_path / "grown") == in_memory(source, target, growth)
    assert read_source(tmp_path / "grown").meta.optimizer == "muon"
    assert not any("nu/blocks/mlp/" in path for path in checksums(tmp_path / "grown"))
    read = record["verification"]["streamed"]["source"]["leaves"]
    assert read == (12 if mode == "fresh" else 37 - 7)
    with pytest.raises(ValueError, match="Muon cannot go on exactly where head_dim grows by 'zero'"):
        stream(
            source, tmp_path / "refused", NEW, Growth("copy", methods={**SILENT, "vocab": "mean"}, optimizer="exact")
        )
    assert not (tmp_path / "refused").exists()


FROM_NOTHING = {
    "deeper and wider": (NEW, Growth("noise", methods={**SILENT, "layers": "identity", "vocab": "mean"})),
    "wider": (NEW.replace(layers=0), Growth("copy", methods={**SILENT, "vocab": "zero"}, optimizer="exact")),
}


def test_a_source_without_layers_grows_to_the_same_bits_too(tmp_path):
    """Arrays without entries have a place in the manifest, and no file."""
    source = save(tmp_path / "run", OLD.replace(layers=0))
    for name, (target, growth) in FROM_NOTHING.items():
        stream(source, tmp_path / name, target, growth)
        assert checksums(tmp_path / name) == in_memory(source, target, growth)
        assert verify(step(tmp_path / name)).ok


def test_a_sharded_source_with_masks_and_a_tied_embedding_restores_sharded(tmp_path):
    """Chunks are the shares of eight devices; of the target, which grows again, they are blocks."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    tied = SHARDED.replace(tied=True)
    source = save(tmp_path / "run", tied, mesh)
    growth = Growth("mask", ramp_steps=3, methods={"vocab": "zero"})
    target = tied.replace(embed=32, mlp=40, heads=8, kv_heads=4, layers=3, vocab=272, output_mult=2.0)
    stream(source, tmp_path / "grown", target, growth, chunk=2000)
    expected = in_memory(source, target, growth)
    assert checksums(tmp_path / "grown") == expected
    with jax.set_mesh(mesh):
        abstract = abstract_state(read_source(tmp_path / "grown").lineage, mesh)
        with Checkpoints(step(tmp_path / "grown").parent, read_only=True) as store:
            state = store.restore(abstract).state
        assert not state.params["blocks"]["mlp"]["gate"].sharding.is_fully_replicated
        found = {path: checksum.of(x) for path, x in manifest.leaf_paths(state).items()}
        assert checksum.digests(found) == expected


GO = """
import sys
from flm_jax.growth import Growth
from flm_jax.checkpoint_growth import grow_checkpoint
from tests.test_streaming import NEW
grow_checkpoint(sys.argv[1], sys.argv[2], NEW, Growth(), streamed=True, chunk_bytes=300)
"""


def test_killed_at_any_time_it_goes_on_to_the_same_bits(source, tmp_path):
    expected = in_memory(source, NEW, Growth())
    journal = step(tmp_path / "grown").parent / "0.growing.jsonl"
    rng, lines = np.random.default_rng(0), [0]
    for _ in range(3):
        run = subprocess.Popen(
            [sys.executable, "-c", GO, source, tmp_path / "grown"], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        wanted = lines[-1] + int(rng.integers(20, 200))
        while run.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= wanted):
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not step(tmp_path / "grown").exists()
        lines.append(journal.read_bytes().count(b"\n"))
        assert lines[-1] > lines[-2]
    kept = step(tmp_path / "grown").parent / "0.growing" / "arrays"
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*/*")}
    journal.write_bytes(journal.read_bytes()[:-3])  # a line that was cut off
    stream(source, tmp_path / "grown", chunk=300)
    assert checksums(tmp_path / "grown") == expected
    after = {path: (step(tmp_path / "grown") / path.relative_to(kept.parent)).stat().st_mtime_ns for path in before}
    assert sum(before[path] == after[path] for path in before) > len(before) - 20, "it began anew"
    assert sorted(p.name for p in step(tmp_path / "grown").parent.iterdir()) == [".lock", "0"]


class Full:
    """A disk that has room for so many blocks."""

    def __init__(self, blocks_left):
        self.left, self.write = blocks_left, blocks.write_block

    def __call__(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the disk")
        self.write(*arguments)


def test_a_full_disk_is_said_and_the_same_call_goes_on_but_another_growth_begins_anew(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "write_block", Full(30))
        with pytest.raises(CheckpointError, match="the disk cannot be written: No space left.*goes on where this one"):
            stream(source, tmp_path / "grown")
    assert not step(tmp_path / "grown").exists()
    with pytest.raises(ValueError, match="is not empty"):
        grow_checkpoint(source, tmp_path / "grown", NEW, Growth())
    shutil.copytree(tmp_path / "grown", tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "write_block", full := Full(10**6))
        stream(source, tmp_path / "grown")
        once = full.left
        stream(source, tmp_path / "other", seed=1)
        assert once - full.left > 10**6 - once, "blocks of another seed were kept"
    assert checksums(tmp_path / "other") == in_memory(source, NEW, Growth(), seed=1)
    assert checksums(tmp_path / "grown") == in_memory(source, NEW, Growth())


@pytest.mark.parametrize("where", ["write_identity", "write_record"])
def test_killed_between_the_commit_and_the_record_it_only_writes_the_record(source, tmp_path, where):
    stream(source, tmp_path / "grown")
    record = (tmp_path / "grown" / "growth.json").read_text()
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"flm_jax.checkpoint_growth.grow.{where}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stream(source, tmp_path / "again", records={"config.gin": "x"})
        with pytest.raises(ValueError, match="holds another grown checkpoint"):
            stream(source, tmp_path / "again", seed=1)
    stream(source, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "growth.json").read_text())["plan"] == json.loads(record)["plan"]
    assert checksums(tmp_path / "again") == checksums(tmp_path / "grown")
    with pytest.raises(ValueError, match="is not empty"):
        stream(source, tmp_path / "again")


def test_a_damaged_source_is_refused_by_name_and_nothing_is_left(source, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    arrays = next(broken.rglob("manifest.ocdbt")).parent
    (run,) = blocks.open_leaves(
        arrays, {"params/blocks/mlp/up": jax.ShapeDtypeStruct((2, 16, 24), jnp.float32)}
    ).values()
    layer = np.empty((16, 24), np.float32)
    run.read((0,), 0, layer)
    (where,) = (file for file in arrays.rglob("*") if file.is_file() and layer.tobytes() in file.read_bytes())
    content = bytearray(where.read_bytes())
    content[content.index(layer.tobytes()) + layer.nbytes // 2] ^= 8
    where.write_bytes(content)
    with pytest.raises(DamagedError, match="is damaged: it does not match its sha256"):
        stream(broken, tmp_path / "grown")
    with monkeypatch.context() as patch:  # files above 1 MiB have no sha256 of their own
        patch.setattr(manifest, "file_faults", lambda *_, **__: [])
        with pytest.raises(DamagedError, match="the values of params/blocks/mlp/up have changed"):
            stream(broken, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
    where.write_bytes(content[:-20])
    with pytest.raises(DamagedError, match=f"{where.name} has"):
        stream(arrays.parent, tmp_path / "new")


def test_what_cannot_be_streamed_is_refused_with_what_would_be_right(source, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"depth='distance' needs a run of the source.*or take a place, such as 'inter"
    ):
        stream(source, tmp_path / "grown", growth=Growth(depth="distance"))
    with pytest.raises(ValueError, match="no use for a mesh, nor for data"):
        grow_checkpoint(source, tmp_path / "grown", NEW, Growth(), mesh=MeshConfig(), streamed=True)
    with pytest.raises(ValueError, match="chunk_bytes=0 must be positive"):
        stream(source, tmp_path / "grown", chunk=0)
    (tmp_path / "file").write_text("")
    with pytest.raises((CheckpointError, NotADirectoryError), match="Not a directory"):
        stream(source, tmp_path / "file" / "grown")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        CheckpointError,
        match="has room for 1e-06 GB, and .*: free some, or take a --workdir on another disk",
    ):
        stream(source, tmp_path / "grown")
    assert not step(tmp_path / "grown").exists()


def test_on_the_command_line(source, tmp_path, capsys):
    import gin

    from flm_jax.cli import runs

    fields = {name: value for name, value in dataclasses.asdict(NEW).items() if value != getattr(OLD, name)}
    given = {**dataclasses.asdict(OLD), **fields}
    bindings = [f"ModelConfig.{name} = {value!r}" for name, value in given.items()]
    bindings += ["grow.target = @ModelConfig()", "grow.growth = @Growth()", "Growth.method = 'zero'"]
    gin.clear_config()
    runs.run_grow(
        str(source), str(tmp_path / "grown"), [], [*bindings, "grow.streamed = True", "grow.chunk_bytes = 5000"]
    )
    gin.clear_config()
    assert "all with the checksums of the source" in capsys.readouterr().out
    assert verify(step(tmp_path / "grown")).ok
