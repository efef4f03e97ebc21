"""A mixture of three small corpora, prepared without TensorFlow."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from flm_jax.data import prepare
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import Jsonl, TextFolder
from flm_jax.data.mixture import Mixture, Source
from flm_jax.data.reading import MissingExtraError
from flm_jax.data.source import open_data
from flm_jax.data.train_vocabulary import Bytes

CONTEXT = 16


def write(folder: Path) -> DataConfig:
    """Three corpora whose texts have letters of their own, the second with a limit of epochs, as a prepared mixture."""
    rng = np.random.default_rng(0)

    def text(letters: str, length: int) -> str:
        return "".join(rng.choice(list(letters), length))

    for name, letters, count in (("prose", "abcd ", 12), ("code", "(){}", 6)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number:02}.txt").write_text(text(letters, 90))
    lines = [json.dumps({"text": text("0123", 60)}) + "\n" for _ in range(20)]
    (folder / "numbers.jsonl").write_text("".join(lines))
    sources = (
        Source("prose", TextFolder(str(folder / "prose"), heldout_percent=30), 3.0),
        Source("code", TextFolder(str(folder / "code"), heldout_percent=30), 2.0, epochs=2.5),
        Source("numbers", Jsonl(str(folder / "numbers.jsonl"), heldout_percent=30), 1.0),
    )
    config = DataConfig(Mixture(sources), Bytes(), context=CONTEXT, cache_dir=str(folder / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_tensorflow", _missing)
        open_data(config, progress=False)
    return config


def _missing() -> None:
    raise MissingExtraError("not in these tests: it takes seconds to load")


def changed(config: DataConfig, **sources: dict[str, object]) -> DataConfig:
    """The configuration with other fields of some sources, by name; `mixture` are fields of the mixture itself."""
    assert config.mixture is not None
    fields = sources.pop("mixture", {})
    made = tuple(dataclasses.replace(s, **sources.get(s.name, {})) for s in config.mixture.sources)
    return dataclasses.replace(config, corpus=Mixture(made, **fields))


def unweighted(config: DataConfig, temperature: float) -> DataConfig:
    """The configuration with weights by size."""
    none = {"weight": None}
    return changed(config, prose=none, code=none, numbers=none, mixture={"temperature": temperature})
