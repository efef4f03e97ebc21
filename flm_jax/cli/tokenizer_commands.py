"""The subcommands of `flm-tokenizer`: calls the library, prints the results, sets the exit status."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flm_jax.cli import configure
from flm_jax.cli.configure import check_used, configured, parse
from flm_jax.cli.errors import started
from flm_jax.cli.runs import check_directory, check_json_file
from flm_jax.data.config import DataConfig
from flm_jax.data.train_vocabulary import SentencePiece, build_vocabulary, load_vocabulary, sample_of
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.data.vocabulary_files import to_files
from flm_jax.data.vocabulary_measure import mean_by_weight, measure_all, measurements_text, sources
from flm_jax.files import atomic_write, write_json
from flm_jax.records import as_dict, counted

REPORT = "report.json"


def run_train(
    output: str, gin_files: Sequence[str], gin_bindings: Sequence[str], sample_bytes: int, json_file: str | None
) -> None:
    """Trains the vocabulary of a corpus or a mixture, writes it into a directory, and measures it."""
    with started():
        check_json_file(json_file)
        check_directory("output", output)
        folder = Path(output).expanduser()
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--output={output} is not empty, and nothing is overwritten; give a new directory.")
        data = _data(gin_files, gin_bindings)
        config = data.tokenised_by
        if not isinstance(config, SentencePiece):
            raise ValueError(
                f"DataConfig.vocabulary is {type(config).__name__}, of which there is nothing to train: bind "
                "DataConfig.vocabulary = @SentencePiece()."
            )
        sources(data.corpus)  # refused before anything is read
        vocabulary = build_vocabulary(config, data.corpus, data.cache_dir)
        drawn = sample_of(config, data.corpus, data.cache_dir)
        for name, part in drawn.items():
            print(f"{name}: trained on {part['drawn']:,} of {counted(part['bytes'], 'byte')}")
        found = _measured({output: vocabulary}, data, sample_bytes)
        found |= {"vocabulary": as_dict(config), "sample": drawn}
        for name, content in to_files(vocabulary).items():
            atomic_write(folder / name, content)
        write_json(folder / REPORT, found)
        if json_file is not None:
            write_json(Path(json_file), found)
        print(
            f"Written to {output}: use it with DataConfig.vocabulary = @Pretrained() and Pretrained.path = {output!r}."
        )


def run_measure(
    tokenizers: Sequence[str],
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
    sample_bytes: int,
    json_file: str | None,
) -> None:
    """Measures tokenizers on the held-out text of each source."""
    with started():
        check_json_file(json_file)
        if twice := sorted({path for path in tokenizers if tokenizers.count(path) > 1}):
            raise ValueError(f"--tokenizer={twice[0]} is given twice; give each once.")
        data = _data(gin_files, gin_bindings)
        vocabularies = {path: load_vocabulary(path) for path in tokenizers}
        found = _measured(vocabularies, data, sample_bytes)
        if json_file is not None:
            write_json(Path(json_file), found)


def _data(gin_files: Sequence[str], gin_bindings: Sequence[str]) -> DataConfig:
    parse(gin_files, gin_bindings)
    data = configured(configure.tokenizer)
    check_used()
    return data


def _measured(vocabularies: Mapping[str, Vocabulary], data: DataConfig, sample_bytes: int) -> dict[str, Any]:
    """Measures vocabularies and prints the tables; returns what --json holds."""
    say = functools.partial(print, "Held-out text of", flush=True)
    found = measure_all(vocabularies, data.corpus, sample_bytes, say)
    for number, (name, vocabulary) in enumerate(vocabularies.items(), 1):
        print(f"[{number}] {name}: {vocabulary.kind}, {counted(vocabulary.size, 'id')}")
    print(measurements_text(found, data.corpus))

    def record(name: str, vocabulary: Vocabulary) -> dict[str, Any]:
        ratios = {source: own[name].ratios["bytes_per_token"] for source, own in found.items()}
        return {
            "kind": vocabulary.kind,
            "size": vocabulary.size,
            "digest": vocabulary.digest,
            "bytes_per_token": mean_by_weight(data.corpus, ratios),
            "sources": {source: own[name].record() for source, own in found.items()},
        }

    return {
        "corpus": data.corpus.describe(),
        "tokenizers": {name: record(name, vocabulary) for name, vocabulary in vocabularies.items()},
    }
