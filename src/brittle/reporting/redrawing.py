"""The page of a result, whatever it is of."""

from __future__ import annotations

import functools

from brittle.reporting.comparison import comparison_html
from brittle.reporting.frontiers import frontier_html
from brittle.reporting.page import report_html
from brittle.results import Audit, Comparison, Frontier


@functools.singledispatch
def result_html(result: object) -> str:
    """The page that an audit, a comparison or a frontier has.

    Raises:
        TypeError: The result is of another kind.
    """
    raise TypeError(f"{type(result).__name__} has no page")


@result_html.register
def _(result: Audit) -> str:
    return report_html(result)


@result_html.register
def _(result: Comparison) -> str:
    return comparison_html(result)


@result_html.register
def _(result: Frontier) -> str:
    return frontier_html(result)
