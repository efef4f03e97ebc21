"""Conversations to tune on and questions to evaluate with, made from the Python standard library and by computation.

  python benchmarks/sft_data.py --output=data/sft [--pool=12000] [--questions=40] [--seed=0]

writes three files of JSON lines: `pool.jsonl`, conversations in five domains; `heldout.jsonl`, as many again as there
are questions, made in the same way; and `questions.jsonl`, for `experiments/evaluate.py --prompts`. The domains:

  arithmetic   sums, differences, comparisons of small numbers
  strings      upper case, first and last letters, lengths, joining words that the library's sources use
  signatures   the arguments of functions of the standard library
  docstrings   what such a function does, in the first sentence of its docstring
  dialogue     several turns: a name or a number that an earlier turn gave

What real pools have, this one has too, in known shares (`FAULTS`): conversations that stand there twice, exactly or
nearly, answers that break off, that refuse, that repeat themselves, and wrong ones. Questions and held-out
conversations have none of these; none of them is in the pool, and they are about other functions than the pool.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import app, flags

# Shares of the pool.
FAULTS = {
    "twice": 0.10,
    "nearly twice": 0.10,
    "breaks off": 0.05,
    "refuses": 0.03,
    "repeats itself": 0.02,
    "wrong": 0.05,
}
BROKEN_OFF = "The answer to this is, as far as one can say without"
Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class Sample:
    """A conversation with a checkable last answer.

    Attributes:
      turns: questions and answers.
      kind: how the last answer is checked: exact, numeric or choice.
      choices: for a choice, all answers to choose from.
    """

    turns: Turns
    kind: str = "exact"
    choices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Function:
    """A public function of the standard library: its name with its module, arguments, and what its docstring says."""

    name: str
    arguments: str
    says: str


def functions() -> list[Function]:
    """The public functions of the standard library that have arguments and a docstring, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"} & set(inside.parts):
            continue
        module = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or "._" in f".{module}":
                continue
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            says = re.split(r"(?<=[.!?])\s|\n\s*\n", (ast.get_docstring(node) or "").strip())[0]
            says = " ".join(says.split())
            if 1 <= len(names) <= 4 and 15 <= len(says) <= 100 and says.isascii():
                found[f"{module}.{node.name}"] = Function(f"{module}.{node.name}", ", ".join(names), says)
    return [found[name] for name in sorted(found)]


def words(known: list[Function]) -> list[str]:
    """Words of three to eight small letters that functions and docstrings use, sorted."""
    text = " ".join(f"{f.name} {f.says}" for f in known)
    return sorted({word for word in re.findall(r"[a-z]+", text) if 3 <= len(word) <= 8})


class Maker:
    """Makes samples of each domain, about the given functions and words."""

    def __init__(self, rng: random.Random, about: list[Function], known_words: list[str]) -> None:
        self.rng, self.functions, self.words = rng, about, known_words
        self.domains: dict[str, Callable[[], Sample]] = {
            "arithmetic": self.arithmetic,
            "strings": self.strings,
            "signatures": self.signatures,
            "docstrings": self.docstrings,
            "dialogue": self.dialogue,
        }

    def arithmetic(self) -> Sample:
        """A sum, a difference or a comparison of numbers below 50."""
        a, b = self.rng.randrange(1, 50), self.rng.randrange(1, 50)
        low, high = sorted((a, b))
        question, answer = self.rng.choice(
            [
                (f"What is {a} + {b}?", a + b),
                (f"Add {a} and {b}.", a + b),
                (f"What is {high} - {low}?", high - low),
                (f"Which number is larger, {a} or {b}?", high),
                (f"Which number is smaller, {a} or {b}?", low),
            ]
        )
        return Sample([(question, str(answer))], "numeric")

    def strings(self) -> Sample:
        """A question about one or two words."""
        one, two = self.rng.choice(self.words), self.rng.choice(self.words)
        question, answer, kind = self.rng.choice(
            [
                (f"Write the word '{one}' in upper case.", one.upper(), "exact"),
                (f"What is the first letter of '{one}'?", one[0], "exact"),
                (f"What is the last letter of '{one}'?", one[-1], "exact"),
                (f"How many letters has the word '{one}'?", str(len(one)), "numeric"),
                (f"Join the words '{one}' and '{two}' by an underscore.", f"{one}_{two}", "exact"),
            ]
        )
        return Sample([(question, answer)], kind)

    def signatures(self) -> Sample:
        """The arguments of a function."""
        f = self.rng.choice(self.functions)
        question = self.rng.choice([f"Which arguments does {f.name} take?", f"Name the arguments of {f.name}."])
        others = {g.arguments for g in self.rng.sample(self.functions, 12)} - {f.arguments}
        return Sample([(question, f.arguments)], "choice", self._shuffled([f.arguments, *sorted(others)[:3]]))

    def docstrings(self) -> Sample:
        """What a function does."""
        f = self.rng.choice(self.functions)
        question = self.rng.choice([f"What does {f.name} do?", f"Describe {f.name} in one sentence."])
        others = {g.says for g in self.rng.sample(self.functions, 8)} - {f.says}
        return Sample([(question, f.says)], "choice", self._shuffled([f.says, *sorted(others)[:3]]))

    def _shuffled(self, choices: list[str]) -> list[str]:
        return self.rng.sample(choices, len(choices))

    def dialogue(self) -> Sample:
        """Two or three turns, the last about an earlier one."""
        word, number = self.rng.choice(self.words), self.rng.randrange(1, 90)
        name = word.capitalize()
        turns, kind = self.rng.choice(
            [
                ([(f"My name is {name}.", f"Hello, {name}."), ("What is my name?", name)], "exact"),
                ([(f"The number is {number}.", "I will keep it."), ("What was the number?", str(number))], "numeric"),
                ([(f"The word is '{word}'.", "I will keep it."), ("Which word was it?", word)], "exact"),
                (
                    [
                        (f"The number is {number}.", "I will keep it."),
                        ("Good.", "What is next?"),
                        ("Add 1 to the number.", str(number + 1)),
                    ],
                    "numeric",
                ),
            ]
        )
        return Sample(turns, kind)

    def stream(self) -> Iterator[tuple[str, Sample]]:
        """Yields samples, domain after domain."""
        while True:
            for domain, make in self.domains.items():
                yield domain, make()


def record(turns: Turns, **fields: Any) -> dict[str, Any]:
    """A conversation as a line of the pool."""
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**fields, "messages": messages}


def spoiled(turns: Turns, fault: str, rng: random.Random) -> Turns:
    """A conversation with a fault in its last answer, or in its wording."""
    question, answer = turns[-1]
    if fault == "nearly twice":
        first, reply = turns[0]
        return (
            [(first.replace("?", " ?").replace("What", "what", 1), reply), *turns[1:]]
            if len(turns) > 1
            else [(f"{question} Please.", answer)]
        )
    if fault == "breaks off":
        answer = BROKEN_OFF
    elif fault == "refuses":
        answer = "As an AI language model, I cannot answer this."
    elif fault == "repeats itself":
        answer = " ".join([answer] * 12)
    elif fault == "wrong":
        answer = str(rng.randrange(100)) if answer.isdigit() else answer[::-1]
    return [*turns[:-1], (question, answer)]


def make(output: Path, size: int, questions: int, seed: int) -> dict[str, int]:
    """Writes the three files; returns the number of lines of each."""
    rng = random.Random(seed)
    known = functions()
    rng.shuffle(known)
    border, known_words = len(known) // 4, words(known)
    maker, pool_maker = Maker(rng, known[:border], known_words), Maker(rng, known[border:], known_words)
    asked: set[str] = set()
    counts = dict.fromkeys(maker.domains, 0)
    held, questioned = [], []
    for domain, sample in maker.stream():
        if min(counts.values()) == 2 * questions:
            break
        key = json.dumps(sample.turns)
        if key in asked or counts[domain] == 2 * questions:
            continue
        asked.add(key)
        number, counts[domain] = counts[domain], counts[domain] + 1
        if number % 2:
            held.append(record(sample.turns, id=f"{domain}-{number}", domain=domain))
            continue
        whole = record(sample.turns)["messages"]
        about: dict[str, Any] = {
            "id": f"{domain}-{number}",
            "category": domain,
            "kind": sample.kind,
            "reference": sample.turns[-1][1],
        }
        if sample.choices:
            about["choices"] = sample.choices
        questioned.append({**about, "messages": whole[:-1]})
    pool: list[dict[str, Any]] = []
    faults = [fault for fault, share in FAULTS.items() for _ in range(round(share * size))]
    faults += [""] * (size - len(faults))
    rng.shuffle(faults)
    stream = ((d, s) for d, s in pool_maker.stream() if json.dumps(s.turns) not in asked)
    plain: list[tuple[str, Turns]] = []
    for number, fault in enumerate(faults):
        if fault in ("twice", "nearly twice") and plain:
            domain, turns = rng.choice(plain)
        else:
            domain, sample = next(stream)
            turns = sample.turns
        plain += [(domain, turns)] if not fault else []
        turns = spoiled(turns, fault, rng) if fault else turns
        pool.append(record(turns, id=f"pool-{number}", domain=domain))
    output.mkdir(parents=True, exist_ok=True)
    files = {"pool": pool, "heldout": held, "questions": questioned}
    for name, records in files.items():
        text = "".join(json.dumps(line) + "\n" for line in records)
        (output / f"{name}.jsonl").write_text(text)
    return {name: len(records) for name, records in files.items()}


def define_flags() -> None:
    """Defines the flags; other programs that make the same data have their own."""
    flags.DEFINE_string("output", None, "Directory for the three files.", required=True)
    flags.DEFINE_integer("pool", 12_000, "Conversations in the pool.", lower_bound=100)
    flags.DEFINE_integer("questions", 40, "Questions per domain.", lower_bound=4)
    flags.DEFINE_integer("seed", 0, "Seed of everything.")


def main(argv: list[str]) -> None:
    """Writes the files and says how many lines each has."""
    del argv
    given = flags.FLAGS
    output = Path(given.output).expanduser()
    for name, count in make(output, given.pool, given.questions, given.seed).items():
        print(f"{output / name}.jsonl: {count} lines")


if __name__ == "__main__":
    define_flags()
    app.run(main)
