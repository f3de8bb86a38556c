"""Experiments on low-rank and sparse weights: what they measure against closed forms, and whom claims compare."""

import dataclasses
import math

import pandas as pd
import pytest
import torch

from brittle.data.load import load_data
from brittle.errors import InputError
from brittle.experiments import effective_ranks, judge, low_rank_fooling, reconciliation
from brittle.experiments.dense_networks import initial_norm
from brittle.experiments.low_rank_networks import (
    RANKS,
    afforded,
    build_network,
    fooling_ratios,
    rank_shares,
    share_right,
    weight_names,
)
from brittle.models.architectures.fcn import fcn
from brittle.models.layers import read_layers
from brittle.training.interventions.penalties import joint_l1

DIGITS = load_data("digits", limit=40)


def verdicts(experiment, table):
    """By sentence."""
    return {claim.sentence: str(judge(claim, table, "small").verdict) for claim in experiment.EXPERIMENT.claims}


# --- networks, ranks and fooling ratios ---------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["fcn", "conv"])
def test_networks_are_homogeneous_in_every_layer_and_have_products_of_consecutive_ones(arch):
    state = torch.get_rng_state()
    network = build_network(arch, DIGITS, width=6, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    before = network(DIGITS.inputs)
    views = read_layers(network).views
    for view in views:
        view.module.weight.data *= 3
    torch.testing.assert_close(network(DIGITS.inputs), 3 ** len(views) * before)
    names = weight_names(network)
    assert len(names) == len(views)
    assert joint_l1(network, layers=names) > joint_l1(network, layers=names[:-1]) * (arch == "fcn")
    torch.testing.assert_close(build_network(arch, DIGITS, width=6, seed=3)(DIGITS.inputs), before)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(InputError, match="arch: expected one of fcn, conv; got 'vit'"):
        build_network("vit", DIGITS, width=4, seed=0)


def test_rank_shares_are_one_for_what_is_neither_of_low_rank_nor_sparse_and_least_for_a_single_weight():
    network = fcn(8, 8, 3, 3)
    sylvester = torch.tensor([[1.0]])
    for _ in range(3):
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    for place in (1, 3):
        network[place].weight.data = 5 * sylvester  # orthogonal up to a factor, all entries of one size
    assert rank_shares(network) == pytest.approx(dict.fromkeys(RANKS, 1.0))
    single = torch.zeros(8, 8)
    single[2, 5] = 3
    for place in (1, 3):
        network[place].weight.data = single
    assert rank_shares(network) == pytest.approx(dict.fromkeys(RANKS[:-1], 1 / 8) | {"effective_sparsity": 1 / 64})
    torch.manual_seed(0)
    shares = list(rank_shares(build_network("conv", DIGITS, width=4, seed=0)).values())[:-1]
    assert shares == sorted(shares)  # stable <= nuclear / spectral <= nuclear / Frobenius <= effective


def largest_of_three():
    """A network that says which of three inputs is the largest, and four samples, the last with a wrong label."""
    network = fcn(3, 3, 2, 3)
    for layer in (network[1], network[3]):
        layer.weight.data = torch.eye(3)
    x = torch.tensor([[0.6, 0.5, 0.1], [0.1, 0.8, 0.2], [0.2, 0.1, 0.9], [0.3, 0.5, 0.54]])
    data = dataclasses.replace(DIGITS, inputs=x, labels=torch.tensor([0, 1, 2, 0]), classes=3)
    return network, data


def test_fooling_ratios_count_every_changed_prediction_and_apart_those_that_were_right():
    """Half the gaps of the two largest inputs are 0.05, 0.3, 0.35 and 0.02: the l_inf distances to another label."""
    network, data = largest_of_three()
    budgets = {"none": (math.inf, 0.015), "wrong": (math.inf, 0.03), "one": (math.inf, 0.06), "more": (math.inf, 0.31)}
    row = fooling_ratios(network, data, budgets, seed=0)
    assert share_right(network, data) == row["clean_accuracy"] == 0.75
    assert [row[f"fooled_{name}"] for name in budgets] == [0, 0.25, 0.5, 0.75]
    assert [row[f"fooled_right_{name}"] for name in budgets] == pytest.approx([0, 0, 1 / 3, 2 / 3])
    assert row["fooled"] == pytest.approx(1.5 / 4)
    assert row["fooled_right"] == pytest.approx(1 / 4)


def strengths(accuracies, **columns):
    """Two seeds a strength, whose mean accuracy this is."""
    return [
        {"strength": strength, "validation": accuracy + sign * 0.01, **columns}
        for strength, accuracy in accuracies.items()
        for sign in (-1, 1)
    ]


def test_the_strongest_afforded_intervention_is_chosen_by_mean_validation_accuracy_within_its_own_networks():
    table = pd.DataFrame(
        strengths({0.0: 0.9}, intervention="none", data="a")
        + strengths({1.0: 0.95, 2.0: 0.885, 3.0: 0.87}, intervention="l1", data="a")
        + strengths({1.0: 0.87}, intervention="nuclear_norm", data="a")
        + strengths({0.0: 0.5}, intervention="none", data="b")
        + strengths({1.0: 0.4, 2.0: 0.49}, intervention="l1", data="b")
    )
    chosen = afforded(table, ["data"])
    assert set(zip(chosen.data, chosen.intervention, chosen.strength, strict=True)) == {
        ("a", "none", 0.0), ("a", "l1", 2.0), ("b", "none", 0.0), ("b", "l1", 2.0),
    }  # fmt: skip
    assert len(chosen) == 8


# --- effective ranks ----------------------------------------------------------------------------------------


def ranks_table(factor, late=0.9):
    """Three epochs, at which adversarial training multiplies every rank; accuracies meet at the second clean epoch."""
    rows = []
    for arch in effective_ranks.NETWORKS:
        for seed in range(3):
            for adversarial in (False, True):
                ranks = [0.8, 0.7, 0.6 + 0.001 * seed]
                row = {"arch": arch, "seed": seed, "adversarial": adversarial, "epoch": [1, 2, 4]}
                row["test_accuracy"] = [0.5, 0.7, late] if adversarial else [0.8, 0.904, 0.95]
                rows.append(row | {name: [rank * factor**adversarial for rank in ranks] for name in RANKS})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("factor", "verdict"), [(0.8, "reproduced"), (1.2, "opposite")])
def test_effective_ranks_are_compared_after_the_last_epoch_and_at_equal_accuracy(factor, verdict):
    table = ranks_table(factor)
    assert set(verdicts(effective_ranks, table).values()) == {verdict}
    one = effective_ranks.by_epoch(table[(table.seed == 0) & (table.arch == "fcn")])
    plain, attacked = (one.loc[label] for label in effective_ranks.alike(one))
    assert (plain.epoch, attacked.epoch) == (2, 4)
    equal = effective_ranks.relative_at_equal_accuracy("effective_rank", "fcn")(table[table.seed == 0])
    assert equal.value == pytest.approx(0.6 * factor / 0.7 - 1)


def test_networks_of_no_common_accuracy_are_not_compared_at_equal_accuracy():
    table = ranks_table(0.8, late=0.75)
    statistic = effective_ranks.relative_at_equal_accuracy("effective_rank", "conv")(table)
    assert (statistic.value, statistic.reason) == (None, "a seed has no value")


# --- fooling ratios under penalties -------------------------------------------------------------------------


def fooling_table(taken, adversarial):
    """Penalties take this share of a fooling ratio of 0.8 at a strength of 1, and accuracy at 2."""
    rows = []
    for arch, data in low_rank_fooling.NETWORKS:
        for seed in range(5 if arch == "fcn" else 3):
            base = {"arch": arch, "data": data, "seed": seed}
            arms = [("none", 0.0, 0.0, 0.97), ("adversarial", 0.05, adversarial, 0.96)]
            for name in low_rank_fooling.PENALTIES:
                arms += [(name, 1.0, taken[arch], 0.955), (name, 2.0, 1.0, 0.9)]
            for name, strength, share, accuracy in arms:
                ratio = 0.8 * (1 - share) + 0.001 * seed * (1 + share)
                row = {"intervention": name, "strength": strength, "validation": accuracy}
                rows.append(base | row | {"fooled": ratio, "fooled_right": ratio})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("taken", "adversarial", "lower", "most", "behind"),
    [
        ({"fcn": 0.2, "conv": 0.5}, 0.9, "reproduced", "reproduced", "reproduced"),
        ({"fcn": 0.5, "conv": 0.2}, 0.1, "reproduced", "opposite", "opposite"),
        ({"fcn": -0.1, "conv": -0.2}, 0.9, "opposite", "opposite", "reproduced"),
    ],
)
def test_fooling_ratios_are_compared_at_strengths_that_keep_the_accuracy(taken, adversarial, lower, most, behind):
    found = verdicts(low_rank_fooling, fooling_table(taken, adversarial))
    kinds = {"helps convolutional": most, "stay behind": behind}
    for sentence, verdict in found.items():
        expected = next((kinds[words] for words in kinds if words in sentence), lower)
        assert verdict == expected, sentence


# --- reconciliation -----------------------------------------------------------------------------------------


def test_causes_of_robustness_are_those_of_a_network_whose_distances_are_known():
    """Where the input is the representation: slopes are sqrt(2), and linear distances those to the boundary."""
    network, data = largest_of_three()
    logits, margins, slopes = reconciliation.margins_and_slopes(network, data)
    torch.testing.assert_close(logits, data.inputs)
    torch.testing.assert_close(margins, torch.tensor([0.1, 0.6, 0.7, 0.3 - 0.54]))
    torch.testing.assert_close(slopes, torch.full((4,), math.sqrt(2)))
    causes = reconciliation.causes_of(network, data)
    assert causes["frobenius"] == pytest.approx(math.sqrt(3))
    assert causes["stable_rank"] == pytest.approx(3)
    assert causes["linear"] == pytest.approx(causes["margin"] / math.sqrt(2))
    assert 0 <= causes["certified"] <= causes["linear"] + 1e-9  # all is linear around the samples


def test_a_multiple_of_a_matrix_moves_scale_norm_margin_and_bound_and_nothing_that_robustness_follows():
    torch.manual_seed(1)
    network = fcn(64, 12, 3, 10)
    before = reconciliation.causes_of(network, DIGITS)
    network[1].weight.data *= 5
    after = reconciliation.causes_of(network, DIGITS)
    moved = ("frobenius", "spectral", "margin", "bound", "slope")
    assert after == pytest.approx({name: v * (5 if name in moved else 1) for name, v in before.items()}, rel=1e-4)
    assert before["spectral"] == pytest.approx(before["frobenius"] / before["stable_rank"])
    assert before["spectral"] == pytest.approx(before["frobenius"] * before["concentration"])


@pytest.mark.parametrize("scale", ["free", "held"])
def test_what_is_held_is_held_after_the_last_step(scale):
    settings = {"data": "digits", "width": 24, "training": 200, "samples": 12, "epochs": 2, "seed": 0, "scale": scale}
    row = reconciliation.run(**settings, intervention="rank", strength=4, condition=1.5)
    assert (row["frobenius"] == pytest.approx(initial_norm(24) ** 2, rel=1e-4)) == (scale == "held")
    # Least where one of the four singular values is 1.5 times the others, in both matrices.
    assert row["stable_rank"] >= (1 + 3 / 1.5**2) * (1 - 1e-4)


def reconciled_table(free, conditioned):
    """``free``: log10 of what the penalty multiplies the certified radius by at free scale; held, it falls tenfold."""
    rows = []
    for seed in range(3):
        for scale in reconciliation.SCALES:
            effect = free if scale == "free" else -1.0
            for arm, strength, condition, radius in (
                ("none", 0.0, 0.0, 0.0), ("nuclear_norm", 1.0, 0.0, effect), ("rank", 14, 0.0, -0.8),
                ("rank", 14, 1.2, conditioned),
            ):  # fmt: skip
                radius += 0.01 * seed * (1 + strength / 14 + condition)
                spectral = 10.0 ** (-0.5 if (arm, scale) == ("nuclear_norm", "free") else 0.4 * (arm != "none"))
                row = {"intervention": arm, "strength": strength, "condition": condition, "scale": scale, "seed": seed}
                row |= {
                    "validation": 0.95,
                    "spectral": spectral,
                    "certified": 10**radius,
                    reconciliation.KEPT: 0.7 + 0.3 * radius,
                }
                rows.append(row | {"concentration": 10.0 ** (0.3 * (arm != "none"))})
    return pd.DataFrame(rows)


def test_the_reconciliation_compares_at_one_scale_and_with_low_rank_what_controls_it():
    assert set(verdicts(reconciliation, reconciled_table(0.5, -0.1)).values()) == {"reproduced"}
    found = verdicts(reconciliation, reconciled_table(-0.5, -0.9))
    turned = {sentence for sentence, verdict in found.items() if verdict != "reproduced"}
    assert turned >= {
        "At free scale a nuclear norm penalty makes networks more robust.",
        "At free scale the margin grows relative to the bound.",
        "Control of the condition number makes low-rank networks more robust: free scale.",
        "It gives back what low rank takes: scale held.",
    }
    assert found["With the scale held the same penalty makes them less robust."] == "reproduced"
