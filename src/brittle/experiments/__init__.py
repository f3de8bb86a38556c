"""Studies that train networks and test claims."""

from brittle.experiments.catalogue import EXPERIMENTS, named_experiments, overview
from brittle.experiments.claims import Claim, change, judge, over_seeds, pearson, slope, spearman
from brittle.experiments.demo import run_demo
from brittle.experiments.experiment import Experiment, load_experiment
from brittle.experiments.reproducing import redraw, reproduce, run_experiment

__all__ = [
    "EXPERIMENTS",
    "Claim",
    "Experiment",
    "change",
    "judge",
    "load_experiment",
    "named_experiments",
    "over_seeds",
    "overview",
    "pearson",
    "redraw",
    "reproduce",
    "run_demo",
    "run_experiment",
    "slope",
    "spearman",
]
