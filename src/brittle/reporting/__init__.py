"""Pages and figures, drawn from results alone."""

from brittle.reporting.comparison import comparison_html, write_comparison
from brittle.reporting.comparison_words import comparison_lines
from brittle.reporting.page import report_html, write_report
from brittle.reporting.verdict import judge

__all__ = ["comparison_html", "comparison_lines", "judge", "report_html", "write_comparison", "write_report"]
