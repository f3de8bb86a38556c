"""Pages and figures, drawn from results alone."""

from brittle.reporting.comparison import Chapter, Story, write_story
from brittle.reporting.page import write_report
from brittle.reporting.verdict import judge

__all__ = ["Chapter", "Story", "judge", "write_report", "write_story"]
