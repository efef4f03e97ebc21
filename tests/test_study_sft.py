"""The study of conversations to tune on, whole and as small as it gets, on a converted base with its own tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sft_data
from flm_jax.chat.template import TELE_FLM
from tests import hub
from tests.environment import as_user

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_converted_base_with_its_own_template_is_studied_to_the_end(tmp_path):
    folder = hub.write_tokenizer(tmp_path / "base")
    (folder / "chat_template.jinja").write_text(TELE_FLM.source)
    _, base, _, _ = hub.llama(folder, positions=512)
    work = tmp_path / "study"
    sft_data.make(work / "data", 100, 4, 0)
    small = [
        "--sizes=20",
        "--seeds=1",
        "--epochs=0.2",
        "--steps=1",
        "--rates=1e-3",
        "--context=128",
        "--text_windows=8",
    ]
    command = [f"--base={base}", f"--work={work}", "--template=tokenizer", *small]
    done = subprocess.run(
        [sys.executable, "benchmarks/study_sft.py", *command], cwd=ROOT, env=as_user(), capture_output=True, text=True
    )
    assert not done.returncode, done.stderr + (work / "log.txt").read_text()[-2000:]
    page = (work / "study.md").read_text()
    assert f"    python benchmarks/study_sft.py --base={base} " in page
    assert "Bits per byte: of held-out plain\n  text from files of the Python standard library; it" in page
    for row in ("| all | all (", "| random | 20 (", "| longest | 20 (", "| selected | 20 ("):
        assert page.count(row) == 2, f"{row}: once for equal passes, once for equal steps"
    assert (work / "study.png").stat().st_size > 10_000
    results = [json.loads(path.read_text()) for path in (work / "results").glob("*.json")]
    assert len(results) == 1 + 1 + 2 * 4 and not list((work / "runs").iterdir()), "checkpoints are deleted"
    base_loss = next(one["answer_loss"] for one in results if one["set"] == "base")
    tuned = [one["answer_loss"] for one in results if one["set"] not in ("base", "sweep")]
    assert base_loss not in tuned, "a single step tunes, too"
