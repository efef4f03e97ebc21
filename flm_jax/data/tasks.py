"""Converts corpora to seqio tasks, and seqio tasks to corpora.

TensorFlow is imported only inside these functions.

Documents are read by tf.data operations that can be checkpointed (lists of files, TextLineDataset, TFDS), so that a
stream resumes exactly; `streaming.py` depends on it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flm_jax.data import reading
from flm_jax.data.corpora import Corpus, FileCorpus, Jsonl, RowCorpus, SeqioTask, Tfds
from flm_jax.data.reading import load_tensorflow
from flm_jax.data.text import check_split
from flm_jax.data.tfds import check_tfds
from flm_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, TokenizerVocabulary, Vocabulary
from flm_jax.records import meant


@dataclasses.dataclass(frozen=True)
class Source:
    """A seqio task or mixture, ready to be read.

    Attributes:
      task: the seqio.Task or seqio.Mixture.
      vocabulary: a vocabulary of ours with the ids of the task's own.
      feature: the output feature that holds the tokens.
      splits: from 'train' and 'heldout' to the task's names for them.
    """

    task: Any
    vocabulary: Vocabulary
    feature: str
    splits: Mapping[str, str]

    @property
    def is_mixture(self) -> bool:
        """Whether it is a mixture of several tasks."""
        _, seqio = load_tensorflow()
        return isinstance(self.task, seqio.Mixture)

    def _check_has(self, split: str) -> None:
        if self.splits[split] not in self.task.splits:
            known = sorted(self.task.splits)
            near = meant(self.splits[split], known)
            raise ValueError(f"{self.task.name} has no split {self.splits[split]!r}: it has {', '.join(known)}{near}")

    def dataset(self, split: str, **options: Any) -> Any:
        """The tf.data.Dataset of one split, in a fixed order unless shuffled; a mixture's rates apply.

        Args:
          split: 'train' or 'heldout'.
          **options: for seqio: shuffle, seed, num_epochs.
        """
        check_split(split)
        self._check_has(split)
        tf, _ = load_tensorflow()
        # If it were cached in memory, a small dataset would be written in full into every saved position.
        options = {"num_epochs": 1, "shuffle": False, **options, "try_in_mem_cache": False}
        dataset = self.task.get_dataset(sequence_length=None, split=self.splits[split], **options)
        deterministic = tf.data.Options()
        deterministic.deterministic = True
        return dataset.with_options(deterministic)

    def documents(self, split: str) -> Iterator[tuple[np.ndarray, int]]:
        """Yields each document's tokens, int (n,), and the length of its text in bytes, in a fixed order.

        The tasks of a mixture are read one after the other: seqio would end the whole mixture with the first task that
        runs out, and leave the rest of the others unread.
        """
        check_split(split)
        _, seqio = load_tensorflow()
        if self.is_mixture:
            self._check_has(split)
            for task in seqio.get_subtasks(self.task):
                if self.splits[split] in task.splits:
                    yield from dataclasses.replace(self, task=task).documents(split)
            return
        pretokenized = f"{self.feature}_pretokenized"
        for example in self.dataset(split).as_numpy_iterator():
            tokens = np.asarray(example[self.feature]).ravel()
            if "text_bytes" in example:
                length = int(example["text_bytes"])
            elif isinstance(example.get(pretokenized), bytes):
                length = len(example[pretokenized])
            else:
                length = len(self.vocabulary.decode(tokens).encode())
            yield tokens, length


def resolve(corpus: Corpus, vocabulary: Vocabulary | None = None, shuffle_buffer: int | None = None) -> Source:
    """The seqio source of a corpus.

    Args:
      corpus: any of `corpora`.
      vocabulary: for every corpus but a SeqioTask, which has its own.
      shuffle_buffer: see register_task.

    Raises:
      ValueError: an unknown task, module or feature, a vocabulary that is neither SentencePiece nor bytes, or a text
        corpus without a vocabulary.
    """
    if isinstance(corpus, RowCorpus) and (not isinstance(corpus, Jsonl) or corpus.compressed):
        raise ValueError(
            f"{type(corpus).__name__} {corpus.path}: seqio reads neither compressed lines nor tables during training; "
            "set DataConfig.streamed = False."
        )
    _, seqio = load_tensorflow()
    if not isinstance(corpus, SeqioTask):
        if vocabulary is None:
            raise ValueError(f"{corpus} holds text: it needs a vocabulary")
        task = seqio.TaskRegistry.get(register_task(corpus, vocabulary, shuffle_buffer))
        return Source(task, vocabulary, "targets", {"train": "train", "heldout": "heldout"})
    if corpus.module:
        try:
            importlib.import_module(corpus.module)
        except ModuleNotFoundError as error:
            raise ValueError(f"SeqioTask: the module {corpus.module!r} cannot be imported: {error}") from None
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    if corpus.name not in known:
        others = f"; there are {len(known)}, such as {', '.join(known[:3])}" if known else "; there are none at all"
        raise ValueError(
            f"no seqio task or mixture {corpus.name!r} is registered"
            f"{f' by {corpus.module}' if corpus.module else ' (SeqioTask.module is not set)'}"
            f"{meant(corpus.name, known, most=3) or others}"
        )
    task = seqio.get_mixture_or_task(corpus.name)
    if corpus.feature not in task.output_features:
        near = meant(corpus.feature, task.output_features)
        raise ValueError(
            f"{corpus.name} has no feature {corpus.feature!r}: it has {', '.join(task.output_features)}{near}"
        )
    own = from_seqio(task.output_features[corpus.feature].vocabulary, corpus.name)
    splits = {"train": corpus.train_split, "heldout": corpus.heldout_split}
    return Source(task, own, corpus.feature, splits)


def from_seqio(vocabulary: Any, name: str) -> Vocabulary:
    """A vocabulary of ours with the ids of a seqio vocabulary.

    Raises:
      ValueError: its kind has no counterpart here.
    """
    _, seqio = load_tensorflow()
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByteVocabulary(extra_ids=vocabulary.extra_ids)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return SentencePieceVocabulary(model=vocabulary.sp_model)  # its extra ids are pieces of this model
    if isinstance(vocabulary, _tokenizer_class()):
        tokenizer: TokenizerVocabulary = vocabulary.tokenizer
        return tokenizer
    raise ValueError(
        f"{name} has a {type(vocabulary).__name__}: SentencePieceVocabulary and ByteVocabulary can be read"
    )


def to_seqio(vocabulary: Vocabulary) -> Any:
    """A seqio vocabulary with the ids of one of ours."""
    tf, seqio = load_tensorflow()
    if isinstance(vocabulary, ByteVocabulary):
        return seqio.ByteVocabulary(extra_ids=vocabulary.size - 259)
    if isinstance(vocabulary, TokenizerVocabulary):
        return _tokenizer_class()(vocabulary)
    assert isinstance(vocabulary, SentencePieceVocabulary)
    # seqio needs a file; one in TensorFlow's memory cannot be left behind, moved or altered.
    path = f"ram://flm_jax/{vocabulary.digest}.model"
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(vocabulary.model)
    return seqio.SentencePieceVocabulary(path)


@functools.cache
def _tokenizer_class() -> Any:
    """A class of seqio vocabularies that tokenise in Python, by a `TokenizerVocabulary`; made when first needed."""
    tf, seqio = load_tensorflow()
    base: Any = seqio.Vocabulary

    class TokenizerOfOurs(base):
        """A `TokenizerVocabulary` as a seqio vocabulary."""

        def __init__(self, tokenizer: TokenizerVocabulary) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eos_id(self) -> int:
            return self.tokenizer.eos_id

        @property
        def bos_id(self) -> None:
            return None  # as in the other vocabularies, only ends separate documents

        @property
        def unk_id(self) -> None:
            return None

        @property
        def _base_vocab_size(self) -> int:
            return self.tokenizer.size

        def _encode(self, s: str) -> list[int]:
            return self.tokenizer.encode(s)

        def _decode(self, ids: Iterable[int]) -> str:
            return self.tokenizer.decode(ids)

        def _encode_tf(self, s: Any) -> Any:
            # Declared stateless: otherwise the position of a stream could not be saved.
            encode = lambda text: np.asarray(self.tokenizer.encode(text.decode()), np.int32)  # noqa: E731
            return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32, stateful=False), [None])

        def _decode_tf(self, ids: Any) -> Any:
            decode = lambda array: self.tokenizer.decode(array).encode()  # noqa: E731
            return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string, stateful=False), [])

        def __eq__(self, other: object) -> bool:
            return isinstance(other, TokenizerOfOurs) and other.tokenizer.digest == self.tokenizer.digest

    return TokenizerOfOurs


def register_task(corpus: Corpus, vocabulary: Vocabulary, shuffle_buffer_size: int | None = None) -> str:
    """Registers a text corpus as a seqio task with one output feature, 'targets', ended by eos.

    Args:
      corpus: a text corpus.
      vocabulary: what to tokenise with.
      shuffle_buffer_size: number of documents that seqio shuffles among, if it shuffles. By default 1 for corpora of
        one document per file, whose files are shuffled all at once, and 1,024 otherwise.

    Returns:
      The task's name, equal for equal documents and vocabularies; its examples also have `text_bytes`, each document's
      length.
    """
    tf, seqio = load_tensorflow()
    if shuffle_buffer_size is None:
        shuffle_buffer_size = 1 if isinstance(corpus, FileCorpus) else 1024
    key = json.dumps([corpus.digest(), corpus.describe(), vocabulary.digest, shuffle_buffer_size], sort_keys=True)
    name = f"flm_jax_{type(corpus).__name__.lower()}_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if name in seqio.TaskRegistry.names():
        return name

    def measured(dataset: Any) -> Any:
        text = corpus.field if isinstance(corpus, Tfds) else "targets"
        return dataset.map(
            lambda example: {"targets": example[text], "text_bytes": tf.strings.length(example[text])},
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    if isinstance(corpus, Tfds):
        info = check_tfds(corpus).info
        full_name, _, version = info.full_name.rpartition("/")  # seqio requires a version
        splits = {"train": corpus.train_split, "heldout": corpus.heldout_split}
        source = seqio.TfdsDataSource(tfds_name=f"{full_name}:{version}", tfds_data_dir=corpus.data_dir, splits=splits)
    else:
        read: Any
        if isinstance(corpus, FileCorpus):
            read = functools.partial(reading.read_files, corpus)
        elif isinstance(corpus, Jsonl):
            read = functools.partial(reading.read_lines, corpus)
        else:
            raise ValueError(f"{corpus} is no corpus of text that a seqio task can be made of")
        source = seqio.FunctionDataSource(read, splits=["train", "heldout"])
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            measured,
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(vocabulary=to_seqio(vocabulary), add_eos=True)},
        shuffle_buffer_size=shuffle_buffer_size,
    )
    return name
