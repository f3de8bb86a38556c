"""Options made from the fields of the dataclasses that they fill.

The dataclasses stand beside code that imports torch, which takes seconds; a help text has to be there at once. So their
modules are not imported: names, types, defaults and meanings are read from the source.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_origin

import typer

from brittle.storage.schema import meanings

TYPES = {"int": int, "float": float, "str": str, "bool": bool}
"""What a field may hold whose option needs nothing but the field; each also with ``| None``."""


class Field(NamedTuple):
    """A dataclass's field as its source has it; the default is ``...`` where there is none, or no plain value."""

    name: str
    type: str
    default: Any
    meaning: str


def fields(module: str, record: str) -> tuple[Field, ...]:
    """The fields of a dataclass; their meanings are those under "Attributes:" in its docstring.

    Args:
        module: Where the class stands, or a package that offers it: ``"brittle.training"``.
        record: Its name.
    """
    body = _definition(module, record)
    assert isinstance(body, ast.ClassDef)
    said = meanings(ast.get_docstring(body) or "")
    return tuple(
        Field(node.target.id, ast.unparse(node.annotation), _value(node.value), said.get(node.target.id, ""))
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )


def constant(module: str, name: str) -> Any:
    """The plain value of a module's constant, or of one that a package offers; of a dict, the keys alone.

    Raises:
        LookupError: The module has no such constant, or its value has to be computed.
    """
    node = _definition(module, name)
    assert isinstance(node, ast.expr)
    value = tuple(map(_value, node.keys)) if isinstance(node, ast.Dict) else _value(node)
    if value is ...:
        raise LookupError(f"{module}.{name}: expected a plain value or a dict written out; got {ast.unparse(node)}")
    return value


def options(
    module: str, record: str, panels: Mapping[str, str], without: Mapping[str, str], **changes: Mapping[str, Any]
) -> list[inspect.Parameter]:
    """An option for every field of a dataclass, as parameters of a function that typer reads.

    Args:
        module: As :func:`fields`.
        record: Its name.
        panels: Headings of the help, with the names of the fields under them, in this order.
        without: Fields that have no option, with the reason.
        changes: By field, in what its option differs from it: ``name``, ``type``, ``default``, or anything else that
            ``typer.Option`` takes.

    Raises:
        LookupError: A field has neither a panel nor a reason, a name is no field's, or an option cannot be made from
            the field alone.
    """
    read = {field.name: field for field in fields(module, record)}
    placed = [(name, panel) for panel, names in panels.items() for name in names.split()]
    listed = [*without, *(name for name, _ in placed)]
    if sorted(listed) != sorted(read) or not changes.keys() <= dict(placed).keys():
        raise LookupError(f"{record}: its fields are {sorted(read)}; options and reasons are for {sorted(listed)}")
    return [_option(read[name], panel, changes.get(name, {})) for name, panel in placed]


def _option(field: Field, panel: str, changed: Mapping[str, Any]) -> inspect.Parameter:
    """A field as the option that typer makes of it."""
    settings = {"help": field.meaning.replace("[", r"\["), "rich_help_panel": panel, **changed}
    kind = settings.pop("type", TYPES.get(field.type.removesuffix(" | None")))
    default = settings.pop("default", field.default)
    if kind is None or default is ...:
        raise LookupError(f"{field.name}: expected a plain type and default; got {field.type} = {default}")
    # Without a name typer makes one from the field's, and for a flag its opposite: --flip is off unless it is given.
    name = settings.pop("name", "--" + field.name.replace("_", "-") if default is False else None)
    annotation = Annotated[kind | None if default is None else kind, typer.Option(*filter(None, [name]), **settings)]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def by_records(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function of records one of their fields, as typer calls it.

    A parameter that is annotated with a dataclass takes the place of its fields; ``Annotated[dict, PARAMETERS]`` with a
    list of parameters, that of a dict of their values by name. Others stay as they are.

    Args:
        defaults: Of fields, in place of the record's own.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        """The same function with its records' fields as parameters."""
        flat: list[inspect.Parameter] = []
        records: dict[str, tuple[Callable[..., Any], list[str]]] = {}
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            make: Any = parameter.annotation
            own = [parameter]
            if get_origin(make) is not Annotated:
                own = list(inspect.signature(make, eval_str=True).parameters.values())
            elif isinstance(make.__metadata__[0], list):
                make, own = dict, make.__metadata__[0]
            if own != [parameter]:
                records[name] = make, [field.name for field in own]
            flat += [field.replace(kind=field.KEYWORD_ONLY) for field in own]

        @functools.wraps(function)
        def called(**values: Any) -> None:
            made = {name: make(**{key: values.pop(key) for key in keys}) for name, (make, keys) in records.items()}
            function(**made, **values)

        if unknown := defaults.keys() - {field.name for field in flat}:
            raise LookupError(f"{function.__name__}: expected names of fields; got {sorted(unknown)}")
        flat = [field.replace(default=defaults.get(field.name, field.default)) for field in flat]
        called.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
        return called

    return decorate


def _definition(module: str, name: str) -> ast.ClassDef | ast.expr:
    """The class, or the expression assigned to a name; where a module imports it, in the module that it is from."""
    for node in _source(module).body:
        match node:
            case ast.ClassDef(name=defined) if defined == name:
                return node
            case ast.Assign(targets=[ast.Name(id=defined)], value=value) if defined == name:
                return value
            case ast.AnnAssign(target=ast.Name(id=defined), value=ast.expr() as value) if defined == name:
                return value
            case ast.ImportFrom(module=str(home), names=imported) if name in [alias.name for alias in imported]:
                return _definition(home, name)
    raise LookupError(f"{module} defines no {name}")


@functools.cache
def _source(module: str) -> ast.Module:
    path = Path(__file__).parents[2].joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _value(node: ast.expr | None) -> Any:
    """The plain value of an expression; ``...`` if it has none."""
    try:
        return ... if node is None else ast.literal_eval(node)
    except ValueError:
        return ...
