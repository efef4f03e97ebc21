"""One function per program: parses gin, calls the library, prints the results, sets the exit status."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gin

from flm_jax import checkpoint_growth, costs, distributed, evaluation, forking, run_comparison
from flm_jax.chat.checkpoint_template import chat_template_of
from flm_jax.chat.template import ChatEncoder
from flm_jax.checkpoint import verify
from flm_jax.checkpoint.find import step_directory
from flm_jax.checkpoint_growth.text import verification_lines
from flm_jax.cli import chat, configure
from flm_jax.cli.configure import PACKAGE, check_used, configured, parse
from flm_jax.cli.errors import fail, join, started
from flm_jax.cli.flags import STOPPED
from flm_jax.convert import exporting, importing
from flm_jax.data.store_verify import verify_store
from flm_jax.evaluation import EvalRequest, JudgeRequest
from flm_jax.evaluation.loaded import load_model
from flm_jax.files import check_writable, write_json
from flm_jax.generation import GenerateRequest, Sampling, prompts
from flm_jax.planning import compiled, stages, text
from flm_jax.planning.topology import Topology
from flm_jax.records import as_dict, counted
from flm_jax.records.verification import Verification
from flm_jax.selection.select import select
from flm_jax.train import train

__all__ = [
    "join",
    "run_compare",
    "run_evaluate",
    "run_export",
    "run_generate",
    "run_grow",
    "run_import",
    "run_judge",
    "run_plan",
    "run_select",
    "run_train",
    "run_verify",
    "run_verify_checkpoint",
    "run_verify_store",
]


def run_train(
    gin_files: Sequence[str], gin_bindings: Sequence[str], workdir: str | None, dry_run: bool, fork: str | None = None
) -> None:
    """Builds the recipe from gin and trains it, or prints its plan if `dry_run`.

    The program exits with `STOPPED` if a signal stopped the run, which is then saved.
    """
    with started():
        parse(gin_files, gin_bindings)
        recipe, run = configured(configure.train)
        check_used()
        if dry_run:
            for section in text.dry_run(recipe, run):
                distributed.print0(section)
            for line in forking.preview(recipe, fork) if fork is not None else ():
                distributed.print0(line)
            return
        assert workdir is not None
        check_directory("workdir", workdir)
        given = {"config.gin": gin.operative_config_str(), "git.txt": git_state()}
        if train(recipe, run, workdir, records=given, fork=fork) is not None:
            return
        distributed.print0(f"Stopped; everything is saved in {workdir}. Run the same command to continue.")
    sys.exit(STOPPED)


def chosen(checkpoint: str, say: Callable[[str], None] = distributed.print0) -> str:
    """The step that a path stands for, which is said if it is not the path itself.

    Raises:
      CheckpointError: there is none, or it cannot be told which.
    """
    step = step_directory(checkpoint)
    if step != Path(checkpoint).expanduser().absolute():
        say(f"{checkpoint}: its newest step is {step}")
    return str(step)


def check_json_file(json_file: str | None, flag: str = "json") -> None:
    """Refuses a --json, or another flag that names a file, that cannot be written, before anything is computed.

    Raises:
      ValueError: it is a directory, or its directory does not exist or cannot be written to.
    """
    if json_file is None:
        return
    path = Path(json_file).absolute()
    if path.is_dir():
        raise ValueError(f"--{flag}={json_file} is a directory; give the name of a file.")
    if not path.parent.is_dir():
        raise ValueError(f"--{flag}={json_file}: there is no directory {path.parent}.")
    if distributed.is_primary():
        check_writable(path.parent, f"--{flag}={json_file}")


def check_directory(flag: str, directory: str) -> None:
    """Refuses a directory that cannot be written to, before anything is computed.

    Raises:
      ValueError: it is a file, or cannot be written to or made.
    """
    if distributed.is_primary():
        check_writable(Path(directory), f"--{flag}={directory}")


def run_grow(source: str, workdir: str, gin_files: Sequence[str], gin_bindings: Sequence[str]) -> None:
    """Grows a checkpoint into a new work directory, and prints its verification."""
    with started():
        check_directory("workdir", workdir)
        parse(gin_files, gin_bindings)
        settings = configured(configure.grow)
        check_used()
        records = {"config.gin": gin.operative_config_str(), "git.txt": git_state()}
        record = checkpoint_growth.grow_checkpoint(chosen(source), workdir, **settings, records=records)
        distributed.print0(verification_lines(record["verification"]))
        distributed.print0(f"Written to {workdir}. To train on from it, set Recipe.start = {workdir!r}.")


def run_verify(
    source: str, target: str, json_file: str | None, gin_files: Sequence[str], gin_bindings: Sequence[str]
) -> None:
    """Verifies a grown checkpoint; exits with status 1 if a promise of its method does not hold."""
    with started():
        check_json_file(json_file)
        parse(gin_files, gin_bindings)
        settings = configured(configure.verify)
        check_used()
        found = checkpoint_growth.verify_checkpoints(chosen(source), chosen(target), **settings)
        distributed.print0(verification_lines(found))
        if json_file and distributed.is_primary():
            write_json(Path(json_file), found)
    if not found["holds"]:
        sys.exit(1)


def run_verify_checkpoint(checkpoint: str, json_file: str | None) -> None:
    """Checks every byte of a checkpoint; exits with status 1 if it is not as it was saved."""
    _verify_files(lambda: verify(chosen(checkpoint)), json_file)


def run_verify_store(store: str, json_file: str | None) -> None:
    """Checks every byte of a token store; exits with status 1 if it is not as it was written."""
    _verify_files(lambda: verify_store(store), json_file)


def _verify_files(look: Callable[[], Verification], json_file: str | None) -> None:
    with started():
        check_json_file(json_file)
        found = look()
        distributed.print0(str(found))
        if json_file and distributed.is_primary():
            write_json(Path(json_file), found.record())
    if not found.ok:
        sys.exit(1)


def run_import(source: str, workdir: str, dtype: str | None) -> None:
    """Imports a Hugging Face model as a checkpoint, and prints what it is."""
    with started():
        check_directory("workdir", workdir)
        found = importing.import_model(source, workdir, dtype)
    if "commit" in found:
        distributed.print0(f"{found['source']}, {found['revision']}: commit {found['commit']}.")
    distributed.print0(
        f"{found['architecture']}: {found['model']}; {costs.count(found['params'])} parameters in "
        f"{counted(found['tensors'], 'tensor')}, stored as {found['dtype']}; with {', '.join(found['files'])}."
    )
    if "tokenizer.json" not in found["files"]:
        distributed.print0(
            "It has no tokenizer.json: give one for training (Pretrained.path) and for evaluation (--tokenizer)."
        )
    distributed.print0(f"Written to {workdir}. Grow it with --source={workdir}, or train on with Recipe.start.")


def run_export(workdir: str, target: str, architecture: str | None, dtype: str | None, shard_bytes: int) -> None:
    """Exports a checkpoint as a Hugging Face model, and prints what was written."""
    with started():
        check_directory("to_hf", target)
        found = exporting.export_model(chosen(workdir), target, architecture, dtype, shard_bytes)
    folded = (
        "multipliers and kept widths are folded into "
        f"{counted(found['folded'], 'kind of parameter', 'kinds of parameters')}"
        if found["folded"]
        else ("nothing to fold")
    )
    tokenizer = "" if found["tokenizer"] else "; no tokenizer.json"
    distributed.print0(
        f"{found['architecture']}: {found['model']}; {costs.count(found['params'])} parameters as {found['dtype']}, "
        f"{costs.size(found['bytes'])}; {folded}{tokenizer}."
    )
    if found["tokenizer_fault"]:
        distributed.print0(f"Without a tokenizer.json: {found['tokenizer_fault']}")
    if found["folded"] and found["dtype"] != "float32":
        distributed.print0(
            f"The folded weights are rounded to {found['dtype']}; with --dtype=float32 logits stay within a few 1e-6."
        )
    distributed.print0(f"Written to {target}: {', '.join(found['files'])} and the weights.")


def run_evaluate(
    checkpoint: str,
    asked: EvalRequest,
    json_file: str | None,
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
) -> None:
    """Evaluates a checkpoint, and prints the results."""
    with started():
        check_json_file(json_file)
        parse(gin_files, gin_bindings)
        mesh = configured(configure.evaluate)
        check_used()
        try:
            found = evaluation.evaluate_checkpoint(
                chosen(checkpoint), asked, mesh, distributed.print0, functools.partial(distributed.print0, end="")
            )
        except ImportError as error:
            fail(error)
        if json_file and distributed.is_primary():
            write_json(Path(json_file), found)


def run_judge(
    checkpoint: str | None,
    asked: JudgeRequest,
    json_file: str | None,
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
) -> None:
    """Judges answers, and prints the results; exits with status 1 if no answer could be judged."""
    with started():
        check_json_file(json_file)
        parse(gin_files, gin_bindings)
        mesh = configured(configure.evaluate)
        check_used()
        check_directory("output", asked.output)
        found = evaluation.judge_answers(
            None if checkpoint is None else chosen(checkpoint), asked, mesh, distributed.print0
        )
        if json_file and distributed.is_primary():
            write_json(Path(json_file), found)
        if not asked.dry_run and not found["judged"]:
            raise ValueError("no answer could be judged; the reasons stand above, and the replies in calls.jsonl")


def run_generate(
    checkpoint: str,
    asked: GenerateRequest,
    json_file: str | None,
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
) -> None:
    """Answers a prompt, which is shown while it is made, or a file of prompts, or what is said in a conversation.

    What there is to say, the speed included, goes to stderr.
    """
    with started():
        check_json_file(json_file)
        parse(gin_files, gin_bindings)
        settings = configured(configure.generate)
        check_used()
        sampling = settings["sampling"] or (chat.SAMPLING if asked.chat else Sampling())
        sampling = dataclasses.replace(sampling, **asked.sampling)
        given = None if asked.prompts is None else prompts.read_prompts(asked.prompts, asked.chat)
        model = load_model(chosen(checkpoint, say), asked.tokenizer, asked.max_length, asked.dtype, settings["mesh"])
        for line in (model.note, model.sentence()):
            say(line)
        alone = asked.prompts is None
        generator = model.generator(1 if alone else asked.batch_size)
        asking = prompts.as_they_are(generator, asked.stops)
        if asked.chat:
            encoder = ChatEncoder(chat_template_of(model.source, asked.template, model.vocabulary), model.vocabulary)
            asking = chat.in_conversation(encoder, asked.system, asked.stops)
            if alone and asked.prompt is None:
                chat.hold(generator, encoder, model.length, asked.max_tokens, sampling, asked.stops, asked.system)
                return
        found = {**model.record(), "sampling": as_dict(sampling)}
        limits = model.length, asked.max_tokens, sampling
        if given is None:
            assert asked.prompt is not None
            show = functools.partial(distributed.print0, end="")
            found["answers"] = [prompts.continue_prompt(generator, asking, asked.prompt, *limits, say, show)]
            speed = generator.speed
        else:
            speed = prompts.answer_prompts(generator, asking, given, *limits, asked.output, distributed.print0)
        say(f"{speed}.")
        if json_file and distributed.is_primary():
            write_json(Path(json_file), {**found, "speed": speed.record()})


def say(text: str) -> None:
    """Prints a line to stderr, in process 0 only: the answers have stdout for themselves."""
    if text and distributed.is_primary():
        print(text, file=sys.stderr, flush=True)


def run_plan(
    machine: Topology,
    compiler: str,
    utilisation: float,
    storage: float,
    json_file: str | None,
    gin_files: Sequence[str],
    gin_bindings: Sequence[str],
    price: float | None = None,
    only: Sequence[str] | None = None,
) -> bool:
    """Prints the plan of a recipe for a machine, stage by stage; returns whether every stage fits."""
    with started():
        check_json_file(json_file)
        parse(gin_files, gin_bindings)
        recipe, run = configured(configure.train)
        check_used()
        assumed = stages.Assumptions(utilisation, storage)
        print(
            f"{machine.name}: {counted(machine.devices, 'device')} on {counted(machine.hosts, 'host')}; "
            f"utilisation {utilisation:.0%} assumed"
        )
        records, devices = [], compiled.devices_of(machine, compiler)
        for record in stages.stages(recipe, run, devices, machine, compiler, assumed, only):
            records.append(record)
            print(text.stage_text(record), flush=True)
        print(text.total_text(records, machine, price))
        if json_file:
            about = {
                "name": machine.name,
                "devices": machine.devices,
                "hosts": machine.hosts,
                "chip": machine.chip.source,
            }
            found = {
                "topology": about,
                "compiler": compiler,
                "assumed": {"utilisation": utilisation, "storage_bytes_per_second_and_host": storage},
                "stages": records,
                "total": text.totals(records) | text.cost(records, machine, price),
            }
            write_json(Path(json_file), found)
    return all(record["fits"] for record in records)


def run_compare(workdirs: Sequence[str], output: str | None, json_file: str | None) -> None:
    """Compares runs, prints the tables, and writes what is asked for."""
    with started():
        check_json_file(json_file)
        if output is not None:
            check_directory("output", output)
        found = run_comparison.compare_runs(workdirs)
        print(run_comparison.markdown(found))
        if output is not None:
            run_comparison.write(found, Path(output))
            print(f"Written to {output}: compare.md, compare.png, compare.html, compare.json.")
        if json_file is not None:
            write_json(Path(json_file), found.record())


def run_select(
    gin_files: Sequence[str], gin_bindings: Sequence[str], inputs: Sequence[str], output: str, steps: str | None
) -> None:
    """Selects conversations from a pool, and prints what each step leaves; exits with status 1 if nothing is left."""
    with started():
        check_directory("output", output)
        parse(gin_files, gin_bindings)
        selection = configured(configure.select_sft)
        check_used()
        try:
            found = select(selection, inputs, output, steps, functools.partial(print, flush=True))
        except ImportError as error:  # what decompresses is no part of the base installation
            fail(error)
        asked = found["selection"]["count"]
        if found["chosen"] < asked:
            print(f"{counted(asked, 'was', 'were')} asked for, and the pool has no more: see {output}/report.md.")
    if not found["chosen"]:
        sys.exit(1)


def git_state() -> str:
    """The commit of this checkout and a summary of uncommitted changes; empty outside a git checkout."""
    root = str(PACKAGE.parent)
    try:
        calls = [["git", "-C", root, *args] for args in (["rev-parse", "HEAD"], ["diff", "HEAD", "--stat"])]
        return "\n".join(subprocess.run(call, capture_output=True, text=True, check=True).stdout for call in calls)
    except (OSError, subprocess.CalledProcessError):
        return ""
