"""The chat template of a checkpoint: the one that it was tuned with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flm_jax.chat.template import BUILT_IN, OWN, Template, TemplateError, find_template
from flm_jax.checkpoint.manifest import META
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.source_checkpoint import SourceCheckpoint


def chat_template_of(
    source: SourceCheckpoint, name: str | None = None, vocabulary: Vocabulary | None = None
) -> Template:
    """The template to write conversations with for a checkpoint.

    Args:
      source: the checkpoint.
      name: a template as in `find_template`, in place of the checkpoint's; None: the one that its record names (the
        template of the conversations that it was tuned on), else the one that came with its vocabulary.
      vocabulary: in place of the checkpoint's own.

    Raises:
      TemplateError: the checkpoint has no template, or its record of one cannot be read.
      VocabularyError: it has no vocabulary that can be used, and none is given.
    """
    if name is not None:
        return find_template(name, vocabulary or source.vocabulary)
    corpus = (source.meta.data or {}).get("corpus")
    recorded = corpus.get("template") if isinstance(corpus, Mapping) else None
    if recorded is not None:
        return _from_record(recorded, f"{source.directory / META}: the template of its corpus")
    if (vocabulary or source.vocabulary).special.chat_template:
        return find_template(OWN, vocabulary or source.vocabulary)
    raise TemplateError(
        f"{source.directory} does not say which chat template it was tuned with, and its vocabulary has none: give "
        f"--template, one of {', '.join(BUILT_IN)} or a jinja2 file"
    )


def _from_record(record: Any, where: str) -> Template:
    texts = ("name", "source", "end")
    if (
        not isinstance(record, Mapping)
        or not {"name", "source", "markers"} <= set(record) <= {*texts, "markers"}
        or not all(isinstance(record.get(field, ""), str) for field in texts)
        or not isinstance(record["markers"], list | tuple)
        or not all(isinstance(marker, str) for marker in record["markers"])
    ):
        raise TemplateError(f"{where} is {record!r:.60}, which is no record of a template: give --template")
    return Template.from_record(record)
