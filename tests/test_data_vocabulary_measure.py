"""What vocabularies make of text: counts that can be made by hand, by source and vocabulary, and the program."""

import json

import gin
import pytest

from flm_jax.data.corpora import Jsonl, TextFolder
from flm_jax.data.mixture import Mixture, Source
from flm_jax.data.sentencepiece_training import SentencePiece, train
from flm_jax.data.train_vocabulary import load_vocabulary
from flm_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary
from flm_jax.data.vocabulary_measure import heldout_texts, measure, measure_all, measurements_text
from tests.commands import run_here
from tests.hub import write_tokenizer

TEXT = "It grows: tall,\twide and tall.\n"
FOREIGN = "长大了"


@pytest.fixture(scope="module")
def vocabulary():
    return SentencePieceVocabulary(model=train(SentencePiece(300), [TEXT.replace("\t", " ") * 30]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    for name, text in (("prose", TEXT), ("foreign", FOREIGN * 5 + "\n")):
        lines = [json.dumps({"text": f"{n} {text * 4}"}) + "\n" for n in range(30)]
        (root / f"{name}.jsonl").write_text("".join(lines))
    return root


def mixture(folder):
    made = [Source(name, Jsonl(str(folder / f"{name}.jsonl"), heldout_percent=30), w) for name, w in SOURCES.items()]
    return Mixture(tuple(made))


SOURCES = {"prose": 3.0, "foreign": 1.0}


def test_bytes_are_counted_as_by_hand():
    found = measure(ByteVocabulary(), ["two words", FOREIGN])
    assert (found.texts, found.bytes, found.characters, found.words, found.tokens) == (2, 18, 12, 3, 18)
    assert (found.partial, found.exact) == (9, 2)
    ratios = found.ratios
    assert ratios["bytes_per_token"] == 1 and ratios["tokens_per_word"] == 6 and ratios["tokens_per_character"] == 1.5
    assert ratios["partial"] == 0.5 and ratios["exact"] == 1 and ratios["megabytes_per_second"] > 0


def test_characters_without_a_token_are_counted_as_their_bytes(vocabulary):
    found = measure(vocabulary, [TEXT, FOREIGN])
    assert found.partial == 9, "three bytes of each character; the tab is one byte and whole"
    assert found.tokens == len(vocabulary.encode(TEXT)) + 9 and found.exact == 2
    assert measure(vocabulary, ["_\u2581_"]).exact == 0, "decoded as a space"


def test_a_tokenizer_of_bytes_says_which_tokens_are_parts(tmp_path):
    found = measure(load_vocabulary(write_tokenizer(tmp_path / "hub", False)), [TEXT, FOREIGN])
    assert found.partial == 9 and found.exact == 2
    path = write_tokenizer(tmp_path / "other", False) / "tokenizer.json"
    assert load_vocabulary(path).kind == "tokenizer"


def test_every_source_is_measured_with_every_vocabulary(vocabulary, folder):
    corpus = mixture(folder)
    found = measure_all({"bytes": ByteVocabulary(), "own": vocabulary}, corpus, 10**6)
    assert list(found) == list(SOURCES) and all(list(own) == ["bytes", "own"] for own in found.values())
    held = list(corpus.sources[0].corpus.documents("heldout"))
    assert found["prose"]["own"].texts == len(held) and found["prose"]["own"].bytes == sum(map(len, held))
    lines = measurements_text(found, corpus).splitlines()
    at = lines.index("Bytes per token")
    assert lines[at + 1].split() == ["[1]", "[2]"] and lines[at + 2].split()[:2] == ["prose", "1.000"]
    mean = (3 * found["prose"]["own"].ratios["bytes_per_token"] + found["foreign"]["own"].ratios["bytes_per_token"]) / 4
    assert lines[at + 4].split() == ["by", "weight", "1.000", f"{mean:.3f}"]


def test_a_sample_is_bounded_and_of_heldout_text(folder, tmp_path):
    corpus = mixture(folder).sources[0].corpus
    some = heldout_texts("prose", corpus, 300)
    assert 0 < sum(map(len, some)) <= 300 and set(some) < set(corpus.documents("heldout"))
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    with pytest.raises(ValueError, match="Source 'one' has no held-out text .* at least two documents"):
        heldout_texts("one", Jsonl(str(tmp_path / "one.jsonl")), 300)
    with pytest.raises(FileNotFoundError, match="Source 'gone': .*nowhere"):
        measure_all({}, Mixture((Source("gone", TextFolder(str(tmp_path / "nowhere"))),)), 300)


# The program


def gin_file(folder):
    corpora = [f"{n}/Jsonl.path = '{folder}/{n}.jsonl'\n{n}/Source.weight = {w}\n" for n, w in SOURCES.items()]
    names = [f"{n}/Source.name = '{n}'\n{n}/Source.corpus = @{n}/Jsonl()\n" for n in SOURCES]
    head = "DataConfig.corpus = @Mixture()\nMixture.sources = [@prose/Source(), @foreign/Source()]\n"
    (folder / "mix.gin").write_text(f"{head}{''.join(corpora + names)}DataConfig.cache_dir = '{folder}/cache'\n")
    return f"--gin_file={folder}/mix.gin"


def program(*words):
    """Runs the program in this process; returns its exit status."""
    gin.clear_config()
    try:
        run_here("tokenizer", [f"--command={words[0]}", *words[1:]])
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_tokenizer_is_trained_and_measured_beside_others(folder, tmp_path, capsys):
    given, made = gin_file(folder), tmp_path / "made"
    assert program("train", given, f"--output={made}", "--gin_bindings=SentencePiece.size = 300") == 0
    said = capsys.readouterr().out
    assert "prose: trained on " in said and "by weight" in said and f"Written to {made}" in said
    report = json.loads((made / "report.json").read_text())
    vocabulary = load_vocabulary(str(made))
    (own,) = report["tokenizers"].values()
    assert own["digest"] == vocabulary.digest and set(own["sources"]) == set(report["sample"]) == set(SOURCES)
    theirs = write_tokenizer(tmp_path / "hub", False)
    both = [f"--tokenizer={made}", f"--tokenizer={theirs}", f"--json={tmp_path / 'found.json'}"]
    assert program("measure", given, *both) == 0
    found = json.loads((tmp_path / "found.json").read_text())["tokenizers"]
    assert found[str(made)]["bytes_per_token"] == own["bytes_per_token"] and len(found) == 2
    # Nothing is overwritten, and a changed model is no tokenizer.
    assert program("train", given, f"--output={made}") == 1
    assert "is not empty, and nothing is overwritten" in capsys.readouterr().err
    (made / "tokenizer.model").write_bytes((made / "tokenizer.model").read_bytes()[:-9])
    assert program("measure", given, f"--tokenizer={made}") == 1
    assert f"error: the vocabulary in {made} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["train", "GIN"], 2, "give the directory to write, with --output"),
        (["measure", "GIN"], 2, "name what to measure, with --tokenizer"),
        (["measure", "GIN", "--tokenizer=a", "--output=b"], 2, "--output belongs to train"),
        (["train", "GIN", "--tokenizer=a", "--output=b"], 2, "--tokenizer belongs to measure"),
        (["train", "--output=b"], 2, "say what text there is"),
        (["train", "GIN", "--output=OUT", "--gin_bindings=DataConfig.vocabulary = @Bytes()"], 1, "is Bytes, of which"),
        (["measure", "GIN", "--tokenizer=a", "--tokenizer=a"], 1, "--tokenizer=a is given twice"),
        (["measure", "GIN", "--tokenizer=OUT"], 1, "holds no tokenizer.json, and is no checkpoint either"),
    ],
)
def test_wrong_input_is_one_sentence(words, status, said, folder, tmp_path, capsys):
    given = {"GIN": gin_file(folder)}
    assert program(*(given.get(word, word).replace("OUT", str(tmp_path / "out")) for word in words)) == status
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == status
    assert not (tmp_path / "out").exists()
