"""Prepares everything that a `DataConfig` names before a run: its token store, or those of a mixture's sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flm_jax.data.config import DataConfig
from flm_jax.data.left_out import LEFT_OUT, LeftOut
from flm_jax.data.left_out import sentence as in_words
from flm_jax.data.mixture import STREAMED
from flm_jax.data.mixture_data import mixture_vocabulary
from flm_jax.data.prepare import Prepared, prepare_by
from flm_jax.data.workers import Runner
from flm_jax.records import counted


def prepare_data(config: DataConfig, runner: Runner, progress: bool = True) -> Iterator[tuple[str, Prepared]]:
    """Yields the name of each source, or '' of a single corpus, with its store: the one that `open_data` then opens.

    Args:
      config: what will be trained on.
      runner: what does the work on the parts of corpora of files; others are prepared by this process.
      progress: show progress bars.

    Raises:
      ValueError, OSError: as `prepare.prepare`, of a source with its name; or the data is streamed.
      MissingExtraError: a corpus, or the runner, needs what is not installed.
    """
    if config.streamed:
        raise ValueError(STREAMED if config.mixture else "DataConfig.streamed = True: there is no store to prepare.")
    if config.mixture is None:
        yield (
            "",
            prepare_by(
                runner,
                config.corpus,
                config.tokenised_by,
                config.cache_dir,
                progress,
                config.context,
                dedup=config.dedup,
            ),
        )
        return
    vocabulary = mixture_vocabulary(config, config.mixture)
    for source in config.mixture.sources:
        try:
            found = prepare_by(
                runner, source.corpus, vocabulary, config.cache_dir, progress, config.context, dedup=config.dedup
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"Source {source.name!r}: {error}") from error
        except ValueError as error:
            raise ValueError(f"Source {source.name!r}: {error}") from error
        yield source.name, found


def report(name: str, found: Prepared) -> dict[str, Any]:
    """What a source holds and what was left out of it; JSON-able."""
    about = found.store.describe()
    dedup = about["corpus"].get("dedup", {})
    kept = sum(counts["documents"] for counts in about["splits"].values())
    return {
        "source": name,
        "store": str(found.store.path.absolute()),
        "digest": found.store.digest,
        "made": found.made,
        "seconds": round(found.seconds, 3),
        "documents": dedup.get("documents", kept),
        "dropped_exact": dedup.get("dropped_exact", 0),
        "dropped_near": dedup.get("dropped_near", 0),
        LEFT_OUT: about["corpus"].get(LEFT_OUT, LeftOut(0).record()),
        "splits": about["splits"],
    }


def sentence(record: dict[str, Any]) -> str:
    """A line about one source, from its `report`."""
    splits = record["splits"]
    names = f"{record['source']}: " if record["source"] else ""
    dropped = record["dropped_exact"] + record["dropped_near"]
    out = (
        f", {record['dropped_exact']:,} dropped as the same and {record['dropped_near']:,} as nearly the same as "
        "earlier ones"
        if dropped
        else ""
    )
    kept = "; ".join(
        f"{split}: {counted(n['documents'], 'document')}, {counted(n['text_bytes'], 'byte')}, "
        f"{counted(n['tokens'], 'token')}"
        for split, n in splits.items()
    )
    faulty = in_words(record[LEFT_OUT])
    faulty = f" {faulty[0].upper()}{faulty[1:]}." if faulty else ""
    how = f"prepared in {record['seconds']:.1f} s" if record["made"] else "was there"
    return f"{names}{counted(record['documents'], 'document')}{out}.{faulty} {kept}. {record['store']}: {how}."
