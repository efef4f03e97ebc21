"""The train step of tunix, another JAX trainer, as a server: a turn of steps per line on standard input.

  .venv/tunix/bin/python benchmarks/tunix_step.py '{"embed": 160, ..., "timed": 2}'

`make .venv/tunix/installed` installs it.

It prints the loss of the first step of each turn, and the seconds per step of the others. It runs in tunix's own
environment, which has none of flm_jax. The step is that of its `PeftTrainer` on all parameters of its Llama, with the
same optimizer; it starts from random parameters of its own.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """Builds the trainer, and does a turn per line."""
    size: dict[str, Any] = json.loads(sys.argv[1])
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.sft import peft_trainer

    shape: dict[str, Any] = dict(
        num_layers=size["layers"],
        vocab_size=size["vocab"],
        embed_dim=size["embed"],
        hidden_dim=size["mlp"],
        num_heads=size["heads"],
        head_dim=size["embed"] // size["heads"],
        num_kv_heads=size["heads"],
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = llama.Llama3(llama.ModelConfig(**shape), rngs=nnx.Rngs(0))
        chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.0))
        config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9)
        trainer = peft_trainer.PeftTrainer(model, chain, config)
        ids = np.random.default_rng(0).integers(0, size["vocab"], (size["rows"], size["context"]), dtype=np.int32)
        causal = jnp.tril(jnp.ones((size["context"],) * 2, bool))
        inputs = {
            "input_tokens": jnp.asarray(ids),
            "input_mask": jnp.ones(ids.shape, bool),
            "positions": jnp.broadcast_to(jnp.arange(size["context"]), ids.shape),
            "attention_mask": jnp.broadcast_to(causal, (size["rows"], *causal.shape)),
        }
        step = trainer.jit_train_and_eval_step(cache_nnx_graph=True)[0]
        floats = {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))}
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        print(json.dumps({"dtypes": sorted(floats), "parameters": count}), flush=True)

        def done() -> Any:
            found = step(inputs)
            jax.block_until_ready((found, nnx.state(trainer.optimizer), nnx.state(model)))
            return found

        for _ in sys.stdin:
            # As `benchmarks.parts.trainers.turn`, which this environment cannot import.
            loss = float(done()[0])
            since = time.perf_counter()
            for _ in range(size["timed"]):
                done()
            print(json.dumps({"seconds": (time.perf_counter() - since) / size["timed"], "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
