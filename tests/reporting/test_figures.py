"""The figures of synthetic audits: what they show, when there are none, and that they fit into any page."""

import functools
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from brittle.reporting import figures
from brittle.reporting.drawing import svg
from brittle.reporting.page import FIGURES
from brittle.results import (
    CertifiedCurve,
    Rate,
    SecurityCurve,
)
from brittle.results.wording import budget, norm_name, number
from helpers.audits import CERTIFIED, HOSTILE, INF, data_free, full, layer, norm_result, one_layer, with_parts, without

ALL = tuple(FIGURES.values())


@functools.cache
def drawn(draw, make) -> str | None:
    """The figure as SVG, drawn once for all the tests that only read it."""
    figure = draw(make())
    return None if figure is None else svg(figure)


def texts(figure: Figure) -> str:
    """What is written in a figure, without the titles that appear beside a pointer."""
    written = ET.fromstring(svg(figure)).iter("{http://www.w3.org/2000/svg}text")
    return " ".join("".join(text.itertext()) for text in written)


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_a_full_audit_has_every_figure_as_wellformed_svg(draw):
    figure = draw(full())
    assert isinstance(figure, Figure)
    root = ET.fromstring(drawn(draw, full))
    assert root.tag.endswith("}svg")
    assert root.get("role") == "img"
    assert root.get("aria-label") == root[0].text == figure.get_label()


@pytest.mark.parametrize(
    ("draw", "part"),
    [
        (figures.draw_security_curve, "curve"),
        (figures.draw_certificate, "certified"),
        (figures.draw_layer_norms, "layers"),
        (figures.draw_spectra, "layers"),
        (figures.draw_compressibility, "layers"),
        (figures.draw_sensitivity, "lipschitz"),
        (figures.draw_directions, "responses"),
        (figures.draw_universal, "universal"),
    ],
)
def test_a_figure_is_none_exactly_when_its_part_is_missing(draw, part):
    assert draw(replace(full(), layers=()) if part == "layers" else without(full(), part)) is None
    others = {"curve", "certified", "lipschitz", "responses", "universal"} - {part}
    assert draw(replace(without(full(), *others), not_measured=())) is not None
    assert draw(without(full(), "evaluation", *others)) is not None
    assert draw(replace(full(), norms=())) is None or part == "layers"


def test_what_the_network_decides_by_is_drawn_where_it_was_measured():
    features = full().features
    (axis,) = figures.draw_features(full()).axes
    cosines = [100, *(100 * layer.cosine for layer in features.layers), 100 * features.followed.cosine]
    assert [*axis.lines[1].get_xdata()] == pytest.approx(cosines)
    assert [*axis.lines[2].get_xdata()] == pytest.approx([74, 33])
    seen = texts(figures.draw_features(full()))
    assert all(name in seen for name in ("input", "conv1", "decision", "not lost"))
    (axis,) = figures.draw_feature_pairs(full()).axes
    ratios = [100 * pair.ratio for pair in features.pairs if pair.ratio is not None]
    assert [*axis.lines[1].get_ydata()] == pytest.approx(ratios)
    for less in (None, replace(features, layers=(), pairs=features.pairs[:1])):
        audit = replace(full(), features=less)
        assert figures.draw_features(audit) is None is figures.draw_feature_pairs(audit)


def test_without_data_only_the_weights_are_drawn():
    names = {draw.__name__ for draw in ALL if drawn(draw, data_free) is not None}
    assert names == {"draw_layer_norms", "draw_spectra", "draw_compressibility"}


def test_ids_are_unique_over_figures_and_every_reference_has_its_target():
    drawings = [drawn(draw, make) for make in (full, data_free) for draw in ALL if drawn(draw, make)]
    ids = [name for drawing in drawings for name in re.findall(r'\sid="([^"]*)"', drawing)]
    assert len(ids) == len(set(ids)) > 100
    for drawing in drawings:
        targets = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', drawing)
        assert targets
        assert {a or b for a, b in targets} <= set(re.findall(r'\sid="([^"]*)"', drawing))


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_svg_takes_the_colour_of_the_page_and_holds_no_date_image_or_global_style(draw):
    drawing = drawn(draw, full)
    assert "currentColor" in drawing
    colours = {to_hex(colour) for colour in re.findall(r"#[0-9a-f]{6}\b", drawing)}
    assert colours <= set(figures.SERIES)
    assert not re.search(r"<image|<style|<metadata|<\?xml|<!|DejaVu|matplotlib\.org", drawing)


def test_the_series_contrast_with_white_and_with_the_dark_page():
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    for colour in figures.SERIES:
        assert 1.05 / (luminance(colour) + 0.05) >= 3
        assert (luminance(colour) + 0.05) / (luminance("#15181c") + 0.05) >= 3


def test_the_same_audit_gives_the_same_bytes_whatever_the_callers_style():
    first = [drawn(draw, full) for draw in ALL]
    changed = {"font.size": 30.0, "axes.facecolor": "black", "svg.hashsalt": "x", "text.usetex": False}
    before = {name: rcParams[name] for name in changed}
    rcParams.update(changed)
    try:
        assert [svg(draw(full())) for draw in ALL] == first
        assert {name: rcParams[name] for name in changed} == changed
    finally:
        rcParams.update(before)


def test_the_curve_marks_clean_accuracy_and_the_standard_budgets():
    seen = texts(figures.draw_security_curve(full()))
    for text in ("clean 91.2 %", "8/255", "ℓ∞ attacks", "ℓ₂ attacks"):
        assert text in seen
    values = figures.draw_security_curve(full()).axes[0].lines[0].get_ydata()
    assert list(values[:3]) == pytest.approx([91.2, 86.8, 81.1])


def test_the_curve_needs_no_evaluation():
    figure = figures.draw_security_curve(without(full(), "evaluation"))
    assert list(figure.axes[0].lines[0].get_ydata()[:2]) == pytest.approx([86.8, 81.1])


def certificate_of(audit, p) -> tuple[Axes, dict[str, Line2D]]:
    """The panel of a norm, and the two accuracies drawn in it, by the way in which they step."""
    axis = next(axis for axis in figures.draw_certificate(audit).axes if f"in {norm_name(p)}," in axis.get_xlabel())
    return axis, {line.get_drawstyle(): line for line in axis.lines if line.get_drawstyle() != "default"}


def heights(line: Line2D, budgets) -> list[float]:
    """What a step line shows at budgets off its corners."""
    x, y = map(np.asarray, line.get_data())
    after = line.get_drawstyle() == "steps-post"
    return [float(y[np.searchsorted(x, b, side="right") - 1] if after else y[np.searchsorted(x, b)]) for b in budgets]


def test_the_certificate_draws_each_accuracy_on_its_safe_side_between_two_budgets():
    axis, lines = certificate_of(full(), 2.0)
    between = [0.0122, 0.02, 0.1, 0.2, 0.45, 0.55, 0.8]
    assert heights(lines["steps-pre"], between) == pytest.approx([91.1, 70, 60, 45.6, 12.1, 0, 0])
    assert heights(lines["steps-post"], between) == pytest.approx([91.2, 91.2, 91.2, 84.2, 76, 58.3, 58.3])
    for budgets, line in (
        (CERTIFIED.eps[1:], lines["steps-pre"]),
        (full().norm(2).curve.eps, lines["steps-post"]),
    ):
        assert set(budgets) <= set(line.get_xdata())
    low, high = axis.get_xlim()
    assert 0.7 * 0.0123 < low < 0.0123
    assert 1 <= high < 1.2
    assert axis.get_xscale() == "log"


def test_the_certificate_names_its_regions_the_standard_budget_and_a_norm_without_one():
    figure = figures.draw_certificate(full())
    seen = texts(figure)
    for text in ("certified: proven right below", "attacked: broken", "not known", "clean 91.2 %", "8/255", "0.5"):
        assert text in seen
    assert seen.count("no certificate in ℓ∞") == 1
    assert "no certificate in ℓ₂" not in seen
    for axis in figure.axes:
        _, lines = certificate_of(full(), INF if "∞" in axis.get_title(loc="left") else 2.0)
        assert set(lines) == ({"steps-post"} if "∞" in axis.get_title(loc="left") else {"steps-pre", "steps-post"})


def test_the_standard_budget_has_a_mark_on_each_side():
    axis, _ = certificate_of(full(), 2.0)
    marks = [line for line in axis.lines if line.get_marker() == "s"]
    assert [list(line.get_xdata()) for line in marks] == [[0.5, 0.5]]
    assert list(marks[0].get_ydata()) == pytest.approx([58.3, 12.1])


@pytest.mark.parametrize(
    ("curve", "edges"),
    [
        (
            replace(CERTIFIED, eps=(0.0, 1e-9, 1.0), certified=(Rate(912, 1000), Rate(9, 1000), Rate(0, 1000))),
            (1e-9, 1),
        ),
        (replace(CERTIFIED, eps=(0.0, 1.0, 3.0), certified=(Rate(5, 9), Rate(5, 9), Rate(0, 9))), (0.125, 1)),
        (replace(CERTIFIED, eps=(0.0, 0.125), certified=(Rate(0, 9), Rate(0, 9)), median_radius=None), (0.125, 1)),
        (replace(CERTIFIED, eps=(0.0, 1e-310, 0.5), certified=(Rate(5, 9), Rate(4, 9), Rate(2, 9))), (0.125, 1)),
    ],
    ids=["tiny", "beyond the attack", "nothing proven", "subnormal"],
)
def test_the_certificate_spans_from_the_first_loss_to_the_largest_attack(curve, edges):
    axis, lines = certificate_of(with_parts(full(), 2.0, certified=curve), 2.0)
    low, high = axis.get_xlim()
    assert 0.75 * edges[0] < low < edges[0]
    assert edges[1] <= high < 1.6 * edges[1]
    assert all(np.isfinite(line.get_data()).all() for line in lines.values())


def test_what_is_given_is_drawn_even_where_the_proof_exceeds_the_attack():
    wrong = replace(CERTIFIED, certified=tuple(Rate(950, 1000) for _ in CERTIFIED.eps))
    _, lines = certificate_of(with_parts(full(), 2.0, certified=wrong), 2.0)
    assert heights(lines["steps-pre"], [0.3, 0.9]) == pytest.approx([95, 95])
    assert heights(lines["steps-post"], [0.3, 0.9]) == pytest.approx([76, 58.3])


def test_nothing_is_called_unknown_where_proof_and_attack_meet():
    rates = tuple(Rate(912, 1000) for _ in range(3))
    met = CertifiedCurve(2.0, (0.0, 0.5, 1.0), rates, 1.0)
    curve = SecurityCurve(2.0, (0.5, 1.0), rates[:2])
    audit = replace(full(), norms=(replace(full().norm(2), certified=met, curve=curve),))
    assert "not known" not in texts(figures.draw_certificate(audit))


def test_layers_are_named_in_the_order_of_the_model_and_a_zero_layer_says_so():
    figure = figures.draw_layer_norms(data_free())
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [layer.name for layer in data_free().layers]
    assert texts(figure).count("all weights are zero") == 1


def test_a_hundred_layers_stay_readable():
    many = tuple(layer(f"layer{i}", 6, 8, seed=i) for i in range(200))
    figure = figures.draw_compressibility(replace(data_free(), layers=many))
    assert len(figure.axes[0].get_yticklabels()) <= 80
    assert figure.get_size_inches()[1] < 15


def test_spectra_name_all_layers_when_few_and_the_extremes_when_many():
    assert all(layer.name in texts(figures.draw_spectra(full())) for layer in full().layers)
    seen = texts(figures.draw_spectra(data_free()))
    flattest = max(
        (layer for layer in data_free().layers if not layer.degenerate),
        key=lambda x: np.mean(x.row_norms) / x.row_norms[0],
    )
    assert seen.count("steepest: ") == seen.count("flattest: ") == 4
    assert f"flattest: {flattest.name}" in seen


def test_spectra_need_two_singular_values():
    assert figures.draw_spectra(one_layer()) is None


def beside_one_bound():
    """A norm with both sides, and one of which only a bound is known."""
    return replace(full(), norms=(full().norm(2), one_layer().norms[0]))


def test_every_mark_says_what_it_is_and_what_it_shows():
    drawing = drawn(figures.draw_compressibility, full)
    titles = re.findall(r"<title>([^<]+)</title></use>", drawing)
    assert len(titles) == 2 * 3 * 4  # panels, layers, fractions
    assert f"conv1, 10 % kept: {number(full().layers[0].row_error[1])}" in titles
    curve = drawn(figures.draw_security_curve, full)
    assert f"<title>at {number(8 / 255)}: 41.7 %</title>" in curve
    spectra = drawn(figures.draw_spectra, full)
    assert spectra.count("<title>features.fc</title>") == 2  # lines without marks have one each


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_on_a_phone_panels_stand_one_below_the_other(draw):
    wide, narrow = draw(full()), draw(full(), narrow=True)
    assert len(narrow.axes) == len(wide.axes)
    assert narrow.get_figwidth() < 5
    lefts = {round(axis.get_subplotspec().colspan.start) for axis in narrow.axes}
    assert lefts == {0}
    assert all(axis.yaxis.get_tick_params()["labelleft"] for axis in narrow.axes)


def test_sensitivity_says_which_side_is_missing_and_rounds_each_bound_to_its_side():
    seen = texts(figures.draw_sensitivity(full()))
    assert "certified: not available" in seen
    assert "1844" in seen  # 1843.2 is an upper bound
    bounded = texts(figures.draw_sensitivity(beside_one_bound()))
    assert "3.21 × 10¹⁷" in bounded
    assert "largest found: not available" in bounded
    assert figures.draw_sensitivity(one_layer()) is None  # one number is no figure


def test_sensitivity_shows_the_product_of_norms_only_where_another_argument_is_better():
    def triangles(audit):
        axis = figures.draw_sensitivity(audit).axes[0]
        return sorted(float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "v")

    assert triangles(full()) == [1843.2, 5400.0]
    assert "product of norms" in texts(figures.draw_sensitivity(full()))
    alone = replace(full().norm(2).lipschitz, arguments=())
    audit = replace(full(), norms=(norm_result(2.0, lipschitz=alone),))
    assert triangles(audit) == [1843.2]
    assert "product of norms" not in texts(figures.draw_sensitivity(audit))


def test_the_numbers_of_close_bounds_stay_apart():
    close = replace(full().norm(2).lipschitz, upper=12.41)
    figure = figures.draw_sensitivity(replace(full(), norms=(norm_result(2.0, lipschitz=close),)))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 2
    assert not boxes[0].overlaps(boxes[1])


def test_names_are_text_and_never_markup_or_mathematics():
    names = ("_orig_mod.$x$", HOSTILE, "bell\x07 and 中文")
    audit = replace(full(), layers=tuple(layer(name) for name in names))
    seen = texts(figures.draw_spectra(audit))
    assert "_orig_mod.$x$" in seen
    assert HOSTILE[:8] in seen
    assert "bell\N{REPLACEMENT CHARACTER} and 中文" in seen


@pytest.mark.parametrize(
    ("value", "side", "printed"),
    [
        (0.0, "nearest", "0"),
        (1.0, "upper", "1.00"),
        (0.99999, "lower", "0.999"),
        (0.99999, "upper", "1.00"),
        (12.34, "upper", "12.4"),
        (99999.7, "nearest", "1.00 × 10⁵"),
        (12345.6, "lower", "12345"),
        (1.234e17, "upper", "1.24 × 10¹⁷"),
        (0.000123456, "lower", "1.23 × 10⁻⁴"),
        (-2.5, "nearest", "-2.50"),
        (INF, "upper", "∞"),
        (math.nan, "nearest", "–"),
        (None, "lower", "–"),
    ],
)
def test_numbers_have_three_digits_and_a_bound_keeps_its_side(value, side, printed):
    assert number(value, side) == printed


def test_budgets_are_printed_in_steps_of_255_only_when_they_are_whole():
    assert [budget(eps) for eps in (4 / 255, 0.03, 0.5, 2.0, 3.0)] == ["4/255", "0.03", "0.5", "2", "3"]


def test_universal_perturbations_are_drawn_beside_the_range_of_the_random_ones():
    figure = figures.draw_universal(full())
    (axis,) = figure.axes
    intervals = sorted(tuple(np.sort(segment[:, 0])) for bar in axis.collections for segment in bar.get_segments())
    random = (100 / 456, 1700 / 456)
    fitted_and_free = [tuple(100 * side for side in Rate(hits, 456).interval) for hits in (140, 56, 41)]
    np.testing.assert_allclose(intervals, sorted([random, random, *fitted_and_free]))
    text = texts(figure)
    assert all(rate in text for rate in ("30.7 %", "12.3 %", "9.0 %", "1.8 %"))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["ℓ∞, eps 8/255", "ℓ₂, eps 0.5"]
    assert "data-free" in text
    fitted = with_parts(full(), INF, universal=full().norm(INF).universal[:1])
    assert "data-free" not in texts(figures.draw_universal(fitted))
