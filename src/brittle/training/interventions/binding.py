"""The one form of every penalty and constraint: bound to a model once, then called without arguments.

A row of ``PENALTIES`` or ``CONSTRAINTS`` is an :class:`Intervention`. What it returns is called at every step of the
optimiser: a bound penalty before it, for the scalar that is added to the loss; a bound constraint after it, to change
the weights in place. One that has to remember something between its calls offers ``state_dict()`` and
``load_state_dict(state)``, tensors by name, and goes on from there when a training is resumed. One that reuses a costly
gradient offers its ``drift``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from brittle.models.selection import chosen_layers

Result_co = TypeVar("Result_co", covariant=True)
Penalty = Callable[[nn.Module], Tensor]
"""From a model to a scalar that is added to the loss."""
Constraint = Callable[[nn.Module], Callable[[], object]]
"""From a model to what is called after every step of the optimiser."""


class Intervention(Protocol[Result_co]):
    """A row of a table."""

    def __call__(
        self, model: nn.Module, value: Any, *, layers: Sequence[str] | None = None, every: int = 1
    ) -> Callable[[], Result_co]:
        """Bind to a model.

        Args:
            model: Whose weights are read or changed; bind anew when its modules are replaced.
            value: A penalty's strength, a constraint's bound; None where a constraint has a value of its own.
            layers: Names, as :func:`brittle.models.selection.chosen_layers` takes them; None for the paper's choice.
            every: Calls that one costly decomposition serves; what needs none, or needs it every time, ignores it.

        Raises:
            InputError: The value is out of range, or the layers cannot be chosen.
        """


@dataclass(frozen=True)
class Drift:
    """How far the gradient P that a penalty reuses was from the exact one when it was renewed, over all chosen layers.

    Attributes:
        gradient: ``||P_old - P_new||_F / ||P_new||_F``, layers stacked.
        value: The penalty's value less ``<P_old, W>``, over its value, sums over the layers; from 0 up to rounding.
        steps: Calls that the old gradient served.
    """

    gradient: float
    value: float
    steps: int


@dataclass(frozen=True)
class WeightedPenalty:
    """A penalty of one model times its strength; a state is that of the penalty, if it has one.

    Attributes:
        penalty: From a model to a scalar.
        model: The model.
        strength: The factor.
    """

    penalty: Penalty
    model: nn.Module
    strength: float

    def __call__(self) -> Tensor:
        """``strength * penalty(model)``, a scalar."""
        return self.strength * self.penalty(self.model)

    @property
    def drift(self) -> Drift | None:
        """That of the penalty; None where nothing is reused, or nothing was renewed yet."""
        return getattr(self.penalty, "drift", None)

    def state_dict(self) -> dict[str, Tensor]:
        """What the penalty remembers; {} for nothing."""
        return self.penalty.state_dict() if hasattr(self.penalty, "state_dict") else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        if hasattr(self.penalty, "load_state_dict"):
            self.penalty.load_state_dict(state)


def weighted(penalty: Callable[..., Tensor], *, reusing: Callable[..., Penalty] | None = None) -> Intervention[Tensor]:
    """The row of a penalty.

    Args:
        penalty: ``penalty(model, *, layers)``, which remembers nothing.
        reusing: ``reusing(every, layers=layers)`` makes a penalty that reuses its costly part over ``every`` calls; it
            takes the other's place for ``every`` above 1.
    """

    def bind(model: nn.Module, value: float, *, layers: Sequence[str] | None = None, every: int = 1) -> WeightedPenalty:
        chosen_layers(model, layers)  # a wrong name is an error now, not in the first step
        bound = partial(penalty, layers=layers) if reusing is None or every == 1 else reusing(every, layers=layers)
        return WeightedPenalty(bound, model, value)

    return bind
