"""A training run's folder: its configuration, from which the network can be built again, beside weights and history."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from brittle._version import __version__
from brittle.compression.factorise import factorised
from brittle.compression.folders import CONFIG, RECIPE, load_compressed, read_recipe
from brittle.compression.rebuild import ranks_and_sizes, refilled
from brittle.data.load import MEAN_STD, Data, statistics_of
from brittle.errors import InputError
from brittle.models.build import ARCHITECTURES, build_model, check_trusted, runs_code
from brittle.models.checkpoints import fill, read_state
from brittle.models.normalize import normalised
from brittle.results.compression import CompressionRecipe
from brittle.storage.codec import from_json, to_json
from brittle.storage.files import remove_files, write_text
from brittle.training.history import Callback
from brittle.training.hosts import check_devices
from brittle.training.interventions.assembly import Interventions
from brittle.training.jobs import make_job
from brittle.training.loop import WEIGHTS, Training, run_job
from brittle.training.recipe import Recipe
from brittle.training.snapshots import remove_snapshot

RUN_FILES = (WEIGHTS, CONFIG, "history.csv", "history.parquet", "layers.csv", "layers.parquet")
"""What a finished run leaves in its folder."""
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunConfig:
    """What a run was made of; ``config.json`` of its folder.

    Attributes:
        arch: As :func:`brittle.build_model` takes it.
        arguments: Of the architecture, those that follow from the data included.
        mean: Per channel, of the ``Normalize`` that is the network's first module; () where there is none.
        std: Likewise.
        ranks: Rank by name of every layer that is a low-rank pair.
        input_shape: Of one sample.
        classes: Number of classes.
        data: What was trained on (a compressed network: planned with), as :func:`brittle.load_data` takes it; None
            for nothing that is known.
        data_root: Where it lay; None for none.
        limit: Most training samples; None for all.
        image_size: ``(height, width)`` to which the images of a folder were resized; None for none.
        start: File or run's folder of the weights that were fine-tuned; None for fresh ones.
        teacher: Run's folder of the network that it learnt from; None for none.
        recipe: How it was trained.
        sizes: Of the modules of a compressed network that was fine-tuned, see
            :class:`brittle.results.compression.CompressionRecipe`.
        version: Of Brittle.
        schema_version: Of this document.
    """

    arch: str
    arguments: dict[str, object]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ranks: dict[str, int]
    input_shape: tuple[int, ...]
    classes: int
    data: str | None
    data_root: str | None = None
    limit: int | None = None
    image_size: tuple[int, int] | None = None
    start: str | None = None
    teacher: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    sizes: dict[str, dict[str, int | tuple[int, ...]]] = field(default_factory=dict)
    version: str = __version__
    schema_version: int = SCHEMA_VERSION


def run_config(folder: str | Path) -> RunConfig:
    """Read a run's ``config.json``.

    Raises:
        InputError: It is missing or not one.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise InputError(f"folder: expected the folder of a training run; got {folder}, which holds no {CONFIG}")
    return from_json(path.read_bytes(), {SCHEMA_VERSION: RunConfig}, str(path))


def load_run(folder: str | Path, *, arch: str | None = None) -> tuple[nn.Module, RunConfig]:
    """The network of a folder, with its normalisation inside, in evaluation mode, and its configuration.

    Args:
        folder: Of a run of ``brittle train``, or of a compressed network
            (:func:`brittle.compression.save_compressed`), whose configuration says nothing about its training.
        arch: Only for a network that a function of yours builds: ``module:function``, as the run names it. A run from
            elsewhere could name any function, so none is called that the caller has not named.

    Raises:
        InputError: The folder is not one of a run, the run is not finished, its weights do not fit, or it names a
            function other than ``arch``.
    """
    folder = Path(folder)
    if (folder / RECIPE).is_file():
        if (folder / CONFIG).is_file():
            raise InputError(
                f"folder: expected a run or a compressed network; got {folder}, which holds a {CONFIG} and a {RECIPE}"
            )
        network, recipe = load_compressed(folder, arch=arch)
        return network, _config_of(recipe)
    config = run_config(folder)
    check_trusted(config.arch, arch, f"{folder} is a run")
    if not (folder / WEIGHTS).is_file():
        raise InputError(
            f"folder: expected a finished run; got {folder}, not finished (no {WEIGHTS}): run its command again"
        )
    return refilled(config, read_state(folder / WEIGHTS)).eval(), config


def folder_arch(folder: str | Path) -> str | None:
    """The architecture that a folder of either kind names; nothing is built.

    Raises:
        InputError: It is neither a run nor a compressed network.
    """
    folder = Path(folder)
    return read_recipe(folder).arch if (folder / RECIPE).is_file() else run_config(folder).arch


def _config_of(recipe: CompressionRecipe) -> RunConfig:
    """What a compressed network was made of, as that of a run; how it was trained is not known."""
    assert recipe.arch is not None  # no network without one can be opened
    return RunConfig(
        arch=recipe.arch,
        arguments=recipe.arguments,
        mean=recipe.mean,
        std=recipe.std,
        ranks=recipe.ranks,
        sizes=recipe.sizes,
        input_shape=recipe.input_shape,
        classes=recipe.classes,
        data=recipe.data,
        data_root=recipe.data_root,
        image_size=recipe.image_size,
        start=recipe.start,
    )


@dataclass(frozen=True)
class RunRequest:
    """What is asked of a run, before the data have been looked at.

    Attributes:
        arch: As :func:`brittle.build_model` takes it; None: that of the run that is fine-tuned, else ``fcn``.
        arguments: Of the architecture; inputs, classes and image size follow from the data where not given.
        statistics: Per-channel mean and standard deviation to normalise by; the data set's own by default.
        rank: Rank of low-rank pairs, or a share of the full rank; None for full matrices.
        start: Weights to fine-tune: a file (of the architecture alone or with its normalisation), or a run's folder.
        teacher: Folder of the run whose network a recipe with ``distill`` learns from.
        data_root: Where the data lie, for the configuration.
        limit: Most training samples, likewise.
        image_size: Of the images of a folder, likewise.
        recipe: How to train.
    """

    arch: str | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    rank: int | float | None = None
    start: Path | None = None
    teacher: Path | None = None
    data_root: Path | None = None
    limit: int | None = None
    image_size: tuple[int, int] | None = None
    recipe: Recipe = field(default_factory=Recipe)


def train_run(
    request: RunRequest,
    data: Data,
    folder: Path,
    *,
    overwrite: bool = False,
    devices: str | Sequence[str] = "cpu",
    callback: Callback | None = None,
) -> Training:
    """Build a network for the data and train it into a folder; interrupted, it resumes where it stopped.

    Args:
        request: What is asked for.
        data: Training samples.
        folder: For ``config.json``, weights and history; untouched where something in the request is wrong.
        overwrite: Whether what the folder holds of another run goes; not before the request has been checked.
        devices: As :func:`brittle.training.train`.
        callback: Likewise.

    Raises:
        InputError: As ``train``, or a part of the request that does not fit the data.
        OSError: As ``train``.
    """
    for name, source in (("fine_tune", request.start), ("teacher", request.teacher)):
        if source is not None and folder.resolve() in (source.resolve(), source.resolve().parent):
            raise InputError(
                f"{name}: expected weights outside of {folder}, whose own would go before new ones are there"
            )
    if (folder / RECIPE).exists():
        raise InputError(
            f"folder: expected one that is not a compressed network's; got {folder}, which holds a {RECIPE}"
        )
    names = check_devices(devices, request.recipe)
    network, config = build_network(request, data)
    interventions = None
    if request.teacher is not None:
        arch = request.arch if request.arch == run_config(request.teacher).arch else None  # named, hence trusted
        interventions = Interventions(teacher=load_run(request.teacher, arch=arch)[0])
    job = make_job(network, data, request.recipe, interventions=interventions, folder=folder, overwrite=overwrite)
    if not overwrite and (folder / CONFIG).exists():
        run_config(folder)  # of something else it is not ours to replace
    if overwrite:
        remove_files(folder, RUN_FILES)
        remove_snapshot(folder)
    write_text(folder / CONFIG, to_json(config))
    training = run_job(job, devices=names, callback=callback)
    if not (folder / CONFIG).is_file():  # someone is emptying the folder: a run without it cannot be opened
        raise FileNotFoundError(errno.ENOENT, "expected the run's configuration; it was removed meanwhile", str(folder))
    return training


def build_network(request: RunRequest, data: Data) -> tuple[nn.Module, RunConfig]:
    """The network to start from, and the configuration of its run."""
    if request.start is not None and request.start.is_dir():
        network, config = _load_start(request, request.start)
    else:
        network, config = _build_fresh(request, data)
    ranks, sizes = config.ranks, config.sizes
    if request.rank is not None:
        initial = "random" if request.start is None else "svd"
        network = factorised(
            network, request.rank, layers=request.recipe.layers, initial=initial, seed=request.recipe.seed
        )
        ranks, sizes = ranks_and_sizes(network, config)
        if ranks == config.ranks:
            raise InputError(f"rank: expected a rank below that of some chosen layer; got {request.rank}")
    return network, dataclasses.replace(
        config,
        ranks=ranks,
        sizes=sizes,
        input_shape=tuple(data.inputs.shape[1:]),
        classes=data.classes,
        data=data.name,
        data_root=None if request.data_root is None else str(request.data_root.absolute()),
        limit=request.limit,
        image_size=request.image_size,
        start=None if request.start is None else str(request.start.absolute()),
        teacher=None if request.teacher is None else str(request.teacher.absolute()),
        recipe=request.recipe,
    )


def _build_fresh(request: RunRequest, data: Data) -> tuple[nn.Module, RunConfig]:
    """A network by name, fresh or filled from a file."""
    arch = request.arch or "fcn"
    mean, std = request.statistics or MEAN_STD.get(data.name) or statistics_of(data)
    if len(mean) not in (1, data.inputs.shape[1]):
        raise InputError(f"mean, std: expected one number for each of {data.inputs.shape[1]} channels; got {len(mean)}")
    arguments = {**_arguments_from_data(arch, data), **request.arguments}
    inner = build_model(arch, arguments, seed=request.recipe.seed)
    network = normalised(inner, mean, std, "the run's configuration")
    if request.start is not None:
        state = read_state(request.start)
        fill(network if any(key.startswith("normalize.") for key in state) else inner, state)
    return network, RunConfig(
        arch=arch,
        arguments=arguments,
        mean=tuple(mean),
        std=tuple(std),
        ranks={},
        input_shape=tuple(data.inputs.shape[1:]),
        classes=data.classes,
        data=data.name,
    )


def _load_start(request: RunRequest, start: Path) -> tuple[nn.Module, RunConfig]:
    """The network of another run, with all that it was made of."""
    network, config = load_run(start, arch=request.arch if request.arch and runs_code(request.arch) else None)
    asked = {"arch": request.arch, **request.arguments}
    made_with = {"arch": config.arch, **config.arguments}
    other = [f"{name} {value!r}" for name, value in asked.items() if value not in (None, made_with.get(name))]
    if request.statistics not in (None, (config.mean, config.std)):
        other.append(f"mean and std {request.statistics}")
    if other:
        raise InputError(
            f"fine_tune: expected what {start} was made with ({made_with}), or none; got {', '.join(other)}"
        )
    return network, config


def _arguments_from_data(arch: str, data: Data) -> dict[str, object]:
    """The arguments of an architecture that follow from the data."""
    shape = tuple(data.inputs.shape[1:])
    facts: dict[str, object] = {
        "in_features": math.prod(shape),
        "in_channels": shape[0],
        "classes": data.classes,
        "num_classes": data.classes,
        "image_size": shape[-1],
    }
    if arch in ARCHITECTURES:
        taken = inspect.signature(ARCHITECTURES[arch]).parameters
        return {name: value for name, value in facts.items() if name in taken}
    names = {"torchvision": "num_classes", "timm": "num_classes", "hf": "num_labels"}
    source = arch.partition(":")[0]
    return {names[source]: data.classes} if source in names else {}
