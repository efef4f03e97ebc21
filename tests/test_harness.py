"""lm-eval on our models: the answers of its own HFLM on the same model, and evaluation from the command line."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

# Before anything of Hugging Face is imported: no test needs a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import model
from flm_jax.checkpoint import Checkpoints
from flm_jax.data.config import DataConfig
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.data.vocabulary import ByteVocabulary, TokenizerVocabulary
from flm_jax.evaluation import EvalRequest, lm_eval_model, scoring
from flm_jax.evaluation.evaluate import LONGEST_BY_DEFAULT, evaluate_checkpoint, find_length
from flm_jax.evaluation.scoring import Scorer, Window, bits_per_byte_of_text, rolling_windows
from flm_jax.growth import Growth, Lineage, masks_at
from flm_jax.sharding import MeshConfig, make_mesh, param_shardings
from flm_jax.source_checkpoint import CheckpointMeta, model_of, read_source
from flm_jax.state import abstract_state
from tests import small
from tests.hub import BEGIN, END, TEXT, llama, write_tokenizer

pytestmark = pytest.mark.integration

CONTEXT = 40
ONE, EIGHT = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)
WORDS = TEXT.split()


def mesh_of(config):
    return make_mesh(config, jax.devices()[:1] if config == ONE else None)


def requests(*arguments):
    return [SimpleNamespace(args=args, task_name=None) for args in arguments]


PAIRS = requests(
    ("The small model", " grows"),
    ("", "It grows, and"),
    ("", END + " grows"),  # begins with the prefix, where that is the end of a document
    ("Nothing that it knew ", "is lost"),  # the space goes to the continuation
    (" ".join(WORDS * 4), " and a longer one"),  # loses its beginning
    ("one", " one"),
    (BEGIN + "one", " one"),  # the text has its beginning already
    ("ways", " " + " ".join(WORDS[:6])),
)
TEXTS = requests((TEXT,), ("",), ("a",), (" ".join(WORDS[:14]),), (TEXT * 2,))


@pytest.fixture(scope="module", params=[False, True], ids=["no token begins", "a token begins"])
def pair(request, tmp_path_factory):
    """lm-eval's model, and ours on one device, of the same weights and tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from flm_jax.evaluation.lm_eval_model import LmEvalModel

    folder = write_tokenizer(tmp_path_factory.mktemp("hub"), request.param)
    vocabulary = TokenizerVocabulary.from_directory(folder)
    theirs, _, cfg, params = llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=3, max_length=CONTEXT, device="cpu")
    ours = LmEvalModel(Scorer(cfg.for_comparison, params, mesh_of(ONE), CONTEXT, 3), vocabulary, progress=False)
    return hf, ours


@pytest.fixture(scope="module")
def on_eight(pair):
    from flm_jax.evaluation.lm_eval_model import LmEvalModel

    _, ours = pair
    cfg, mesh = ours.scorer.cfg, mesh_of(EIGHT)
    shapes, signatures = model.declared(cfg)
    params = jax.device_put(ours.scorer.params, param_shardings(signatures, shapes, mesh))
    return LmEvalModel(Scorer(cfg, params, mesh, CONTEXT, 3), ours.vocabulary, progress=False)


def assert_same_scores(found, expected):
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=2e-5, atol=2e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]


def greedy_pairs(ours):
    """Continuations that are the likeliest, and the same with another last token."""
    before = [[7, token] for token in (50, 60, 70)]
    found = []
    for context, after in zip(before, likeliest(ours, before, 3), strict=True):
        found += [(("", ""), context, after), (("", ""), context, [*after[:2], (after[2] + 1) % 290])]
    return found


def likeliest(ours, prompts, steps):
    """Token by token, what the model holds for likeliest, without its cache."""
    rows = np.array(prompts, np.int32)
    for _ in range(steps):
        padded = np.pad(rows, ((0, 0), (0, 8 - rows.shape[1])))
        logits = small.apply(ours.scorer.cfg, ours.scorer.params, padded)[:, rows.shape[1] - 1]
        rows = np.concatenate([rows, np.argmax(logits, -1).astype(np.int32)[:, None]], axis=1)
    return rows[:, -steps:].tolist()


def test_log_likelihoods_are_those_of_hflm(pair, on_eight):
    hf, ours = pair
    expected = hf.loglikelihood(PAIRS, disable_tqdm=True)
    assert_same_scores(ours.loglikelihood(PAIRS), expected)
    assert_same_scores(on_eight.loglikelihood(PAIRS), expected)


def test_greedy_is_said_of_the_likeliest_tokens(pair, on_eight):
    hf, ours = pair
    asked = greedy_pairs(ours)
    expected = hf._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [greedy for _, greedy in expected] == [True, False] * 3
    for found in (ours, on_eight):
        assert_same_scores(found._loglikelihood_tokens(asked), expected)


def test_rolling_log_likelihoods_are_those_of_hflm(pair, on_eight):
    hf, ours = pair
    expected = hf.loglikelihood_rolling(TEXTS, disable_tqdm=True)
    assert expected[1] == 0 or ours.vocabulary.special.begin
    for found in (ours, on_eight):
        np.testing.assert_allclose(found.loglikelihood_rolling(TEXTS), expected, rtol=2e-5, atol=2e-4)


def test_generation_is_that_of_hflm(pair, on_eight):
    hf, ours = pair
    # None is written with its beginning: whether HFLM then adds another depends on the first prompt of a batch.
    prompts = ["It", "Nothing that it knew", " ".join(WORDS * 4), "the large one.\n", "12 345"]
    free = hf.generate_until(requests(*[(p, {"until": [], "max_gen_toks": 20}) for p in prompts]), disable_tqdm=True)
    assert len({*free}) == len(prompts) and all(free)
    # Texts that stop are taken from what is generated without them, so that they are met in the midst of it.
    until = [text[len(text) // 2 :][:3] for text in free]
    asked = requests(
        *[(p, {"until": [], "max_gen_toks": 20}) for p in prompts],
        *[(p, {"until": [stop], "max_gen_toks": 20}) for p, stop in zip(prompts, until, strict=True)],
        *[(p, {"until": until[0], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0}) for p in prompts[:2]],
    )
    expected = hf.generate_until(asked, disable_tqdm=True)
    assert expected[: len(prompts)] == free and expected[len(prompts) : 2 * len(prompts)] != free
    assert ours.generate_until(asked) == expected
    assert on_eight.generate_until(asked) == expected


def test_generation_stops_at_an_end_and_goes_on_after_a_look(pair, monkeypatch):
    """Short rounds change nothing; an end that the model writes is one, and so is a special token that a task names."""

    _, ours = pair
    asked = requests(("It grows", {"until": [], "max_gen_toks": 20}), ("12", {"until": [], "max_gen_toks": 11}))
    expected = ours.generate_until(asked)
    monkeypatch.setattr(lm_eval_model, "FIRST_STEPS", 2)
    assert ours.generate_until(asked) == expected
    ((first,),) = likeliest(ours, [ours.tok_encode("It grows")[-7:]], 1)
    with monkeypatch.context() as patch:
        patch.setattr(ours, "_special", dataclasses.replace(ours._special, stop_ids=(first,)))
        assert ours.generate_until(asked)[0] == ""
    assert ours.generate_until(asked)[0] == expected[0] != ""
    # Were that token special, and named by a task: it is not written out, and stops all the same.
    encode, decode = ours.vocabulary.encode, ours.vocabulary.decode
    monkeypatch.setattr(ours.vocabulary, "encode", lambda text: [first] if text == "<halt>" else encode(text))
    monkeypatch.setattr(ours.vocabulary, "decode", lambda ids: decode(i for i in ids if i != first))
    assert ours.generate_until(requests(("It grows", {"until": ["<halt>"], "max_gen_toks": 20}))) == [""]


def test_sampling_has_a_seed_and_a_temperature(pair):
    from flm_jax.evaluation.lm_eval_model import LmEvalModel

    _, ours = pair
    asked = requests(("It", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 3.0}))
    one, same, other = (
        LmEvalModel(ours.scorer, ours.vocabulary, seed, progress=False).generate_until(asked) for seed in (0, 0, 1)
    )
    assert one == same != other
    greedy = requests(("It", {"until": [], "max_gen_toks": 8}))
    assert ours.generate_until(greedy) != one


def test_what_a_task_may_not_ask_is_said(pair):
    _, ours = pair
    for asked, message in (
        ({"num_beams": 4}, "generate with num_beams; supported are"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.9}, "generate with top_p"),
        ({"max_gen_toks": CONTEXT}, "asks for 40 generated tokens, but the model's context is 40"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.generate_until(requests(("It", asked)))
    with pytest.raises(ValueError, match="1 tokens of context and 41 to predict"):
        ours.scorer.score([Window([1], [2] * 41)])


@pytest.mark.parametrize("context", [1, 5, 16, 17])
def test_rolling_windows_are_those_of_lm_eval(context):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length in (0, 1, context - 1, context, context + 1, 3 * context, 3 * context + 2):
        tokens = list(range(100, 100 + length))
        expected = [make_disjoint_window(w) for w in get_rolling_token_windows(tokens, 7, context, 1)]
        assert [tuple(w) for w in rolling_windows(tokens, 7, context)] == expected


@pytest.mark.parametrize("mesh", [ONE, EIGHT, MeshConfig(data=2, sequence=2, tensor=2)], ids=["1", "8", "sequence"])
def test_scores_are_those_computed_directly(mesh, monkeypatch):
    """Also with the head in chunks, and on a mesh that splits positions."""
    cfg = small.shape(init_std_vector=1.0)
    params, rng = small.params(cfg), np.random.default_rng(0)
    windows = [
        Window(rng.integers(0, cfg.vocab, before).tolist(), rng.integers(0, cfg.vocab, after).tolist())
        for before, after in ((1, 1), (30, 3), (4, 20), (1, 24), (90, 24))
    ]
    expected = []
    for before, after in windows:
        ids = (before + after)[-25:]
        log_probs = jax.nn.log_softmax(small.apply(cfg, params, np.array([ids[:-1]], np.int32))[0])[-len(after) :]
        greedy = np.argmax(log_probs, -1).tolist() == after
        expected.append((sum(float(row[t]) for row, t in zip(log_probs, after, strict=True)), greedy))
    for at_once in (scoring.LOGITS_AT_ONCE, 4 * 24 * cfg.vocab):
        monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
        assert_same_scores(Scorer(cfg, params, mesh_of(mesh), 24, rows=3).score(windows), expected)


def test_few_shapes_are_compiled():
    scorer = Scorer(small.shape(), None, mesh_of(ONE), 100)
    assert [scorer.bucket(n) for n in (1, 16, 17, 33, 65, 100)] == [16, 16, 32, 64, 112, 112]
    assert next(scorer.batches([3, 9, 1, 7])) == [1, 3, 0, 2]
    assert Scorer(small.shape(), None, mesh_of(EIGHT), 100, rows=5).rows == 8


def test_bits_a_byte_are_the_rolling_sum(pair, monkeypatch):
    _, ours = pair
    scorer, texts = ours.scorer, [request.args[0] for request in TEXTS]
    found = bits_per_byte_of_text(scorer.cfg, scorer.params, ours.vocabulary, texts, CONTEXT, scorer.mesh)
    # What a tokenizer puts before a text is no part of it.
    with_begin = -sum(ours.loglikelihood_rolling(TEXTS))
    assert (found.nats == pytest.approx(with_begin, rel=1e-6)) == (not ours.vocabulary.special.begin)
    monkeypatch.setattr(ours, "_special", dataclasses.replace(ours._special, begin=()))
    nats = -sum(ours.loglikelihood_rolling(TEXTS))
    assert found.nats == pytest.approx(nats, rel=1e-6)
    size = sum(len(text.encode()) for text in texts)
    assert (found.documents, found.bytes) == (4, size)
    assert found.bits_per_byte == pytest.approx(nats / size / math.log(2), rel=1e-6)
    with pytest.raises(ValueError, match="there is no text"):
        bits_per_byte_of_text(scorer.cfg, scorer.params, ours.vocabulary, [""], CONTEXT, scorer.mesh)
    with pytest.raises(ValueError, match="has 359 ids, and the model only 304"):
        bits_per_byte_of_text(scorer.cfg, scorer.params, ByteVocabulary(100), texts, CONTEXT, scorer.mesh)
    with pytest.raises(ValueError, match="has 359 ids, and the model only 304"):
        type(ours)(scorer, ByteVocabulary(100))


def test_many_documents_are_scored_in_parts():
    """The same sum, whatever is scored together."""
    cfg = small.shape()
    params, vocabulary, texts = small.params(cfg), ByteVocabulary(), [f"text {i}" for i in range(70)]
    whole = bits_per_byte_of_text(cfg, params, vocabulary, texts, 8, mesh_of(ONE), rows=1)
    parts = [bits_per_byte_of_text(cfg, params, vocabulary, [text], 8, mesh_of(ONE), rows=1) for text in texts[:60:20]]
    assert whole.documents == 70 and whole.tokens == sum(map(len, texts))
    alike = bits_per_byte_of_text(cfg, params, vocabulary, texts[:60:20], 8, mesh_of(ONE), rows=4)
    assert alike.nats == pytest.approx(sum(part.nats for part in parts), rel=1e-5)


def saved(workdir, cfg, params, blobs, lineage=None):
    """A work directory with one checkpoint."""
    lineage, mesh = lineage or Lineage(cfg), mesh_of(ONE)
    with jax.set_mesh(mesh):
        like = abstract_state(lineage, mesh)
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like).replace(params=params)
        meta = CheckpointMeta("saved", lineage).record()
        with Checkpoints(workdir / "checkpoints" / "0_saved") as store:
            store.save(0, state, meta=meta, blobs=blobs)
            store.wait()
    return workdir


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A checkpoint that holds its tokenizer, as one that came from a Hugging Face directory does."""
    return llama(write_tokenizer(tmp_path_factory.mktemp("converted") / "hub"))[1]


TASK = """
task: little_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: @FILE
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture
def tasks(tmp_path):
    lines = [{"question": "It grows, and goes", "choices": [" on", " off", " one"], "answer": i % 3} for i in range(6)]
    (tmp_path / "little.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "little.yaml").write_text(TASK.replace("@FILE", str(tmp_path / "little.jsonl")))
    return tmp_path / "tasks"


def launched(checkpoint, what, tokenizer=None, batch_size=4, json_file=None, bindings=()):
    import gin

    from flm_jax.cli import runs

    gin.clear_config()
    try:
        runs.run_evaluate(str(checkpoint), what, tokenizer, batch_size, None, json_file, [], list(bindings))
    finally:
        gin.clear_config()


def test_a_task_of_ones_own_runs_from_a_checkpoint_without_a_network(converted, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    what = EvalRequest(("little_*",), str(tasks), limit=5, text=str(tmp_path / "text.txt"), prompt="It grows", tokens=5)
    (tmp_path / "text.txt").write_text(TEXT)
    mesh = ("evaluate.mesh = @MeshConfig()", "MeshConfig.fsdp = 4", "MeshConfig.tensor = 2")
    launched(converted, what, json_file=str(tmp_path / "found.json"), bindings=mesh)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["max_length"] == 64 and found["tokenizer"]["kind"] == "tokenizer" and found["step"] == 0
    assert found["lm_eval"]["results"]["little_choices"]["acc,none"] in (0.2, 0.4)  # one of three choices each time
    assert found["lm_eval"]["n-samples"]["little_choices"]["effective"] == 5
    vocabulary = TokenizerVocabulary.from_directory(converted.parent / "hub")
    cfg, params = model_of(str(converted)), read_source(converted).restore_params(mesh_of(ONE))
    direct = bits_per_byte_of_text(cfg, params, vocabulary, [TEXT], 64, mesh_of(ONE))
    assert found["text"]["bits_per_byte"] == pytest.approx(direct.bits_per_byte, rel=1e-3)  # in bfloat16
    assert len(found["generated"]["tokens"]) == 5
    said = capsys.readouterr().out
    assert (
        f"{found['text']['bits_per_byte']:.4f} bits per byte" in said
        and "little_choices" in said
        and "It grows" in said
    )


def test_errors_are_one_sentence(converted, tasks, tmp_path, capsys, monkeypatch):
    def refused(what, **changes):
        with pytest.raises(SystemExit) as stop:
            launched(changes.pop("checkpoint", converted), what, **changes)
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    text = EvalRequest(text=str(tmp_path / "nowhere.txt"))
    assert "there is no text file or folder" in refused(text)
    assert "no tokenizer.json in" in refused(text, tokenizer=str(tmp_path))
    large = write_tokenizer(tmp_path / "large", size=310)
    assert "The tokenizer has 310 ids, and the model only 304" in refused(text, tokenizer=str(large))
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    assert "is not UTF-8 text" in refused(EvalRequest(text=str(tmp_path / "latin.txt")))
    assert "is not a folder" in refused(EvalRequest(("x",), str(tmp_path / "nowhere")))

    # lm-eval's own tasks take ten seconds to read.
    from lm_eval import tasks as theirs

    manager = theirs.TaskManager
    monkeypatch.setattr(
        theirs, "TaskManager", lambda include_path, include_defaults=False: manager(None, include_path, False)
    )
    error = refused(EvalRequest(("litle_choices",), str(tasks)))
    assert "knows no task 'litle_choices'; close to it: 'little_choices'" in error


def test_a_run_is_evaluated_with_the_vocabulary_it_was_trained_with(data, tmp_path, capsys):
    run = saved(tmp_path / "run", small.shape(), small.params(small.shape()), {"data": b"{}"})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    text = EvalRequest(text=str(tmp_path / "texts"))
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json, and its work directory does not record"):
        evaluate_checkpoint(run, text)
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer", size=260))
    with pytest.raises(ValueError, match="context length .* is not known: .* set --max_length"):
        evaluate_checkpoint(run, text, tokenizer)
    (run / "config.gin").write_text(
        "DataConfig.corpus = @TextFolder()\nDataConfig.vocabulary = @Bytes()\nDataConfig.context = 16\n"
        f"TextFolder.path = {data.corpus.path!r}\nDataConfig.cache_dir = {data.cache_dir!r}\n"
    )
    launched(run, text, json_file=str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokenizer"]["kind"] == "bytes" and found["max_length"] == 16
    assert found["text"]["tokens"] == found["text"]["bytes"] == len(TEXT.encode())
    lines = evaluate_checkpoint(run, EvalRequest(text=str(tmp_path / "texts.jsonl")), data=data, mesh=EIGHT)
    assert lines["text"]["nats"] == pytest.approx(found["text"]["nats"], rel=1e-5)
    assert "sequences of 16 tokens" in capsys.readouterr().out


def test_a_checkpoints_tokenizer_is_a_vocabulary_to_train_with(converted):
    import gin

    from flm_jax.cli import configure

    gin.clear_config()
    try:
        bindings = ["DataConfig.vocabulary = @Pretrained()", f"Pretrained.path = {str(converted)!r}"]
        configure.parse([], [*bindings, "verify.data = @DataConfig()"])
        config = configure.verify()["data"].vocabulary
    finally:
        gin.clear_config()
    assert config.load().digest == TokenizerVocabulary.from_directory(converted.parent / "hub").digest


def test_a_model_that_could_read_very_much_does_so_where_it_is_asked_to():
    def origin(**said):
        return SimpleNamespace(
            directory="runs/some/0", files={"config.json": json.dumps(said).encode()} if said else {}
        )

    assert find_length(origin(max_position_embeddings=1024), None) == 1024
    assert find_length(origin(max_position_embeddings=131_072), None) == LONGEST_BY_DEFAULT
    # A run may have trained it to read more than it did when it came.
    assert find_length(origin(max_position_embeddings=64), DataConfig(context=128)) == 128
    assert find_length(origin(), DataConfig(context=128)) == 128
    with pytest.raises(ValueError, match="The context length of the model of runs/some/0 is not known"):
        find_length(origin(), None)


def test_a_model_in_a_ramp_is_what_its_masks_let_through(tmp_path):
    old, new = (small.shape(mlp=mlp, init_std_vector=1.0) for mlp in (40, 56))
    plan = Growth("mask", ramp_steps=4)
    params, mesh = small.params(new), mesh_of(ONE)
    run = saved(tmp_path / "run", new, params, {}, Lineage(new, plan, Lineage(old)))
    (tmp_path / "a.txt").write_text(TEXT)
    found = evaluate_checkpoint(
        run, EvalRequest(text=str(tmp_path / "a.txt")), max_length=16, data=DataConfig(vocabulary=Bytes())
    )
    masked, plain = (
        bits_per_byte_of_text(new, params, ByteVocabulary(), [TEXT], 16, mesh, masks=masks).nats
        for masks in (masks_at(old, new, plan, 0), None)
    )
    assert found["text"]["nats"] == pytest.approx(masked, rel=1e-5)
    assert abs(masked - plain) > 0.1


def test_the_command_says_what_it_can_do_where_nothing_is_asked(tmp_path):
    done = subprocess.run(
        [sys.executable, "experiments/evaluate.py", f"--checkpoint={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "say what to evaluate: --lm_eval, --text or --generate" in done.stdout + done.stderr


def test_evaluating_text_needs_neither_tensorflow_nor_lm_eval(converted, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    code = f"""
import sys
for name in ("tensorflow", "seqio", "lm_eval", "torch", "transformers"):
    sys.modules[name] = None  # importing it now fails
from flm_jax.evaluation.evaluate import LONGEST_BY_DEFAULT, EvalRequest, evaluate_checkpoint, find_length
evaluate_checkpoint({str(converted)!r}, EvalRequest(text={str(tmp_path / "a.txt")!r}))
try:
    evaluate_checkpoint({str(converted)!r}, EvalRequest(tasks=("x",)))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install -e '.[eval]'" in done.stdout
