"""The appendix's networks and data sets: one thing is changed at a time, and each variant is judged by itself."""

import dataclasses

import pandas as pd
import pytest
import torch

from brittle.data.load import load_data
from brittle.experiments import appendix_networks, judge
from brittle.experiments.appendix_networks import CLAIMS, EXPERIMENT, FIGURE_5, VARIANTS, effects_of
from brittle.experiments.conv_effect import ROWS
from brittle.experiments.conv_networks import build_convolutional


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_network_differs_from_figure_5_in_one_thing(scale):
    """VGG16's stem goes with its architecture."""
    figure_5 = FIGURE_5 | {"data": "cifar10"}
    for settings in EXPERIMENT.settings(scale):
        changed = {name for name, value in figure_5.items() if settings[name] != value} - {"stem"}
        assert len(changed) == 1
        assert settings["stem"] == ("3x3" if settings["arch"] == "vgg16" else "7x7")
        assert not (settings["alpha"] and settings["rank"])


def test_every_variant_is_run_at_the_scales_of_its_claims():
    for scale in ("small", "paper"):
        table = pd.DataFrame(EXPERIMENT.settings(scale))
        for claim in CLAIMS:
            variant = claim.sentence.split(":")[0]
            rows = appendix_networks.networks_of(variant)(table, ROWS)
            assert (scale in claim.scales) == (len(rows) > 0)
            assert rows.empty or rows.seed.nunique() >= 3


def changed_table(harmed):
    """Networks of every variant under each intervention; robustness falls in one variant and rises in the others."""
    rows = []
    for variant, changed in VARIANTS.items():
        for alpha, rank in ((0.0, 0), (0.1, 0), (0.0, 4))[: 1 + len(effects_of(variant))]:
            row = {"data": "cifar10"} | FIGURE_5 | changed | {"alpha": alpha, "rank": rank, "clean_accuracy": 0.6}
            row |= {"row_error": 0.3 if alpha else 0.9, "spectral_error": 0.2 if rank else 0.9}
            kept = 0.5 + (0.3 if variant != harmed else -0.3) * bool(alpha or rank)
            row |= {"kept_linf": kept, "kept_l2": kept}
            rows += [row | {"seed": seed, "kept_linf": kept + seed / 100} for seed in range(3)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("harmed", VARIANTS)
def test_a_variant_is_judged_by_its_own_networks(harmed):
    table = changed_table(harmed)
    verdicts = {claim.sentence: str(judge(claim, table, "paper").verdict) for claim in CLAIMS}
    falls = {sentence: verdict for sentence, verdict in verdicts.items() if "robustness falls" in sentence}
    assert len(falls) == len(verdicts) / 2 == sum(len(effects_of(variant)) for variant in VARIANTS)
    for sentence, verdict in verdicts.items():
        helped = sentence in falls and not sentence.startswith(f"{harmed}:")
        assert verdict == ("opposite" if helped else "reproduced")


def test_the_figure_has_a_line_for_each_variant_that_was_run():
    table = changed_table("VGG16")
    shown = [axis for axis in appendix_networks.draw(table).axes if axis.get_visible()]
    assert len(shown) == sum(len(effects_of(variant)) for variant in VARIANTS)
    only = appendix_networks.draw(table[table.data == "svhn"]).axes
    assert [axis.get_title() for axis in only] == ["SVHN: row compressibility", "SVHN: spectral compressibility"]
    written = [tick.get_text() for axis in only for tick in axis.get_xticklabels()]
    assert written == ["0", "0.1", "full", "4"]
    low_rank_alone = appendix_networks.draw(table[(table.data == "svhn") & (table["rank"] > 0)]).axes
    assert [len(axis.lines[0].get_xdata()) for axis in low_rank_alone] == [0, 1]


@pytest.mark.parametrize("arch", ["vgg16", "wide-resnet101-2"])
def test_the_architectures_take_small_images_whole_and_of_low_rank(arch):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = dataclasses.replace(load_data("digits", limit=2), inputs=images)
    stem = {**FIGURE_5, **next(v for v in VARIANTS.values() if v.get("arch") == arch)}["stem"]
    for rank in (0, 1):
        network = build_convolutional(data, width=2, rank=rank, seed=0, stem=stem, arch=arch).eval()
        with torch.no_grad():
            assert network(images).shape == (2, 10)


def test_the_penalty_that_is_asked_for_is_the_one_that_trains(monkeypatch):
    """The standard lasso shrinks filters, which the scale-invariant one cannot; at strength 0 there is none."""
    trained = []
    monkeypatch.setattr(appendix_networks, "robustness_of", lambda network, *_: trained.append(network) or {})
    tiny = {**EXPERIMENT.settings("smoke")[1], "training": 64, "epochs": 1, "rank": 0}
    for alpha in (0.0, 3.0):
        for penalty in ("group_lasso", "scale_invariant_group_lasso"):
            appendix_networks.run(**tiny | {"penalty": penalty, "alpha": alpha})
    plain, same, shrunk, turned = (
        sum(layer.weight.norm().item() for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))
        for network in trained
    )
    assert plain == same
    assert shrunk < 0.999 * plain
    assert shrunk < turned
