"""The jobs of the paper's figures: bounds stand in their order, and every code path of every scale runs."""

import dataclasses
import itertools
import math

import pandas as pd
import pytest
import torch
from torch.linalg import matrix_norm

from brittle.data.load import load_data
from brittle.experiments import (
    EXPERIMENTS,
    emergent,
    fig2,
    fig3,
    fig4,
    fig5_conv,
    fig5_fcn,
    fig7_adversarial,
    fig7_transfer,
    fig7_universal,
    judge,
    mitigations,
    named_experiments,
    reproduce,
    tug_of_war,
    universal_training,
    unstructured,
)
from brittle.experiments.conv_networks import filter_structure
from brittle.models.architectures.fcn import fcn
from brittle.models.selection import chosen_layers, matrix
from helpers.experiments import lines
from helpers.grids import in_this_process

TINY = {"data": "digits", "width": 12, "epochs": 1, "samples": 12}
"""In place of a scale's own: one pass, on tiny data."""


def every_kind(experiment, *kinds):
    """One job's settings of the largest scale for every combination of values in these columns, made tiny."""
    found = {tuple(settings[name] for name in kinds): settings for settings in experiment.settings("paper")}
    return [settings | TINY for settings in found.values()]


def strongest(experiment, *axes):
    """One job's settings of the largest scale at the end of each axis, the others at their first value, made tiny."""
    jobs = experiment.settings("paper")
    for axis in axes:
        pick = min if axis.startswith("-") else max
        settings = pick(jobs, key=lambda settings: settings[axis.removeprefix("-")])
        yield settings | TINY | {"samples": 40}


JOBS = [(fig3, settings) for settings in every_kind(fig3.EXPERIMENT, "intervention")]
JOBS += [(fig4, settings) for settings in every_kind(fig4.EXPERIMENT, "classes")]
JOBS += [(fig2, settings) for settings in strongest(fig2.EXPERIMENT, "alpha", "-rank")]
JOBS += [(fig5_fcn, settings) for settings in strongest(fig5_fcn.EXPERIMENT, "alpha", "-rank")]
JOBS += [(fig7_universal, settings) for settings in strongest(fig7_universal.EXPERIMENT, "alpha", "scale")]
JOBS += [(tug_of_war, settings) for settings in every_kind(tug_of_war.EXPERIMENT, "penalty")]
JOBS += [(emergent, settings) for settings in strongest(emergent.EXPERIMENT, "lr")]
JOBS += [(unstructured, settings | {"samples": 40}) for settings in every_kind(unstructured.EXPERIMENT, "intervention")]

JOBS += [(universal_training, job | {"samples": 40}) for job in every_kind(universal_training.EXPERIMENT, "attacked")]
JOBS += [(mitigations, settings) for settings in every_kind(mitigations.EXPERIMENT, "family", "adversarial")]
JOBS += [(mitigations, settings) for settings in strongest(mitigations.EXPERIMENT, "against_spread")]

CONVOLUTIONAL = TINY | {"width": 2, "training": 64, "samples": 40}
"""Attacks take as long on few samples: of these figures the one kind of job that no smoke scale has."""
JOBS += [(fig5_conv, every_kind(fig5_conv.EXPERIMENT, "stem")[1] | CONVOLUTIONAL)]


@pytest.mark.parametrize(("figure", "settings"), JOBS, ids=lambda part: getattr(part, "__name__", None))
def test_every_path_of_the_papers_scale_runs(figure, settings):
    state = torch.get_rng_state()
    row = figure.run(**settings)
    assert torch.equal(state, torch.get_rng_state())
    numbers = [value for value in row.values() if isinstance(value, float)]
    assert numbers == [pytest.approx(value) for value in numbers]  # no NaN equals itself
    assert not set(row) & set(settings)


def trained_by(figure, monkeypatch, **settings):
    """The row of a tiny network of a convolutional figure's largest scale, left without attacks, and the network."""
    networks = []
    monkeypatch.setattr(figure, "robustness_of", lambda network, *_: networks.append(network) or {})
    row = figure.run(**figure.EXPERIMENT.settings("paper")[0] | CONVOLUTIONAL | settings)
    return row, networks[0]


def test_training_under_attack_of_figure_7_takes_ten_steps_in_its_norm_or_none(monkeypatch):
    rows = {
        (pgd, norm): trained_by(fig7_adversarial, monkeypatch, alpha=0.1, pgd=pgd, norm=norm)[0]
        for pgd in (0, 10)
        for norm in ("linf", "l2")
    }
    assert rows[0, "linf"] == rows[0, "l2"]
    assert len({row["gain_inf"] for row in rows.values()}) == 3


def test_transfer_of_figure_7_keeps_the_low_rank_of_pretraining_below_its_new_head(monkeypatch):
    row, network = trained_by(fig7_transfer, monkeypatch, downstream_data="digits", rank=1)
    assert 0 <= row["pretrained_accuracy"] <= 1
    assert {torch.linalg.matrix_rank(matrix(layer)).item() for layer in chosen_layers(network)} == {1}
    assert filter_structure(network).items() <= row.items()


def test_bounds_of_figure_3_stand_in_the_order_that_the_theory_proves():
    rank = {"intervention": "rank", "seed": 1} | TINY
    for strength in (2, 12):
        row = fig3.run(**rank | {"strength": strength, "epochs": 4, "samples": 60})
        assert row["best"] <= row["exact"] * (1 + 1e-9)
        assert row["exact"] <= row["product"] * (1 + 1e-9)
        assert row["exact"] <= row["sharp"] * (1 + 1e-9)
        assert row["sharp"] <= row["paper"] * (1 + 1e-9)
        assert row["local"] <= row["best"]
        assert 0 <= row["gap"] <= row["certified_gap"]
        assert 0 <= row["robust_accuracy"] <= row["clean_accuracy"]
        for p in fig3.NORMS:
            by_name = [row[f"{name}_{p}"] for name in ("lower", "norm", "sharp", "printed")]
            assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(by_name))
            assert 0 < row[f"alignment_lower_{p}"] <= row[f"alignment_{p}"] <= 1


def test_norms_and_alignments_of_figure_3_are_those_of_the_hidden_layers():
    """Against their definitions: the head is left out, and with six units all patterns can be tried."""
    torch.manual_seed(3)
    network = fcn(5, 6, 3, 4)
    W1, W2 = (network[place].weight.detach().double() for place in (1, 3))
    row = fig3.norms_and_alignments(network)
    for p, order in (("2", 2), ("inf", math.inf)):
        assert row[f"norm_{p}"] == pytest.approx(float(matrix_norm(W1, order) * matrix_norm(W2, order)))
    (U1, s1, _), (_, s2, V2) = (torch.linalg.svd(W, full_matrices=False) for W in (W1, W2))
    roots = (s2.sqrt().diag() @ V2, U1 @ s1.sqrt().diag())
    scale = float(matrix_norm(W1, 2) * matrix_norm(W2, 2)) ** 0.5
    patterns = [torch.tensor(d).double().diag() for d in itertools.product((0, 1), repeat=6)]
    exact = {"2": max(float(matrix_norm(roots[0] @ D @ roots[1], 2)) for D in patterns) / scale}
    exact["inf"] = max(float(matrix_norm(W2 @ D @ W1, math.inf)) for D in patterns) / row["norm_inf"]
    for p, value in exact.items():
        assert row[f"alignment_lower_{p}"] <= value * (1 + 1e-9)
        assert row[f"alignment_{p}"] >= value * (1 - 1e-9)
        assert row[f"alignment_lower_{p}"] >= 0.9 * value


def test_the_printed_form_takes_the_best_k_up_to_the_rank():
    """Of flat spectra the best k is the rank, where the printed form of a layer is sqrt(h / r) times its norm."""
    network = fcn(16, 16, 2, 16)
    for module in (network[1], network[3]):
        Q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
        module.weight.data = Q @ torch.diag(torch.tensor([1.0] * 4 + [0.0] * 12)) @ Q.mT
    bounds, margins = fig3.lipschitz_bounds(network)
    assert bounds["paper"] == pytest.approx(4 * bounds["alignments"], rel=1e-4)
    assert bounds["sharp"] == pytest.approx(bounds["alignments"], rel=1e-4)
    assert margins.shape == (16, 16)


def test_labels_of_two_classes_are_parities():
    data = load_data("digits", limit=50)
    job = {"classes": 2, "alpha": 0.0, "seed": 0} | TINY
    assert 0 <= fig4.run(**job)["clean_accuracy"] <= 1
    assert set((data.labels % 2).tolist()) == {0, 1}


def test_robustness_is_judged_where_the_plain_network_keeps_three_quarters():
    kept = {0.125: 0.99, 0.5: 0.9, 1.0: 0.7, 2.0: 0.1}
    rows = [
        {"alpha": alpha, "seed": seed} | {f"kept_{eps:g}": share - 5 * alpha for eps, share in kept.items()}
        for alpha in (0.0, 0.05)
        for seed in range(3)
    ]
    table = pd.DataFrame(rows)
    assert fig4.judged_budget(table) == 1.0
    assert fig4.robustness_lost(table).value == pytest.approx(-0.25)


def universal_table(fooled_under_scale):
    """Networks of which the penalty makes samples fragile and perturbations universal, and the norm as it is told."""
    rows = []
    for seed in range(3):
        base = {"seed": seed, "row_error": 0.8, "kept_2/255": 0.8, "sample_fooled": 0.2 + 0.01 * seed}
        base |= {"universal_fooled": 0.02, "random_fooled": 0.01, "relative": 0.05}
        fragile = {"kept_2/255": 0.2, "sample_fooled": 0.8 + 0.01 * seed, "random_fooled": 0.02}
        rows += [
            base | {"alpha": 0.0, "scale": 1.0},
            base | fragile | {"alpha": 0.1, "scale": 1.0, "row_error": 0.3, "universal_fooled": 0.5, "relative": 0.6},
            base | fragile | {"alpha": 0.0, "scale": 8.0} | fooled_under_scale,
        ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("under_scale", "told_apart"),
    [
        ({"universal_fooled": 0.05, "relative": 0.04}, "reproduced"),
        ({"universal_fooled": 0.5, "relative": 0.6}, "not reproduced"),
        ({"universal_fooled": 0.7, "relative": 0.85}, "opposite"),
    ],
)
def test_figure_7_tells_universal_perturbations_from_fragile_samples(under_scale, told_apart):
    table = universal_table(under_scale)
    *others, scale, separation = [judge(claim, table, "small").verdict for claim in fig7_universal.CLAIMS]
    assert set(others) == {"reproduced"}
    assert scale == ("reproduced" if told_apart == "reproduced" else "opposite")
    assert separation == told_apart


@pytest.mark.parametrize(
    ("spread", "gained", "verdicts"),
    [
        (0.3, 0.1, ["reproduced"] * 3),
        (0.3, 0.5, ["reproduced", "reproduced", "opposite"]),  # no lower than its robustness alone would have it
        (0.9, 0.5, ["opposite"] * 3),
    ],
)
def test_universal_training_is_compared_at_equal_robustness(spread, gained, verdicts):
    """Training sample by sample lowers the spread from 0.6 to 0.3 for half of the samples fooled."""
    rows = []
    for seed in range(3):
        for alpha in (0.0, 0.01):
            row = {"seed": seed, "alpha": alpha}
            for attacked, beta, fooled, one in (
                ("none", 0.6, 0.8, 0.4), ("sample", 0.3, 0.4, 0.1), ("universal", spread, 0.8 - gained, 0.1),
            ):  # fmt: skip
                row = row | {"attacked": attacked, "spread": beta + 0.01 * seed, "sample_fooled": fooled}
                rows.append(row | {"universal_fooled": one + 0.01 * seed})
    results = [judge(claim, pd.DataFrame(rows), "small") for claim in universal_training.CLAIMS]
    assert [result.verdict for result in results] == [*verdicts, "reproduced", "reproduced"]
    assert results[2].statistic.value == pytest.approx((spread - 0.6) + 0.3 * gained / 0.4)


def larger_of_two():
    """A network with one hidden layer that says which of two inputs is the larger, and two of its samples."""
    network = fcn(2, 2, 2, 2)
    for layer in (network[1], network[3]):
        layer.weight.data = torch.eye(2)
    x = torch.tensor([[0.6, 0.5], [0.2, 0.7]])
    return network, dataclasses.replace(load_data("digits", limit=2), inputs=x, labels=torch.tensor([0, 1]), classes=2)


def test_figure_2_finds_boundaries_where_they_are():
    network, data = larger_of_two()
    away = torch.tensor([[-1.0, 1.0], [0.3, 0.3]])  # straight to the boundary, and along it
    eps = 0.05
    first, second = fig2.crossing(network, data, data.inputs + away, eps).tolist()
    assert 0.1 / 2**0.5 <= first <= 0.1 / 2**0.5 + fig2.LENGTHS * eps / 40 * 1.001
    assert second == pytest.approx(fig2.LENGTHS * eps)


def test_maps_of_figure_2_are_those_of_the_network_with_the_clean_point_in_the_middle():
    network, data = larger_of_two()
    attacked = {"dense": data.inputs + torch.tensor([0.0, 0.2]), "compressible": data.inputs - torch.tensor([0.2, 0.0])}
    row = fig2.around(dict.fromkeys(fig2.NETWORKS, network), data, attacked, 0, eps=0.2)
    offsets = fig2.REACH * 0.2 * fig2.grid()
    # Both networks share a plane whose first axis is the compressible network's perturbation.
    assert row["input_at_compressible"] == pytest.approx([1, 0], abs=1e-6)
    assert [abs(part) for part in row["input_at_dense"]] == pytest.approx([0, 1], abs=1e-6)
    up = row["input_at_dense"][1]
    x = torch.tensor([0.6, 0.5]) + torch.stack([-offsets[:, 0], up * offsets[:, 1]], dim=1)
    expected = torch.where(x[:, 0].clamp_min(0) >= x[:, 1].clamp_min(0), 0, 1)
    apart = (x[:, 0] - x[:, 1]).abs() > 1e-6
    assert torch.equal(torch.tensor(row["input_dense"])[apart], expected[apart])
    assert row["input_dense"] == row["input_compressible"]
    middle = fig2.CELLS**2 // 2
    assert {row[f"{space}_{name}"][middle] for space in ("input", "representation") for name in fig2.NETWORKS} == {0}
    # The representation is the input: its shift is the perturbation, in lengths of (0.6, 0.5).
    assert row["representation_at_dense"] == pytest.approx([0.2 / 0.61**0.5, 0])
    beside = fig2.CELLS // 2 + round(fig2.CELLS / 2 * row["representation_at_dense"][0] / row["reach"])
    assert row["representation_dense"][fig2.CELLS * (fig2.CELLS // 2) + beside] == 1  # 0.7 is larger than 0.6


@pytest.mark.parametrize(("effect", "robustness"), [(1.0, "reproduced"), (-1.0, "opposite")])
def test_figure_5_asks_penalties_and_ranks_each_of_their_own_networks(effect, robustness):
    """The penalty breaks networks in both norms; low rank breaks them or helps. One baseline serves both."""
    rows = []
    for seed in range(3):
        for alpha, rank, step in ((0.0, 800, 0.0), (0.01, 800, 1.0), (0.0, 256, -0.02), (0.0, 64, 0.5), (0.0, 8, 1.0)):
            row = {"seed": seed, "width": 800, "alpha": alpha, "rank": rank, "norm_inf": 9 + step, "norm_2": 3 + step}
            row |= {"row_error": 0.8 - alpha * 50, "spectral_error": 0.7 - 0.4 * (rank < 800)}
            lost = step if rank == 800 else effect * step
            for norm in fig5_fcn.BUDGETS:
                row |= {f"robust_{norm}": 0.3 - 0.2 * lost, f"kept_{norm}": 0.6 - 0.4 * lost + 0.001 * seed}
            rows.append(row)
    verdicts = [judge(claim, pd.DataFrame(rows), "small").verdict for claim in fig5_fcn.CLAIMS]
    assert verdicts[:7] == ["reproduced"] * 7  # the penalty's six, and that low rank is compressible
    assert verdicts[7:12] == [robustness] * 5
    assert verdicts[12:] == ["reproduced", robustness]  # the mildest rank helps where the others harm


def mitigated_table(gained, kept_compressible):
    """Compressible networks that lose 0.3, of which mitigations give back ``gained`` at their strongest."""
    rows = []
    for seed in range(3):
        noise = 0.001 * seed
        base = {"seed": seed, "against_spread": 0.0, "against_alignment": 0.0, "adversarial": False}
        rows.append(base | {"family": "none", "robust_linf": 0.8 + noise, "robust_l2": 0.8 + noise, "row_error": 0.9})
        for family in mitigations.WORDS:
            for settings, share in (
                ({}, 0.0),
                ({"against_spread": 1.0}, 0.1),
                ({"against_spread": 10.0}, 1.0),
                ({"against_alignment": 5.0}, 1.0),
                ({"against_spread": 10.0, "against_alignment": 5.0}, 1.0),
                ({"adversarial": True}, 8.0),
            ):
                robust = 0.5 + share * gained + noise * (1 + share)
                error = 0.4 if kept_compressible else 0.4 + 0.5 * share
                rows.append(
                    base
                    | settings
                    | {"family": family, "robust_linf": robust, "robust_l2": robust, "row_error": error + noise}
                )
    return pd.DataFrame(rows)


def verdicts_of(table):
    """Of every claim about mitigations, in their order."""
    return [str(judge(claim, table, "small").verdict) for claim in mitigations.CLAIMS]


def test_mitigations_are_judged_at_their_strongest_against_both_references():
    helped = verdicts_of(mitigated_table(0.1, kept_compressible=True))
    assert helped == ["reproduced"] * 15  # six claims a family, and three on what stays compressible
    harmed = verdicts_of(mitigated_table(-0.05, kept_compressible=False))
    assert harmed[:6] == harmed[6:12] == ["reproduced", "opposite", "opposite", "opposite", "reproduced", "opposite"]
    assert harmed[12:] == ["opposite"] * 3
    too_good = verdicts_of(mitigated_table(0.4, kept_compressible=True))
    assert (too_good[4], too_good[10]) == ("opposite", "opposite")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_smoke_scale_draws_its_figure_and_judges_nothing(name, tmp_path):
    (experiment,) = reproduce(named_experiments([name]), "smoke", tmp_path, executor=in_this_process).experiments
    assert (experiment.rows, experiment.failed) == (experiment.jobs, ())
    assert {claim.verdict for claim in experiment.claims} == {"not testable at this scale"}
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_no_experiment_has_the_name_of_another_or_claims_twice_the_same():
    for experiment in named_experiments(["all"]):
        sentences = [claim.sentence for claim in experiment.claims]
        assert len(set(sentences)) == len(sentences)
        assert all(claim.measure for claim in experiment.claims)
        assert dataclasses.replace(experiment).name == experiment.name != lines().name
