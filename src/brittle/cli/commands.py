"""The command line: parses, calls one function, prints. The only module that prints.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 bad usage or
input (one line, no traceback), 130 interrupted.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brittle._version import __version__
from brittle.cli import options
from brittle.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from brittle.data.load import Data
    from brittle.results import AttackResult, Audit
    from brittle.training.runs import RunConfig

FORMS = "digits, mnist, cifar10, cifar100, svhn, imagenet, folder:PATH or npz:PATH"
app = typer.Typer(
    name="brittle",
    help="Audit neural networks: how compressible and how fragile they are, and why.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
Stage = Callable[[str, int, "int | None"], None]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin cost much beside other load
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line; returns its exit code.

    Args:
        arguments: Everything after the program's name.

    Returns:
        0 done, 1 failed to write or read a file, 2 bad usage or input, 130 interrupted.
    """
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="brittle", standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into this exit code
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _complain(str(error), 2)
    except _UsageError as error:
        return _complain(_usage(error, arguments), 2)
    except OSError as error:
        return _complain(f"{error.filename or 'file'}: {error.strerror or error}", 1)
    except (KeyboardInterrupt, typer.Abort):
        again = " without --overwrite" if "--overwrite" in arguments else ""
        return _complain(
            "interrupted; nothing was half-written, run the same command again "
            f"(an attack or a training goes on where it stopped{again})",
            130,
        )


def _complain(message: str, code: int) -> int:
    print(f"brittle: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage(error: Any, arguments: list[str]) -> str:
    """What was wrong with an option, and what came."""
    names = getattr(getattr(error, "param", None), "opts", [])
    came = [value for name, value in itertools.pairwise(arguments) if name in names]
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


Model = Annotated[
    Path,
    typer.Argument(
        help="Weights: .safetensors, or a checkpoint that holds plain tensors; or a folder of brittle train."
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(help="What to fill: fcn, resnet18-cifar, torchvision:NAME, timm:NAME or module:function."),
]
ArchArg = Annotated[list[str] | None, typer.Option(help="Argument of the architecture, NAME=VALUE (repeatable).")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder that holds the data sets in torchvision's layout.")]
Split = Annotated[str, typer.Option(help="train or test.")]
Limit = Annotated[int, typer.Option(help="Most samples; a random subset, by --seed.")]
ImageSize = Annotated[str | None, typer.Option(help="HEIGHT,WIDTH to resize the images of folder: to.")]
Mean = Annotated[str | None, typer.Option(help="Per-channel means the model expects its input to be normalised by.")]
Std = Annotated[str | None, typer.Option(help="Per-channel standard deviations, likewise.")]
Norms = Annotated[str, typer.Option(help="Norms of the budgets: inf, 2 or inf,2.")]
Eps = Annotated[
    list[str] | None,
    typer.Option(help="Budget in input units, P=EPS (repeatable); EPS alone holds for every norm."),
]
Steps = Annotated[int | None, typer.Option(help="Steps of every gradient attack; the preset's own by default.")]
Restarts = Annotated[int, typer.Option(help="Random restarts of every attack.")]
BatchSize = Annotated[int, typer.Option(help="Samples at once; halved when memory runs out.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every random choice.")]
Threads = Annotated[int | None, typer.Option(min=1, max=4096, help="CPU threads.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a result that is already there.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of the summary.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no summary.")]


@app.command("audit")
def _audit(
    model: Model,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    data: Annotated[
        str | None,
        typer.Option(help=f"{FORMS}. Without it: a run's own, or weights alone."),
    ] = None,
    data_root: DataRoot = None,
    split: Split = "test",
    limit: Limit = 1000,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    p: Norms = "inf,2",
    eps: Eps = None,
    preset: Annotated[str, typer.Option(help="Attacks: fast, standard or thorough.")] = "fast",
    steps: Steps = None,
    restarts: Restarts = 1,
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one input (3,224,224): sharper bounds on convolutions without data.")
    ] = None,
    tighten: Annotated[
        int, typer.Option(help="Steps of optimisation of the certified bounds; each as long as the bounds themselves.")
    ] = 0,
    batch_size: BatchSize = 256,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Threads = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the report.")] = Path("brittle-audit"),
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Audit a trained network: one report that says how compressible and how fragile it is, and why.

    Example: brittle audit model.safetensors --arch fcn --data mnist --data-root data -o report
    """
    _check_output(out, "audit.json", overwrite)
    budgets, norms = options.budgets(eps), options.norms(p)
    shape, size = options.integers("input-shape", input_shape), options.integers("image-size", image_size, count=2)
    _prepare(threads)
    network, own = _network(model, arch, options.arguments(arch_arg or []), mean, std, options.device(device))
    samples = _samples(data, data_root, split, limit, seed, size, own)
    from brittle.auditing.run import audit

    with _progress(quiet) as stage:
        result = audit(
            network,
            samples,
            p=norms,
            eps={q: budgets[q] for q in norms if q in budgets} or None,
            attacks=preset,
            steps=steps,
            restarts=restarts,
            input_shape=shape,
            tighten=tighten,
            batch_size=batch_size,
            seed=seed,
            name=model.name,
            progress=stage,
        )
    save(result, out)
    _announce(result, out, as_json, quiet)


@app.command("attack")
def _attack(
    model: Model,
    arch: Arch = None,
    data: Annotated[str | None, typer.Option(help=f"{FORMS}. Without it: a run's own.")] = None,
    arch_arg: ArchArg = None,
    data_root: DataRoot = None,
    split: Split = "test",
    limit: Limit = 1000,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    p: Norms = "inf,2",
    eps: Eps = None,
    preset: Annotated[str, typer.Option(help="Attacks: fast, standard or thorough.")] = "standard",
    steps: Steps = None,
    restarts: Restarts = 1,
    certify: Annotated[bool, typer.Option(help="Leave out samples that are proven robust at the budget.")] = True,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Attack a compiled copy (torch.compile): for long runs on a GPU.")
    ] = False,
    batch_size: BatchSize = 256,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; several, separated by commas, share.")] = "cpu",
    ray_workers: Annotated[int, typer.Option(help="Tasks at once on a Ray cluster; 0 for none.")] = 0,
    threads: Threads = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path("brittle-attack"),
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Robust accuracy alone, under strong attacks, for data of any size; interrupted, it goes on where it stopped.

    Example: brittle attack model.safetensors --arch fcn --data mnist --data-root data --eps inf=0.1 -o attacked
    """
    _check_output(out, "attack.json", overwrite)
    budgets, norms = options.budgets(eps), options.norms(p)
    size = options.integers("image-size", image_size, count=2)
    devices = [options.device(name.strip()) for name in device.split(",")]
    _prepare(threads)
    network, own = _network(model, arch, options.arguments(arch_arg or []), mean, std, devices[0])
    samples = _samples(data, data_root, split, limit, seed, size, own)
    if samples is None:
        raise InputError(f"data: expected one of {FORMS}; got none")
    from brittle.evaluation.standard import attack

    with _progress(quiet) as stage:
        result = attack(
            network,
            samples,
            p=norms,
            eps={q: budgets[q] for q in norms if q in budgets} or None,
            preset=preset,
            steps=steps,
            restarts=restarts,
            certify=certify,
            compiled=compiled,
            batch_size=batch_size,
            seed=seed,
            devices=devices if len(devices) > 1 else (),
            ray_workers=ray_workers,
            resume=out / "parts",
            name=model.name,
            progress=stage,
        )
    save_attack(result, out)
    if as_json:
        print(result.to_json(), end="")
    elif not quiet:
        for evaluation in result.evaluations:
            print(evaluation.summary)
        print(result.signature.line)
        print(f"Results: {out / 'attack.json'}, {out / 'samples.parquet'}")


@app.command("train")
def _train(
    data: Annotated[str, typer.Option(help=f"{FORMS}.")],
    arch: Annotated[
        str | None,
        typer.Option(
            help="fcn (the default), resnet18-cifar, vgg16, wide-resnet101-2, vit, torchvision:NAME, timm:NAME or "
            "module:function; with --fine-tune RUN, the run's own."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the run.")] = Path("brittle-run"),
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option(help="Fetch the data set into --data-root if it is not there.")] = False,
    limit: Annotated[int | None, typer.Option(help="Most training samples; a random subset, by --seed.")] = None,
    image_size: ImageSize = None,
    arch_arg: ArchArg = None,
    width: Annotated[int | None, typer.Option(help="Same as --arch-arg width=N.")] = None,
    depth: Annotated[int | None, typer.Option(help="Same as --arch-arg depth=N.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Per-channel means to normalise by; the data set's by default.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviations, likewise.")] = None,
    fine_tune: Annotated[
        Path | None, typer.Option(help="Start from these weights: a file, or a folder of brittle train.")
    ] = None,
    penalty: Annotated[
        list[str] | None,
        typer.Option(
            help="Penalty and strength, NAME=NUMBER (repeatable): group_lasso, scale_invariant_group_lasso, "
            "nuclear_norm, l1, joint_l1, spread_control."
        ),
    ] = None,
    refresh: Annotated[
        int, typer.Option(help="Steps between evaluations of the nuclear norm's gradient, and between shrinkages.")
    ] = 1,
    rank: Annotated[
        str | None, typer.Option(help="Train low-rank factors of this rank, or share of the full one.")
    ] = None,
    frobenius: Annotated[
        str | None, typer.Option(help="Hold every layer's Frobenius norm: a constant, or 'initial'.")
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            help="Constraint and value, NAME=NUMBER (repeatable): spectral_cap, orthonormal, condition_cap, "
            "row_shrinkage, singular_shrinkage, frobenius."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Names of the layers acted on, separated by commas; the paper's choice by default."),
    ] = None,
    adversarial: Annotated[
        str | None, typer.Option(help="Adversarial training with this budget, P=EPS: inf=0.1 or 2=0.5.")
    ] = None,
    attack_steps: Annotated[int, typer.Option(help="Steps of the training attack.")] = 10,
    adversarial_ratio: Annotated[float, typer.Option(help="Share of every batch that is attacked.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Passes over the training samples.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 128,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Momentum of sgd.")] = 0.9,
    schedule: Annotated[
        str, typer.Option(help="constant, cosine or step (at half and three quarters, times 0.1).")
    ] = "constant",
    crop: Annotated[int, typer.Option(help="Random crops from images padded by so many pixels.")] = 0,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = False,
    validation: Annotated[float, typer.Option(help="Share of the samples held out to select the weights.")] = 0.1,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a better validation accuracy.")
    ] = None,
    select: Annotated[str, typer.Option(help="best (by validation) or last.")] = "best",
    measure_every: Annotated[
        int, typer.Option(help="Epochs between measurements of layers and bounds; 0 for none.")
    ] = 1,
    precision: Annotated[str, typer.Option(help="32-true, 16-mixed or bf16-mixed.")] = "32-true",
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log for TensorBoard, into the run's folder.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    processes: Annotated[int, typer.Option(help="Processes (GPUs) that share every batch.")] = 1,
    seed: Seed = 0,
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a network with the papers' interventions; interrupted, the same command goes on where it stopped.

    Example: brittle train --data mnist --data-root data --arch fcn --width 400 --penalty nuclear_norm=0.003 -o run
    """
    _check_output(out, "weights.safetensors", overwrite)
    arguments = options.arguments(arch_arg or [])
    arguments |= {name: value for name, value in (("width", width), ("depth", depth)) if value is not None}
    penalties = options.strengths("penalty", penalty)
    constraints: dict[str, float | None] = {**options.strengths("constraint", constraint)}
    if frobenius is not None and "frobenius" in constraints:
        raise InputError(f"frobenius: given twice, as {constraints['frobenius']} and as {frobenius}")
    if frobenius is not None:
        constraints["frobenius"] = None if frobenius == "initial" else options.number("frobenius", frobenius)
    budget = options.budgets([adversarial]) if adversarial is not None else {}
    if len(budget) > 1:
        raise InputError(f"adversarial: expected one norm, P=EPS; got {adversarial!r}")
    share, size = options.rank(rank), options.integers("image-size", image_size, count=2)
    if (mean is None) != (std is None):
        raise InputError("mean, std: expected both or neither; got one")
    options.device(device)
    _prepare(threads)
    from brittle.training.recipe import Adversary, Recipe
    from brittle.training.runs import Order, ordered_run

    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr, weight_decay=weight_decay,
        momentum=momentum, schedule=schedule, penalties=penalties, refresh=refresh, constraints=constraints,
        layers=None if layers is None else tuple(name.strip() for name in layers.split(",")),
        adversary=next((Adversary(eps, p, attack_steps, ratio=adversarial_ratio) for p, eps in budget.items()), None),
        crop=crop, flip=flip, validation=validation, patience=patience, select=select, precision=precision,
        measure_every=measure_every, seed=seed,
    )  # fmt: skip
    if download:
        from brittle.data.downloads import download as fetch

        fetch(data, data_root)
    samples = _samples(data, data_root, "train", limit, seed, size)
    assert samples is not None
    order = Order(
        arch=arch,
        arguments=arguments,
        statistics=None
        if mean is None or std is None
        else (tuple(options.numbers("mean", mean)), tuple(options.numbers("std", std))),
        rank=share,
        start=fine_tune,
        data_root=data_root,
        limit=limit,
        image_size=None if size is None else (size[0], size[1]),
        recipe=recipe,
    )
    with _training_progress(quiet, tensorboard, out) as tell:
        result = ordered_run(order, samples, out, anew=overwrite, device=device, processes=processes, tell=tell)
    if not quiet:
        row = result.epochs[result.epoch - 1]
        held = "" if row.validation_accuracy is None else f", validation {row.validation_accuracy:.2%}"
        print(f"Epoch {result.epoch} of {len(result.epochs)} selected: training {row.accuracy:.2%}{held}")
        print(f"Run: {out}; next: brittle audit {out}")


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the report.")] = Path("brittle-demo"),
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> None:
    """Train a dense and four compressible networks on the embedded digits, audit them, and tell the whole story.

    Takes about a minute on two cores. Example: brittle demo -o brittle-demo
    """
    import torch

    from brittle.experiments.demo import run_demo

    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much beside other load
    _check_output(out, "audit.json", True)
    with _progress(quiet) as stage:
        story = run_demo(out, seed=seed, progress=stage)
    print("\n".join(story.lines))
    print(f"Report: {out / 'report.html'}")


@app.command("report")
def _report(
    audit: Annotated[Path, typer.Argument(help="An audit.json.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the page.")] = Path("report.html"),
) -> None:
    """Draw the report again from an audit.json; needs neither the model nor the data."""
    from brittle.reporting.page import write_report
    from brittle.results import Audit

    if not audit.is_file():
        raise InputError(f"audit: expected an audit.json; {audit} is {'a folder' if audit.is_dir() else 'not there'}")
    if out.resolve() == audit.resolve():
        raise InputError(f"out: expected another file than the audit itself; got {out}")
    write_report(Audit.load(audit), out)
    print(f"Report: {out}")


def save_attack(result: AttackResult, out: Path) -> None:
    """Write ``attack.json`` and ``samples.parquet`` into a folder, whole or not at all; the parts go."""
    import shutil

    from brittle.storage.files import replacing

    with replacing(out / "samples.parquet") as beside:
        result.samples_frame().to_parquet(beside, index=False)
    result.save(out / "attack.json")
    shutil.rmtree(out / "parts", ignore_errors=True)


def save(audit: Audit, out: Path) -> None:
    """Write ``audit.json``, ``samples.parquet`` (if samples were attacked) and ``report.html`` into a folder."""
    from brittle.reporting.page import write_report
    from brittle.storage.files import replacing

    audit.save(out / "audit.json")
    if audit.clean_accuracy is not None:
        with replacing(out / "samples.parquet") as beside:
            audit.samples_frame().to_parquet(beside, index=False)
    write_report(audit, out / "report.html")


def _network(
    path: Path, arch: str | None, arguments: dict[str, object], mean: str | None, std: str | None, device: str
) -> tuple[nn.Module, RunConfig | None]:
    """The network of a file of weights, or of a run's folder with its configuration."""
    if path.is_dir():
        from brittle.training.runs import load_run

        if arguments or mean is not None or std is not None:
            raise InputError(f"arch-arg, mean, std: {path} is a run and knows its own; leave them out")
        trained, config = load_run(path, arch=arch)
        return trained.to(device), config
    from brittle.models.build import build_model
    from brittle.models.checkpoints import fill, read_state

    if arch is None:
        raise InputError("arch: expected an architecture to fill with the weights; got none")
    state = read_state(path)
    network = build_model(arch, arguments, state)
    fill(network, state)
    if (mean is None) != (std is None):
        raise InputError("mean, std: expected both or neither; got one")
    if mean is not None and std is not None:
        from brittle.models.normalize import normalised

        network = normalised(network, options.numbers("mean", mean), options.numbers("std", std))
    return network.eval().to(device), None


def _samples(
    spec: str | None,
    root: Path | None,
    split: str,
    limit: int | None,
    seed: int,
    size: tuple[int, ...] | None,
    own: RunConfig | None = None,
) -> Data | None:
    """The data asked for; without any, what the run was trained on."""
    from brittle.data.load import load_data

    if spec is None and own is None:
        return None
    if spec is None and own is not None:
        spec, root, size = own.data, root or (Path(own.data_root) if own.data_root else None), size or own.image_size
    assert spec is not None
    pair = (size[0], size[1]) if size else None
    return load_data(spec, root=root, split=split, limit=limit, seed=seed, image_size=pair)


def _announce(audit: Audit, out: Path, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(audit.to_json(), end="")
        return
    if not quiet:
        print(audit.verdict.headline)
        for finding in audit.verdict.findings:
            print(f"  - {finding}")
        if audit.not_measured:
            print(f"Not measured: {len(audit.not_measured)}, listed in the report with the reasons.")
        print(audit.signature.line)
    print(f"Report: {out / 'report.html'}")


@contextmanager
def _progress(quiet: bool) -> Iterator[Stage]:
    """A bar with the time left for every stage, on standard error; silent when that is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def stage(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, rate="")
            speed = bars.tasks[tasks[name]].speed
            bars.update(tasks[name], completed=done, total=total, rate=f"{speed:,.1f}/s" if speed else "")

        yield stage


@contextmanager
def _training_progress(quiet: bool, tensorboard: bool, out: Path) -> Iterator[Callable[[Any], None]]:
    """A bar over all steps with loss, accuracy, throughput and time left, and a line an epoch; on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    shown = not quiet and console.is_terminal
    with Progress(*columns, console=console, disable=not shown) as bars, _tensorboard(tensorboard, out) as log:
        task = bars.add_task("starting", total=None)

        def tell(moment: Any) -> None:
            over = moment.epoch - 1 if moment.row is None else moment.epoch
            done = over * moment.steps + (moment.step if moment.row is None else 0)
            text = (
                f"epoch {moment.epoch}/{moment.epochs}  loss {moment.loss:.4f}  accuracy {moment.accuracy:.2%}  "
                f"{moment.samples_per_second:,.0f}/s"
            )
            bars.update(task, description=text, completed=done, total=moment.epochs * moment.steps)
            if moment.row is not None:
                log(moment.row)
                held = moment.row.validation_accuracy
                if shown:
                    console.print(text + ("" if held is None else f"  validation {held:.2%}"), highlight=False)

        yield tell


@contextmanager
def _tensorboard(wanted: bool, out: Path) -> Iterator[Callable[[Any], None]]:
    """Writes every number of an epoch's row for TensorBoard."""
    if not wanted:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from brittle.errors import MissingExtra

        raise MissingExtra("tensorboard", "tensorboard", "--tensorboard") from None
    import dataclasses

    with SummaryWriter(str(out / "tensorboard")) as writer:

        def log(row: Any) -> None:
            for name, value in dataclasses.asdict(row).items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, row.epoch)

        yield log


def _check_output(out: Path, name: str, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"out: expected a folder; {out} is a file")
    if (out / name).exists() and not overwrite:
        raise InputError(f"out: {out} already holds results ({name}); choose another folder or pass --overwrite")


def _prepare(threads: int | None) -> None:
    """Settings of this process that long runs gain from."""
    options.threads(threads)
    _keep_heap()


def _keep_heap() -> None:
    """Let glibc keep freed memory: else it gives large tensors back and faults them in again at every pass."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest that is taken
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    main()
