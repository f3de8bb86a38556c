"""Whether a robust accuracy can be trusted: checks on a few samples, each a flag that is raised or not."""

from brittle.evaluation.honesty.checks import CHECKS, Check, honesty_flags

__all__ = ["CHECKS", "Check", "honesty_flags"]
