"""The command line: parses, calls one function, prints. The only module that prints.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 bad usage or
input (one line, no traceback), 3 jobs of a sweep failed, 4 done but below the floor that was asked for (or a table
apart from the stored one), 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import _thread
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brittle._version import __version__
from brittle.cli import values
from brittle.cli.completion import completing
from brittle.cli.compression_options import COMPRESSION, FineTuning, FrontierOptions, chosen_threat, compression
from brittle.cli.configuration import configurable
from brittle.cli.exporting import export
from brittle.cli.from_dataclass import by_records, constant
from brittle.cli.messages import complain, note, say
from brittle.cli.options import (
    ADVERSARY,
    ALIASES,
    DEVICES,
    EXECUTION,
    EXPERIMENTS,
    FORMS,
    LIKE_AUTOATTACK,
    RECIPE,
    SCALES,
    THREAT,
    Budgets,
    DataRoot,
    Gate,
    InputShape,
    Interventions,
    Json,
    Network,
    Networks,
    NewNetwork,
    Output,
    Samples,
    Threads,
    TrainingSamples,
    Values,
    check_seed,
    named,
    option,
)
from brittle.cli.progress import stage_bars, training_bar
from brittle.cli.sweep_options import Workers, status_lines
from brittle.errors import InputError
from brittle.progress import silent

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from brittle.data import Data
    from brittle.evaluation import Execution
    from brittle.results import AttackResult, Audit, Comparison, Evaluation, Frontier, Reproduction

app = typer.Typer(
    name="brittle",
    help="Audit neural networks: how compressible and how fragile they are, and why.",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]  # typer offers its other usage errors under no name


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin cost much beside other load
    _repeat_lost_interrupts()
    terminated = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        """End as for Ctrl-C: what batch systems send before they kill."""
        terminated.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    code = run(sys.argv[1:] if arguments is None else arguments)
    sys.exit(128 + signal.SIGTERM if code == 130 and terminated.is_set() else code)


def run(arguments: list[str]) -> int:
    """Run the command line; returns its exit code.

    Args:
        arguments: Everything after the program's name.

    Returns:
        0 done, 1 failed to write or read a file, 2 bad usage or input, 3 failed jobs, 4 below a floor, 130 interrupted.
    """
    try:
        code = typer.main.get_command(app).main(arguments or ["--help"], prog_name="brittle", standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into this exit code
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except InputError as error:
        return complain(str(error), 2)
    except _UsageError as error:
        return complain(_usage(error, arguments), 2)
    except OSError as error:
        return complain(f"{error.filename or 'file'}: {error.strerror or error}", 1)
    except (KeyboardInterrupt, typer.Abort):
        again = " without --overwrite" if "--overwrite" in arguments else ""
        return complain(
            "interrupted; nothing was half-written, run the same command again (an audit, an attack, a comparison, "
            f"a compression, a training or a sweep resumes where it stopped{again})",
            130,
        )


def _pass(gate: Gate, evaluations: Iterable[tuple[str, Evaluation]]) -> None:
    """Leave with exit code 4, and the reason on standard error, where a robust accuracy is below the floor."""
    if (failure := gate.failure(evaluations)) is not None:
        raise typer.Exit(complain(failure, 4))


def _repeat_lost_interrupts() -> None:
    """Let Ctrl-C end the program also where Python can only report it: in a finaliser, or a callback of compiled code.

    It is raised again a moment later, when that code is over, and again if it is lost once more.
    """
    report = sys.unraisablehook

    def repeat(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report(unraisable)
            return
        timer = threading.Timer(0.05, _thread.interrupt_main)
        timer.daemon = True
        timer.start()

    sys.unraisablehook = repeat


def _usage(error: Any, arguments: list[str]) -> str:
    """What was wrong with an option, and what came."""
    parameter, context = getattr(error, "param", None), getattr(error, "ctx", None)
    came = [value for name, value in itertools.pairwise(arguments) if name in getattr(parameter, "opts", [])]
    if not came and parameter is not None and context is not None:  # from --config or --set
        came = [value for name, value in (context.default_map or {}).items() if name == parameter.name]
    got = f" Got {came[-1]!r}." if came else ""
    return f"{error.format_message().rstrip('.')}.{got} See: brittle --help"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"brittle {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command("audit", rich_help_panel="Judge networks")
@configurable
@by_records(out=Path("brittle-audit"), attacks="fast")
def _audit(
    *,
    network: Network,
    samples: Samples,
    budgets: Budgets,
    threat: Annotated[Values, THREAT],
    execution: Annotated[Values, EXECUTION],
    threads: Threads = None,
    input_shape: InputShape = None,
    tighten: Annotated[
        int, option("Bounds", help="Steps that tighten the certified bounds; each takes as long as the bounds.")
    ] = 0,
    output: Output,
    gate: Gate,
    as_json: Json = False,
) -> None:
    """Audit a trained network: one report on how compressible and how fragile it is, and why.

    Interrupted, the same command resumes.

    Example: brittle audit model.safetensors --arch fcn --data mnist --data-root data -o report
    """
    output.check("audit.json")
    gate.check()
    shape = values.integers("input-shape", input_shape)
    norms, eps = budgets.read()
    devices = values.devices(execution["devices"])
    weights = network.read_weights() if samples.data is None else None
    model, data = (weights, None) if weights else _opened(network, samples, threads, devices[0], threat["seed"])
    gate.check(data is not None)
    from brittle.auditing import audit
    from brittle.evaluation import Threat
    from brittle.reporting.page import report_html

    with _execution(output, execution, devices) as how:
        result = audit(
            model, data, Threat(**threat), p=norms, eps=eps, input_shape=shape, tighten=tighten,
            name=network.model.name, source=named(network, samples), execution=how,
        )  # fmt: skip
    _write(result, output.out, "audit.json", samples=result.samples_frame(), page=report_html(result))
    if as_json:
        print(result.to_json(), end="")
    elif not output.quiet:
        say(result.verdict.headline, *(f"  - {finding}" for finding in result.verdict.findings), *_of_alias(threat))
        if result.not_measured:
            say(f"Not measured: {len(result.not_measured)}, listed in the report with the reasons.")
        say(*filter(None, [result.how_fed]), result.signature.line)
    if not as_json:
        say(f"Report: {output.out / 'report.html'}")
    _pass(gate, [(result.model, norm.evaluation) for norm in result.norms if norm.evaluation])


@app.command("attack", rich_help_panel="Judge networks")
@configurable
@by_records(out=Path("brittle-attack"), attacks="standard")
def _attack(
    *,
    network: Network,
    samples: Samples,
    budgets: Budgets,
    threat: Annotated[Values, THREAT],
    execution: Annotated[Values, EXECUTION],
    threads: Threads = None,
    output: Output,
    gate: Gate,
    as_json: Json = False,
) -> None:
    """Measure robust accuracy alone, under strong attacks, on data of any size; interrupted, it resumes.

    Example: brittle attack model.safetensors --arch fcn --data mnist --data-root data --eps inf=0.1 -o attacked
    """
    output.check("attack.json")
    gate.check()
    norms, eps = budgets.read()
    devices = values.devices(execution["devices"])
    model, data = _opened(network, samples, threads, devices[0], threat["seed"])
    if data is None:
        raise InputError(f"data: expected one of {FORMS}; got none")
    from brittle.evaluation import Threat, attack
    from brittle.results import warnings_of

    with _execution(output, execution, devices) as how:
        result = attack(model, data, Threat(**threat), p=norms, eps=eps, name=network.model.name, execution=how)
    _write(result, output.out, "attack.json", samples=result.samples_frame())
    if as_json:
        print(result.to_json(), end="")
    elif not output.quiet:
        said = list(_of_alias(threat))
        for evaluation in result.evaluations:
            said += [evaluation.summary, *(f"  - {doubt}" for doubt in evaluation.doubts)]
        said += [f"  - Warning: {warning}" for warning in warnings_of(result.evaluations)]
        say(*said, result.how_fed, result.signature.line)
        say(f"Results: {output.out / 'attack.json'}, {output.out / 'samples.parquet'}")
    _pass(gate, [(result.model, evaluation) for evaluation in result.evaluations])


def _of_alias(threat: Values) -> Iterator[str]:
    """Where a preset was asked for by another name: what it is."""
    if threat["attacks"] in ALIASES:
        yield f"Preset {threat['attacks']} is standard. {LIKE_AUTOATTACK}"


@app.command("compare", rich_help_panel="Judge networks")
@configurable
@by_records(out=Path("brittle-compare"), attacks="fast")
def _compare(
    *,
    networks: Networks,
    samples: Samples,
    budgets: Budgets,
    threat: Annotated[Values, THREAT],
    execution: Annotated[Values, EXECUTION],
    threads: Threads = None,
    input_shape: InputShape = None,
    output: Output,
    gate: Gate,
    as_json: Json = False,
) -> None:
    """Compare networks on the same samples: accuracies with paired tests, layers, sensitivity, size and time.

    Interrupted, the same command resumes.

    Example: brittle compare dense.safetensors run --arch fcn --data mnist --data-root data -o compared
    """
    output.check("comparison.json")
    gate.check()
    shape = values.integers("input-shape", input_shape)
    norms, eps = budgets.read()
    devices = values.devices(execution["devices"])
    _prepare_process(threads)
    models, run = networks.load(devices[0], samples.data)
    from brittle.auditing import compare
    from brittle.evaluation import Threat
    from brittle.reporting import comparison_html, comparison_lines
    from brittle.results import Audit

    saved = [model for model in models if isinstance(model, Audit)]
    data = None if len(saved) == len(models) else samples.load(threat["seed"], run)
    gate.check(data is not None or (len(saved) == len(models) and saved[0].clean_accuracy is not None))
    with _execution(output, execution, devices) as how:
        result = compare(
            models, data, Threat(**threat), names=networks.names(), p=norms, eps=eps, input_shape=shape, execution=how
        )
    _write(result, output.out, "comparison.json", page=comparison_html(result))
    if as_json:
        print(result.to_json(), end="")
    elif not output.quiet:
        headline, *lines = comparison_lines(result)
        say(headline, *(f"  - {line}" for line in lines), *_how_fed(result))
    if not as_json:
        say(f"Report: {output.out / 'report.html'}")
    _pass(gate, [(network.name, e) for network in result.networks for e in network.evaluations])


@app.command("train", rich_help_panel="Make networks")
@configurable
@by_records(out=Path("brittle-run"))
def _train(
    *,
    samples: TrainingSamples,
    network: NewNetwork,
    interventions: Interventions,
    adversary: Annotated[Values, ADVERSARY],
    recipe: Annotated[Values, RECIPE],
    device: Annotated[str, option("Execution", autocompletion=DEVICES, help="auto, cpu, cuda or cuda:N.")] = "cpu",
    processes: Annotated[int, option("Execution", help="Processes (GPUs) that share every batch.")] = 1,
    threads: Threads = None,
    output: Output,
    tensorboard: Annotated[
        bool, option("Output", "--tensorboard", help="Also log for TensorBoard, into the run's folder.")
    ] = False,
) -> None:
    """Train a network: plainly, with penalties and constraints, adversarially; interrupted, it resumes.

    Example: brittle train --data mnist --data-root data --arch fcn --width 400 --penalty nuclear_norm=0.003 -o run
    """
    output.check("weights.safetensors")
    values.device(device)
    if not 1 <= processes <= 1024:
        raise InputError(f"processes: expected an integer from 1 to 1024; got {processes}")
    devices = [device] if processes == 1 else [device.partition(":")[0]] * processes
    _prepare_process(threads)
    request = network.request(samples, interventions.recipe(recipe, adversary))
    data = samples.load(request.recipe.seed)
    from brittle.training.runs import train_run

    with training_bar(output.quiet, output.out / "tensorboard" if tensorboard else None) as callback:
        result = train_run(request, data, output.out, overwrite=output.overwrite, devices=devices, callback=callback)
    if not output.quiet:
        row = result.epochs[result.epoch - 1]
        validation = "" if row.validation_accuracy is None else f", validation {row.validation_accuracy:.2%}"
        say(f"Epoch {result.epoch} of {len(result.epochs)} selected: training {row.accuracy:.2%}{validation}")
        say(f"Run: {output.out}; next: brittle audit {output.out}")


@app.command("compress", rich_help_panel="Make networks")
@configurable
@by_records(out=Path("brittle-compressed"), attacks=None)
def _compress(
    *,
    network: Network,
    samples: Samples,
    removal: Annotated[Values, COMPRESSION],
    tuning: FineTuning,
    rungs: FrontierOptions,
    formats: Annotated[
        list[str] | None,
        option(
            "Output",
            "--format",
            metavar="FORM",
            autocompletion=completing(*constant("brittle.delivery.keeping", "FORMATS")),
            help="Also write onnx, pt2 or apb (repeatable).",
        ),
    ] = None,
    budgets: Budgets,
    threat: Annotated[Values, THREAT],
    execution: Annotated[Values, EXECUTION],
    threads: Threads = None,
    output: Output,
    gate: Gate,
    as_json: Json = False,
) -> None:
    """Make a network smaller and keep its robustness; one report says what it cost; interrupted, it resumes.

    Example: brittle compress model.safetensors --arch fcn --data mnist --data-root data --ratio 0.5 -o small
    """
    begun = output.out / "parts" / "frontier.json"
    for name in ("frontier.json", *(() if begun.exists() else ("recipe.json",))):
        output.check(name)
    gate.check()
    norms, eps = budgets.read()
    devices = values.devices(execution["devices"])
    asked = compression(removal, tuning.recipe(threat["seed"]), threat["seed"])
    ladder = rungs.ladder(asked)
    if ladder is not None and gate.fail_under_robust is not None:
        raise InputError("fail-under-robust: expected none with --sweep, whose floor is --min-robust")
    _prepare_process(threads)
    model, run = network.load(devices[0], samples.data)
    samples = network.sized(samples)
    data, training = samples.load(asked.seed, run), tuning.samples(samples, run, asked)
    if data is None:
        raise InputError(f"data: expected one of {FORMS}; got none")
    origin, attacks = network.origin(model, run, samples), chosen_threat(threat, data.classes)
    from brittle import delivery

    with _execution(output, execution, devices) as how:
        if ladder is not None:
            if output.overwrite:
                begun.unlink(missing_ok=True)
            walk = delivery.walk_of(model, data, ladder, attacks, training=training, p=norms, eps=eps, execution=how)
            _show_frontier(delivery.keep_frontier(walk, origin, output.out, network.model.name), output, as_json)
            return
        plan = delivery.plan_removal(
            model, data, asked, training=training, p=norms, eps=eps, progress=how.progress or silent
        )
        delivery.check_formats(formats or (), plan)
        delivery.check_kept(plan, origin)
        for warning in plan.warnings:
            note(f"warning: {warning}")
        result = delivery.carry_out(plan, attacks, p=norms, eps=eps, execution=how)
        comparison = delivery.write_compressed(result, origin, output.out, formats or ())
        shutil.rmtree(output.out / "parts", ignore_errors=True)
    from brittle.reporting import comparison_lines
    from brittle.reporting.compression import compression_lines

    if as_json:
        print(comparison.to_json(), end="")
    elif not output.quiet:
        say(*comparison_lines(comparison), *compression_lines(result.recipe), *_how_fed(comparison))
        say(f"Report: {output.out / 'report.html'}; next: brittle audit {output.out}")
    _pass(gate, [(small.name, evaluation) for small in comparison.others for evaluation in small.evaluations])


def _how_fed(comparison: Comparison) -> list[str]:
    """What the networks were fed: one sentence where it is the same for all, else one for each; none without data."""
    sentences = {network.name: network.audit.how_fed for network in comparison.networks if network.audit.how_fed}
    if len(set(sentences.values())) < 2:
        return [*sentences.values()][:1]
    return [f"{name}: {sentence}" for name, sentence in sentences.items()]


def _show_frontier(frontier: Frontier, output: Output, as_json: bool) -> None:
    """Say what a frontier shows, and leave with exit code 4 where no network is above the floor."""
    from brittle.reporting.frontiers import frontier_lines

    shutil.rmtree(output.out / "parts", ignore_errors=True)
    if as_json:
        print(frontier.to_json(), end="")
    elif not output.quiet:
        say(*frontier_lines(frontier), f"Report: {output.out / 'report.html'}")
    if frontier.min_robust is not None and frontier.smallest is None:
        floor = f"no compressed network has a robust accuracy of at least {frontier.min_robust:g} in every norm"
        raise typer.Exit(complain(f"min-robust: {floor}", 4))


@app.command("demo", rich_help_panel="Judge networks")
def _demo(
    out: Annotated[Path, option("Output", "-o", "--out", help="Folder for the report.")] = Path("brittle-demo"),
    seed: Annotated[int, option("Execution", callback=check_seed, help="Seed of every random choice.")] = 0,
    quiet: Annotated[bool, option("Output", "-q", "--quiet", help="No progress.")] = False,
) -> None:
    """Train, audit and compare five small networks on the built-in digits: what Brittle shows, in a minute.

    Takes about a minute on two cores. Example: brittle demo -o brittle-demo
    """
    Output(out, overwrite=True).check("audit.json")
    import torch

    from brittle.experiments.demo import run_demo

    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much beside other load
    with stage_bars(quiet) as progress:
        comparison = run_demo(out, seed=seed, progress=progress)
    from brittle.reporting import comparison_lines

    say(*comparison_lines(comparison), f"Report: {out / 'report.html'}")


@app.command("reproduce", rich_help_panel="Experiments")
@by_records()
def _reproduce(
    *,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME...",
            autocompletion=completing("all", *EXPERIMENTS),
            help=f"Experiments: all, or some of {', '.join(EXPERIMENTS)}.",
        ),
    ] = None,
    listed: Annotated[
        bool, option("Experiments", "--list", help="List claims, jobs, time, disk and data of each scale; run nothing.")
    ] = False,
    scale: Annotated[
        str,
        option(
            "Experiments",
            autocompletion=SCALES,
            help="smoke (a minute), small (up to 45 minutes on 2 cores) or paper (GPUs).",
        ),
    ] = "small",
    data_root: DataRoot = None,
    check: Annotated[
        bool, option("Experiments", "--check", help="Compare with the stored tables; exit code 4 where they differ.")
    ] = False,
    redraw: Annotated[
        bool, option("Experiments", "--redraw", help="Draw and judge again from the tables; train nothing.")
    ] = False,
    workers: Workers,
    out: Annotated[Path, option("Output", "-o", "--out", help="Folder for the results.")] = Path("brittle-reproduced"),
    quiet: Annotated[bool, option("Output", "-q", "--quiet", help="No progress, no summary.")] = False,
) -> None:
    """Reproduce the papers: run their experiments, judge each claim, write one page; interrupted, it resumes.

    Example: brittle reproduce fig3 --scale small --data-root data -o reproduced
    """
    Output(out, overwrite=True).check("report.html")
    from brittle import experiments as tried

    chosen = tried.named_experiments(names or ["all"] if listed else names or [])
    if listed:
        say(*tried.overview(chosen))
        return
    if redraw:
        result = tried.redraw(chosen, out, check=check)
    else:
        executor = workers.executor()
        with stage_bars(quiet, window=math.inf) as progress:
            result = tried.reproduce(
                chosen, scale, out, data_root=data_root, executor=executor, check=check, progress=progress
            )
    show_reproduction(result, out, quiet)


@app.command("sweep", rich_help_panel="Experiments")
@by_records()
def _sweep(
    *,
    file: Annotated[
        str,
        typer.Argument(metavar="FILE.py|status", help="File that defines EXPERIMENT; or the word status, before OUT."),
    ],
    place: Annotated[str | None, typer.Argument(metavar="[OUT]", help="After status: folder or URL of sweeps.")] = None,
    scale: Annotated[
        str, option("Experiments", autocompletion=SCALES, help="Which of its grids: smoke, small or paper.")
    ] = "small",
    data_root: DataRoot = None,
    workers: Workers,
    retries: Annotated[
        int, option("Execution", min=0, metavar="<int>", help="How often a job that fails is tried again.")
    ] = 1,
    out: Annotated[Path, option("Output", "-o", "--out", help="Folder for the results.")] = Path("brittle-sweep"),
    store: Annotated[
        str | None,
        option(
            "Output", metavar="URL", help="Keep the rows of jobs there: s3://BUCKET/FOLDER or what else fsspec knows."
        ),
    ] = None,
    quiet: Annotated[bool, option("Output", "-q", "--quiet", help="No progress, no summary.")] = False,
) -> None:
    """Run an experiment of your own, each job once, or say how far sweeps are; interrupted, it resumes.

    Example: brittle sweep my_experiment.py --scale small -o swept; brittle sweep status swept
    """
    if file == "status":
        from brittle.sweeps import stores_below, sweep_status

        for found in stores_below(str(out) if place is None else place):
            say(*status_lines(sweep_status(found)))
        return
    if place is not None:
        raise InputError(f"file: expected one file, or status and a folder; got {file} and {place}")
    Output(out, overwrite=True).check("report.html")
    executor = workers.executor()
    from brittle import experiments as tried
    from brittle.sweeps import Store

    experiment = tried.load_experiment(Path(file))
    jobs, kept = experiment.jobs(scale, data_root), None if store is None else Store(store)
    with stage_bars(quiet, window=math.inf) as progress:
        tried.run_experiment(
            experiment, scale, jobs, out, store=kept, executor=executor, retries=retries, progress=progress
        )
    show_reproduction(tried.redraw([experiment], out), out, quiet)


def show_reproduction(result: Reproduction, out: Path, quiet: bool) -> None:
    """Say what became of the claims; leave with exit code 3 where jobs failed, 4 where tables differ."""
    from brittle.reporting.reproductions import reproduction_lines

    if not quiet:
        say(*reproduction_lines(result), f"Report: {out / 'report.html'}")
    if failed := sum(len(experiment.failed) for experiment in result.experiments):
        raise typer.Exit(complain(f"{failed} jobs failed; the report names them, the same command tries them again", 3))
    if apart := [c.column for experiment in result.experiments for c in experiment.checks if not c.agrees]:
        raise typer.Exit(complain(f"check: the stored tables differ in {', '.join(apart)}", 4))


@app.command("report", rich_help_panel="Results and this machine")
def _report(
    result: Annotated[
        Path,
        typer.Argument(
            metavar="RESULT", help="An audit.json, comparison.json or frontier.json, or the folder that holds one."
        ),
    ],
    out: Annotated[Path, option("Output", "-o", "--out", help="Where to write the page.")] = Path("report.html"),
) -> None:
    """Draw the page of a saved result again; needs neither networks nor data.

    Example: brittle report brittle-audit -o report.html
    """
    if result.is_file() and out.resolve() == result.resolve():
        raise InputError(f"out: expected another file than the result itself; got {out}")
    from brittle.reporting.redrawing import result_html
    from brittle.results.reading import read_result
    from brittle.storage.files import write_text

    write_text(out, result_html(read_result(result)))
    say(f"Report: {out}")


app.add_typer(export, name="export", rich_help_panel="Results and this machine")


@app.command("schema", rich_help_panel="Results and this machine")
def _schema(
    document: Annotated[
        str | None,
        typer.Argument(
            metavar="[RESULT]",
            autocompletion=completing(*constant("brittle.results.schemas", "DOCUMENTS")),
            help=f"{', '.join(constant('brittle.results.schemas', 'DOCUMENTS'))}; without it, their names.",
        ),
    ] = None,
) -> None:
    """Print the JSON schema of a saved result, with what every field means.

    Example: brittle schema audit > audit.schema.json
    """
    from brittle.results.schemas import DOCUMENTS, schema_of

    if document is None:
        say(*DOCUMENTS)
    else:
        print(json.dumps(schema_of(document), indent=1))


@app.command("doctor", rich_help_panel="Results and this machine")
def _doctor(
    data_root: DataRoot = None,
    as_json: Annotated[bool, option("Output", "--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what this machine has: versions, missing extras, devices, threads, data sets, caches.

    Example: brittle doctor --data-root data
    """
    from brittle.cli.doctor import as_document, checkup_lines, examine

    checkup = examine(data_root)
    if as_json:
        print(json.dumps(as_document(checkup), indent=1))
    else:
        say(*checkup_lines(checkup))


def _opened(
    network: Network, samples: Samples, threads: int | None, device: str, seed: int
) -> tuple[nn.Module, Data | None]:
    """The network on its device, and the samples to judge it on."""
    _prepare_process(threads)
    model, run = network.load(device, samples.data)
    return model, network.sized(samples).load(seed, run)


@contextmanager
def _execution(output: Output, chosen: Values, devices: tuple[str, ...]) -> Iterator[Execution]:
    """How an evaluation is carried out: with bars, and with finished parts in the folder until all is done."""
    from brittle.evaluation import Execution

    parts = output.out / "parts"
    shared = devices if len(devices) > 1 else ()  # the network lies on the first
    try:
        with stage_bars(output.quiet) as progress:
            yield Execution(**chosen | {"devices": shared, "resume": parts, "progress": progress})
    finally:
        with suppress(OSError):  # folders that hold something stay
            parts.rmdir()
            output.out.rmdir()


def _write(
    result: Audit | AttackResult | Comparison,
    out: Path,
    name: str,
    *,
    samples: pd.DataFrame | None = None,
    page: str | None = None,
) -> None:
    """Write a result as JSON and, beside it, its samples if any were attacked, and its page: all of them or none.

    The JSON takes its place last, as it says that there is a result; then the parts that it was made of go.
    """
    from brittle.results import Audit
    from brittle.storage.files import replacing

    pictures, signature = (result.pictures, result.signature.line) if isinstance(result, Audit) else (None, "")
    with ExitStack() as files:  # which take their places in the opposite order, when all are written
        files.enter_context(replacing(out / name)).write_text(result.to_json(), encoding="utf-8")
        if samples is not None and len(samples):
            samples.to_parquet(files.enter_context(replacing(out / "samples.parquet")), index=False)
        if pictures is not None:
            pictures.save(files.enter_context(replacing(out / "audit.npz")), signature)
        if page is not None:
            files.enter_context(replacing(out / "report.html")).write_text(page, encoding="utf-8")
    shutil.rmtree(out / "parts", ignore_errors=True)


def _prepare_process(threads: int | None) -> None:
    """Set torch's number of CPU threads (None leaves it), and let glibc keep freed memory.

    glibc would give large tensors back and fault them in again at every pass.
    """
    import ctypes

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest that is taken
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    main()
