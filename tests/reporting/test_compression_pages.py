"""Pages of a compression and of a frontier: what they say follows from the numbers, whoever wrote these."""

import json
import re
from dataclasses import replace

import pytest

from brittle.errors import InputError
from brittle.reporting import comparison_html, comparison_lines
from brittle.reporting.compression import compression_lines, draw_kept
from brittle.reporting.frontiers import draw_frontier, frontier_html, frontier_lines
from brittle.reporting.redrawing import result_html
from brittle.results import (
    ComparedNetwork,
    Comparison,
    CompressionRecipe,
    CompressionRequest,
    Frontier,
    FrontierRow,
    GroupCut,
    NetworkSize,
    Paired,
)
from helpers.audits import HOSTILE, INF, full

SIZE = NetworkSize(1000, 4000, 4000)
ASKED = CompressionRequest("filters", "planner", "influence", "macs", 0.6)
RECIPE = CompressionRecipe(
    asked=ASKED, arch="fcn", arguments={}, mean=(), std=(), input_shape=(1, 8, 8), classes=10, before=SIZE, after=SIZE,
    groups=(GroupCut("0", 16, 4), GroupCut("2", 32, 32)), share=0.597, candidate="k_term",
    repair=("layers fitted", "fine-tuned for 1 epoch"), warnings=("layer 0 is thin",), whole={"4": f"kept {HOSTILE}"},
    seconds={"planning": 12.0, "repair": 90.0},
)  # fmt: skip


def test_sentences_say_what_was_asked_and_what_was_met():
    said = compression_lines(RECIPE)
    assert said[0].startswith("59.7 % of the multiply-accumulates went (asked for: 60 %)")
    assert "1 of 2 groups of layers" in said[0]
    assert "planner (as much as robust accuracy can spare), of whose candidates it took k_term" in said[1]
    assert said[2:] == (
        "Afterwards: layers fitted, fine-tuned for 1 epoch.",
        "Planning took 12.0 s, repair took 1 min 30 s.",
        "Warning: layer 0 is thin.",
    )


def test_a_score_of_the_users_has_its_name_alone():
    theirs = replace(RECIPE, asked=replace(ASKED, allocate="k_term", score="theirs"), candidate=None)
    assert compression_lines(theirs)[1].endswith("What goes first: the least by theirs.")
    drawn = replace(theirs, asked=replace(theirs.asked, allocate="random"))
    assert compression_lines(drawn)[1].endswith("What goes first: drawn at random.")


def test_bars_are_as_long_as_what_is_kept():
    axis = draw_kept(RECIPE).axes[0]
    assert [bar.get_width() for bar in axis.patches] == [100, 100, 25, 100]
    assert [text.get_text() for text in axis.texts] == ["4 of 16", "32 of 32"]
    assert draw_kept(replace(RECIPE, groups=())) is None


def comparison(recipe=RECIPE) -> Comparison:
    networks = (ComparedNetwork(name, full(), SIZE) for name in ("uncompressed", "compressed"))
    return Comparison(tuple(networks), compression=recipe)


@pytest.mark.parametrize("remove", ["filters", "ranks", "weights"])
def test_the_page_of_a_compression_names_what_went_and_what_stays(remove):
    page = comparison_html(comparison(replace(RECIPE, asked=replace(ASKED, remove=remove))))
    assert "compressed, with 40.3 % of the multiply-accumulates: " in comparison_lines(comparison())[0]
    assert HOSTILE not in page
    assert "&lt;/script&gt;" in page
    assert ("A group is named after its first layer" in page) is (remove == "filters")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"asked": replace(ASKED, remove="heads")}, "compression.asked: expected remove of filters, ranks, weights"),
        ({"asked": replace(ASKED, target="joules")}, "compression.asked: expected a target of parameters"),
        ({"seconds": {"planning": INF}}, "compression: expected seconds of at least 0, below"),
        ({"groups": (GroupCut("0", 0, 0),)}, "expected 0 <= after <= before, and 1 before"),
    ],
)
def test_a_recipe_that_no_page_can_show_is_refused(change, said):
    with pytest.raises(InputError, match=said):
        Comparison.from_json(comparison(replace(RECIPE, **change)).to_json())


# Frontiers


def row(allocate: str, ratio: float, robust: int, *, measured: bool = True, proven: bool = True) -> FrontierRow:
    """A network with so many robust samples of 1000 in l_inf."""
    norms = []
    for norm in full().norms:
        evaluation = replace(norm.evaluation, robust_correct=robust) if norm.p == INF else norm.evaluation
        evaluation = replace(evaluation, proven=7 if proven else 0)
        norms.append(replace(norm, evaluation=evaluation, certified=norm.certified if proven else None))
    paired = (Paired("robust", INF, 8 / 255, 1000, tuple(range(40)), ()),)
    seconds = {"planning": 3.0, "repair": 4.0, "measuring": 500.0}
    if not measured:
        return FrontierRow(allocate, ratio, warnings=(f"so much cannot go {HOSTILE}",))
    return FrontierRow(allocate, ratio, ratio + 0.01, SIZE, tuple(norms), paired, seconds=seconds)


def frontier(*rows: FrontierRow, min_robust: float | None = 0.3, proven: bool = True) -> Frontier:
    base = replace(row("none", 0.0, 417, proven=proven), share=0.0, seconds={}, paired=())
    return Frontier("net", replace(ASKED, allocate="all"), ("refitted",), base, rows, min_robust, full().signature)


ROWS = (
    row("planner", 0.5, 400),
    row("random", 0.5, 310),
    row("planner", 0.75, 290),
    row("random", 0.75, 0, measured=False),
)


def test_the_smallest_network_above_the_floor_is_named_and_marked_wherever_it_stands():
    found = frontier(*ROWS)
    assert "has 49.0 % of the multiply-accumulates (allocated by planner)" in frontier_lines(found)[0]
    page = frontier_html(found)
    marked = re.findall(r'<tr class="mark"><th scope="row" class="name">(\w+)<small>(.*?)</small>', page)
    assert marked == [("planner", "50&nbsp;%")] * 2  # among the networks, and among the sensitivities
    assert "No compressed network keeps 90 %" in frontier_lines(frontier(*ROWS, min_robust=0.9))[0]
    assert 'class="mark"' not in frontier_html(frontier(*ROWS, min_robust=None))


def test_every_network_has_its_row_also_one_that_could_not_be_made():
    page = frontier_html(frontier(*ROWS))
    table = page.partition('aria-label="Networks"')[2].partition("</table>")[0]
    assert re.findall(r'class="name">(\w+)<', table) == ["uncompressed", "planner", "random", "planner", "random"]
    assert [*re.findall(r"7\.0&nbsp;s|7\.0 s", table)] == ["7.0 s"] * 3  # without measuring
    assert "so much cannot go &lt;/script&gt;" in table
    assert HOSTILE not in page
    assert "random at 0.75" in frontier_lines(frontier(*ROWS))[-1]


def test_columns_without_numbers_are_left_out():
    bare = frontier(row("planner", 0.5, 400, proven=False), proven=False)
    for found, shown in ((frontier(*ROWS), True), (bare, False)):
        page = frontier_html(found)
        assert ('<th scope="col">Proven, ℓ₂</th>' in page) is shown
        assert ('class="text">Remarks</th>' in page) is shown


def test_lines_pass_through_the_uncompressed_network_and_each_of_the_allocations():
    axes = draw_frontier(frontier(*ROWS)).axes
    lines = [line for line in axes[1].lines if len(line.get_xdata()) > 2]
    assert [*lines[0].get_xdata()] == pytest.approx([24, 49, 100])
    assert [*lines[0].get_ydata()] == pytest.approx([29, 40, 41.7])


def test_a_frontier_that_no_page_can_show_is_refused():
    endless = replace(ROWS[0], seconds={"planning": INF})
    with pytest.raises(InputError, match=r"rows\.0: expected seconds of at least 0, below"):
        Frontier.from_json(frontier(endless).to_json())
    document = json.loads(frontier(*ROWS).to_json())
    document["base"]["norms"] = []
    with pytest.raises(InputError, match="expected an uncompressed network that was attacked in every norm"):
        Frontier.from_json(json.dumps(document))


def test_the_page_of_a_result_is_found_by_what_it_is():
    assert result_html(frontier(*ROWS)) == frontier_html(frontier(*ROWS))
    assert result_html(comparison()) == comparison_html(comparison())
    with pytest.raises(TypeError, match="has no page"):
        result_html(SIZE)
