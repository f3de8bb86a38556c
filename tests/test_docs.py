"""What docstrings cite exists."""

import re
from pathlib import Path

import brittle

PACKAGE = Path(brittle.__file__).parent
PAGE = PACKAGE.parents[1] / "docs" / "theory.md"


def test_every_section_that_a_docstring_cites_exists():
    text = " ".join(re.sub(r"\s+", " ", path.read_text()) for path in PACKAGE.rglob("*.py"))
    cited = set(re.findall(r'heory page, section "([^"]+)"', text))
    assert len(cited) >= 7
    headings = {line.lstrip("# ").strip() for line in PAGE.read_text().splitlines() if line.startswith("#")}
    assert cited <= headings
