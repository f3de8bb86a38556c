"""The options of the commands: records of a command's own, and those made from the dataclasses of the library."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brittle.cli import values
from brittle.cli.completion import completing
from brittle.cli.from_dataclass import constant, options
from brittle.errors import InputError
from brittle.results.wording import budget, norm_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from brittle.data.load import Data
    from brittle.delivery import Origin
    from brittle.results import Audit, Evaluation
    from brittle.training.recipe import Recipe
    from brittle.training.runs import RunConfig, RunRequest


def option(panel: str, *names: str, **settings: Any) -> Any:
    """An option under a heading of the help."""
    return typer.Option(*names, rich_help_panel=panel, **settings)


def check_seed(seed: int) -> int:
    """A seed that every generator takes; checked here for a range of 19 digits would stand in every help text."""
    if not 0 <= seed < 2**63:
        raise typer.BadParameter(f"expected an integer from 0 to {2**63 - 1}")
    return seed


def check_threads(threads: int | None) -> int | None:
    """A number of threads that a machine can have; its range, too, would take the room of the help."""
    if threads is not None and not 1 <= threads <= 4096:
        raise typer.BadParameter("expected an integer from 1 to 4096")
    return threads


FORMS = constant("brittle.data.load", "FORMS")
PRESETS = constant("brittle.evaluation", "PRESETS")
LIKE_AUTOATTACK = "It runs AutoAttack's attacks, but APGD along smoothed gradients in place of FAB."
ALIASES = constant("brittle.evaluation.threat", "ALIASES")
EXPERIMENTS = constant("brittle.experiments.catalogue", "EXPERIMENTS")
ARCHITECTURES = ", ".join(constant("brittle.models", "ARCHITECTURES"))
ARCHITECTURES += ", torchvision:NAME, timm:NAME, hf:FOLDER or module:function"
PENALTIES = constant("brittle.training", "PENALTIES")
CONSTRAINTS = constant("brittle.training", "CONSTRAINTS")
ARCHS = completing(*constant("brittle.models", "ARCHITECTURES"), "torchvision:", "timm:", "hf:")
DATA_SETS = completing(*(form.removesuffix("PATH") for form in FORMS.split(", ")))
DEVICES = completing("auto", "cpu", "cuda")
SCALES = completing(*constant("brittle.experiments.claims", "SCALES"))

ArchArg = Annotated[
    list[str] | None,
    option("Network", metavar="NAME=VALUE", help="Argument of the architecture; VALUE is JSON or text (repeatable)."),
]
Std = Annotated[str | None, option("Network", metavar="N,N,N", help="Standard deviation of each channel, likewise.")]
DataRoot = Annotated[Path | None, option("Data", help="Folder that holds the data sets, in torchvision's layout.")]
ImageSize = Annotated[str | None, option("Data", metavar="H,W", help="Resize the images of folder:PATH to this.")]
Threads = Annotated[int | None, option("Execution", callback=check_threads, help="CPU threads.")]
InputShape = Annotated[
    str | None,
    option("Bounds", metavar="C,H,W", help="Shape of one input, for sharper bounds on convolutions without data."),
]
Json = Annotated[bool, option("Output", "--json", help="Print the result as JSON instead of the summary.")]
Statistics = tuple[tuple[float, ...], tuple[float, ...], str]
"""Mean and standard deviation by channel, and where they are from."""
Values = dict[str, Any]
"""Values of options by the names of the fields that they fill."""


Normalise = Annotated[
    str,
    option(
        "Network",
        help="auto: as the library of its weights or the run says; dataset: by the usual constants of --data; none. "
        "--mean and --std come before it.",
    ),
]
Download = Annotated[
    bool, option("Network", help="Fetch the weights of torchvision:, timm: or hf: into their library's cache.")
]
LIBRARY_DATA = ("imagenet", "folder:", "npz:")
"""Beginnings of the data for which weights in a file may be a library's own; others are known to be something else."""


@dataclass(frozen=True)
class Network:
    """A trained network to judge."""

    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Weights: .safetensors, or a checkpoint that holds plain tensors; a folder of brittle train; or a "
            "trained network by name: torchvision:NAME, timm:NAME, hf:ORG/MODEL or hf:FOLDER.",
        ),
    ]
    arch: Annotated[
        str | None,
        option(
            "Network",
            autocompletion=ARCHS,
            help=f"{ARCHITECTURES}; a run knows its own, and an audit without data can do without.",
        ),
    ] = None
    arch_arg: ArchArg = None
    mean: Annotated[
        str | None,
        option("Network", metavar="N,N,N", help="Mean of each channel, where the network expects normalised inputs."),
    ] = None
    std: Std = None
    normalise: Normalise = "auto"
    weights: Annotated[
        str | None,
        option("Network", help="Which weights of torchvision:NAME or timm:NAME.", show_default="the library's DEFAULT"),
    ] = None
    download: Download = False

    def load(self, device: str, data: str | None = None) -> tuple[nn.Module, RunConfig | None]:
        """The network of weights, a name, or a run's folder with its configuration; in evaluation mode.

        Args:
            device: Where it is put.
            data: Name of the data that it is judged on, whose usual constants --normalise may ask for.
        """
        arguments, asked = values.arguments(self.arch_arg or []), self._asked_statistics(data)
        own = self.normalise == "auto" and asked is None
        if self.weights is not None and not is_named(self.model):
            raise InputError(f"weights: expected it with torchvision:NAME or timm:NAME; got it with {self.model}")
        if self.download and not (by_name(self.model)):
            raise InputError(f"download: expected torchvision:NAME, timm:NAME or hf:ORG/MODEL; got {self.model}")
        if by_name(self.model):
            if self.arch is not None or arguments:
                raise InputError(f"arch, arch-arg: {self.model} knows its own; leave them out")
            return self._normalised(self._by_name(own), asked).to(device), None
        if self.model.is_dir():
            from brittle.training.runs import load_run

            if arguments or not own:
                raise InputError(
                    f"arch-arg, mean, std, normalise: {self.model} is a run and knows its own; leave them out"
                )
            trained, config = load_run(self.model, arch=self.arch)
            return trained.to(device), config
        from brittle.models.build import build_model
        from brittle.models.checkpoints import fill, read_state

        if self.arch is None:
            alone = "" if data is None else "; without --data the weights alone are audited"
            hint = _of_a_run(self.model) or alone
            raise InputError(f"arch: expected an architecture to fill with the weights; got none{hint}")
        state = read_state(self.model)
        network = build_model(self.arch, arguments, state)
        fill(network, state)
        return self._normalised(network, self._statistics(data)).to(device), None

    def read_weights(self) -> dict[str, Tensor] | None:
        """The weights of a file without an architecture to fill; None where there is more, or a run around it."""
        if self.arch is not None or by_name(self.model) or self.model.is_dir() or _of_a_run(self.model):
            return None
        from brittle.models.checkpoints import read_state

        return read_state(self.model)

    def sized(self, samples: Samples) -> Samples:
        """The samples with images of the size that the library of a named network says, where none was asked for."""
        if samples.image_size is not None or not (samples.data or "").startswith(("imagenet", "folder:")):
            return samples
        size = None
        if is_snapshot(self.model):
            from brittle.models.hugging_face import snapshot_image_size

            size = snapshot_image_size(str(self.model))
        elif is_named(self.model):
            from brittle.models.pretrained import pretraining_of

            size = pretraining_of(str(self.model), self.weights or "DEFAULT").input_shape[1:]
        return samples if size is None else replace(samples, image_size=f"{size[0]},{size[1]}")

    def origin(self, model: nn.Module, run: RunConfig | None, samples: Samples) -> Origin:
        """What the network of :meth:`load` was built from, and the data that it is judged on."""
        from brittle.delivery import Origin
        from brittle.models.build import complete_arguments

        spec, root, size = samples.source(run)
        data = spec, None if root is None else str(root.absolute()), size, str(self.model.absolute())
        if run is not None:
            return Origin(run.arch, run.arguments, run.mean, run.std, *data)
        mean, std = (self._statistics(spec) or ((), (), ""))[:2]
        if is_snapshot(self.model):
            from brittle.models.hugging_face import absolute_name

            name = absolute_name(str(self.model))
            return Origin(name, {}, mean, std, *data[:-1], name)
        if is_named(self.model):
            return Origin(str(self.model), {}, mean, std, *data[:-1], str(self.model))
        assert self.arch is not None
        inner = model.get_submodule("model") if mean else model
        arguments = complete_arguments(self.arch, values.arguments(self.arch_arg or []), inner.state_dict())
        return Origin(self.arch, arguments, mean, std, *data)

    def _by_name(self, own: bool) -> nn.Module:
        """The trained network of that name, behind the normalisation that its library says or alone."""
        if is_snapshot(self.model):
            from brittle.models.hugging_face import load_snapshot

            return load_snapshot(str(self.model), download=self.download, normalise=own)
        from brittle.models.pretrained import load_pretrained

        return load_pretrained(str(self.model), self.weights or "DEFAULT", download=self.download, normalise=own)

    def _normalised(self, network: nn.Module, statistics: Statistics | None) -> nn.Module:
        """The network behind a normalisation, in evaluation mode."""
        from brittle.models.normalize import normalised

        return (network if statistics is None else normalised(network, *statistics)).eval()

    def _asked_statistics(self, data: str | None) -> Statistics | None:
        """Mean, standard deviation and where they are from, where options ask for them."""
        if self.normalise not in ("auto", "dataset", "none"):
            raise InputError(f"normalise: expected auto, dataset or none; got {self.normalise!r}")
        if (given := values.statistics(self.mean, self.std)) is not None:
            return (*given, "--mean, --std")
        if self.normalise != "dataset":
            return None
        from brittle.data.load import MEAN_STD

        if data not in MEAN_STD:
            raise InputError(f"normalise: expected --data of {', '.join(MEAN_STD)}, with usual constants; got {data}")
        return (*MEAN_STD[data], f"the usual constants of {data}")

    def _statistics(self, data: str | None) -> Statistics | None:
        """The same, else what the network's library says; None where its inputs are taken as they are."""
        if (asked := self._asked_statistics(data)) is not None or self.normalise == "none":
            return asked
        if is_snapshot(self.model):
            from brittle.models.hugging_face import PROCESSOR, snapshot_statistics

            said = snapshot_statistics(str(self.model))
            return None if said is None else (*said, PROCESSOR)
        from brittle.models.pretrained import expected_statistics, pretraining_of

        if is_named(self.model):
            known = pretraining_of(str(self.model), self.weights or "DEFAULT")
            return known.mean, known.std, known.source
        if data is not None and not data.startswith(LIBRARY_DATA):
            return None
        probable = expected_statistics(self.arch or "", values.arguments(self.arch_arg or []))
        return None if probable is None else (probable.mean, probable.std, f"as {probable.source}")


@dataclass(frozen=True)
class Networks:
    """Trained networks to put side by side."""

    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...",
            help="At least two: weights as for audit, folders of brittle train, or an audit.json. The first is what "
            "the others are compared with.",
        ),
    ]
    arch: Annotated[
        list[str] | None,
        option(
            "Network",
            metavar="<str>",
            autocompletion=ARCHS,
            help=f"{ARCHITECTURES}. Once for all files of weights, or once for each; a run knows its own.",
        ),
    ] = None
    arch_arg: ArchArg = None
    mean: Annotated[
        str | None,
        option("Network", metavar="N,N,N", help="Mean of each channel, where the networks expect normalised inputs."),
    ] = None
    std: Std = None
    normalise: Normalise = "auto"
    download: Download = False
    name: Annotated[
        list[str] | None,
        option("Network", metavar="<str>", help="What to call a network, once for each.", show_default="its path"),
    ] = None

    def load(self, device: str, data: str | None = None) -> tuple[list[nn.Module | Audit], RunConfig | None]:
        """The networks and audits in their order, and the configuration of the first run among them."""
        files = [path for path in self.models if not (path.is_dir() or is_audit(path) or by_name(path))]
        archs = self.arch or []
        if len(archs) > 1 and len(archs) < len(files):
            raise InputError(f"arch: expected one for all {len(files)} files of weights, or one for each; got {archs}")
        loaded: list[nn.Module | Audit] = []
        runs: list[RunConfig] = []
        for path in self.models:
            if is_audit(path):
                loaded.append(_read_audit(path))
                continue
            feeding = self.mean, self.std, self.normalise
            if by_name(path):
                network, run = Network(path, None, None, *feeding, download=self.download).load(device, data)
            elif path.is_dir():
                network, run = Network(path, _named_arch(path, archs)).load(device)
            else:
                arch = archs[files.index(path) if len(archs) > 1 else 0] if archs else None
                network, run = Network(path, arch, self.arch_arg, *feeding).load(device, data)
            loaded.append(network)
            runs += [] if run is None else [run]
        return loaded, runs[0] if runs else None

    def names(self) -> list[str]:
        """A name for each: the given ones, or as much of the end of each path as tells them apart."""
        if self.name:
            return self.name
        paths = [path.parent if path.name == "audit.json" else path for path in map(Path.absolute, self.models)]
        for parts in range(1, max(len(path.parts) for path in paths) + 1):
            names = ["/".join(path.parts[-parts:]) for path in paths]
            if len(set(names)) == len(names):
                return names
        return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]


def is_audit(path: Path) -> bool:
    """Whether a path is taken for a saved audit: a file whose name ends in ``.json``."""
    return path.suffix == ".json"


def is_snapshot(path: Path) -> bool:
    """Whether a network is named as ``hf:FOLDER``."""
    return str(path).startswith("hf:")


def is_named(path: Path) -> bool:
    """Whether a trained network is named as ``torchvision:NAME`` or ``timm:NAME``."""
    return str(path).startswith(("torchvision:", "timm:"))


def by_name(path: Path) -> bool:
    """Whether a trained network is named, and no file or folder."""
    return is_snapshot(path) or is_named(path)


def _of_a_run(file: Path) -> str:
    """A hint where a file lies in the folder of a run or of a compressed network, which knows its architecture."""
    known = any((file.parent / name).is_file() for name in ("config.json", "recipe.json"))
    return f"; the folder of that file knows its own, so give the folder: {file.parent}" if known else ""


def _read_audit(path: Path) -> Audit:
    """A saved audit, with its samples where they lie beside it."""
    from brittle.results import Audit

    samples = path.parent / "samples.parquet"
    return Audit.load(path, samples if samples.is_file() else None)


def _named_arch(folder: Path, archs: Sequence[str]) -> str | None:
    """The architecture of a run where the user has named it, which a function of someone's needs; else None."""
    from brittle.training.runs import folder_arch

    return next((arch for arch in archs if arch == folder_arch(folder)), None)


@dataclass(frozen=True)
class Samples:
    """Labelled inputs to judge a network on."""

    data: Annotated[
        str | None,
        option(
            "Data",
            autocompletion=DATA_SETS,
            help=f"{FORMS}. Without it: what the run was trained on; an audit of a file reads weights alone.",
        ),
    ] = None
    data_root: DataRoot = None
    split: Annotated[
        str, option("Data", autocompletion=completing("train", "test"), help="Split of the data: train or test.")
    ] = "test"
    limit: Annotated[int, option("Data", help="Most samples: a random subset, by --seed.")] = 1000
    image_size: ImageSize = None

    def load(self, seed: int, run: RunConfig | None) -> Data | None:
        """The data asked for; without any, what the run was trained on."""
        return self.load_split(self.split, self.limit, seed, run)

    def load_split(self, split: str, limit: int | None, seed: int, run: RunConfig | None) -> Data | None:
        """The same of another split, or of other size."""
        from brittle.data.load import load_data

        spec, root, size = self.source(run)
        if spec is None:
            return None
        return load_data(spec, root=root, split=split, limit=limit, seed=seed, image_size=size)

    def source(self, run: RunConfig | None) -> tuple[str | None, Path | None, tuple[int, int] | None]:
        """The data's name, where they lie, and the size of the images."""
        spec, root, size = self.data, self.data_root, values.image_size(self.image_size)
        if spec is None and run is not None:
            spec, size = run.data, size or run.image_size
            root = root or (Path(run.data_root) if run.data_root else None)
        return spec, root, size


def named(network: Network, samples: Samples) -> dict[str, Any]:
    """How a network and samples were named, by option, as far as it was said: for commands that a report suggests.

    The data of a run that were not named are the run's own.
    """
    said = {**vars(network), **vars(samples)}
    if samples.data is None and (network.model / "config.json").is_file():
        from brittle.training.runs import run_config

        run = run_config(network.model)
        size = ",".join(map(str, run.image_size)) if run.image_size else None
        own = {"data": run.data, "data_root": run.data_root, "image_size": size}
        said |= {name: said[name] or value for name, value in own.items()}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in said.items()}
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return {name: value for name, value in plain.items() if value is not None}


@dataclass(frozen=True)
class Budgets:
    """How far an attacker may go."""

    p: Annotated[str, option("Attack", help="Norms of the budgets: inf, 2 or inf,2.")] = "inf,2"
    eps: Annotated[
        list[str] | None,
        option(
            "Attack",
            metavar="P=EPS",
            help="Budget in input units, as inf=8/255 or 2=0.5 (repeatable); EPS alone holds for every norm.",
            show_default="the data set's own",
        ),
    ] = None

    def read(self) -> tuple[tuple[float, ...], dict[float, float] | None]:
        """The norms, and the budgets of those that were given one; None for none."""
        budgets, norms = values.budgets(self.eps), values.norms(self.p)
        return norms, {p: budgets[p] for p in norms if p in budgets} or None


@dataclass(frozen=True)
class Output:
    """Where results go."""

    out: Annotated[Path, option("Output", "-o", "--out", help="Folder for the results.")]
    overwrite: Annotated[bool, option("Output", "--overwrite", help="Replace results that are already there.")] = False
    quiet: Annotated[bool, option("Output", "-q", "--quiet", help="No progress, no summary.")] = False

    def check(self, name: str) -> None:
        """Refuse a file in the folder's place, or results that are there and not to be replaced."""
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"out: expected a folder; {self.out} is a file")
        if (self.out / name).exists() and not self.overwrite:
            raise InputError(
                f"out: {self.out} already holds results ({name}); choose another folder, such as "
                f"-o {_free_folder(self.out)}, or pass --overwrite"
            )


def _free_folder(taken: Path) -> Path:
    """The first of ``NAME-2``, ``NAME-3`` ... that is not there."""
    name = taken if taken.name not in ("", "..") else taken.resolve()
    numbered = (Path(f"{name}-{number}") for number in itertools.count(2))
    return next(folder for folder in numbered if not folder.exists())


@dataclass(frozen=True)
class Gate:
    """A floor under the robust accuracies, for pipelines."""

    fail_under_robust: Annotated[
        float | None,
        option(
            "Output", metavar="SHARE", help="End with exit code 4 if a robust accuracy is below this share (0 to 1)."
        ),
    ] = None

    def check(self, attacked: bool = True) -> None:
        """Refuse a floor that is no share, or one under accuracies that nothing is going to measure."""
        if self.fail_under_robust is None:
            return
        if not 0 <= self.fail_under_robust <= 1:
            raise InputError(f"fail-under-robust: expected a share from 0 to 1; got {self.fail_under_robust}")
        if not attacked:
            raise InputError("fail-under-robust: expected data to attack; got none, so there is no robust accuracy")

    def failure(self, evaluations: Iterable[tuple[str, Evaluation]]) -> str | None:
        """A sentence that names networks and norms below the floor, with robust accuracies; None if there are none.

        The accuracies are compared as counted, not as printed.
        """
        if self.fail_under_robust is None:
            return None
        below = [
            f"of {name} in {norm_name(e.p)} (eps {budget(e.eps)}) is {e.robust_accuracy.percent}"
            f" ({e.robust_accuracy.counts})"
            for name, e in evaluations
            if (e.robust_accuracy.value or 0.0) < self.fail_under_robust
        ]
        floor = f"the floor {self.fail_under_robust} of --fail-under-robust"
        return f"robust accuracy {', '.join(below)}: below {floor}" if below else None


@dataclass(frozen=True)
class NewNetwork:
    """A network to train."""

    arch: Annotated[
        str | None,
        option(
            "Network",
            autocompletion=ARCHS,
            help=f"{ARCHITECTURES}.",
            show_default="fcn; with --fine-tune RUN, the run's own",
        ),
    ] = None
    arch_arg: ArchArg = None
    width: Annotated[int | None, option("Network", help="Same as --arch-arg width=N.")] = None
    depth: Annotated[int | None, option("Network", help="Same as --arch-arg depth=N.")] = None
    mean: Annotated[
        str | None,
        option("Network", metavar="N,N,N", help="Mean of each channel to normalise by.", show_default="the data set's"),
    ] = None
    std: Std = None
    fine_tune: Annotated[
        Path | None, option("Network", help="Start from these weights: a file, or a folder of brittle train.")
    ] = None
    teacher: Annotated[
        Path | None,
        option("Learning from a teacher", help="Folder of brittle train whose network is the teacher; see --distill."),
    ] = None
    rank: Annotated[
        str | None, option("Network", help="Train low-rank factors of this rank, or this share of the full rank.")
    ] = None

    def request(self, samples: TrainingSamples, recipe: Recipe) -> RunRequest:
        """What is asked of the run."""
        from brittle.training.runs import RunRequest

        short = {name: size for name, size in (("width", self.width), ("depth", self.depth)) if size is not None}
        return RunRequest(
            arch=self.arch,
            arguments=values.arguments(self.arch_arg or []) | short,
            statistics=values.statistics(self.mean, self.std),
            rank=values.rank(self.rank),
            start=self.fine_tune,
            teacher=self.teacher,
            data_root=samples.data_root,
            limit=samples.limit,
            image_size=values.image_size(samples.image_size),
            recipe=recipe,
        )


@dataclass(frozen=True)
class TrainingSamples:
    """Labelled inputs to train on."""

    data: Annotated[str, option("Data", autocompletion=DATA_SETS, help=f"{FORMS}.")]
    data_root: DataRoot = None
    download: Annotated[
        bool, option("Data", "--download", help="Fetch the data set into --data-root if it is not there.")
    ] = False
    limit: Annotated[int | None, option("Data", help="Most training samples: a random subset, by --seed.")] = None
    image_size: ImageSize = None

    def load(self, seed: int) -> Data:
        """The training split, fetched first where that was asked for."""
        from brittle.data.load import load_data

        if self.download:
            from brittle.data.downloads import download

            download(self.data, self.data_root)
        size = values.image_size(self.image_size)
        return load_data(self.data, root=self.data_root, split="train", limit=self.limit, seed=seed, image_size=size)


THREAT = options(
    "brittle.evaluation",
    "Threat",
    {"Attack": "attacks steps restarts", "Execution": "seed"},
    without={
        "p": "every norm of --p in turn",
        "bounds": "what is read from files lies in [0, 1]",
        "further": "a preset brings its own",
    },
    attacks={
        "name": "--preset",
        "type": str,
        "autocompletion": completing(*PRESETS, *ALIASES),
        "help": f"Attacks: {', '.join(PRESETS)}; standard is also called autoattack. {LIKE_AUTOATTACK}",
    },
    steps={"help": "Steps of every gradient attack.", "show_default": "the preset's own"},
    restarts={"help": "Random restarts of every attack; the worst case counts."},
    seed={"callback": check_seed},
)
EXECUTION = options(
    "brittle.evaluation",
    "Execution",
    {"Execution": "devices ray_workers batch_size certify proof_passes compiled"},
    without={"resume": "the folder parts of --out", "progress": "bars on standard error"},
    devices={
        "name": "--device",
        "type": str,
        "default": "cpu",
        "autocompletion": DEVICES,
        "help": "auto, cpu, cuda or cuda:N; several, separated by commas, share the work.",
    },
    certify={"help": "Prove samples robust where that saves time, and leave them out of the attacks."},
    proof_passes={"help": "Passes of the network that certified radii may cost, for each sample; inf: no limit."},
    compiled={"name": "--compile"},
)
RECIPE = options(
    "brittle.training",
    "Recipe",
    {
        "Penalties and constraints": "penalties constraints layers refresh",
        "Learning from a teacher": "distill temperature",
        "Optimisation": "epochs batch_size optimizer lr weight_decay momentum schedule crop flip",
        "Selection and measurement": "validation patience select measure_every",
        "Execution": "precision seed",
    },
    without={
        "milestones": "the command line has the usual step schedule alone",
        "decay": "likewise",
        "adversary": "its options are ADVERSARY and --adversarial",
    },
    penalties={
        "name": "--penalty",
        "type": list[str],
        "default": None,
        "metavar": "NAME=STRENGTH",
        "autocompletion": completing(*(f"{name}=" for name in PENALTIES)),
        "help": f"Penalty on the loss (repeatable): {', '.join(PENALTIES)}.",
    },
    constraints={
        "name": "--constraint",
        "type": list[str],
        "default": None,
        "metavar": "NAME=VALUE",
        "autocompletion": completing(*(f"{name}=" for name in CONSTRAINTS)),
        "help": f"Held after every step (repeatable): {', '.join(CONSTRAINTS)}.",
    },
    layers={"type": str, "help": "Layers acted on, separated by commas.", "show_default": "the paper's choice"},
    refresh={"help": "Steps between exact decompositions for nuclear_norm and the shrinkages; 1 is exact."},
    optimizer={
        "autocompletion": completing(*constant("brittle.training.optimizers", "OPTIMIZERS")),
        "help": "adamw or sgd.",
    },
    schedule={
        "autocompletion": completing(*constant("brittle.training.optimizers", "SCHEDULES")),
        "help": "Learning rate: constant; cosine, down to 0; step, times 0.1 at half and three quarters of all steps.",
    },
    weight_decay={"help": "Weight decay: decoupled for AdamW, in the gradient for SGD."},
    momentum={"help": "Momentum of SGD."},
    crop={"help": "Pixels of zero padding from which training images are cropped at random."},
    flip={"help": "Mirror every other training image, at random."},
    distill={"help": "Share of the loss that draws towards the teacher's predictions on clean inputs, from 0 to 1."},
    temperature={"help": "Temperature by which the logits of both are divided there."},
    validation={"help": "Share of the training samples held out to select the weights, from 0 (none), below 1."},
    patience={"help": "End after so many epochs without a better validation accuracy."},
    select={
        "autocompletion": completing(*constant("brittle.training.recipe", "SELECTIONS")),
        "help": "Weights that are kept: best, of best validation accuracy; or last, of the last epoch.",
    },
    precision={
        "autocompletion": completing(*constant("brittle.training.recipe", "PRECISIONS")),
        "help": "32-true; 16-mixed or bf16-mixed (Lightning Fabric).",
    },
    measure_every={"help": "Epochs between measurements of layers and bounds, and after the last; 0 for none."},
    seed={"callback": check_seed, "help": "Seed of every random choice."},
)
ADVERSARY = options(
    "brittle.training",
    "Adversary",
    {"Adversarial training": "steps ratio universal"},
    without={
        "eps": "the budget is --adversarial P=EPS",
        "p": "likewise",
        "step_size": "the command line has the usual length alone",
    },
    steps={
        "name": "--attack-steps",
        "help": "Steps of the training attack on each batch.",
        "show_default": "10, or 1 with --universal",
    },
    ratio={"name": "--adversarial-ratio", "help": "Share of every batch that is attacked, above 0, at most 1."},
    universal={"help": "Train against one universal perturbation, kept from batch to batch."},
)


@dataclass(frozen=True)
class Interventions:
    """Options of a recipe beside those of its fields."""

    frobenius: Annotated[
        str | None,
        option("Penalties and constraints", help="Hold every layer's Frobenius norm: a constant, or initial."),
    ] = None
    adversarial: Annotated[
        str | None,
        option(
            "Adversarial training", metavar="P=EPS", help="Train against attacks of this budget: inf=8/255 or 2=0.5."
        ),
    ] = None

    def recipe(self, recipe: Values, adversary: Values) -> Recipe:
        """The recipe that all options together make."""
        penalties = values.strengths("penalty", recipe["penalties"])
        constraints: dict[str, float | None] = {**values.strengths("constraint", recipe["constraints"])}
        if self.frobenius is not None:
            if "frobenius" in constraints:
                raise InputError(f"frobenius: given twice, as {constraints['frobenius']} and as {self.frobenius}")
            initial = self.frobenius == "initial"
            constraints["frobenius"] = None if initial else values.number("frobenius", self.frobenius)
        budgets = {} if self.adversarial is None else values.budgets([self.adversarial])
        if len(budgets) > 1:
            raise InputError(f"adversarial: expected one norm, P=EPS; got {self.adversarial!r}")
        if adversary["universal"] and not budgets:
            raise InputError("universal: expected --adversarial P=EPS beside it; got none")
        layers = None if recipe["layers"] is None else tuple(name.strip() for name in recipe["layers"].split(","))
        from brittle.training import Adversary, Recipe

        enemies = [Adversary(eps, p, **adversary) for p, eps in budgets.items()]
        read = {"penalties": penalties, "constraints": constraints, "layers": layers}
        return Recipe(**recipe | read, adversary=enemies[0] if enemies else None)
