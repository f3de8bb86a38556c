"""All interventions of a training, bound to its model: those that the recipe names, then the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from brittle.errors import InputError
from brittle.training.interventions.binding import Constraint, Intervention, Penalty, Result_co, WeightedPenalty
from brittle.training.interventions.constraints import CONSTRAINTS
from brittle.training.interventions.penalties import PENALTIES
from brittle.training.recipe import Recipe


@dataclass(frozen=True)
class Interventions:
    """What no recipe can hold: penalties and constraints of your own, beside those that it names, and a teacher.

    Where training runs in several processes they have to be picklable.

    Attributes:
        penalties: Functions of the model to a scalar, with their strengths; no resumed training can compare them.
        constraints: Functions of the model that return what is to be called after every step; likewise.
        teacher: The network that a recipe with ``distill`` learns from: the same inputs, as many logits. It is only
            read; a resumed training compares its weights.
    """

    penalties: Sequence[tuple[Penalty, float]] = ()
    constraints: Sequence[Constraint] = ()
    teacher: nn.Module | None = None


def bind_penalties(model: nn.Module, recipe: Recipe, own: Interventions) -> list[Callable[[], Tensor]]:
    """Every penalty, to be called for what is added to the loss.

    Raises:
        InputError: The recipe names an unknown one, or one that cannot act on the model.
    """
    named = _bind_named(PENALTIES, recipe.penalties, model, recipe)
    return [*named, *(WeightedPenalty(penalty, model, strength) for penalty, strength in own.penalties)]


def bind_constraints(model: nn.Module, recipe: Recipe, own: Interventions) -> list[Callable[[], object]]:
    """Every constraint, to be called after a step of the optimiser.

    Raises:
        InputError: As :func:`bind_penalties`.
    """
    named = _bind_named(CONSTRAINTS, recipe.constraints, model, recipe)
    return [*named, *(constraint(model) for constraint in own.constraints)]


def _bind_named(
    table: Mapping[str, Intervention[Result_co]],
    values: Mapping[str, float | None],
    model: nn.Module,
    recipe: Recipe,
) -> list[Callable[[], Result_co]]:
    if unknown := sorted(set(values) - set(table)):
        raise InputError(f"recipe: expected names among {', '.join(table)}; got {', '.join(unknown)}")
    return [table[name](model, value, layers=recipe.layers, every=recipe.refresh) for name, value in values.items()]
