"""Corpora of tables and of records: Parquet, TFRecord, ArrayRecord; their libraries are imported when they are read."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flm_jax.data.folders import endings_of, find_files
from flm_jax.data.json_lines import RowError
from flm_jax.data.reading import MissingExtraError, load_tensorflow
from flm_jax.data.rows import RowCorpus, Span
from flm_jax.data.text import Percent
from flm_jax.records import meant, meant_beside, recorded
from flm_jax.records.fields import Count

# How many rows of a Parquet file are in memory at a time.
ROWS = 1024


def _missing(path: Path, package: str, error: ImportError) -> MissingExtraError:
    return MissingExtraError(
        f"{path} is read with {package}, which cannot be imported ({error}): pip install -e '.[data]' in a checkout."
    )


@dataclasses.dataclass(frozen=True)
@recorded
class Parquet(RowCorpus):
    """Parquet: each row of a file, or of every *.parquet in a folder, has a document in its column `field`.

    A column inside another one is named by its path, such as 'page.text'. A row without a value holds no document.

    Attributes:
      path: a file, or a folder of such files.
      field: the column.
      heldout_percent: share of the documents that is held out.
      most_faulty: how many rows may be left out because they are not UTF-8; more are an error.
    """

    path: str = dataclasses.field(metadata={"identity": False})
    field: str = "text"
    heldout_percent: Percent = 5.0
    most_faulty: Count = dataclasses.field(default=0, metadata={"identity": False})  # as in Jsonl

    def files(self) -> list[tuple[str, Path]]:
        """See RowCorpus."""
        return find_files(self.path, (".parquet",))

    def texts(self, path: Path, span: Span | None = None) -> Iterator[tuple[int, str | RowError]]:
        """See RowCorpus.

        Raises:
          ValueError: the file is no Parquet, has no such column, or the column is not text.
        """
        del span  # a file is read as a whole
        yield from enumerate(self._texts(path), 1)

    def _texts(self, path: Path) -> Iterator[str | RowError]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise _missing(path, "pyarrow", error) from error
        try:
            # Pages without a checksum, as most writers make them, cannot be verified.
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                column = _column(file.schema_arrow, self.field, path)
                if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
                    raise ValueError(f"{path}: the column {self.field!r} is {column}, and should be text")
                before = 0
                for batch in file.iter_batches(ROWS, columns=[self.field]):
                    values = batch.column(0)
                    for inner in self.field.split(".")[1:] if self.field not in batch.schema.names else ():
                        values = values.field(inner)
                    yield from _decoded(values, path, before)
                    before += len(values)
        # Of a damaged page that has a checksum, Arrow raises OSError without a number.
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path} cannot be read as Parquet, it is damaged or cut short: {error}") from error


def _decoded(values: Any, path: Path, before: int) -> Iterator[str | RowError]:
    """Yields the texts of an array, '' where there is none, an error where one is not UTF-8.

    Args:
      values: the array.
      path: the file's, for errors.
      before: how many rows of the file are before it.
    """
    try:
        yield from (value or "" for value in values.to_pylist())
    except UnicodeDecodeError:
        for row, value in enumerate(values, before + 1):
            found: str | RowError
            try:
                found = value.as_py() or ""
            except UnicodeDecodeError as error:
                found = _not_utf8(f"{path}, row {row}", error)
            yield found


def _not_utf8(where: str, error: UnicodeDecodeError) -> RowError:
    return RowError(f"{where}, is not UTF-8 text ({error.reason} at byte {error.start})", "not UTF-8")


def _column(schema: Any, field: str, path: Path) -> Any:
    """The type of a column of a table, named by its path.

    Raises:
      ValueError: there is none.
    """
    names = [field] if field in schema.names else field.split(".")
    fields, found = {own.name: own.type for own in schema}, None
    for name in names:
        if name not in fields:
            near = meant(name, fields)
            raise ValueError(f"{path} has no column {field!r}: found {', '.join(sorted(fields)) or 'none'}{near}")
        found = fields[name]
        fields = {found.field(i).name: found.field(i).type for i in range(found.num_fields)}
    return found


@dataclasses.dataclass(frozen=True)
@recorded
class Records(RowCorpus):
    """TFRecord or ArrayRecord files: each record is a tf.train.Example with a document in its feature `field`.

    With `field` = '' a record is the text itself, in UTF-8. Names contain .tfrecord or .array_record, as those of TFDS.

    Attributes:
      path: a file, or a folder of such files.
      field: the feature.
      heldout_percent: share of the documents that is held out.
      most_faulty: how many records may be left out because they are no Example with one text in this feature, or not
        UTF-8; more are an error.
    """

    path: str = dataclasses.field(metadata={"identity": False})
    field: str = "text"
    heldout_percent: Percent = 5.0
    most_faulty: Count = dataclasses.field(default=0, metadata={"identity": False})  # as in Jsonl
    unit = "record"

    def files(self) -> list[tuple[str, Path]]:
        """See RowCorpus."""
        root = Path(self.path).expanduser()
        if root.is_file():
            return [(root.name, root)]
        if not root.is_dir():
            raise FileNotFoundError(f"there is no file or folder {root}{meant_beside(root)}")
        kinds = (".tfrecord", ".array_record")
        found = sorted(p for p in root.rglob("*") if any(kind in p.name for kind in kinds) and p.is_file())
        if not found:
            held = endings_of(root)
            raise FileNotFoundError(
                f"there is no {' or '.join(kinds)} file in {root}" + (f"; it holds {held}" * bool(held))
            )
        return [(p.relative_to(root).as_posix(), p) for p in found]

    def texts(self, path: Path, span: Span | None = None) -> Iterator[tuple[int, str | RowError]]:
        """See RowCorpus.

        Raises:
          ValueError: the file is damaged.
        """
        del span  # a file is read as a whole
        for number, record in enumerate(_records(path), 1):
            found: str | RowError
            try:
                found = self._text(record, f"{path}, record {number}")
            except RowError as error:
                found = error
            yield number, found

    def _text(self, record: bytes, where: str) -> str:
        content = record
        if self.field:
            tf, _ = load_tensorflow()
            try:
                features = tf.train.Example.FromString(record).features.feature
            except Exception as error:  # protobuf's own, of a module that differs between versions
                raise RowError(f"{where}, is no tf.train.Example: {error}", "no Example") from error
            if self.field not in features:
                near = meant(self.field, features)
                found = ", ".join(sorted(features))
                raise RowError(f"{where}, has no feature {self.field!r}: found {found}{near}", "no such feature")
            values = features[self.field].bytes_list.value
            if len(values) != 1:
                said = f"{where}: the feature {self.field!r} has {len(values)} texts, and should have one"
                raise RowError(said, "no text")
            content = values[0]
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from None


def _records(path: Path) -> Iterator[bytes]:
    """Yields the records of a file, in order."""
    if ".array_record" in path.name:
        try:
            from array_record.python import array_record_module
        except ImportError as error:
            raise _missing(path, "array_record", error) from error
        try:
            with contextlib.closing(array_record_module.ArrayRecordReader(str(path))) as reader:
                for first in range(0, reader.num_records(), ROWS):
                    yield from reader.read(range(first, min(first + ROWS, reader.num_records())))
        except (ValueError, RuntimeError, IndexError) as error:
            said = str(error) or "no record is found at its end"
            raise ValueError(f"{path} cannot be read as ArrayRecord, it is damaged or cut short: {said}") from error
        return
    tf, _ = load_tensorflow()
    try:
        yield from tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise ValueError(f"{path} cannot be read as TFRecord, it is damaged or cut short: {error.message}") from error
