"""Options and the dataclasses that they fill say the same, and the help is there at once."""

import dataclasses
import importlib
import inspect
import pathlib
import re
from typing import Annotated

import pytest
import typer

from brittle.cli.from_dataclass import by_records, constant, fields, options
from brittle.cli.options import ADVERSARY, RECIPE, Interventions
from brittle.training import Adversary, Recipe
from helpers import processes
from helpers.command_line import commands

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
COMMANDS = commands()
RECORDS = [
    ("brittle.training", "Recipe"),
    ("brittle.training", "Adversary"),
    ("brittle.evaluation", "Threat"),
    ("brittle.evaluation", "Execution"),
]
TABLES = [
    ("brittle.training", "PENALTIES"),
    ("brittle.training", "CONSTRAINTS"),
    ("brittle.models", "ARCHITECTURES"),
    ("brittle.evaluation", "PRESETS"),
]


def names_of(command):
    return {name for option in COMMANDS[command].params for name in (*option.opts, *option.secondary_opts)}


# The source is read as Python reads it


@pytest.mark.parametrize(("module", "name"), RECORDS)
def test_fields_read_from_the_source_are_those_of_the_class(module, name):
    record = getattr(importlib.import_module(module), name)
    for read, field in zip(fields(module, name), dataclasses.fields(record), strict=True):
        assert (read.name, read.type) == (field.name, field.type)
        if read.default is not ...:
            assert read.default == field.default
        assert read.meaning
        words = re.sub(r"[`\"]|:\w+:(?=`)", "", " ".join(record.__doc__.split()))
        assert f"{read.name}: {read.meaning}" in words


@pytest.mark.parametrize(("module", "name"), TABLES)
def test_names_read_from_the_source_are_those_of_the_table(module, name):
    assert constant(module, name) == tuple(getattr(importlib.import_module(module), name))


def test_forms_of_data_are_those_of_the_loader():
    from brittle.data import load

    assert constant("brittle.data.load", "FORMS") == load.FORMS


@pytest.mark.parametrize("command", ["audit", "attack"])
def test_helps_of_architectures_and_presets_name_them_all(command):
    helps = " ".join(option.help for option in COMMANDS[command].params)
    for name in (*constant("brittle.models", "ARCHITECTURES"), *constant("brittle.evaluation", "PRESETS")):
        assert name in helps


def test_helps_of_interventions_name_them_all():
    helps = {option.name: option.help for option in COMMANDS["train"].params}
    for table, option in (("PENALTIES", "penalties"), ("CONSTRAINTS", "constraints")):
        for name in constant("brittle.training", table):
            assert name in helps[option]


# Options fill the records


def test_options_that_are_left_out_make_the_default_recipe():
    recipe = {parameter.name: parameter.default for parameter in RECIPE}
    adversary = {parameter.name: parameter.default for parameter in ADVERSARY}
    assert Interventions().recipe(recipe, adversary) == Recipe()
    made = Interventions(adversarial="2=0.5").recipe(recipe, adversary)
    assert made == Recipe(adversary=Adversary(0.5, 2.0))


PAIR = {"p": "likewise", "eps": "likewise", "step_size": "likewise"}


def test_a_field_without_an_option_needs_a_reason():
    with pytest.raises(LookupError, match="ratio"):
        options("brittle.training", "Adversary", {"Attack": "steps universal"}, PAIR)


def test_an_option_needs_a_field():
    with pytest.raises(LookupError, match="Adversary"):
        options("brittle.training", "Adversary", {"Attack": "steps ratio universal momentum"}, PAIR)
    with pytest.raises(LookupError, match="Adversary"):
        options("brittle.training", "Adversary", {"Attack": "steps ratio universal"}, PAIR, momentum={"help": "None."})


def test_a_field_that_is_no_plain_value_needs_a_change():
    others = {field.name: "likewise" for field in dataclasses.fields(Recipe) if field.name != "penalties"}
    with pytest.raises(LookupError, match="penalties: expected a plain type"):
        options("brittle.training", "Recipe", {"Interventions": "penalties"}, others)
    changed = {"name": "--penalty", "type": list[str], "default": None}
    (option,) = options("brittle.training", "Recipe", {"Interventions": "penalties"}, others, penalties=changed)
    assert (option.name, option.default) == ("penalties", None)


@dataclasses.dataclass(frozen=True)
class Point:
    x: Annotated[int, typer.Option()]
    y: Annotated[int, typer.Option()] = 2


def test_a_function_of_records_is_called_with_their_fields():
    heard = []
    adversary = options("brittle.training", "Adversary", {"Attack": "steps ratio universal"}, PAIR)

    @by_records(y=5)
    def call(*, point: Point, adversary: Annotated[dict, adversary], z: Annotated[int, typer.Option()] = 3):
        heard.append((point, adversary, z))

    found = {name: parameter.default for name, parameter in inspect.signature(call).parameters.items()}
    assert found == {"x": inspect.Parameter.empty, "y": 5, "steps": None, "ratio": 0.5, "universal": False, "z": 3}
    call(x=1, y=7, steps=4, ratio=0.25, universal=True, z=0)
    assert heard == [(Point(1, 7), {"steps": 4, "ratio": 0.25, "universal": True}, 0)]


def test_a_default_is_that_of_a_field():
    def call(*, point: Point):
        pass

    with pytest.raises(LookupError, match="z"):
        by_records(z=1)(call)


# The help


@pytest.mark.parametrize("command", [[], *map(str.split, COMMANDS)], ids=" ".join)
def test_help_imports_nothing_that_takes_long(command):
    code = f"""
import sys
from brittle.cli import run
assert run({[*command, "--help"]!r}) == 0
assert not {{"torch", "pandas", "matplotlib", "numpy", "scipy"}} & set(sys.modules)
"""
    done = processes.run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Usage: brittle" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_and_groups(command):
    text = COMMANDS[command].help
    assert f"Example: brittle {command}" in text
    assert len(text.splitlines()) < 10
    for option in COMMANDS[command].params:
        assert option.help, option.name
        assert option.param_type_name == "argument" or option.rich_help_panel, option.name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_names_every_option(command):
    """``attack`` takes those of ``audit``, ``train`` the seed and its like; their sections say so."""
    section = re.search(rf"^## brittle {command.split()[0]}\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)[1]
    section += re.search(r"^## brittle audit\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)[1]
    written = set(re.findall(r"--[a-z][a-z-]*", section))
    asked = {name for name in names_of(command) if name.startswith("--") and not name.startswith("--no-")}
    assert asked - written == set()


def test_the_page_names_no_option_that_is_not_there():
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE))
    taken = set().union(*map(names_of, COMMANDS))
    assert written - taken <= {"--install-completion", "--show-completion", "--version", "--help"}
