"""The command line: parses, calls one function, prints. The only module that prints.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 bad usage or
input (one line, no traceback), 130 interrupted.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brittle import __version__
from brittle.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from brittle.data import Data
    from brittle.results import Audit

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
        return _complain("interrupted; nothing was half-written, run the same command again", 130)


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


@app.command("audit")
def _audit(
    model: Annotated[Path, typer.Argument(help="Weights: .safetensors, or a checkpoint that holds plain tensors.")],
    arch: Annotated[
        str,
        typer.Option(help="What to fill: fcn, resnet18-cifar, torchvision:NAME, timm:NAME or module:function."),
    ],
    arch_arg: Annotated[
        list[str] | None, typer.Option(help="Argument of the architecture, NAME=VALUE (repeatable).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, mnist, cifar10, folder:PATH or npz:PATH; weights alone without it.")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder that holds the data sets in torchvision's layout.")
    ] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
    limit: Annotated[int, typer.Option(help="Most samples; a random subset, by --seed.")] = 1000,
    image_size: Annotated[str | None, typer.Option(help="HEIGHT,WIDTH to resize the images of folder: to.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Per-channel means the model expects its input to be normalised by.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Per-channel standard deviations, likewise.")] = None,
    p: Annotated[str, typer.Option(help="Norms of the budgets: inf, 2 or inf,2.")] = "inf,2",
    eps: Annotated[
        list[str] | None,
        typer.Option(help="Budget in input units, P=EPS (repeatable); EPS alone holds for every norm."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of every attack.")] = 100,
    restarts: Annotated[int, typer.Option(help="Random restarts of every attack.")] = 1,
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one input (3,224,224): sharper bounds on convolutions without data.")
    ] = None,
    tighten: Annotated[
        int, typer.Option(help="Steps of optimisation of the certified bounds; each as long as the bounds themselves.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the report.")] = Path("brittle-audit"),
    overwrite: Annotated[bool, typer.Option(help="Replace an audit that is already there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the audit as JSON instead of the summary.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no summary.")] = False,
) -> None:
    """Audit a trained network: one report that says how compressible and how fragile it is, and why.

    Example: brittle audit model.safetensors --arch fcn --data mnist --data-root data -o report
    """
    _check_output(out, overwrite)
    budgets, norms = _budgets(eps), _norms(p)
    shape, size = _integers("input-shape", input_shape), _integers("image-size", image_size, count=2)
    _threads(threads)
    network = _network(model, arch, _arguments(arch_arg or []), mean, std, _device(device))
    samples = _samples(data, data_root, split, limit, seed, size)
    from brittle.auditing import audit

    with _progress(quiet) as stage:
        result = audit(
            network,
            samples,
            p=norms,
            eps={q: budgets[q] for q in norms if q in budgets} or None,
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

    from brittle.demo import run_demo

    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much beside other load
    _check_output(out, True)
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
    from brittle.report import write_report
    from brittle.results import Audit

    if not audit.is_file():
        raise InputError(f"audit: expected an audit.json; nothing is at {audit}")
    write_report(Audit.load(audit), out)
    print(f"Report: {out}")


def save(audit: Audit, out: Path) -> None:
    """Write ``audit.json``, ``samples.parquet`` (if samples were attacked) and ``report.html`` into a folder."""
    from brittle.files import replacing
    from brittle.report import write_report

    audit.save(out / "audit.json")
    if audit.evaluations:
        with replacing(out / "samples.parquet") as beside:
            audit.samples_frame().to_parquet(beside, index=False)
    write_report(audit, out / "report.html")


def _network(
    path: Path, arch: str, arguments: dict[str, object], mean: str | None, std: str | None, device: str
) -> nn.Module:
    from collections import OrderedDict

    from torch import nn

    from brittle.checkpoints import fill, read_state
    from brittle.models import Normalize, build_model

    state = read_state(path)
    network = build_model(arch, arguments, state)
    fill(network, state)
    if (mean is None) != (std is None):
        raise InputError("mean, std: expected both or neither; got one")
    if mean is not None and std is not None:
        normalize = Normalize(_numbers("mean", mean), _numbers("std", std))
        network = nn.Sequential(OrderedDict(normalize=normalize, model=network))
    return network.eval().to(device)


def _samples(
    spec: str | None, root: Path | None, split: str, limit: int, seed: int, size: tuple[int, ...] | None
) -> Data | None:
    from brittle.data import load_data

    if spec is None:
        return None
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
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet or not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def stage(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield stage


def _check_output(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"out: expected a folder; {out} is a file")
    if (out / "audit.json").exists() and not overwrite:
        raise InputError(f"out: {out} already holds an audit; choose another folder or pass --overwrite")


def _arguments(pairs: list[str]) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name.isidentifier():
            raise InputError(f"arch-arg: expected NAME=VALUE; got {pair!r}")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def _norms(text: str) -> tuple[float, ...]:
    norms = _numbers("p", text)
    if not norms or any(q not in (2, math.inf) for q in norms) or len(set(norms)) < len(norms):
        raise InputError(f"p: expected inf, 2 or inf,2; got {text!r}")
    return tuple(norms)


def _budgets(entries: list[str] | None) -> dict[float, float]:
    budgets: dict[float, float] = {}
    for entry in entries or []:
        norm, separator, value = entry.rpartition("=")
        for q in _norms(norm) if separator else (math.inf, 2.0):
            budgets[q] = _numbers("eps", value)[0]
            if not 0 < budgets[q] < math.inf:
                raise InputError(f"eps: expected a finite number above 0; got {value}")
    return budgets


def _numbers(name: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name}: expected numbers separated by commas; got {text!r}") from None
    if any(math.isnan(number) for number in numbers):
        raise InputError(f"{name}: expected numbers; got {text!r}")
    return numbers


def _integers(name: str, text: str | None, count: int | None = None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts) or count not in (None, len(parts)):
        raise InputError(f"{name}: expected {count or 'some'} positive integers separated by commas; got {text!r}")
    return tuple(int(part) for part in parts)


def _device(name: str) -> str:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: expected cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise InputError(f"device: expected cpu or one of {torch.cuda.device_count()} CUDA devices; got {name!r}")
    return name


def _threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        if threads < 1:
            raise InputError(f"threads: expected at least 1; got {threads}")
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
