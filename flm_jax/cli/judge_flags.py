"""The flags of `evaluate.py` for judged answers."""

from __future__ import annotations

from typing import Any

from absl import flags

from flm_jax.cli.flags import process_flags, refuse

_MINE: set[str] = set()  # their names


def define() -> None:
    """Defines them."""
    known = set(flags.FLAGS)
    _define()
    _MINE.update(set(flags.FLAGS) - known)


def check_unused(values: Any) -> None:
    """Refuses these flags where no answers are judged."""
    for name in sorted(_MINE):
        if values[name].present:
            refuse(f"--{name} is for judged answers: give --prompts too")


def _define() -> None:
    flags.DEFINE_string(
        "prompts", None, "Judge answers to this file of questions: JSON lines with category, reference."
    )
    flags.DEFINE_string("output", None, "Directory to keep answers, verdicts and the report in.")
    flags.DEFINE_string(
        "judge",
        "rules",
        "Judge of questions of the kind 'judged': rules (none), likelihood:CHECKPOINT or endpoint:MODEL@URL.",
    )
    flags.DEFINE_string("answers", None, "Judge the answers in this file of JSON lines, in place of a checkpoint's.")
    flags.DEFINE_string("reference_answers", None, "Compare with the answers in this file of JSON lines.")
    flags.DEFINE_string(
        "template", None, "Chat template of the checkpoint: tele_flm, telechat, chatml, tokenizer or a jinja2 file."
    )
    flags.DEFINE_string("judge_template", None, "Chat template of the checkpoint that judges by likelihood.")
    flags.DEFINE_enum(
        "judge_mode", "score", ["score", "pairwise"], "What an endpoint does: score answers, or compare two."
    )
    flags.DEFINE_string("judge_prompt", None, "The prompt of an endpoint: a jinja2 file.")
    flags.DEFINE_string(
        "judge_options",
        None,
        "Fields of requests to an endpoint, as JSON, in place of temperature and max_tokens.",
    )
    flags.DEFINE_string(
        "key_env",
        None,
        "The environment variable with an endpoint's key; default: OPENAI_API_KEY if it is set; '': none.",
    )
    flags.DEFINE_integer("concurrency", 8, "Calls to an endpoint at a time.", lower_bound=1, upper_bound=256)
    flags.DEFINE_integer("retries", 5, "Attempts after a call that failed or brought no verdict.", lower_bound=0)
    flags.DEFINE_float("timeout", 120.0, "Seconds until a call is given up.", lower_bound=0.001)
    flags.DEFINE_integer("max_calls", None, "The most requests to an endpoint, retries among them.", lower_bound=0)
    flags.DEFINE_bool("dry_run", False, "Say what would be judged and what it would cost, and stop.")
    flags.DEFINE_integer(
        "most_faulty", 0, "The most faulty lines of questions and answers to leave out.", lower_bound=0
    )
    flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.", lower_bound=0)


def run(values: Any) -> None:
    """Judges the answers that the flags describe."""
    if values.output is None:
        refuse("say where to keep answers, verdicts and the report: --output=DIR")
    if (values.checkpoint is None) == (values.answers is None):
        refuse("say what answers: --checkpoint, or --answers with a file of answers")
    from flm_jax.records.foreign_json import parse_json

    try:
        options = None if values.judge_options is None else parse_json(values.judge_options, "--judge_options")
    except ValueError as error:
        refuse(str(error))
    from flm_jax.cli import runs  # Imported here, so that --help and wrong flags are fast.
    from flm_jax.evaluation import JudgeRequest

    runs.join(process_flags(values))
    asked = JudgeRequest(
        questions=values.prompts,
        output=values.output,
        judge=values.judge,
        answers=values.answers,
        reference_answers=values.reference_answers,
        template=values.template,
        judge_template=values.judge_template,
        tokens=values.tokens or JudgeRequest.tokens,
        tokenizer=values.tokenizer,
        batch_size=values.batch_size,
        max_length=values.max_length,
        dtype=values.dtype,
        mode=values.judge_mode,
        judge_prompt=values.judge_prompt,
        judge_options=options,
        key_env=values.key_env,
        concurrency=values.concurrency,
        retries=values.retries,
        timeout=values.timeout,
        max_calls=values.max_calls,
        dry_run=values.dry_run,
        most_faulty=values.most_faulty,
        seed=values.seed,
    )
    runs.run_judge(values.checkpoint, asked, values.json, values.gin_file, values.gin_bindings)
