"""A vocabulary as the tokenizer files that transformers loads: the same ids for every text, and the same text back.

Only a special token that is written out in a text is read otherwise, as in every tokenizer of this format: it becomes
that token. Special tokens therefore have names that texts do not contain, such as `<|/s|>` for the end of a document.
In unigram models the same is true of byte tokens, such as `<0x41>`.
"""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

from flm_jax.data.tokenizer_file import load
from flm_jax.data.vocabulary import (
    TOKENIZER,
    UNK_ID,
    ByteVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    Vocabulary,
)

CONFIG = "tokenizer_config.json"
SPACE = "\u2581"  # SentencePiece's sign for a space
# What tokenizers treat differently from each other: spaces, line ends, composed and decomposed letters, rare scripts.
PROBES = (
    "",
    " leading, two  and three   spaces, trailing ",
    "    indented\n\tby a tab\n\n\nlines\r\nand\rreturns \n ",
    "a\u00e9\u0301 e\u0301 \u00c5 \u212b \ufb01 \u00bd \u3000\u00a0\u2003wide",
    "\U0001f468\u200d\U0001f469 \U0001f1eb\U0001f1f7 \u4e2d\u6587 \u0627\u0644\u0639 \u0928\u092e\u093f \U00013000",
    "x = 3.14159 * 2 ** 10 != 0x1F; 'it''s' </s> <s> <unk> <pad> \x00\x7f\u200b\ufeff",
    "aaaaaaa ababababa abaabaab ======== -------- 1234567890",
)


def special_ids(vocabulary: Vocabulary) -> dict[str, Any]:
    """The ids of special tokens, as config.json has them.

    The beginning is what the first token of a document is predicted from: the end of the one before, if a vocabulary
    has no token of its own for it.
    """
    special = vocabulary.special
    stops = special.stop_ids
    pad = vocabulary.eos_id if special.pad_id is None else special.pad_id
    return {
        "bos_token_id": special.prefix_id,
        "eos_token_id": stops[0] if len(stops) == 1 else list(stops),
        "pad_token_id": pad,
    }


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a vocabulary.

    Raises:
      ValueError: a tokenizer.json cannot express it: some texts would have other ids.
    """
    if isinstance(vocabulary, TokenizerVocabulary):
        model, built = vocabulary.model, load(vocabulary.model, TOKENIZER)
    else:
        assert isinstance(vocabulary, ByteVocabulary | SentencePieceVocabulary)
        built = _bytes() if isinstance(vocabulary, ByteVocabulary) else _sentencepiece(vocabulary.model)
        _check(built, vocabulary)
        model = built.to_str(pretty=False).encode()
    special, ids = vocabulary.special, special_ids(vocabulary)
    named = {"bos": special.prefix_id, "eos": vocabulary.eos_id, "pad": ids["pad_token_id"]}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": built.id_to_token(number) for role, number in named.items()}
    plain, whole = (built.encode("a", add_special_tokens=add).ids for add in (False, True))
    if whole != [*special.begin, *plain, *special.end]:
        config |= {"add_bos_token": bool(special.begin), "add_eos_token": bool(special.end)}
    return {TOKENIZER: model, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def _check(built: Any, vocabulary: Vocabulary) -> None:
    """Compares ids and decoded text on difficult texts, and on texts made of random pieces.

    Raises:
      ValueError: they differ.
    """
    rng = random.Random(0)
    drawn = (vocabulary.decode(rng.choices(range(vocabulary.size), k=64)) for _ in range(256))
    for text in itertools.chain(PROBES, drawn):
        ids = vocabulary.encode(text)
        # What an unknown character becomes is no text in either.
        same = UNK_ID in ids or built.decode(ids) == vocabulary.decode(ids)
        if built.encode(text, add_special_tokens=False).ids != ids or not same:
            raise ValueError(f"a {TOKENIZER} cannot express this {vocabulary.kind} vocabulary: {text[:40]!r} differs")


def _named(piece: str) -> str:
    """The name of a special piece, such as `</s>`: SentencePiece does not read it in a text, tokenizers would."""
    return f"<|{piece.strip('<>')}|>"


def _with_special(tokenizer: Any, names: list[str]) -> Any:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return tokenizer


def _bytes() -> Any:
    """Bytes, shifted by the three special ids, as BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Its alphabet writes printable bytes as themselves, and the others, in order, from U+0100 on.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    above = itertools.count(0x100)
    signs = [chr(byte) if chr(byte) in alphabet else chr(next(above)) for byte in range(256)]
    special = [_named(piece) for piece in ("<pad>", "</s>", "<unk>")]
    vocab = {sign: number for number, sign in enumerate([*special, *signs])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=special[UNK_ID]))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    return _with_special(tokenizer, special)


def _sentencepiece(content: bytes) -> Any:
    """A SentencePiece model, BPE or unigram, as a tokenizer of the same pieces."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers

    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto()
    proto.ParseFromString(content)
    rules, types = proto.normalizer_spec, proto.SentencePiece
    tokenizer = Tokenizer(_pieces(proto))
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    own = [piece.piece for piece in proto.pieces if piece.type == types.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in own])
    return _with_special(tokenizer, [_name(piece) for piece in proto.pieces if _is_special(piece)])


def _is_special(piece: Any) -> bool:
    return piece.type in (piece.CONTROL, piece.UNKNOWN)


def _name(piece: Any) -> str:
    return _named(piece.piece) if _is_special(piece) else str(piece.piece)


def _pieces(proto: Any) -> Any:
    """The pieces of a SentencePiece model as a model of the library."""
    from tokenizers import models

    types, kinds = proto.SentencePiece, proto.trainer_spec
    names = [_name(piece) for piece in proto.pieces]
    unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == types.UNKNOWN), None)
    fallback = any(piece.type == types.BYTE for piece in proto.pieces)
    if kinds.model_type == kinds.UNIGRAM:
        scored = [(name, piece.score) for name, piece in zip(names, proto.pieces, strict=True)]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=fallback)
    if kinds.model_type != kinds.BPE:
        raise ValueError(f"a {TOKENIZER} has SentencePiece models of BPE and unigram pieces only")
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == types.NORMAL}
    # SentencePiece merges any two neighbours that make a piece, the piece with the best score first.
    cuts = ((p[:i], p[i:]) for p in sorted(scores, key=lambda p: -scores[p]) for i in range(1, len(p)))
    return models.BPE(
        vocab={name: number for number, name in enumerate(names)},
        merges=[(left, right) for left, right in cuts if left in scores and right in scores],
        unk_token=None if unknown is None else names[unknown],
        byte_fallback=fallback,
        fuse_unk=True,
    )
