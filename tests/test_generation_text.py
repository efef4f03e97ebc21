"""Tokens to text while they are made: whole characters, spaces, and stop strings that lie across tokens."""

import numpy as np
import pytest

from flm_jax.data.vocabulary import REPLACEMENT, ByteVocabulary, SentencePieceVocabulary, TokenizerVocabulary
from flm_jax.generation.text import StopStrings, TextStream
from tests.hub import TEXT, write_tokenizer

WIDE = "é, 語 and 🎈🎈 grow; " * 6 + TEXT


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "byte-level BPE", "metaspace"])
def vocabulary(request, tmp_path_factory):
    if request.param == "bytes":
        return ByteVocabulary()
    folder = tmp_path_factory.mktemp("vocabulary")
    if request.param == "sentencepiece":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT] * 20),
            model_prefix=str(folder / "model"),
            vocab_size=290,
            byte_fallback=True,
            character_coverage=0.98,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        return SentencePieceVocabulary(folder / "model.model")
    return TokenizerVocabulary.from_directory(write_tokenizer(folder, metaspace=request.param == "metaspace"))


def test_pieces_are_whole_characters_and_join_to_the_text(vocabulary):
    """With metaspace and an alphabet of bytes a wide character is unknown, so that text is what decoding gives."""
    ids = vocabulary.encode(WIDE)
    whole = vocabulary.decode(ids)
    assert len(ids) > 60
    for cut in (0, 1, 5, 20, 40):
        stream = TextStream(vocabulary, ids[:cut])
        before = vocabulary.decode(ids[:cut]).rstrip(REPLACEMENT)
        pieces = [stream.push(token) for token in ids[cut:]] + [stream.end()]
        assert before + "".join(pieces) == whole
        assert not any(REPLACEMENT in piece for piece in pieces)
        assert sum(map(bool, pieces)) > 30, "token by token"


def test_a_character_that_never_becomes_whole_is_shown_at_last():
    class Broken(ByteVocabulary):
        def decode(self, ids):
            return bytes(i - 3 for i in ids).decode("utf-8", "replace")

    vocabulary = Broken()
    stream = TextStream(vocabulary)
    pieces = [stream.push(0xE2 + 3) for _ in range(6)]
    assert pieces[0] == pieces[1] == "" and "".join(pieces).count(REPLACEMENT) >= 3
    stream = TextStream(vocabulary)
    assert stream.push(0xE2 + 3) == "" and stream.end() == REPLACEMENT


@pytest.mark.parametrize("seed", range(5))
def test_a_stop_string_is_never_shown_in_part_however_the_text_is_cut(seed):
    rng = np.random.default_rng(seed)
    stops = ["\n\nUser:", "\n###", "aab"]
    for end, stop in (("", None), ("\n\nUser: hello", stops[0]), ("aaaabxx", stops[2]), ("x\n##\n### y", stops[1])):
        text = "One\nline, \n\nUser and aa, then " + end
        finder, shown, at = StopStrings(stops), "", 0
        while at < len(text) and not finder.found:
            size = int(rng.integers(1, 5))
            shown += finder.push(text[at : at + size])
            at += size
            assert text.startswith(shown) and all(s not in shown for s in stops)
            # What is shown is never the beginning of the string that follows.
            assert stop is None or len(shown) <= text.index(stop)
        assert finder.found == (stop is not None)
        shown += finder.push("", last=True)
        assert shown == (text if stop is None else text[: text.index(stop)])


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="A stop string is empty"):
        StopStrings(["x", ""])
