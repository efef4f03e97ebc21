"""The site: Sphinx with MyST, on the pages as they lie in the repository. `make docs` builds it, without a warning.

The front page is README.md. Links between pages stay links; links to other files of the repository become downloads,
and links to folders text, since the site does not hold them.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

project = "flm_jax"
copyright = "the flm_jax developers, Apache-2.0"
extensions = ["myst_parser"]
myst_heading_anchors = 4  # the anchors that forges give to headings
root_doc = "README"
html_theme = "furo"
html_title = "flm_jax"
# Sphinx is given the root of the repository; everything that is no page is left out.
exclude_patterns = ["[.]*", "build", "runs", "flm_jax", "tests", "experiments", "gin_configs", "notebooks", "**/.*"]

# Every page of the site, in the order of the navigation. One that does not exist is left out; a test says which page of
# docs/ is missing here.
NAVIGATION = {
    "Begin": ["docs/tutorial.md", "docs/guide.md", "docs/words.md", "docs/demo.md"],
    "How to": [
        "docs/own_data.md",
        "docs/prepare.md",
        "docs/token_store.md",
        "docs/mixtures.md",
        "docs/tokenizers.md",
        "docs/own_operator.md",
        "docs/own_parameter.md",
        "docs/own_family.md",
        "docs/distillation.md",
        "docs/sft.md",
        "docs/chat.md",
        "docs/convert.md",
        "docs/streaming.md",
        "docs/sweeps.md",
        "docs/savings.md",
        "docs/metrics.md",
        "docs/fork.md",
        "docs/guards.md",
        "docs/checkpoints.md",
        "docs/faults.md",
        "docs/launch.md",
        "docs/pods.md",
        "docs/gpu.md",
    ],
    "Background": ["docs/growth.md", "docs/growth_math.md", "docs/muon.md", "docs/facts.md", "docs/layout.md"],
    "Results": [
        "docs/results/README.md",
        "docs/growth_errors.md",
        "docs/benchmarks.md",
        "docs/results/bench.md",
        "docs/results/gpu.md",
        "docs/results/savings_t0.md",
        "docs/results/savings_t1.md",
        "docs/results/savings_five.md",
        "docs/tpu.md",
        "docs/decode.md",
        "docs/convert_benchmark.md",
        "docs/smollm2.md",
        "docs/select.md",
        "docs/sft_study.md",
        "dev/LOG.md",
        "benchmarks/README.md",
    ],
    "Reference": ["docs/reference/programs.md", "docs/reference/settings.md", "docs/reference/python.md"],
    "Project": ["CONTRIBUTING.md", "CHANGELOG.md"],
}


def navigation() -> str:
    """The navigation as directives that README.md ends with on the site."""
    parts = []
    for title, pages in NAVIGATION.items():
        names = "\n".join(page.removesuffix(".md") for page in pages if (ROOT / page).exists())
        parts.append(f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n{names}\n```\n")
    return "\n".join(parts)


def read(_: Any, page: str, source: list[str]) -> None:
    """Changes the text of a page for the site: folders are no links, and the front page has the navigation."""
    here = (ROOT / page).parent

    def text_of(link: re.Match[str]) -> str:
        return f"`{link[1].strip('`')}`" if (here / link[2]).is_dir() else link[0]

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)\)", text_of, source[0])
    if page == root_doc:
        source[0] += "\n" + navigation()


def front(app: Any, error: Exception | None) -> None:
    """The front page under the name that servers look for, too."""
    if error is None:
        shutil.copyfile(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", read)
    app.connect("build-finished", front)
