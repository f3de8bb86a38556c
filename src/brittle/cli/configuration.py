"""Options from a file: ``--config``, and single ones by ``--set``.

A file's values become text and are read as if they stood on the command line, which wins over ``--set``, which wins
over the file.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brittle.errors import InputError

if TYPE_CHECKING:
    from brittle.training.runs import RunConfig

MOST_BYTES = 2**20
"""Of a file of options; results, which carry their settings, may be larger."""
Option = Any
"""An option or argument of a command, as typer makes it; it has no public name there."""
Texts = dict[str, str | bool | list[str]]
"""Values of options as they would stand on the command line, by the names of the parameters."""


def configurable(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options ``--config`` and ``--set``, which fill its others."""

    @functools.wraps(function)
    def called(*, config: Path | None = None, settings: list[str] | None = None, **others: Any) -> None:
        function(**others)

    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in (("config", ConfigFile), ("settings", Settings))
    ]
    called.__signature__ = inspect.Signature([*inspect.signature(function).parameters.values(), *own])  # type: ignore[attr-defined]
    return called


def read(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """Take one of the two options, and make of both what other options default to."""
    if context.resilient_parsing:
        return value
    context.meta[f"options from {parameter.name}"] = value
    file, entries = context.meta.get("options from config"), context.meta.get("options from settings")
    if file is not None or entries:
        context.default_map = defaults(context.command, file, entries or ())
    return value


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML or JSON: options by name; or a run's config.json (train), an audit.json or attack.json.",
        rich_help_panel="Configuration",
        is_eager=True,
        callback=read,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="One option in place of the file's, or one entry, as eps.inf=8/255 (repeatable).",
        rich_help_panel="Configuration",
        is_eager=True,
        callback=read,
    ),
]


def defaults(command: Any, file: Path | None, entries: Sequence[str]) -> Texts:
    """What the options of a command default to.

    Args:
        command: As typer makes it.
        file: Of options, of a run's configuration or of a result; None for none.
        entries: ``NAME=VALUE`` each; ``NAME.KEY=VALUE`` for one entry of an option that takes several.

    Raises:
        InputError: The file cannot be read, an option is unknown, or a value is of no form that it takes.
    """
    options = dict(_options(command))
    given: dict[str, Any] = {}
    document = {} if file is None else _document(file)
    if "recipe" in document and "arch" in document and "schema_version" in document:
        document = _of_run(command, file, document, [entry.partition("=")[0] for entry in entries])
    elif "signature" in document:
        document = {name: value for name, value in _of_result(file, document).items() if name in options}
    for name, value in document.items():
        _take(given, options, name, value, f"config: {file}")
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator:
            raise InputError(f"set: expected NAME=VALUE; got {entry!r}")
        _take(given, options, name, value, "set")
    return {options[name].name: _texts(options[name], value) for name, value in given.items() if value is not None}


def _options(command: Any) -> Iterator[tuple[str, Option]]:
    """The options of a command by their long names, with underscores; arguments by their own."""
    for option in command.params:
        if option.name not in ("config", "settings", "help"):
            long = [name[2:] for name in option.opts if name.startswith("--")] or [option.name]
            yield long[0].replace("-", "_"), option


def _document(file: Path) -> dict[str, Any]:
    """What a file of YAML or JSON holds."""
    from brittle.results.documents import read_document

    content = read_document(file, "config")
    try:
        document = json.loads(content) if file.suffix == ".json" else _yaml(file, content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"config: expected YAML or JSON; got {file}, which is neither ({error})") from None
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise InputError(f"config: expected names of options with values; got {type(document).__name__} in {file}")
    return document


def _yaml(file: Path, content: bytes) -> Any:
    """A document of YAML's plain types."""
    import yaml

    if len(content) > MOST_BYTES:
        raise InputError(f"config: expected at most {MOST_BYTES} bytes; got {len(content)} in {file}")
    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _take(given: dict[str, Any], options: Mapping[str, Option], path: str, value: Any, where: str) -> None:
    """Put one value in its place; a dotted path is an entry of an option."""
    name, _, key = path.partition(".")
    name = name.replace("-", "_")
    if name not in options:
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"the options are {', '.join(options)}"
        raise InputError(f"{where}: expected names of options; got {path!r}; {hint}")
    if key and not _has_entries(options[name]):
        raise InputError(f"{where}: expected {name}, which has no entries; got {path!r}")
    given[name] = _entries(given.get(name)) | {key: value} if key else value


def _has_entries(option: Option) -> bool:
    """Whether an option takes ``NAME=VALUE``."""
    return "=" in (option.metavar or "")


def _entries(value: Any) -> dict[str, Any]:
    """``NAME=VALUE`` entries by name; a value without a name has the name ""."""
    if isinstance(value, dict):
        return value
    listed = value if isinstance(value, list) else [] if value is None else [value]
    parts = [_text(entry).rpartition("=") for entry in listed]
    return {name: text for name, _, text in parts}


def _texts(option: Option, value: Any) -> str | bool | list[str]:
    """A value as it would stand on the command line."""
    several = option.multiple or option.nargs == -1
    if isinstance(value, dict):
        if not _has_entries(option):
            raise InputError(f"config: {option.name}: expected a plain value; got {value}")
        value = [f"{name}={_text(entry)}" if name else _text(entry) for name, entry in value.items()]
        if not several and len(value) > 1:
            raise InputError(f"config: {option.name}: expected one entry; got {', '.join(value)}")
        return value if several else value[0]
    if several:
        return [_text(entry) for entry in (value if isinstance(value, list) else [value])]
    if isinstance(value, bool):
        return value
    return ",".join(map(_text, value)) if isinstance(value, list) else _text(value)


def _text(value: Any) -> str:
    """A plain value as it is written on the command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return json.dumps(value)


def _of_run(command: Any, file: Path | None, document: dict[str, Any], asked: Sequence[str]) -> dict[str, Any]:
    """The options of ``brittle train`` that make a run's configuration again."""
    from brittle.storage.codec import from_json
    from brittle.training.runs import SCHEMA_VERSION, RunConfig

    if command.name != "train":
        raise InputError(f"config: expected options of brittle {command.name}; got {file}, a run of brittle train")
    config = from_json(json.dumps(document), {SCHEMA_VERSION: RunConfig}, f"config: {file}")
    recipe, enemy = config.recipe, config.recipe.adversary
    by_parameter = {option.name: name for name, option in _options(command)}
    options: dict[str, Any] = {
        "arch": config.arch,
        "arch_arg": {name: json.dumps(value) for name, value in config.arguments.items()},
        "mean": list(config.mean) or None,
        "std": list(config.std) or None,
        "data": config.data,
        "data_root": config.data_root,
        "limit": config.limit,
        "image_size": config.image_size and list(config.image_size),
        "fine_tune": config.start,
        "teacher": config.teacher,
    }
    for name in vars(recipe):
        if name in by_parameter:
            options[by_parameter[name]] = getattr(recipe, name)
    options["layers"] = recipe.layers and ",".join(recipe.layers)
    options["constraint"] = {name: value for name, value in recipe.constraints.items() if value is not None}
    if "frobenius" in recipe.constraints and recipe.constraints["frobenius"] is None:
        options["frobenius"] = "initial"
    if enemy is not None:
        options |= {"adversarial": {f"{enemy.p:g}": enemy.eps}, "attack_steps": enemy.steps}
        options |= {"adversarial_ratio": enemy.ratio, "universal": enemy.universal}
    _check_sayable(config, file)
    if "rank" not in asked:
        options["rank"] = _rank(config, file)
    return {name: value for name, value in options.items() if value is not None and value != {}}


def _check_sayable(config: RunConfig, file: Path | None) -> None:
    """Refuse what no option of the command line says."""
    from brittle.training import Recipe

    recipe, enemy = config.recipe, config.recipe.adversary
    unsaid = [name for name in ("milestones", "decay") if getattr(recipe, name) != getattr(Recipe(), name)]
    unsaid += ["step_size"] if enemy is not None and enemy.step_size is not None else []
    if unsaid:
        raise InputError(f"config: {file} was trained with {', '.join(unsaid)}, for which brittle train has no option")


def _rank(config: RunConfig, file: Path | None) -> int | None:
    """The rank that a run's low-rank layers were given; None where they have none, or the start's own."""
    from brittle.compression.folders import RECIPE, read_recipe
    from brittle.training.runs import run_config

    ranks, start = set(config.ranks.values()), Path(config.start or "")
    if config.start is not None and start.is_dir():
        before = read_recipe(start) if (start / RECIPE).is_file() else run_config(start)
        if before.ranks == config.ranks:
            return None
    if len(ranks) > 1:
        raise InputError(f"config: {file} has layers of ranks {sorted(ranks)}; say which share by --set rank=SHARE")
    return next(iter(ranks), None)


def _of_result(file: Path | None, document: dict[str, Any]) -> dict[str, Any]:
    """The options that attack another network as a saved result says."""
    signature = document["signature"]
    settings = signature.get("settings") if isinstance(signature, dict) else None
    if not isinstance(settings, dict) or settings.get("preset") is None:
        raise InputError(f"config: expected a result of a preset's attacks; got {file}, which names no preset")
    norms, eps = settings.get("p", []), settings.get("eps", [])
    options = {
        "p": norms,
        "eps": dict(zip(norms, eps, strict=False)),
        "seed": signature.get("seed"),
        "input_shape": settings.get("input_shape"),
        **{name: settings.get(name) for name in ("preset", "steps", "restarts", "tighten")},
    }
    return {name: value for name, value in options.items() if value is not None}
