"""Experiments on where compressibility comes from: what they follow, whom they compare, and what claims ask."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from brittle.data.load import load_data
from brittle.experiments import emergent, emergent_conv, judge, tug_of_war, unstructured
from brittle.experiments.dense_networks import loss_gap, scale_of, structure_of
from brittle.experiments.training_time import measured_epochs, train_along
from brittle.models.architectures.fcn import fcn
from brittle.models.build import build_model
from brittle.models.layers import read_layers
from brittle.training.loop import train
from brittle.training.recipe import Recipe


def verdicts(experiment, table):
    return [judge(claim, table, "small").verdict for claim in experiment.CLAIMS]


# --- what dense networks are measured by --------------------------------------------------------------------


def test_scale_and_structure_make_the_norms_and_structure_feels_no_multiple():
    torch.manual_seed(0)
    network = fcn(64, 20, 3, 10)
    before, norms = scale_of(network), structure_of(network)
    assert before["scale"] * before["structure_inf"] == pytest.approx(norms["norm_inf"])
    assert before["scale"] * before["structure_2"] == pytest.approx(norms["norm_2"])
    for view in read_layers(network).views:
        view.module.weight.data *= 4
    after = scale_of(network)
    assert after == pytest.approx(before | {"scale": 16 * before["scale"]})


def test_the_gap_in_loss_grows_with_the_budget_and_with_the_scale_of_a_network():
    torch.manual_seed(0)
    data, network = load_data("digits", limit=40), fcn(64, 20, 3, 10)
    gaps = [loss_gap(network, data, 2.0, eps, seed=0) for eps in (1e-6, 0.1, 0.4)]
    assert 0 <= gaps[0] < 1e-4 < gaps[1] < gaps[2]
    network[-1].weight.data *= 2
    assert loss_gap(network, data, 2.0, 0.4, seed=0) > 1.5 * gaps[2]


# --- tug-of-war ---------------------------------------------------------------------------------------------


def test_networks_along_a_training_are_those_of_shorter_trainings():
    data = load_data("digits", limit=100)
    recipe = Recipe(epochs=3, validation=0.0, measure_every=0, penalties={"group_lasso": 0.01}, seed=4)
    start = build_model("fcn", {"in_features": 64, "width": 8, "depth": 3}, seed=4)
    copies = train_along(start, data, recipe)
    assert list(copies) == [1, 2, 3]
    shorter = train(start, data, dataclasses.replace(recipe, epochs=2)).model
    assert all(torch.equal(a, b) for a, b in zip(copies[2].parameters(), shorter.parameters(), strict=True))


@pytest.mark.parametrize(("epochs", "expected"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_measured_epochs_are_powers_of_two_and_the_last(epochs, expected):
    assert measured_epochs(epochs) == expected


def tug_table(harm):
    """Trainings of four epochs: the strong penalty ends with ``harm`` less of the accuracy kept, the mild one helps."""
    rows = []
    for seed in range(3):
        for penalty, alpha, final, scale in (
            ("group_lasso", 0.0, 0.0, (100, 150, 200)),
            ("group_lasso", 0.001, -0.03, (80, 80, 80)),
            ("group_lasso", 0.01, harm, (60, 40, 20)),
            ("scale_invariant_group_lasso", 0.03, harm, (100, 150, 200)),
        ):
            rises = np.array((0.0, 0.5, 1.0)) * (alpha > 0.001)
            early = 0.02 if alpha == 0.01 else 0.0
            structure = 0.1 * 10 ** (rises * 0.8)
            row = {"epoch": [1, 2, 4], "scale": list(scale), "row_error": list(0.8 - 0.4 * rises)}
            row |= {"structure_inf": list(structure), "norm_inf": list(structure * np.array(scale))}
            row |= {
                "kept_linf": [0.7 + early + 0.001 * seed, 0.7, 0.7 - final],
                "loss_gap": [0.3 - 5 * early, 0.4, 0.5],
            }
            rows.append({name: [0.0] * 3 for name in tug_of_war.MEASURED} | row)
            rows[-1] |= {"penalty": penalty, "alpha": alpha, "seed": seed}
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("harm", "robustness"), [(0.3, "reproduced"), (-0.3, "opposite")])
def test_the_tug_of_war_compares_the_strongest_penalty_with_none_over_time(harm, robustness):
    found = dict(zip(tug_of_war.CLAIMS, verdicts(tug_of_war, tug_table(harm)), strict=True))
    about_the_end = [verdict for claim, verdict in found.items() if "ends less robust" in claim.sentence]
    about_the_end += [verdict for claim, verdict in found.items() if "robustness falls" in claim.sentence]
    assert about_the_end == [robustness] * 3
    assert sum(verdict == "reproduced" for verdict in found.values()) == len(found) - 3 * (robustness == "opposite")


# --- emergent compressibility -------------------------------------------------------------------------------


def test_training_ends_with_the_first_epoch_that_fits():
    data = load_data("digits", limit=60)
    start = build_model("fcn", {"in_features": 64, "width": 20, "depth": 3}, seed=2)
    before = [weight.clone() for weight in start.parameters()]
    how = {"lr": 0.3, "batch": 10, "seed": 2}
    network, fit = emergent.fit_network(start, data, data, epochs=200, **how)
    assert 1 < fit["passes"] < 200
    assert fit["fitted"] >= emergent.FITTED
    assert fit["test_accuracy"] == (network(data.inputs).argmax(1) == data.labels).double().mean()
    _, unfitted = emergent.fit_network(start, data, data, epochs=fit["passes"] - 1, **how)
    assert unfitted["passes"] == fit["passes"] - 1
    assert unfitted["fitted"] < emergent.FITTED
    assert not network.training
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), before, strict=True))


def emergent_table(robustness):
    """Seven networks a seed, of which two have another accuracy and one does not fit; these three tell the opposite."""
    rows = []
    for seed in range(3):
        for i, ratio in enumerate((1, 2, 4, 8)):
            rows.append({"ratio": ratio, "test_accuracy": 0.95 + 0.001 * (i % 3), "fitted": 0.996, "sign": 1, "i": i})
        rows.append({"ratio": 16, "test_accuracy": 0.90, "fitted": 0.999, "sign": -1, "i": 9})
        rows.append({"ratio": 0.5, "test_accuracy": 0.97, "fitted": 0.999, "sign": -1, "i": 8})
        rows.append({"ratio": 32, "test_accuracy": 0.951, "fitted": 0.9, "sign": -1, "i": 7})
        for row in rows[-7:]:
            row |= {"seed": seed, "batch": 16} | dict.fromkeys(("row_error", "spectral_error"), -row["sign"] * row["i"])
            row |= dict.fromkeys(("structure_inf", "structure_2"), row["sign"] * row["i"])
            row |= dict.fromkeys(("kept_linf", "kept_l2"), -robustness * row["sign"] * row["i"])
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("robustness", "verdict"), [(1, "reproduced"), (-1, "opposite")])
@pytest.mark.parametrize("experiment", [emergent, emergent_conv])
def test_emergent_compressibility_is_asked_of_networks_of_equal_accuracy_alone(experiment, robustness, verdict):
    table = emergent_table(robustness)
    table.test_accuracy = 0.5 + (table.test_accuracy - 0.95) * experiment.BAND / emergent.BAND
    assert sorted(set(emergent.alike(table, experiment.BAND).ratio)) == [1, 2, 4, 8]
    assert verdicts(experiment, table) == ["reproduced"] * 4 + [verdict] * 4


# --- unstructured compressibility ---------------------------------------------------------------------------


def unstructured_table(lost):
    """Every kind goes from its error 0.8 to 0 in a straight line, and loses this much of the share kept."""
    rows = []
    for seed in range(3):
        errors = dict.fromkeys(("weight_error", "row_error", "spectral_error"), 0.8)
        plain = {"seed": seed, "intervention": "none", "strength": 0.0, "kept_linf": 0.9, "kept_l2": 0.9} | errors
        rows.append(plain | {"norm_inf": 10.0, "norm_2": 10.0})
        for kind, (_, error) in unstructured.KINDS.items():
            for share, rank in ((0.5, 8), (1.0, 4)):
                kept = 0.9 - lost[kind] * share + 0.001 * seed
                strength = rank if kind == "rank" else share
                row = {"intervention": kind, "strength": strength, error: 0.8 - 0.8 * share}
                row |= dict.fromkeys(("kept_linf", "kept_l2"), kept)
                rows.append(plain | row | dict.fromkeys(("norm_inf", "norm_2"), 10 + 100 * lost[kind] * share))
    return pd.DataFrame(rows)


def test_kinds_are_compared_at_one_k_term_error():
    lost = {"l1": 0.1, "group_lasso": 0.6, "rank": 0.4}
    table = unstructured_table(lost)
    first = table[table.seed == 0]
    way = (0.8 - unstructured.MATCHED) / 0.8
    for kind, share in lost.items():
        assert unstructured.at_matched_error(first, kind, "kept_l2") == pytest.approx(0.9 - share * way)
    far = first[first.weight_error > unstructured.MATCHED]
    assert np.isnan(unstructured.at_matched_error(far, "l1", "kept_l2"))
    assert set(verdicts(unstructured, table)) == {"reproduced"}
    swapped = unstructured_table({"l1": 0.6, "group_lasso": 0.1, "rank": 0.1})
    assert verdicts(unstructured, swapped) == ["reproduced"] * 3 + ["opposite"] * 6 + ["reproduced"] * 2
