"""Reads documents of file corpora as tf.data. TensorFlow is imported only inside these functions.

Only operations whose position tf.data can save are used: `streaming.py` depends on this to resume exactly.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from flm_jax.data.json_lines import RowError
from flm_jax.data.left_out import sentence
from flm_jax.data.rows import Jsonl
from flm_jax.data.text import FileCorpus, name_hash

_log = logging.getLogger(__name__)


class MissingExtraError(ImportError):
    """A package that only an optional extra installs is missing; the message names the extra."""


def load_tensorflow() -> tuple[Any, Any]:
    """Imports TensorFlow and seqio, and keeps TensorFlow off the accelerators, which JAX uses.

    Returns:
      The modules (tensorflow, seqio).

    Raises:
      MissingExtraError: they are not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with _without_start_up_messages():
            _load_triton_first()
            import seqio
            import tensorflow as tf

            with contextlib.suppress(RuntimeError):  # already in use: its devices have been chosen
                tf.config.set_visible_devices([], "GPU")
    except ImportError as error:
        raise MissingExtraError(
            f"Reading this text needs TensorFlow and seqio, which cannot be imported ({error}): "
            "pip install -e '.[data]' in a checkout. Files of text and JSON lines without DataConfig.streamed, and "
            "prepared token stores, need neither."
        ) from error
    return tf, seqio


def _load_triton_first() -> None:
    """Loads triton, if something has installed it, because loading it after TensorFlow crashes the process.

    Both contain LLVM, in different versions, and export its symbols. TensorFlow offers its own to every library that is
    loaded later (RTLD_GLOBAL), so that triton's start would call functions of TensorFlow's LLVM. A library that is
    already loaded keeps its own. GPU builds of PyTorch bring triton, and load it only once something asks for it
    (torch.compile, or a model class of transformers), which may be long after text was read.
    """
    if "tensorflow" not in sys.modules:  # otherwise it is loaded already, or too late
        # Reading text does not need triton: whatever is wrong with it is for those to say who do.
        with contextlib.suppress(Exception):
            importlib.import_module("triton._C.libtriton")


# What TensorFlow's C++ logs before logging is set up, whatever TF_CPP_MIN_LOG_LEVEL says.
_LOGGED = re.compile(rb"[IWE]\d{4} |WARNING: All log messages before absl::InitializeLog")


@contextlib.contextmanager
def _without_start_up_messages() -> Iterator[None]:
    """A context without TensorFlow's messages about GPUs that it does not find; JAX uses those.

    Everything else that is written to the standard error stream, by any thread, is written at the end of the context.
    """
    try:
        real = os.dup(2)
    except OSError:  # closed, as in some services
        yield
        return
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            for line in held:
                if not _LOGGED.match(line):
                    os.write(2, line)


def read_files(corpus: FileCorpus, split: str, shuffle_files: bool, seed: int | None = None) -> Any:
    """The seqio dataset function of a corpus of files, with examples {'targets': text}."""
    tf, _ = load_tensorflow()
    if (parts := corpus.parts(split)) is not None:
        dataset = tf.data.Dataset.from_tensor_slices(tf.constant(parts, tf.string))
        if shuffle_files:
            dataset = dataset.shuffle(max(len(parts), 1), seed=seed)
        return dataset.map(lambda text: {"targets": text})
    paths = [os.fsencode(path) for path in corpus.files(split)]  # names of files need not be UTF-8
    dataset = tf.data.Dataset.from_tensor_slices(tf.constant(paths, tf.string))
    if shuffle_files:
        dataset = dataset.shuffle(max(len(paths), 1), seed=seed)  # names are small: shuffle all of them at once
    return dataset.map(lambda path: {"targets": tf.io.read_file(path)}, num_parallel_calls=tf.data.AUTOTUNE)


def read_lines(corpus: Jsonl, split: str, shuffle_files: bool, seed: int | None = None) -> Any:
    """The seqio dataset function of JSON lines, with examples {'targets': text}."""
    tf, _ = load_tensorflow()
    left_out = corpus.left_out()
    border = corpus.border(left_out)
    if split == "train" and (said := sentence(left_out.record())):
        _log.warning("%s: %s.", corpus.path, said)
    files = corpus.files()
    dataset = tf.data.Dataset.from_tensor_slices(
        tuple(tf.constant([os.fsencode(pair[i]) for pair in files], tf.string) for i in (0, 1))
    )
    if shuffle_files:
        dataset = dataset.shuffle(len(files), seed=seed)

    def parse(name: bytes, path: bytes, number: int, line: bytes) -> tuple[bool, np.ndarray]:
        try:
            text = corpus.parse(line, f"{os.fsdecode(path)}:{number + 1}")
        except RowError:
            if not corpus.most_faulty:
                raise
            text = ""  # `border` has found that so many may be left out
        heldout = name_hash(f"{os.fsdecode(name)}:{number + 1}") < border
        encoded = np.array(text.encode(), object)  # NumPy's own bytes type would drop final NULs
        return bool(text) and heldout == (split == "heldout"), encoded

    def lines(name: Any, path: Any) -> Any:
        numbered = tf.data.TextLineDataset(path).enumerate()
        return numbered.map(
            # Declared stateless: otherwise the position of the stream could not be saved.
            lambda number, line: tf.numpy_function(
                parse, [name, path, number, line], (tf.bool, tf.string), stateful=False
            )
        )

    return (
        dataset.flat_map(lines)
        .filter(lambda keep, _: tf.ensure_shape(keep, []))
        .map(lambda _, text: {"targets": tf.ensure_shape(text, [])})
    )
