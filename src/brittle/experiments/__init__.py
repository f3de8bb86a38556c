"""Studies that train networks and test claims."""

from brittle.experiments.demo import run_demo

__all__ = ["run_demo"]
