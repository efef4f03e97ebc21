"""Models that are named by their repository on the Hugging Face hub: which files are fetched, and in which order.

First config.json, the tokenizer and the index; then, only if the model is supported, the safetensors that the index
names. Pickles, programs and the same weights in other forms, which many repositories hold beside them, are not fetched.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flm_jax.convert import families
from flm_jax.convert.companions import FILES, FormatError
from flm_jax.convert.tensors import INDEX, SINGLE, few, read_index
from flm_jax.data import hub
from flm_jax.data.vocabulary_files import TOKENIZER

log = logging.getLogger(__name__)


def located(source: str | Path) -> tuple[Path, dict[str, str]]:
    """The directory of a model, fetched first if a repository is named.

    Args:
      source: a directory, or the name of a repository, as in `hub.named`.

    Returns:
      The directory; and what to record of where the model came from: source, and of a repository revision and commit.

    Raises:
      ValueError: the repository's model is not supported; see `families.model_config`.
      FormatError: the repository holds no safetensors.
      HubError: it cannot be fetched, or the hub is not asked and the cache lacks some of it.
    """
    name = hub.named(source)
    if name is None:
        return Path(source).expanduser(), {"source": str(source)}
    found = hub.find(name)
    beside = [file for file in (*FILES, INDEX) if file in found.files]
    # If the files are those of the cache, the repository may have what they lack.
    if families.CONFIG not in beside and found.listed:
        raise FormatError(f"{found.origin} has no {families.CONFIG}: it is no model that transformers loads.")
    directory = found.fetch({*beside, families.CONFIG})
    config = directory / families.CONFIG
    families.model_config(families.read_json(config), f"{found.origin}: {families.CONFIG}")
    if INDEX not in beside and SINGLE not in found.files and found.listed:
        other = sorted(file for file in found.files if file.endswith((".bin", ".pt", ".pth", ".safetensors", ".gguf")))
        raise FormatError(
            f"{found.origin} holds neither {SINGLE} nor {INDEX}{f'; it has {few(other)}' if other else ''}: only "
            "safetensors are read."
        )
    found.fetch(read_index(directory / INDEX).values() if INDEX in beside else [SINGLE])
    if not found.listed and TOKENIZER not in beside:
        log.warning(
            "%s: %s, and the cache has no %s: the model is taken without a tokenizer.",
            found.origin,
            found.cached,
            TOKENIZER,
        )
    return directory, {"source": name.repository, "revision": name.revision, "commit": found.commit}
