"""Networks side by side: what the page says follows from the audits, and only from them."""

import math
import re
from dataclasses import replace

import pytest

from brittle.reporting import ComparedNetwork, Comparison, write_comparison
from brittle.reporting.comparison import draw_comparison
from helpers.audits import HOSTILE, INF, full, norm_result, with_parts


def network(name: str, share: float = 1.0, p_value: float = 1.0) -> ComparedNetwork:
    """The full audit, with a share of its robust samples left in l_inf, certified in both norms."""
    evaluation = full().norm(INF).evaluation
    weaker = replace(evaluation, robust_correct=round(share * evaluation.robust_correct))
    bounded = replace(full().norm(INF).lipschitz, upper=1000.0 / share, unavailable=None)
    audit = with_parts(full(), INF, evaluation=weaker, lipschitz=bounded)
    return ComparedNetwork(name, replace(audit, model=name), 0.2 / share, 0.3, {INF: p_value, 2.0: 1.0})


def test_a_network_is_clearly_more_fragile_only_below_the_level_of_the_test():
    dense = network("dense")
    for p_value, words, count in ((0.001, "more fragile in ℓ∞", 1), (0.2, "not clearly different in ℓ∞", 0)):
        head, first, line = Comparison((dense, network("low rank", 0.5, p_value))).lines
        assert f"{count} of them {'is' if count == 1 else 'are'} clearly more fragile" in head
        assert "91.2 % right without attack, 41.7 % within ℓ∞ 8/255 and 58.3 % within ℓ₂ 0.5" in first
        assert f"{words} (20.8 %, −20.9 points) and not clearly different in ℓ₂ (58.3 %, +0.0 points)" in line
        assert "largest tenth of its singular values holds 40 % of their sum instead of 20 %" in line
        assert "certified bounds 2.00 (ℓ∞) and 1.00 (ℓ₂) times" in line


def test_points_are_the_difference_of_the_robust_accuracies():
    dense, weak = network("dense"), network("weak", 0.5)
    assert weak.points_above(dense, INF) == pytest.approx(20.8 - 41.7)
    assert weak.points_above(dense, INF) == -dense.points_above(weak, INF)
    assert weak.points_above(dense, 2.0) == 0


def test_the_product_of_norms_is_the_certified_bound_where_no_argument_says_it():
    dense = network("dense")
    assert dense.product(2.0) == 5400.0
    assert dense.upper(2.0) == 1843.2
    assert dense.product(INF) == dense.upper(INF) == 1000.0
    bare = replace(dense, audit=replace(full(), norms=(norm_result(2.0),)))
    assert (bare.lower(2.0), bare.upper(2.0)) == (0.0, math.inf)


def test_the_page_is_written_beside_its_picture_and_hostile_names_stay_text(tmp_path):
    comparison = Comparison((network("dense"), network(HOSTILE, 0.5)))
    write_comparison(comparison, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "story.png"]
    assert "<img" not in page
    assert page.count("<script") == 0
    assert page.count("<svg") == 1
    assert re.findall(r'<a href="([^"]*)">', page)[0] == "dense/report.html"


def test_the_picture_has_a_row_a_network_and_a_mark_a_number():
    comparison = Comparison(tuple(network(f"network {i}", 1 / (i + 1)) for i in range(3)))
    axes = draw_comparison(comparison).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["network 0", "network 1", "network 2"]
    marks = [line for line in axes[1].lines if line.get_marker() == "D"]
    assert [float(line.get_xdata()[0]) for line in marks] == pytest.approx([20, 40, 60])
