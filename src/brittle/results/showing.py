"""How results show themselves in a notebook: as a short card, and as figures.

Both are drawn by the package of pages. Results do not know it, and need none of it to be read or written; so it is
called by name, on demand.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARD, FIGURE = "brittle.reporting.notebook:card_html", "brittle.reporting.notebook:named_figure"


class Shown:
    """What a notebook shows of a result."""

    def _repr_html_(self) -> str:
        """A short card: the result in a sentence, and its numbers."""
        text: str = pkgutil.resolve_name(CARD)(self)
        return text


class Plotted(Shown):
    """A result that has figures."""

    def plot(self, name: str | None = None, *, narrow: bool = False) -> Figure:
        """One of the figures of the result's page.

        Args:
            name: Which one; the first that there is by default. A wrong name is answered with those that there are.
            narrow: Whether panels stand one below the other, as on a phone.

        Returns:
            A figure of matplotlib that notebooks show by themselves; ``savefig`` writes it.

        Raises:
            InputError: There is no figure of that name, or nothing that it could show was measured.
        """
        figure: Figure = pkgutil.resolve_name(FIGURE)(self, name, narrow=narrow)
        return figure
