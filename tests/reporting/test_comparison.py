"""Networks side by side: what the page says follows from the audits, and only from them."""

import re
from dataclasses import replace

import pytest

from brittle.reporting import comparison_html, comparison_lines, write_comparison
from brittle.reporting.comparison import MOST_LISTED
from brittle.reporting.comparison_figures import draw_comparison, draw_curves, draw_layers
from brittle.reporting.comparison_words import points
from brittle.results import ComparedNetwork, Comparison, Latency, NetworkSize, Paired
from helpers.audits import HOSTILE, INF, data_free, full, layer, with_parts, without

CLEARLY, HARDLY = (tuple(range(209)), ()), (tuple(range(214)), tuple(range(300, 305 + 200)))
"""Samples lost and won: beyond chance, and not."""


def network(name: str, share: float = 1.0, verdicts=CLEARLY) -> ComparedNetwork:
    """The full audit, with a share of its robust samples left in l_inf, certified in both norms."""
    evaluation = full().norm(INF).evaluation
    weaker = replace(evaluation, robust_correct=round(share * evaluation.robust_correct))
    bounded = replace(full().norm(INF).lipschitz, upper=1000.0 / share, unavailable=None)
    audit = with_parts(full(), INF, evaluation=weaker, lipschitz=bounded)
    same = ((), ())
    paired = (
        Paired("clean", None, None, 1000, *same),
        Paired("robust", INF, 8 / 255, 1000, *verdicts),
        Paired("robust", 2.0, 0.5, 1000, *same),
    )
    return ComparedNetwork(name, replace(audit, model=name), NetworkSize(8_576, 10**6, 34_304), paired)


def beside(*others: ComparedNetwork, **fields) -> Comparison:
    return Comparison((replace(network("dense"), paired=()), *others), **fields)


@pytest.mark.parametrize(
    ("verdicts", "words", "count"),
    [
        (CLEARLY, "more fragile in ℓ∞", "1"),
        (HARDLY, "not clearly different in ℓ∞", "none"),
        (CLEARLY[::-1], "more robust", "none"),
    ],
)
def test_a_network_is_clearly_more_fragile_only_below_the_level_of_the_test(verdicts, words, count):
    same = network("same", 1.0, ((), ()))
    head, first, line, _ = comparison_lines(beside(network("low rank", 0.5, verdicts), same))
    assert f"{count} of them is clearly more fragile" in head
    assert "91.2 % right without attack, 41.7 % within ℓ∞ 8/255 and 58.3 % within ℓ₂ 0.5" in first
    assert words in line
    assert "(20.8 %, −20.9 points) and not clearly different in ℓ₂ (58.3 %, +0.0 points)" in line
    assert "certified bounds 2.00 (ℓ∞) and 1.00 (ℓ₂) times" in line


def test_the_largest_tenth_is_told_of_layers_of_the_same_sizes_alone():
    """A tenth of eight rows is one of eight, a tenth of one row all of it."""
    first, *rest = full().layers
    concentrated = replace(first, row_error=(0.0,) * len(first.row_error))
    for layers, told in (((concentrated, *rest), True), ((replace(concentrated, shape=(8, 27)), *rest), False)):
        other = network("other")
        line = comparison_lines(beside(replace(other, audit=replace(other.audit, layers=layers))))[2]
        assert ("largest tenth of its rows holds" in line) is told


def test_one_other_network_is_named_in_the_headline():
    head = comparison_lines(beside(network("low rank", 0.5)))[0]
    assert head == (
        "low rank beside dense: 91.2 instead of 91.2 % right without attack; clearly more fragile in ℓ∞, not clearly "
        "different in ℓ₂."
    )


def test_what_was_not_tested_is_not_called_different():
    lines = comparison_lines(beside(replace(network("low rank", 0.5), paired=())))
    assert "differences are not tested" in lines[0]
    assert "not tested in ℓ∞ (20.8 %, −20.9 points)" in lines[2]


def test_networks_without_data_are_compared_by_their_weights():
    bare = ComparedNetwork("a", data_free())
    lines = comparison_lines(Comparison((bare, replace(bare, name="b"))))
    assert "by their weights alone" in lines[0]
    assert "a: 60 layers, 3,504,872 parameters." in lines
    page = comparison_html(Comparison((bare, replace(bare, name="b"))))
    assert "McNemar" not in page
    assert "Robust," not in page


def test_points_are_the_difference_of_two_accuracies():
    assert points(0.208, 0.417) == "−20.9 points"
    assert points(0.417, 0.208) == "+20.9 points"
    assert points(0.5, 0.5) == "+0.0 points"


def test_other_settings_are_a_warning():
    plain = network("plain", 1.0, ((), ()))
    signature = replace(plain.audit.signature, seed=7, settings=plain.audit.signature.settings | {"limit": 9})
    other = replace(plain, audit=replace(plain.audit, signature=signature))
    assert not [line for line in comparison_lines(beside(plain)) if "different" in line and "Warning" in line]
    (warning,) = [line for line in comparison_lines(beside(other)) if line.startswith("Warning")]
    assert "seed (0 and 7), limit (1000 and 9)" in warning


def test_the_product_of_norms_is_the_certified_bound_where_no_argument_says_it():
    dense = network("dense")
    assert dense.product(2.0) == 5400.0
    assert dense.upper(2.0) == 1843.2
    assert dense.product(INF) == dense.upper(INF) == 1000.0
    assert dense.alignment(INF) is None
    bare = ComparedNetwork("bare", without(full(), "lipschitz"))
    assert (bare.lower(2.0), bare.upper(2.0), bare.product(2.0)) == (None, None, None)


# The page


def test_the_page_is_written_beside_its_picture_and_hostile_names_stay_text(tmp_path):
    comparison = beside(network(HOSTILE, 0.5), title=HOSTILE, about=(HOSTILE,))
    write_comparison(comparison, tmp_path, {"dense": "dense/report.html"})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "story.png"]
    assert "<img" not in page
    assert page.count("<script") == 0
    assert page.count("<svg") == 6
    assert re.findall(r'<a href="([^#"]*)">', page)[0] == "dense/report.html"
    assert not re.findall(r'(?:src|href)="(?!#|dense/)', page)


def test_lost_samples_are_listed_and_their_rest_counted():
    page = comparison_html(beside(network("low rank", 0.5)))
    assert ", ".join(map(str, range(MOST_LISTED))) in page
    assert f"and {209 - MOST_LISTED} more, listed in the JSON" in page
    assert f"{MOST_LISTED - 1}, {MOST_LISTED}," not in page


def test_layers_stand_below_each_other_with_what_moved():
    first, *rest = full().layers
    heavier = replace(first, frobenius=2 * first.frobenius)
    other = network("other", 1.0, ((), ()))
    other = replace(other, audit=replace(other.audit, layers=(heavier, rest[1], layer("extra", 8, 8))))
    page = comparison_html(beside(other))
    assert page.count('<small class="moved">× 2.00</small>') == 1
    assert re.findall(r'<th scope="rowgroup" class="text" rowspan="(\d)"><code>([^<]+)</code>', page) == [
        ("2", "conv1"),
        ("1", "features.fc"),
        ("2", "head"),
        ("1", "extra"),
    ]


def test_a_network_beside_itself_moves_nothing():
    page = comparison_html(beside(replace(network("itself"), paired=network("itself", 1.0, ((), ())).paired)))
    assert set(re.findall(r"× ([^<]+)</small>", page)) == {"1.00"}
    assert 'class="moved"' not in page


def test_times_are_those_of_their_batch():
    rows = tuple(Latency(name, batch, ms, 2 * ms, 30, "Some CPU", 2) for batch, name, ms in
                 ((1, "dense", 1.0), (1, "small", 0.5), (64, "dense", 8.0), (64, "small", 2.0)))  # fmt: skip
    page = comparison_html(beside(network("small"), latency=rows))
    assert "Some CPU" in page
    assert re.findall(r">(0\.500|2\.00|4\.00)<small>× ([\d.]+)</small>", page)[-2:] == [
        ("2.00", "0.250"),
        ("4.00", "0.250"),
    ]


# The pictures


def test_the_picture_has_a_row_a_network_and_a_mark_a_number():
    comparison = beside(*(network(f"network {i}", 1 / (i + 1)) for i in (1, 2)))
    axes = draw_comparison(comparison).axes
    names = ["dense", "network 1", "network 2"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [f"{name}\n8,576 parameters" for name in names]
    marks = [line for line in axes[1].lines if line.get_marker() == "D"]
    assert [float(line.get_xdata()[0]) for line in marks] == pytest.approx(
        [100 * network.spectral_head for network in comparison.networks]
    )


def test_curves_have_a_line_a_network_from_the_clean_accuracy_on():
    comparison = beside(network("weak", 0.5))
    for axis in draw_curves(comparison).axes:
        lines = [line for line in axis.lines if len(line.get_xdata()) > 2]
        assert [float(line.get_ydata()[0]) for line in lines] == [91.2, 91.2]
    assert draw_curves(Comparison((ComparedNetwork("a", data_free()),))) is None


def test_layers_are_drawn_over_those_of_the_first_network():
    first, *rest = full().layers
    other = network("other")
    narrow = tuple(replace(norm, lower=norm.lower / 2, upper=norm.upper / 2) for norm in first.operator_norms)
    other = replace(other, audit=replace(other.audit, layers=(replace(first, operator_norms=narrow), *rest)))
    axis = draw_layers(beside(other)).axes[0]
    assert [float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "s"] == [0.5, 1.0, 1.0]
    assert draw_layers(beside(replace(other, audit=replace(other.audit, layers=())))) is None
