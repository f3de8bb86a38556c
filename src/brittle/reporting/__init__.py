"""Pages and figures, drawn from results alone."""

from brittle.reporting.comparison import ComparedNetwork, Comparison, write_comparison
from brittle.reporting.page import write_report
from brittle.reporting.verdict import judge

__all__ = ["ComparedNetwork", "Comparison", "judge", "write_comparison", "write_report"]
