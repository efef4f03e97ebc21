"""A TensorFlow Datasets builder as a corpus. TensorFlow is imported only when the corpus is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flm_jax.data import reading
from flm_jax.data.text import check_split, describe_fields
from flm_jax.records import meant, recorded
from flm_jax.records.foreign_json import read_json


@dataclasses.dataclass(frozen=True)
@recorded
class Tfds:
    """A TensorFlow Datasets builder, by its name ('wiki40b/en:1.3.0'); `field` holds the text.

    Splits may be slices: train_split='train[5%:]', heldout_split='train[:5%]'.
    """

    name: str
    field: str = "text"
    data_dir: str | None = dataclasses.field(default=None, metadata={"identity": False})
    train_split: str = "train"
    heldout_split: str = "validation"

    def _recorded(self) -> list[Path]:
        """The dataset_info.json of each prepared version that the name can mean."""
        place = self.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        name, _, version = self.name.partition(":")
        return sorted((Path(place).expanduser() / name).glob(f"{version or '*.*.*'}/dataset_info.json"))

    @property
    def is_prepared(self) -> bool:
        """Whether exactly one prepared version is on disk, whose record is then all that `digest` reads."""
        return len(self._recorded()) == 1

    def digest(self) -> str:
        """The sha256 over the builder's name, version and splits (shards, bytes) and this object's fields.

        If exactly one prepared version is on disk, its record is read directly; otherwise TFDS is asked.
        """
        recorded = self._recorded()
        info = read_json(recorded[0]) if len(recorded) == 1 else tfds_info(self)
        kept = {key: info.get(key) for key in ("name", "configName", "version", "splits")}
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key != "data_dir"}
        return hashlib.sha256(json.dumps(["Tfds", fields, kept], sort_keys=True).encode()).hexdigest()

    def documents(self, split: str) -> Iterator[str]:
        """Yields the documents of one split, read by TFDS in its fixed order."""
        check_split(split)
        return tfds_documents(self, split)

    def describe(self) -> dict[str, Any]:
        """The kind and fields of the corpus."""
        return describe_fields(self)


def _builder(corpus: Tfds) -> Any:
    reading.load_tensorflow()
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(corpus.name, data_dir=corpus.data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        place = corpus.data_dir or "TFDS's own folder"
        near = meant(corpus.name.partition("/")[0], tfds.list_builders(with_community_datasets=False), most=3)
        raise ValueError(
            f"Tfds: no dataset {corpus.name!r}, neither known to TFDS nor prepared in {place}{near}"
        ) from None


def check_tfds(corpus: Tfds) -> Any:
    """The TFDS builder, after checking its splits and fields.

    Raises:
      ValueError: an unknown dataset, split or field; the message names those that exist.
    """
    builder = _builder(corpus)
    for field, split in (("train_split", corpus.train_split), ("heldout_split", corpus.heldout_split)):
        base = split.partition("[")[0]
        if builder.info.splits and base not in builder.info.splits:
            raise ValueError(
                f"Tfds: {corpus.name} has no split {base!r} for {field}: it has "
                f"{', '.join(builder.info.splits)}, and a slice of one will do, as in 'train[:5%]'"
                f"{meant(base, builder.info.splits)}"
            )
    if corpus.field not in builder.info.features:
        near = meant(corpus.field, builder.info.features)
        raise ValueError(
            f"Tfds: {corpus.name} has no field {corpus.field!r}: it has {', '.join(builder.info.features)}{near}"
        )
    return builder


def tfds_info(corpus: Tfds) -> dict[str, Any]:
    """The record of a prepared TFDS dataset, which is downloaded and prepared if necessary."""
    builder = _builder(corpus)
    builder.download_and_prepare()
    record: dict[str, Any] = json.loads(builder.info.as_json)
    return record


def tfds_documents(corpus: Tfds, split: str) -> Iterator[str]:
    """Yields the texts of one split of a TFDS dataset, in a fixed order."""
    builder = check_tfds(corpus)
    builder.download_and_prepare()
    name = corpus.train_split if split == "train" else corpus.heldout_split
    for example in builder.as_dataset(split=name, shuffle_files=False).as_numpy_iterator():
        yield example[corpus.field].decode("utf-8")
