"""The pages that a reader follows from an empty folder: every command is run, with fewer steps on less text.

`python -m tests.test_docs_tutorial DIR` runs the tutorial as it stands, each command as a user would, with its time.
"""

import importlib
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.commands import ROOT, SHELL, blocks, commands, run_page, simple
from tests.environment import as_user_compiling_fast

TUTORIAL = ROOT / "docs/tutorial.md"
SHORTER = "--gin_bindings=Stage.steps = 4"


def fewer_steps(words):
    """A train command with the binding that the page itself offers for a trial."""
    if words[0] == "train" and "--dry_run" not in words:
        assert SHORTER.replace("=S", '="S') + '"' in TUTORIAL.read_text()
        return [*words, SHORTER]
    return words


def less_text(folder):
    """Leaves some files of the text, and the beginning of what is held out."""
    for path in sorted(folder.glob("texts/*.py"))[24:]:
        path.unlink()
    for name, kept in (("heldout.txt", 3000), ("questions.jsonl", 2000)):
        path = folder / name
        if path.exists():
            path.write_text(path.read_text()[:kept].rpartition("\n")[0] + "\n")


@pytest.mark.integration
@pytest.mark.slow
def test_the_tutorial_leads_from_an_empty_folder_to_an_exported_model(tmp_path, capsys):
    count = run_page(TUTORIAL, tmp_path, fewer_steps, lambda: less_text(tmp_path))
    said = capsys.readouterr().out
    assert count == 23
    assert said.count("HOLDS") == 2
    assert (tmp_path / "runs/judged/report.md").is_file()
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (96, 6)
    # Growing changes nothing, nor does going out and coming in.
    found = [line.split()[1] for line in said.splitlines() if line.startswith("heldout.txt: ")]
    small, grown, large, again, chat = found
    assert (small, again) == (grown, chat) and large != grown


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", ["own_data.md", "own_operator.md", pytest.param("mixtures.md", marks=pytest.mark.slow)]
)
def test_what_a_page_adds_from_outside_works(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    from flm_jax.data.text import FileCorpus
    from flm_jax.growth import operators
    from flm_jax.records import fields

    monkeypatch.setattr(operators, "REGISTRY", operators.REGISTRY.copy())
    monkeypatch.setattr(fields, "_CLASSES", fields._CLASSES.copy())
    assert FileCorpus not in fields._CLASSES.values()
    # Opened and lowered, not trained: the tutorial trains.
    dry = lambda words: [*(word for word in words if not word.startswith("--workdir")), "--dry_run"]  # noqa: E731
    assert run_page(ROOT / "docs" / name, tmp_path, dry) > 3
    assert "lowered" in capsys.readouterr().out
    if name == "own_data.md":
        corpus = importlib.import_module("my_corpus").Table(str(tmp_path / "table.csv"))
        documents = [document for split in ("train", "heldout") for document in corpus.documents(split)]
        assert len(documents) == 400 and "20 times 20 is 400" in documents


@pytest.mark.integration
def test_the_parameter_of_a_page_grows_exactly(tmp_path):
    """The change of the page, applied to a copy of the package; then the page's program."""
    page = ROOT / "docs/own_parameter.md"
    (change,) = (block.text for block in blocks(page) if block.language == "diff")
    (program,) = (block.text for block in blocks(page) if block.language == "python")
    shutil.copytree(ROOT / "flm_jax", tmp_path / "flm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(["patch", "-p1"], input=change + "\n", capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    environment = {**as_user_compiling_fast(), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "layers: embed" in done.stdout


def test_the_family_of_a_page_is_read():
    from flm_jax.convert.families import FAMILIES

    known = dict(FAMILIES)
    (program,) = (block.text for block in blocks(ROOT / "docs/own_family.md") if block.language == "python")
    try:
        exec(compile(program, "own_family.md", "exec"), {})
    finally:
        FAMILIES.clear()
        FAMILIES.update(known)


def main() -> None:
    """Runs the tutorial as it stands, in a new folder, and prints what each command took of clock and processors."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    total = np.zeros(2)
    for block in blocks(TUTORIAL):
        for command in commands(block.text) if block.language in SHELL[1:] else ():
            before = spent()
            subprocess.run(["bash", "-ec", command], cwd=folder, check=True)
            total += (took := spent() - before)
            program, *flags = simple(command)[0]
            print(
                f"| `{program}` {''.join(flags[:1]).partition('=')[2]} | {took[0]:.0f} s | {took[1]:.0f} s |",
                flush=True,
            )
    print(f"| all | {total[0]:.0f} s | {total[1]:.0f} s |")


def spent() -> np.ndarray:
    """Seconds by the clock, and of processor time of programs that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return np.array([time.monotonic(), used.ru_utime + used.ru_stime])


if __name__ == "__main__":
    main()
