"""What data a run would train on, found in seconds and without preparing anything: files, documents, splits, tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import SPLITS, Corpus, FileCorpus, HubDataset, RowCorpus, SeqioTask, TextFolder, TokenCorpus
from flm_jax.data.hub import dataset_commit
from flm_jax.data.left_out import sentence
from flm_jax.data.mixture import STREAMED, Mixture, Source
from flm_jax.data.parts import left_out_of
from flm_jax.data.prepare import store_path, token_store_path
from flm_jax.data.store import TokenStore
from flm_jax.data.store_record import STORE_FILE
from flm_jax.data.tfds import Tfds, check_tfds
from flm_jax.data.train_vocabulary import (
    Bytes,
    Pretrained,
    SentencePiece,
    build_vocabulary,
    model_file,
)
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.files import check_writable
from flm_jax.records import counted

# A corpus of files is read as a whole if it is not larger than this: a few seconds.
READ_BYTES = 500_000_000


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
      corpus: the class of the corpus, and where its files lie.
      vocabulary: what kind of vocabulary it is.
      ids: its number of ids; None where only preparing the data would tell.
      store: the folder of the prepared token store; None: there is none yet, or it was not looked for.
      files: number of files; None where documents do not lie in files of their own.
      splits: documents and text_bytes of each split, and tokens where there is a store; empty if they were not counted.
      unread: why the documents were not counted; empty if they were.
      notes: what a reader may not expect of the corpus.
      sources: of a mixture, what was found of each.
    """

    corpus: str
    vocabulary: str
    ids: int | None
    store: Path | None
    files: int | None
    splits: dict[str, dict[str, int]]
    unread: str = ""
    notes: tuple[str, ...] = ()
    sources: tuple[Survey, ...] = ()


def survey(config: DataConfig) -> Survey:
    """Opens a corpus and its vocabulary; trains, downloads and writes nothing.

    Raises:
      ValueError, FileNotFoundError: as `open_data`: there is no such folder or file, a document is not text, a split is
        empty, there is no such tokenizer or dataset; or a run would have to write into `cache_dir`, and could not.
      MissingExtraError: a seqio task, or a TFDS dataset that is not prepared, without the extra that reads it.
    """
    found = _survey(config)
    if found.store is None and _writes(config, found):
        check_writable(Path(config.cache_dir), f"DataConfig.cache_dir = {config.cache_dir!r}")
    return found


def _writes(config: DataConfig, found: Survey) -> bool:
    """Whether a run will write into `cache_dir`, as far as is known without reading a large corpus."""
    trained = isinstance(config.tokenised_by, SentencePiece) and not isinstance(config.corpus, SeqioTask)
    if config.streamed and not trained:
        return False
    looked = not (found.unread or config.streamed or (trained and isinstance(config.corpus, TokenCorpus)))
    # What was not looked for may be there: a prepared cache need not be writable.
    kept = "vocabulary-*.model" if config.streamed else f"{type(config.corpus).__name__.lower()}-*/{STORE_FILE}"
    return looked or not any(Path(config.cache_dir).expanduser().glob(kept))


def _mixture(config: DataConfig, mixture: Mixture) -> Survey:
    """As `_survey`, of all sources together, with a note on each."""
    if config.streamed:
        raise ValueError(STREAMED)
    named, trained = config.tokenised_by, isinstance(config.tokenised_by, SentencePiece)
    found = [_of_source(config, source) for source in mixture.sources]
    if isinstance(named, SentencePiece) and all(own.splits for own in found):
        file = model_file(named, mixture, config.cache_dir)
        if file.is_file():  # only with it is it known which stores are those of this mixture
            trained, config = False, dataclasses.replace(config, vocabulary=Pretrained(str(file)))
            found = [_of_source(config, source) for source in mixture.sources]
    counts = [n for n in _COUNTED if not (trained and n == "tokens") and all(n in _train(own) for own in found)]
    splits = {split: {n: sum(own.splits[split][n] for own in found) for n in counts} for split in SPLITS if counts}
    notes = []
    for source, own in zip(mixture.sources, found, strict=True):
        weight = "weight by its size" if source.weight is None else f"weight {source.weight:g}"
        most = "" if source.epochs is None else f", at most {source.epochs:g} passes"
        sizes = ", ".join(counted(_train(own)[n], _COUNTED[n]) for n in counts) or own.unread
        notes.append(f"{source.name}, {weight}{most}: {own.corpus}; to train on: {sizes}")
    return Survey(
        f"Mixture of {counted(len(found), 'source')}",
        "SentencePiece, trained on a sample of all sources"
        if isinstance(named, SentencePiece)
        else found[0].vocabulary,
        found[0].ids,
        Path(config.cache_dir).expanduser() if not trained and all(own.store for own in found) else None,
        None if any(own.files is None for own in found) else sum(own.files or 0 for own in found),
        splits,
        "" if splits else "not every source can be counted without preparing it",
        tuple(notes),
        tuple(found),
    )


_COUNTED = {"documents": "document", "text_bytes": "byte", "tokens": "token"}


def _train(found: Survey) -> dict[str, int]:
    return found.splits.get("train", {})


def _of_source(config: DataConfig, source: Source) -> Survey:
    try:
        return _survey(dataclasses.replace(config, corpus=source.corpus))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Source {source.name!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"Source {source.name!r}: {error}") from error


def _survey(config: DataConfig) -> Survey:
    """As `survey`, without a look at `cache_dir`."""
    if config.mixture is not None:
        return _mixture(config, config.mixture)
    corpus = config.corpus
    name = " ".join(filter(None, [type(corpus).__name__, getattr(corpus, "path", getattr(corpus, "name", ""))]))
    if isinstance(corpus, SeqioTask):
        from flm_jax.data import tasks

        own = tasks.resolve(corpus).vocabulary
        return Survey(name, f"the task's own, {own.kind}", own.size, None, None, {}, "only preparing it tells")
    vocabulary, ids = _vocabulary(config)
    if isinstance(corpus, TokenCorpus):
        return Survey(name, vocabulary, ids, *_tokens(corpus, config))
    if isinstance(corpus, Tfds) and not corpus.is_prepared:
        check_tfds(corpus)
        return Survey(name, vocabulary, ids, None, None, {}, "the dataset is not prepared yet")
    if isinstance(corpus, HubDataset) and corpus.repository is not None:
        dataset_commit(corpus.repository)
        return Survey(name, vocabulary, ids, None, None, {}, "the first run fetches it")
    paths = _paths(corpus)
    files, size = None if paths is None else len(paths), sum(path.stat().st_size for path in paths or ())
    if size > READ_BYTES:
        next(iter(corpus.lines() if isinstance(corpus, RowCorpus) else corpus.contents()), None)  # type: ignore[attr-defined]
        return Survey(name, vocabulary, ids, None, files, {}, f"reading {size / 1e9:.1f} GB takes longer")
    path = store_path(corpus, config.tokenised_by, config.cache_dir, config.dedup)
    if not config.streamed and (path / STORE_FILE).is_file():
        store = TokenStore.open(path, verify=False)  # a survey writes nothing
        return Survey(name, vocabulary, store.vocabulary.size, path, files, store.describe()["splits"])
    if not isinstance(corpus, FileCorpus | RowCorpus):
        return Survey(name, vocabulary, ids, None, files, {}, "only preparing it tells")
    splits = {}
    for split in SPLITS:
        left_out = left_out_of(corpus)
        found = corpus.documents(split, left_out) if isinstance(corpus, RowCorpus) else corpus.documents(split)
        lengths = [len(text.encode()) for text in found]
        if not lengths:
            raise ValueError(f"the corpus has no document in its split {split!r}: {corpus.describe()}")
        splits[split] = {"documents": len(lengths), "text_bytes": sum(lengths)}
    notes = tuple(corpus.notes()) if isinstance(corpus, FileCorpus) else ()
    notes += (f"{said}.",) if (said := sentence(left_out.record())) else ()
    if config.dedup is not None:
        notes += ("Documents that repeat earlier ones are counted here, and left out when the store is prepared.",)
    return Survey(name, vocabulary, ids, None, files, splits, notes=notes)


def _paths(corpus: Corpus) -> list[Path] | None:
    """The files that a corpus reads; None where it has none of its own, or does not list them without reading them.

    Raises:
      FileNotFoundError: there are none.
    """
    if isinstance(corpus, RowCorpus):
        return [path for _, path in corpus.files()]
    return corpus.paths() if isinstance(corpus, TextFolder) else None


def _tokens(
    corpus: TokenCorpus, config: DataConfig
) -> tuple[Path | None, None, dict[str, dict[str, int]], str, tuple[str, ...]]:
    """The survey of a corpus that writes its own tokens, from `store` on."""
    if isinstance(config.tokenised_by, SentencePiece):  # not trained yet, or not cheap to find
        splits = {}
        for split in SPLITS:
            lengths = [len(text.encode()) for text in corpus.documents(split)]
            splits[split] = {"documents": len(lengths), "text_bytes": sum(lengths)}
        return None, None, splits, "", ()
    vocabulary = build_vocabulary(config.tokenised_by, corpus, config.cache_dir)
    found = corpus.tokenised(vocabulary, config.context)
    path = token_store_path(corpus, vocabulary, found, config.cache_dir)
    store = path if (path / STORE_FILE).is_file() else None
    if store:
        splits = TokenStore.open(path, verify=False).describe()["splits"]
    else:
        splits = {split: dict.fromkeys(("documents", "text_bytes", "tokens", "weighted_tokens"), 0) for split in SPLITS}
        for split, document in found.documents():
            of_it = (1, document.text_bytes, len(document.tokens), int(document.weights.sum()))
            for name, number in zip(splits[split], of_it, strict=True):
                splits[split][name] += number
    notes = found.notes()
    for split, counts in splits.items():
        if not counts["documents"]:
            raise ValueError(
                f"the corpus has no document in its split {split!r}: {' '.join(notes) or corpus.describe()}"
            )
        windows = counted((counts["tokens"] - 1) // config.context, "window")
        trained = counts["weighted_tokens"] / counts["tokens"]
        notes.append(f"{split}: {windows} of {config.context} tokens; {trained:.0%} of the tokens are trained on.")
    return store, None, splits, "", tuple(notes)


def _vocabulary(config: DataConfig) -> tuple[str, int | None]:
    """The kind of a vocabulary, and its number of ids where that is known."""
    vocabulary = config.tokenised_by
    if isinstance(vocabulary, Bytes):
        return "bytes", ByteVocabulary().size
    if isinstance(vocabulary, SentencePiece):
        return "SentencePiece, trained on the training split", vocabulary.size
    return f"that of {vocabulary.path}", vocabulary.load().size


def survey_text(found: Survey) -> str:
    """A survey as text."""
    lines = [f"Data: {found.corpus}" + (f", {counted(found.files, 'file')}" if found.files is not None else "")]
    if found.splits:
        train, heldout = (found.splits[split] for split in SPLITS)
        share = heldout["documents"] / (train["documents"] + heldout["documents"])
        for what, split, end in (("to train on", train, ""), ("held out", heldout, f" ({share:.1%} of the documents)")):
            tokens = f", {counted(split['tokens'], 'token')}" if "tokens" in split else ""
            size = f"{counted(split['documents'], 'document')}, {counted(split['text_bytes'], 'byte')}"
            lines.append(f"  {what}: {size}{tokens}{end}")
    else:
        lines.append(f"  documents were not counted: {found.unread}")
    lines += [f"  {note}" for note in found.notes]
    lines.append(f"  vocabulary: {found.vocabulary}" + (f", {found.ids} ids" if found.ids is not None else ""))
    lines.append(f"  token store: {found.store or 'none yet; the first run prepares it'}")
    return "\n".join(lines)
