"""Which conversations to tune on: all of a pool, a random part, the longest answers, or selected ones; how many.

  make study-sft
  python benchmarks/study_sft.py --base=runs/demo/checkpoints/0_52b_small --work=runs/study \
      [--sizes=500,2000] [--write=docs/sft_study.md]
  python benchmarks/study_sft.py --base=runs/smollm2 --template=tokenizer --rates=3e-5,1e-4,3e-4 --work=runs/study

The same base is tuned on all samples, on N random ones (three seeds), on the N with the longest answers and on N
selected ones (`flm_jax.selection`: duplicates, rules, IFD under the base, diversity, equal shares of the domains), for
each N of a list, twice: for equal passes over each set, and for an equal number of optimizer steps. The learning rate
is the best of a few for a random sample that no arm uses, and the same for all. Each arm runs in a process of its own;
its result is kept in WORK/results, so that a start after one that was killed goes on. Then its checkpoints are deleted:
two of them, with moments, take six times the bytes of the model. The data are those of `sft_data.py`, the base of
`make study-sft` is the first model of the demo.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import sft_data, study_sft_page

if TYPE_CHECKING:
    from flm_jax.data.source import Data

_BASE = flags.DEFINE_string("base", None, "The checkpoint to tune.", required=True)
_WORK = flags.DEFINE_string("work", None, "Directory for data, runs and results.", required=True)
_DATA = flags.DEFINE_string("data", None, "pool.jsonl, heldout.jsonl and questions.jsonl; by default they are made.")
_SIZES = flags.DEFINE_list("sizes", ["500", "2000"], "Numbers of conversations.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Random samples per number.", lower_bound=1)
_EPOCHS = flags.DEFINE_float("epochs", 3.0, "Passes over each set, where these are equal.", lower_bound=0.1)
_STEPS = flags.DEFINE_integer("steps", 240, "Optimizer steps, where these are equal.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 128, "Tokens per window.", lower_bound=8)
_BATCH = flags.DEFINE_integer("batch", 8, "Windows per step.", lower_bound=1)
_RATES = flags.DEFINE_list("rates", ["1e-3", "3e-3", "1e-2", "3e-2"], "Learning rates to choose from.")
_TEXT = flags.DEFINE_integer("text_windows", 256, "Windows of plain text to measure on.", lower_bound=1)
_KEEP = flags.DEFINE_bool("keep_runs", False, "Keep the checkpoints of the arms that have a result.")
_TEMPLATE = flags.DEFINE_string("template", "tele_flm", "The chat template; 'tokenizer': that of the base.")
_WRITE = flags.DEFINE_string("write", None, "Write the page to this file, and the plot beside it.")
_COMMAND = flags.DEFINE_string("command", None, "The command that the page names; by default the one that was given.")
_ARM = flags.DEFINE_string("arm", None, "Used by the program itself.")

SWEEP = "sweep"
EPOCHS, STEPS = "passes", "steps"


@dataclass(frozen=True)
class Arm:
    """One tuning.

    Attributes:
      set: base (not tuned), all, random, longest, selected; or sweep, to choose the rate.
      size: conversations; 0: all of the pool.
      seed: of the sample, and of the order of windows.
      equal: what is equal between arms: passes or steps.
      rate: the learning rate.
    """

    set: str
    size: int
    seed: int
    equal: str
    rate: float

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.set}-{self.size}-{self.seed}-{self.equal}-{self.rate:g}"


def sample_of(arm: Arm, data: Path, work: Path, base: str, template: str) -> Path:
    """The file with the conversations of an arm, made where it is missing."""
    pool = data / "pool.jsonl"
    if arm.size == 0:
        return pool
    path = work / "sets" / f"{arm.set}-{arm.size}-{arm.seed}.jsonl"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if arm.set == "selected":
        return _selected(arm, pool, work, base, template)
    lines = pool.read_text().splitlines(keepends=True)
    if arm.set == "longest":

        def length(line: str) -> int:
            return sum(len(m["content"]) for m in json.loads(line)["messages"] if m["role"] == "assistant")

        chosen = sorted(range(len(lines)), key=lambda i: (-length(lines[i]), i))[: arm.size]
    else:
        chosen = random.Random(f"{arm.set} {arm.seed}").sample(range(len(lines)), arm.size)
    path.write_text("".join(lines[i] for i in sorted(chosen)))
    return path


def _selected(arm: Arm, pool: Path, work: Path, base: str, template: str) -> Path:
    from flm_jax.selection.config import Domains, SampleScore, ScoringBase, Selection, TextRules
    from flm_jax.selection.select import select

    domains = sorted({json.loads(line)["domain"] for line in pool.read_text().splitlines()})
    selection = Selection(
        count=arm.size,
        rules=TextRules(least_answer=1),  # many right answers are one number
        score=SampleScore("ifd"),
        domains=Domains(fractions={domain: 1 / len(domains) for domain in domains}),
        base=ScoringBase(base, template=template),
        most_faulty=None,
    )
    output = work / "selections" / str(arm.size)
    select(selection, [pool], output, work / "selections" / "steps", print)
    return output / "selected.jsonl"


def tune(arm: Arm, conversations: Path, work: Path) -> tuple[str, dict[str, Any]]:
    """Tunes the base on an arm's conversations; returns the checkpoint, and what it took."""
    from flm_jax import train
    from flm_jax.chat.corpus import Conversations
    from flm_jax.data.config import DataConfig
    from flm_jax.data.source import StoreData, open_data
    from flm_jax.data.train_vocabulary import Pretrained
    from flm_jax.optimizer import OptimizerConfig
    from flm_jax.recipe import Recipe, Run, Stage
    from flm_jax.source_checkpoint import model_of

    corpus = Conversations(
        str(conversations),
        template=_TEMPLATE.value,
        most_faulty=10**9,
        heldout_percent=10 if arm.set == SWEEP else 1,
    )
    data = DataConfig(corpus, Pretrained(_BASE.value), _CONTEXT.value, seed=arm.seed, cache_dir=str(work / "cache"))
    store = open_data(data)
    assert isinstance(store, StoreData)
    windows = store.store.num_windows("train", _CONTEXT.value)
    steps = _STEPS.value if arm.equal == STEPS else max(round(_EPOCHS.value * windows / _BATCH.value), 1)
    # A warm-up begins with a rate of 0: of few steps, none is to be lost to it.
    optimizer = OptimizerConfig(learning_rate=arm.rate, schedule="linear", final_rate=1e-4, warmup_steps=steps // 20)
    recipe = Recipe(
        (Stage("chat", model_of(_BASE.value), steps, _BATCH.value, optimizer),),
        data,
        start=_BASE.value,
        eval_windows=10**6 if arm.set == SWEEP else 1,
        eval_every=10**9,
    )
    run = work / "runs" / arm.name
    report = train.train(recipe, Run(checkpoint_every=10**9, sample_tokens=8), run)
    assert report is not None
    documents = store.store.num_documents("train")
    spent = {"steps": steps, "passes": steps * _BATCH.value / windows, "conversations": documents}
    return str(run), {**spent, "own_heldout_loss": report["evals"][-1]["loss"]}


def measure(checkpoint: str, data: Path, work: Path, name: str) -> dict[str, Any]:
    """What is reported of a checkpoint: loss of held-out answers, accuracy per domain, bits per byte of plain text."""
    import jax

    from flm_jax.chat.corpus import Conversations
    from flm_jax.data.batches import heldout_batches
    from flm_jax.data.config import DataConfig
    from flm_jax.data.source import StoreData, open_data
    from flm_jax.data.train_vocabulary import Pretrained
    from flm_jax.evaluation.judged import JudgeRequest, judge_answers
    from flm_jax.loss import bits_per_byte, make_heldout_loss
    from flm_jax.sharding import MeshConfig, make_mesh
    from flm_jax.source_checkpoint import read_source

    talks = Conversations(str(data / "heldout.jsonl"), template=_TEMPLATE.value, most_faulty=10**9, heldout_percent=50)
    found = open_data(DataConfig(talks, Pretrained(_BASE.value), _CONTEXT.value, cache_dir=str(work / "cache")))
    assert isinstance(found, StoreData)
    source, mesh = read_source(checkpoint), make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        params = source.restore_params(mesh)
    loss = make_heldout_loss(source.cfg, mesh)
    splits = (heldout_batches(found.store, _CONTEXT.value, 8, 10**6, split) for split in found.store.splits)
    answers = loss(params, itertools.chain(*splits), source.masks())
    plain, _ = plain_text(work)
    text = loss(params, plain.heldout(8, _TEXT.value), source.masks())
    request = JudgeRequest(
        str(data / "questions.jsonl"), str(work / "answers" / name), template=_TEMPLATE.value, tokens=40, batch_size=32
    )
    judged = judge_answers(checkpoint, request)
    return {
        "answer_loss": answers,
        "bits_per_byte": bits_per_byte(text, plain.bytes_per_token),
        "accuracy": study_sft_page.accuracies(judged),
    }


def plain_text(work: Path) -> tuple[Data, str]:
    """What forgetting is measured on, and what it is in words: the base's own text, where its record says which."""
    from flm_jax.data.config import DataConfig
    from flm_jax.data.corpora import StandardLibrary
    from flm_jax.data.source import StoreData, open_data, recorded_data
    from flm_jax.data.train_vocabulary import Pretrained
    from flm_jax.source_checkpoint import read_source

    try:
        found = recorded_data(read_source(_BASE.value).meta.data)
        if isinstance(found, StoreData) and not found.store.weighted:  # else the base was tuned on conversations
            return found, "that the base was trained on the like of"
    except LookupError:  # of a base that was converted, nothing is recorded
        pass
    library = DataConfig(StandardLibrary(), Pretrained(_BASE.value), _CONTEXT.value, cache_dir=str(work / "cache"))
    return open_data(library), "from files of the Python standard library"


def run_arm(arm: Arm, data: Path, work: Path) -> None:
    """Tunes and measures one arm, and writes its result."""
    checkpoint: str = _BASE.value
    spent: dict[str, Any] = {}
    if arm.set != "base":
        checkpoint, spent = tune(arm, sample_of(arm, data, work, _BASE.value, _TEMPLATE.value), work)
    found = {} if arm.set == SWEEP else measure(checkpoint, data, work, arm.name)
    path = work / "results" / f"{arm.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**dataclasses.asdict(arm), **spent, **found}, indent=1) + "\n")
    if not _KEEP.value:
        shutil.rmtree(work / "runs" / arm.name, ignore_errors=True)


def result(arm: Arm, work: Path) -> dict[str, Any]:
    """The result of an arm; it is run in a new process where there is none yet."""
    path = work / "results" / f"{arm.name}.json"
    if not path.is_file():
        print(f"{arm.name} ...", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], f"--arm={json.dumps(dataclasses.asdict(arm))}"]
        # Arms of one shape share their compiled programs.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
        with (work / "log.txt").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env={**cache, **os.environ})
    found: dict[str, Any] = json.loads(path.read_text())
    print(f"{arm.name}: {study_sft_page.line(found)}", flush=True)
    return found


def arms(sizes: list[int], seeds: int, rate: float) -> list[Arm]:
    """Every arm of the study but those of the sweep."""
    found = [Arm("base", 0, 0, EPOCHS, 0.0)]
    for equal in (EPOCHS, STEPS):
        found.append(Arm("all", 0, 0, equal, rate))
        for size in sizes:
            found += [Arm("random", size, seed, equal, rate) for seed in range(seeds)]
            found += [Arm(name, size, 0, equal, rate) for name in ("longest", "selected")]
    return found


def main(argv: list[str]) -> None:
    """Runs what has no result yet, and writes the page."""
    del argv
    logging.set_verbosity(logging.ERROR)
    work = Path(_WORK.value).expanduser().absolute()
    data = Path(_DATA.value).expanduser() if _DATA.value else work / "data"
    if _ARM.value:
        run_arm(Arm(**json.loads(_ARM.value)), data, work)
        return
    work.mkdir(parents=True, exist_ok=True)
    if not (data / "questions.jsonl").is_file():
        sft_data.make(data, 12_000, 40, 0)
    sizes = sorted(map(int, _SIZES.value))
    sweep = [result(Arm(SWEEP, sizes[-1], 99, STEPS, float(rate)), work) for rate in _RATES.value]
    rate = min(sweep, key=lambda found: found["own_heldout_loss"])["rate"]
    results = [result(arm, work) for arm in arms(sizes, _SEEDS.value, rate)]
    lines = {path.stem: len(path.read_text().splitlines()) for path in sorted(data.glob("*.jsonl"))}
    page = Path(_WRITE.value) if _WRITE.value else work / "study.md"
    picture = page.with_suffix(".png")
    study_sft_page.plot(results, picture)
    command = _COMMAND.value or shlex.join(["python", "benchmarks/study_sft.py", *sys.argv[1:]])
    chosen, (_, text) = selections(sizes, data, work), plain_text(work)
    page.write_text(study_sft_page.page(results, sweep, command, base(), text, lines, picture.name, chosen))
    print(f"{page}\n{picture}")


def selections(sizes: list[int], data: Path, work: Path) -> list[str]:
    """A line about each selection."""

    def answers(path: Path) -> list[str]:
        return [json.loads(line)["messages"][-1]["content"] for line in path.read_text().splitlines()]

    found = {size: work / "selections" / str(size) for size in sizes}
    pool = answers(data / "pool.jsonl")
    return [
        study_sft_page.selection_line(
            size, json.loads((folder / "report.json").read_text()), answers(folder / "selected.jsonl"), pool
        )
        for size, folder in found.items()
    ]


def base() -> str:
    """The base, in words: its parameters, stage and step."""
    from flm_jax.costs import param_count
    from flm_jax.source_checkpoint import read_source

    source = read_source(_BASE.value)
    return f"`{source.meta.stage}` of {param_count(source.cfg) / 1e6:.1f} M parameters, at step {source.step}"


if __name__ == "__main__":
    app.run(main)
