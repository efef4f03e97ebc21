"""Data sets of the library `datasets`: a repository of the hub at a commit, or a directory that save_to_disk wrote.

The library is imported when the corpus is read. It runs no code of a repository: from version 4 on it cannot.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flm_jax.data import hub
from flm_jax.data.json_lines import RowError
from flm_jax.data.left_out import LeftOut, kept
from flm_jax.data.reading import MissingExtraError
from flm_jax.data.rows import RowCorpus, Span
from flm_jax.data.text import Percent
from flm_jax.files import read_bounded
from flm_jax.records import meant, meant_beside, recorded
from flm_jax.records.foreign_json import check, parse_json

# Rows in memory at a time.
ROWS = 1024
# What save_to_disk writes: beside the folders of several splits, and beside the tables of one.
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"
MOST_BYTES = 1 << 24
# The first version that cannot run the script of a repository.
SAFE = 4


@dataclasses.dataclass(frozen=True)
@recorded
class HubDataset(RowCorpus):
    """A data set of the library `datasets`: `path` is a repository of the hub, or a directory of `save_to_disk`.

    A repository is named as org/name@revision; `subset` is one of its configurations. Each row of `split` has a
    document in its column `field`; one inside another is named by its path, such as 'page.text'. Documents are held out
    of the same split.
    """

    path: str = dataclasses.field(metadata={"identity": False})
    field: str = "text"
    split: str = "train"
    subset: str | None = None
    heldout_percent: Percent = 5.0

    @property
    def repository(self) -> hub.Name | None:
        """The repository that the path names; None: it is a directory."""
        return hub.named(self.path)

    def files(self) -> list[tuple[str, Path]]:
        """See RowCorpus; none of a repository, whose files are the library's affair.

        Raises:
          ValueError: the directory was not written by `save_to_disk`, or has no such split.
        """
        if self.repository is not None:
            return []
        folder, _ = self._saved()
        return [(path.name, path) for path in sorted(folder.glob("*.arrow"))]

    def listed(self) -> None:
        """See RowCorpus; the library reads its files."""
        return

    def lines(self, left_out: LeftOut | None = None) -> Iterator[tuple[str, str]]:
        """See RowCorpus; rows are named by the split."""
        left_out = self.left_out() if left_out is None else left_out
        for number, text in kept(self.texts(Path(self.path)), left_out):
            yield f"{self.split}:{number}", text

    def texts(self, path: Path, span: Span | None = None) -> Iterator[tuple[int, str | RowError]]:
        """See RowCorpus; the rows in the order of the data set, whatever the path. All have the column's type.

        Raises:
          ValueError: the library cannot read it, there is no such split or column, or the column is not text.
          MissingExtraError: the library is not installed.
          HubError: there is no such repository, or it cannot be asked for.
        """
        del path, span
        opened, number = self._opened(), 0
        column, *inside = [self.field] if self.field in opened.column_names else self.field.split(".")
        if column not in opened.column_names:
            near = meant(column, opened.column_names)
            raise ValueError(f"{self.path} has no column {column!r}: found {', '.join(opened.column_names)}{near}")
        rows = opened.select_columns([column]).with_format(None).iter(batch_size=ROWS)
        while (batch := self._next(rows)) is not None:
            for value in batch[column]:
                number += 1
                yield number, self._text(value, inside, f"{self.path}, row {number} of {self.split!r}")

    def _next(self, rows: Iterator[dict[str, list[Any]]]) -> dict[str, list[Any]] | None:
        try:
            return next(rows, None)
        except Exception as error:  # of Arrow, of the network, of the library
            raise self._unreadable(error) from error

    def _text(self, value: Any, inside: list[str], where: str) -> str:
        for name in inside:
            if isinstance(value, dict) and name not in value:
                found = ", ".join(sorted(value))
                raise ValueError(f"{where} has no field {self.field!r}: found {found}{meant(name, value)}")
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: the field {self.field!r} is {type(value).__name__}, and should be text")
        return value or ""

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path} cannot be read by the library datasets: {' '.join(str(error).split()):.400}")

    def _opened(self) -> Any:
        datasets = _library(self.path)
        name = self.repository
        if name is None:
            load = functools.partial(datasets.load_from_disk, str(self._saved()[0]))
        else:
            commit = hub.dataset_commit(name)
            load = functools.partial(
                datasets.load_dataset, name.repository, self.subset, revision=commit, split=self.split
            )
        try:
            return load()
        except Exception as error:  # the library raises many kinds, and those of others
            raise self._unreadable(error) from error

    def _saved(self) -> tuple[Path, dict[str, Any]]:
        """The folder of the split, and what was recorded with it.

        Raises:
          FileNotFoundError: there is no such directory.
          ValueError: it was not written by `save_to_disk`, or has no such split.
        """
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"there is no folder {root}{meant_beside(root) or '.' + hub.advice(self.path)}")
        if self.subset is not None:
            raise ValueError(f"HubDataset.subset = {self.subset!r} is for repositories, and {root} is a folder.")
        if (root / SPLITS_FILE).is_file():
            known = _json(root / SPLITS_FILE).get("splits")
            names = [
                name for name in check(known, list, f"the splits in {root / SPLITS_FILE}") if isinstance(name, str)
            ]
            if self.split not in names:
                raise ValueError(
                    f"{root} has no split {self.split!r}: found {', '.join(names)}{meant(self.split, names)}"
                )
            root = root / self.split
        if not (root / STATE_FILE).is_file():
            raise ValueError(
                f"{root} holds no {STATE_FILE}, so it is no data set of save_to_disk; files of text, JSON lines or "
                "Parquet are read with @TextFolder(), @Jsonl() or @Parquet()."
            )
        state = _json(root / STATE_FILE)
        if state.get("_split") not in (None, self.split):
            raise ValueError(f"{root} is the split {state['_split']!r}, and HubDataset.split is {self.split!r}.")
        return root, state

    def describe(self) -> dict[str, Any]:
        """The kind and fields of the corpus, and which data it was: the commit, or the fingerprint of the library.

        Its identity, `digest`, is that of its documents: neither a cache nor a fingerprint is trusted.
        """
        name = self.repository
        if name is None:
            return {**super().describe(), "fingerprint": self._saved()[1].get("_fingerprint")}
        return {**super().describe(), "commit": hub.dataset_commit(name)}


def _json(path: Path) -> dict[str, Any]:
    return check(parse_json(read_bounded(path, MOST_BYTES), str(path)), dict, str(path))


@functools.cache
def _library(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is read with datasets, which cannot be imported ({error}): pip install -e '.[datasets]' in a "
            "checkout."
        ) from error
    version = importlib.metadata.version("datasets")
    if int(version.partition(".")[0]) < SAFE:
        raise MissingExtraError(
            f"{path} is read with datasets, whose version {version} would run code of a repository: install "
            f"'datasets>={SAFE}'."
        )
    return datasets
