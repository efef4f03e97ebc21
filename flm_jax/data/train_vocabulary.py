"""The vocabulary of a corpus (bytes, an existing one, or SentencePiece, trained once and cached) or of a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flm_jax.checkpoint.find import step_directory
from flm_jax.checkpoint.manifest import CheckpointError, read_blobs, read_manifest, read_meta
from flm_jax.data import hub
from flm_jax.data.corpora import Corpus, Jsonl, SeqioTask, StandardLibrary, TextCorpus, TextFolder, Tfds
from flm_jax.data.known import digest_of
from flm_jax.data.mixture import Mixture
from flm_jax.data.sentencepiece_training import SentencePiece, draw, train
from flm_jax.data.special import CHAT_TEMPLATE, CONFIGS
from flm_jax.data.vocabulary import (
    MOST_BYTES,
    TOKENIZER,
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    Vocabulary,
)
from flm_jax.data.vocabulary_files import MODELS, RECORD, VocabularyError, from_files, from_spec
from flm_jax.files import atomic_write, check_writable, read_bounded, sha256_file
from flm_jax.records import recorded
from flm_jax.records.fields import Count
from flm_jax.records.foreign_json import check, field, read_json

CACHE = "~/.cache/flm_jax"
# What to do about a checkpoint whose vocabulary is not known.
_NAME = ". Name the right one: for an evaluation by --tokenizer, for training by DataConfig.vocabulary"
# Read beside a tokenizer, where they are.
BESIDE = (*CONFIGS, CHAT_TEMPLATE)
FORMAT = 1  # part of the cache key: increase it when training changes


@dataclasses.dataclass(frozen=True)
@recorded
class Bytes:
    """One id per byte: nothing to train."""


@dataclasses.dataclass(frozen=True)
@recorded
class Pretrained:
    """An existing vocabulary, of a checkpoint or a Hugging Face tokenizer: nothing to train.

    Attributes:
      path: a checkpoint (a step, a stage's directory or a work directory), a directory with tokenizer.json and its
        configuration files, one that `tokenizer.py train` has written, a SentencePiece model file, or a repository of
        the Hugging Face hub as org/name@revision.
      eos_id: the id that ends a document, for a tokenizer.json; None: as the files beside it say.
    """

    path: str = dataclasses.field(metadata={"identity": False})
    eos_id: Count | None = None

    def load(self) -> Vocabulary:
        """The vocabulary.

        Raises:
          FileNotFoundError: there is none.
          ValueError: as `TokenizerVocabulary.from_directory`.
          CheckpointError: the checkpoint is damaged.
          HubError: the repository cannot be fetched.
        """
        return load_vocabulary(self.path, self.eos_id)


def load_vocabulary(path: str | Path, eos_id: int | None = None) -> Vocabulary:
    """The vocabulary at a path; see `Pretrained`."""
    root = Path(path).expanduser()
    if (name := hub.named(path)) is not None:
        root = _fetched(hub.find(name))
    hub.check_whole(root, (TOKENIZER, *BESIDE))
    if root.name == TOKENIZER and root.is_file():
        root = root.parent
    if (root / TOKENIZER).is_file():
        return TokenizerVocabulary.from_directory(root, eos_id)
    model = root / MODELS["sentencepiece"]
    if (root / RECORD).is_file():
        names = [name for name in (RECORD, model.name) if (root / name).is_file()]
        kept = from_files({name: read_bounded(root / name, MOST_BYTES) for name in names}, str(root))
        assert kept is not None  # there is a record
        found: Vocabulary = kept
    elif root.is_file() or model.is_file():
        found = SentencePieceVocabulary(root if root.is_file() else model)
    else:
        try:
            step = step_directory(root)
        except CheckpointError as error:
            hint = "" if root.exists() else hub.advice(path)
            raise FileNotFoundError(
                f"{path} holds no {TOKENIZER}, and is no checkpoint either: {error}{hint}"
            ) from None
        manifest = read_manifest(step)
        files = read_blobs(step, manifest)
        if eos_id is not None and TOKENIZER in files:
            return TokenizerVocabulary.from_files(files, str(step), eos_id)
        data = check(read_meta(step, manifest).get("data"), (dict, type(None)), f"{step}: the record of its data")
        found = checkpoint_vocabulary(files, data, str(step))
    if eos_id not in (None, found.eos_id):
        raise ValueError(f"eos_id={eos_id}: a document ends with {found.eos_id} in the {found.kind} vocabulary {path}")
    return found


def _fetched(found: hub.Snapshot) -> Path:
    """The directory of a repository's tokenizer, fetched if it is not in the cache."""
    if TOKENIZER not in found.files and found.listed:
        raise FileNotFoundError(f"{found.origin} has no {TOKENIZER}; give a repository with one.")
    return found.fetch([TOKENIZER, *(file for file in BESIDE if file in found.files)])


def checkpoint_vocabulary(files: Mapping[str, bytes], data: Mapping[str, Any] | None, where: str) -> Vocabulary:
    """The vocabulary that the model of a checkpoint step was trained with.

    Args:
      files: the step's blobs; all that is needed, except with version 0.1.0, which kept no vocabularies.
      data: what its meta.json records of the data: the digest of the vocabulary, and where the texts were.
      where: the step's directory, for errors.

    Raises:
      VocabularyError: the step holds no vocabulary, and it cannot be made again from what is recorded; or it is not
        the recorded one.
    """
    found, recorded = from_files(files, where), None if data is None else data.get("vocabulary")
    if recorded is not None:
        try:
            record = check(recorded, dict, "the record")
            for name, kind in (("kind", str), ("size", int), ("digest", str)):
                field(record, name, kind, "the record")
        except ValueError as error:
            raise VocabularyError(f"{where} records its vocabulary wrongly: {error}{_NAME}") from error
    if found is None:
        if data is None or recorded is None:
            raise VocabularyError(
                f"{where} neither holds a vocabulary nor records with which one it was trained{_NAME}"
            )
        try:
            found = _made_again(recorded, data["corpus"])
        except (ValueError, OSError, LookupError, TypeError, ImportError) as error:
            raise VocabularyError(
                f"{where} was written by a version that kept no vocabularies, and the one that it was trained with "
                f"({recorded['kind']}, sha256 {recorded['digest']}) cannot be made again: {error}{_NAME}"
            ) from error
    if recorded is not None and recorded["digest"] != found.digest:
        raise VocabularyError(
            f"{where} was trained with a {recorded['kind']} vocabulary of {recorded['size']} ids, sha256 "
            f"{recorded['digest']}; what is there now is a {found.kind} vocabulary of {found.size} ids, sha256 "
            f"{found.digest}: its ids mean other text{_NAME}"
        )
    return found


def _made_again(recorded: Mapping[str, Any], corpus: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a checkpoint that holds none, from its record and, if they are still there, its texts.

    Raises:
      ValueError, OSError: that is not possible.
    """
    if recorded["kind"] == "bytes":
        return from_spec(recorded)
    kinds = {cls.__name__: cls for cls in (StandardLibrary, TextFolder, Jsonl, Tfds)}
    if corpus["kind"] == SeqioTask.__name__:
        raise ValueError(
            f"it belongs to the seqio task {corpus['name']!r}, and a module such as {corpus['module']!r} is imported "
            "only where a recipe names it"
        )
    if recorded["kind"] != "sentencepiece" or corpus["kind"] not in kinds:
        raise ValueError("its files were not recorded")
    cls = kinds[corpus["kind"]]
    texts = cls(**{field.name: corpus[field.name] for field in dataclasses.fields(cls)})
    return build_vocabulary(SentencePiece(recorded["size"]), texts, CACHE)


VocabularyConfig = Bytes | SentencePiece | Pretrained


def identity(config: VocabularyConfig) -> list[Any]:
    """JSON-able: what determines the vocabulary of a corpus. Of a tokenizer this is its content, not its path."""
    decides: Any = {}
    if isinstance(config, Pretrained):
        decides = config.load().digest
    elif isinstance(config, SentencePiece):
        decides = config.decides
    return [FORMAT, type(config).__name__, decides]


def model_file(config: SentencePiece, corpus: Corpus, cache_dir: str | Path) -> Path:
    """The file in which the vocabulary that is trained on a corpus is kept; its name changes with what decides it."""
    decides = [FORMAT, digest_of(corpus, cache_dir), list(config.decides.values())]
    if isinstance(corpus, Mixture):
        decides.append(config.shares(corpus))
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
    return Path(cache_dir).expanduser() / f"vocabulary-{key}.model"


def sample_of(config: SentencePiece, corpus: Corpus, cache_dir: str | Path) -> dict[str, dict[str, int]]:
    """How many bytes each source of a mixture has, and gave to train its vocabulary on, as its record says.

    Empty: the corpus is no mixture.
    """
    record = model_file(config, corpus, cache_dir).with_suffix(".json")
    return field(read_json(record), "sample", dict, str(record)) if isinstance(corpus, Mixture) else {}


def build_vocabulary(config: VocabularyConfig, corpus: Corpus, cache_dir: str | Path) -> Vocabulary:
    """The vocabulary of a corpus: trained, from the cache, read from files, or that of a seqio task.

    Args:
      config: what to build; ignored for a SeqioTask, which has its own vocabulary.
      corpus: its training split is the text to train on; of a mixture, a sample in the proportions of its weights.
      cache_dir: where a trained model is kept, as `vocabulary-KEY.model` with its sha256 in `vocabulary-KEY.json`.

    Raises:
      ValueError: the size is too small or there is too little text; or a cached model was altered, and the message
        names it.
    """
    if isinstance(corpus, SeqioTask):
        from flm_jax.data import tasks

        return tasks.resolve(corpus).vocabulary
    if isinstance(config, Bytes):
        return ByteVocabulary()
    if isinstance(config, Pretrained):
        return config.load()
    config.check(corpus)
    model_path = model_file(config, corpus, cache_dir)
    record_path = model_path.with_suffix(".json")
    if model_path.is_file() and record_path.is_file():
        try:
            recorded = field(read_json(record_path), "sha256", str, str(record_path))
        except ValueError:
            raise ValueError(f"{record_path} is damaged: delete it to train the vocabulary again") from None
        if sha256_file(model_path) != recorded:
            raise ValueError(f"{model_path} was altered: its sha256 is not the one in {record_path.name}; delete both")
        return SentencePieceVocabulary(model_path)
    check_writable(model_path.parent, f"DataConfig.cache_dir = {str(cache_dir)!r}")
    text_corpus: TextCorpus = corpus  # type: ignore[assignment]  # every other corpus has documents
    pieces, drawn = draw(config, text_corpus)
    model = train(config, pieces)
    vocabulary = SentencePieceVocabulary(model=model)
    atomic_write(model_path, model)
    about = {"config": dataclasses.asdict(config), "corpus": corpus.describe(), "sample": drawn}
    record = {"sha256": vocabulary.digest, **about}
    atomic_write(record_path, (json.dumps(record, indent=1) + "\n").encode())
    return vocabulary
