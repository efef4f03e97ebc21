"""Evaluation of checkpoints: lm-eval tasks, bits per byte of any text, continuations of a prompt, judged answers."""

from flm_jax.evaluation.evaluate import EvalRequest, evaluate_checkpoint
from flm_jax.evaluation.judged import JudgeRequest, judge_answers

__all__ = ["EvalRequest", "JudgeRequest", "evaluate_checkpoint", "judge_answers"]
