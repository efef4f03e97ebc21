"""Shingles and MinHash in NumPy: what they promise, compared with sets of Python; which of a group stays."""

import itertools
import re

import numpy as np
import pytest

from flm_jax.chat.conversation import Conversation, Message
from flm_jax.duplicates import near, shingles
from flm_jax.selection.work import compared_text

TOKEN = re.compile(r"[\u4e00-\u9fff\u3041-\u30ff]|[^\W\u4e00-\u9fff\u3041-\u30ff]+|[^\w\s]|_")
TEXTS = [
    "grow the model, then grow it again: 1+1=2",
    "1-1=2",
    "我们训练一个模型 and grow it",
    "x",
    "",
    "naïve\tcafé\n\n42a b",
    "a" * 300,
]


def conversation(*contents, system=None):
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    return Conversation((Message("system", system), *turns) if system else tuple(turns))


def test_tokens_are_those_of_the_pattern():
    found = shingles.tokens(TEXTS)
    names: dict[int, str] = {}
    for number, text in enumerate(TEXTS):
        hashes = found.hashes[found.starts[number] : found.starts[number + 1]].tolist()
        wanted = TOKEN.findall(text)
        assert len(hashes) == len(wanted)
        for code, token in zip(hashes, wanted, strict=True):  # one hash for one token, wherever it stands
            assert names.setdefault(code, token) == token
    assert len(names) == len({token for text in TEXTS for token in TOKEN.findall(text)})


def test_a_text_is_cut_before_it_takes_all_memory(monkeypatch):
    monkeypatch.setattr(shingles, "LONGEST", 10)
    assert len(shingles.tokens(["one two three four"]).hashes) == 3


def test_shingles_are_five_tokens_and_do_not_cross_texts():
    words = list("abcdefg")
    texts = [" ".join(words), "a b c d e", "f g", "c d e f g", ""]
    found = shingles.shingles(shingles.tokens(texts))
    sets = [set(found.hashes[a:b].tolist()) for a, b in itertools.pairwise(found.starts)]
    assert [len(s) for s in sets] == [3, 1, 1, 1, 1]
    assert sets[1] < sets[0] and sets[3] < sets[0]
    assert len(set.union(*sets)) == 5


def test_case_width_spaces_and_system_turns_make_no_difference():
    one = conversation("What  is \uff21?", "a\nletter", system="Be brief.")
    other = conversation("what is A?", "A letter")
    assert compared_text(one) == compared_text(other)
    assert shingles.text_hash(compared_text(other)) != shingles.text_hash(compared_text(conversation("a?", "A")))


def changed(words, count, rng):
    out = list(words)
    for place in rng.choice(len(words), count, replace=False):
        out[place] = f"new{place}"
    return out


def jaccard(a, b):
    one, other = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (a, b))
    return len(one & other) / len(one | other)


@pytest.fixture(scope="module")
def pairs():
    """Texts of 100 words, each beside a copy with 0 to 9 words changed, and the exact share of common shingles."""
    rng = np.random.default_rng(0)
    originals = [[f"w{n}" for n in rng.integers(0, 5000, 100)] for _ in range(600)]
    copies = [changed(words, i % 10, rng) for i, words in enumerate(originals)]
    exact = np.array([jaccard(a, b) for a, b in zip(originals, copies, strict=True)])
    texts = [" ".join(words) for pair in zip(originals, copies, strict=True) for words in pair]
    return near.signatures(shingles.shingles(shingles.tokens(texts))), exact


def test_signatures_estimate_the_share_of_common_shingles(pairs):
    signature, exact = pairs
    for kind in (lambda s: s, near.short):
        found = near.similarity(kind(signature)[::2], kind(signature)[1::2])
        error = found - exact
        assert abs(error.mean()) < 0.006
        # The deviation of a mean of 128 draws.
        assert np.std(error) < 1.15 * np.sqrt(np.mean(exact * (1 - exact)) / 128) + 0.004
    strangers = near.similarity(near.short(signature[:-1:2]), near.short(np.roll(signature[::2], 1, axis=0)))
    assert abs(strangers.mean()) < 0.002  # agreement by chance is taken off


def test_datasketch_estimates_the_same(pairs):
    datasketch = pytest.importorskip("datasketch")
    rng = np.random.default_rng(1)
    words = [f"w{n}" for n in range(100)]
    other = changed(words, 4, rng)
    theirs = []
    for text in (words, other):
        made = datasketch.MinHash(128)
        made.update_batch([" ".join(text[i : i + 5]).encode() for i in range(96)])
        theirs.append(made)
    found = near.signatures(shingles.shingles(shingles.tokens([" ".join(words), " ".join(other)])))
    ours = float(near.similarity(near.short(found[:1]), near.short(found[1:]))[0])
    assert ours == pytest.approx(theirs[0].jaccard(theirs[1]), abs=0.15)


def test_near_copies_are_found_as_often_as_the_bands_promise(pairs):
    signature, exact = pairs
    bands, short = near.band_hashes(signature), near.short(signature)
    compare = near.comparison(lambda: short, 0.7)
    found = np.concatenate(list(near.near_pairs(np.arange(len(short)), lambda band: bands[band], compare)))
    assert (found[:, 0] % 2 == 0).all() and (found[:, 1] == found[:, 0] + 1).all()  # nothing but the planted pairs
    hit = np.zeros(len(exact), bool)
    hit[found[:, 0] // 2] = True
    assert hit[exact > 0.85].mean() > 0.97
    assert hit[exact < 0.5].mean() < 0.02


def test_the_first_of_equal_hashes():
    assert near.first_of_equal(np.array([5, 3, 5, 9, 3, 5], np.uint64)).tolist() == [0, 1, 0, 3, 1, 0]


def test_what_falls_out_is_like_something_that_stays():
    pairs = np.array([[1, 2], [0, 1], [2, 3], [0, 1], [4, 5]])
    # 1 is like 0; 2 is like 1 only, which is gone, so it stays; 3 is like 2.
    assert near.drop(pairs, 6).tolist() == [0, 0, 2, 2, 4, 4]


def test_members_that_differ_from_the_first_of_a_group_are_compared_with_each_other():
    hashes = np.full(4, 7, np.uint64)
    alike = {(0, 2), (1, 3)}
    compare = lambda a, b: np.array([pair in alike for pair in zip(a.tolist(), b.tolist(), strict=True)])  # noqa: E731
    found = {tuple(p) for part in near.near_pairs(np.arange(4), lambda _: hashes, compare) for p in part.tolist()}
    assert found == alike
