"""The special tokens of a vocabulary, and the files beside a tokenizer that say how they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flm_jax.data.tokenizer_file import guarded
from flm_jax.records.foreign_json import check

# The id that ends a document, in vocabularies made here.
EOS_ID = 1
# Files beside a tokenizer that may say how its special tokens are used.
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
# The file beside a tokenizer with its chat template, where tokenizer_config.json does not hold it.
CHAT_TEMPLATE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class Special:
    """The special ids around a text: what its first token is predicted from, and what ends it.

    Attributes:
      prefix_id: what the first token of a text is predicted from: the beginning of a document or, if a vocabulary has
        none, the end of the document before.
      stop_ids: each of them ends a continuation; the first is the end of a document.
      begin: what the tokenizer itself puts before a text for a model.
      end: what it puts after.
      prefix: `prefix_id` as text, '' if it has none.
      eos: the end of a document as text, '' if it has none.
      pad_id: what other programs fill rows with; None: the end of a document.
      chat_template: the jinja2 source of the chat template that came with a tokenizer, '' if there was none.
    """

    prefix_id: int = EOS_ID
    stop_ids: tuple[int, ...] = (EOS_ID,)
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    prefix: str = ""
    eos: str = ""
    pad_id: int | None = None
    chat_template: str = ""


def special_of(processor: Any, configs: Mapping[str, Mapping[str, Any]], eos_id: int | None, where: str) -> Special:
    """The special ids of a tokenizer, from the content of its configuration files."""

    def token(role: str, needed: bool = True) -> int | None:
        for name in CONFIGS[:2]:
            found = configs.get(name, {}).get(f"{role}_token")
            text = found.get("content") if isinstance(found, Mapping) else found
            if text is not None:
                number = processor.token_to_id(check(text, str, f"{name}: the content of {role}_token"))
                if number is None and needed:
                    raise ValueError(f"{name} calls {text!r} the {role} token, and {where} has no such token")
                return None if number is None else int(number)
        return None

    listed: Any = next(
        (found for name in CONFIGS[2:] if (found := configs.get(name, {}).get("eos_token_id")) is not None), []
    )
    listed = listed if isinstance(listed, list) else [listed]
    stops = [check(i, int, "eos_token_id, or an entry of it,") for i in listed]
    # Models may end a text with ids that only their embedding has; a tokenizer counts them in 32 bits.
    if wrong := [i for i in stops if not 0 <= i < 2**31]:
        raise ValueError(f"eos_token_id beside {where} holds {wrong[0]!r:.40}, which is no token's id")
    bos = token("bos")
    eos = next((i for i in (eos_id, token("eos"), *stops) if i is not None), None)
    if eos is None:
        raise ValueError(
            f"nothing says which token of {where} ends a document: there is no eos_token in {' or '.join(CONFIGS[:2])} "
            f"and no eos_token_id in {' or '.join(CONFIGS[2:])} beside it; add one of them, or give eos_id"
        )
    # What tokenizer.json itself adds; transformers does not read `add_bos_token` and `add_eos_token` beside it either.
    with guarded(where):
        plain, whole = (processor.encode("a", add_special_tokens=add).ids for add in (False, True))
    start = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), len(whole))
    begin, end = tuple(whole[:start]), tuple(whole[start + len(plain) :])
    prefix = eos if bos is None else bos
    with guarded(where):
        before, after = (str(processor.decode([i], skip_special_tokens=False)) for i in (prefix, eos))
    stops = list(dict.fromkeys([eos, *stops]))
    return Special(prefix, tuple(stops), begin, end, before, after, token("pad", needed=False))


def chat_template(file: bytes | None, config: Mapping[str, Any], root: str) -> str:
    """The chat template of a tokenizer: in a file of its own, or in its configuration, where it may have variants."""
    if file is not None:
        try:
            return file.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{root}/{CHAT_TEMPLATE} is not UTF-8 text: {error.reason}") from None
    found = config.get("chat_template") or ""
    if isinstance(found, list):
        variants = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
        found = variants.get("default") or ""
    return str(check(found, str, f"{root}/{CONFIGS[0]}: chat_template"))
