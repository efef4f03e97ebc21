"""benchmarks/gpu.py, which is meant for GPUs, runs through with tiny models on any device."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_page, gpu_profile
from benchmarks.gpu_page import peak

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.integration
def test_it_runs_through_and_reports_what_fails(tmp_path):
    words = [sys.executable, "benchmarks/gpu.py", f"--out={tmp_path}", "--quick", "--tiny", "--same_process"]
    # In place of PyTorch's model a module that cannot be imported: that part is left out, and says so.
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/transformers.py").write_text("raise ImportError('not here', name='transformers')")
    command = f"import sys; sys.path.insert(0, {str(tmp_path / 'hidden')!r}); sys.path.insert(0, {str(ROOT)!r})\n"
    command += f"sys.argv = {words[1:]!r}\nfrom benchmarks import gpu, gpu_parts\nfrom absl import app\n"
    command += "def fails(use): raise OSError('no such growth')\ngpu_parts.growth = fails\napp.run(gpu.main)"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert found["growth"]["error"] == "OSError: no such growth"
    assert {name for name, part in found.items() if "skipped" in part} == {n for n in found if n.startswith("torch")}
    assert all(row["right"] for row in found["kernels"]["rows"])
    step = found["train 0.5B 2048"]
    assert step["tokens_per_s"]["lowest"] > 0 and step["losses"][1] < step["losses"][0] and step["parameters"] > 0
    assert [case["rows"] for case in found["decoding"]["cases"]] == [1, 16]
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {title}" in page for title in ("Attention", "Training", "Decoding", "Parts"))
    assert "no such growth" in page and "## Growth" not in page
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_what_no_longer_fits_the_budget_is_left_out(tmp_path):
    words = [sys.executable, "benchmarks/gpu.py", f"--out={tmp_path}", "--budget_s=1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert all("of the budget are left" in part["skipped"] for part in found.values())


def test_parts_may_be_run_one_by_one_into_one_page(tmp_path):
    for part in ("about", "limits"):
        words = ["benchmarks/gpu.py", f"--out={tmp_path}", "--tiny", f"--parts={part}"]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    page = (tmp_path / "gpu.md").read_text()
    assert "cpu, compute capability None" in page and "A bf16 product of" in page
    assert page.count("    python benchmarks/gpu.py") == 2
    words[-1] = "--parts=limit"
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "--parts: limit: use some of about, kernels, limits" in done.stderr


def test_a_profile_is_summed_by_kernel_and_by_kind():
    def kernel(name, start, ns):
        return SimpleNamespace(name=name, start_ns=start, duration_ns=ns)

    # A copy on another stream overlaps the second half of the product; then the GPU waits.
    product, copy, fused = kernel("nvjet_x", 0, 4e6), kernel("memcpy128", 2e6, 3e6), kernel("loop_add", 8e6, 2e6)
    streams = [
        SimpleNamespace(name=f"Stream #{i}", events=events) for i, events in enumerate([[product, fused], [copy]])
    ]
    other = SimpleNamespace(name="XLA Ops", events=[product])
    planes = [
        SimpleNamespace(name="/host:CPU", lines=[]),
        SimpleNamespace(name="/device:GPU:0", lines=[*streams, other]),
    ]
    assert gpu_profile.of_planes(planes[:1], 3) is None
    found = gpu_profile.of_planes(planes, 2)
    assert (found["span_ms"], found["idle_ms"]) == (10, 3)
    assert found["kinds_ms"] == {"matrix products": 4, "copies": 3, "fused by XLA": 2}
    assert [(k["name"], k["ms"], k["count"]) for k in found["kernels"]] == [("nvjet_x", 4, 1), ("memcpy128", 3, 1)]


def test_the_published_page_is_that_of_its_figures():
    results = ROOT / "docs/results"
    assert gpu_page.page(json.loads((results / "gpu.json").read_text())) == (results / "gpu.md").read_text()


def test_peaks_of_cards_are_found_by_their_names():
    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("NVIDIA L4") == 121e12
    assert peak("NVIDIA H2000") is None
    assert peak("cpu") is None
