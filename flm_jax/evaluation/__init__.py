"""Evaluation of checkpoints: lm-eval tasks, bits per byte of any text, continuations of a prompt."""

from flm_jax.evaluation.evaluate import EvalRequest, evaluate_checkpoint

__all__ = ["EvalRequest", "evaluate_checkpoint"]
