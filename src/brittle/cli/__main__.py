"""``python -m brittle.cli``."""

from brittle.cli.commands import main

main()
