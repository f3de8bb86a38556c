"""What a notebook shows: cards that follow from the numbers, and figures by their names."""

from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from brittle.errors import InputError
from brittle.reporting.verdict import short_findings
from brittle.results import ComparedNetwork, Comparison
from helpers.audits import HOSTILE, INF, data_free, full, one_layer


class Text(HTMLParser):
    """The words of a card, and its elements."""

    def __init__(self, card: str) -> None:
        super().__init__(convert_charrefs=True)
        self.words, self.tags = [], set()
        self.feed(card)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.words.append(data)


def test_an_audit_shows_its_verdict_short_findings_and_accuracies():
    words = Text(full()._repr_html_()).words
    assert words[0] == full().model
    assert [word for word in words if word in short_findings(full())] == [*short_findings(full())]
    assert [word for word in words if word.endswith(" %")] == ["91.2 %", "41.7 %", "91.2 %", "58.3 %"]
    assert repr(full()).startswith("<Audit of small CNN: weakened. ")
    assert len(repr(full())) < 250
    assert "Robust" not in data_free()._repr_html_()


def test_an_evaluation_and_a_comparison_show_theirs():
    evaluation = full().norm(INF).evaluation
    assert [word for word in Text(evaluation._repr_html_()).words if "%" in word] == ["91.2 %", "41.7 %"]
    assert repr(evaluation).startswith("<Evaluation of 1000 samples, ℓ∞ 8/255: clean 91.2 %")
    both = Comparison((ComparedNetwork("dense", full()), ComparedNetwork("other", full())))
    words = Text(both._repr_html_()).words
    assert {"dense", "other", "8,576", "91.2 %", "41.7 %", "58.3 %"} <= set(words)
    assert repr(both) == "<Comparison: other beside dense>"


def test_a_hostile_name_stays_text():
    card = Text(one_layer()._repr_html_())
    assert HOSTILE in card.words
    assert not card.tags & {"script", "img"}


def test_figures_are_plotted_by_name_and_show_themselves():
    figure = full().plot("spectra", narrow=True)
    assert isinstance(figure, Figure)
    assert figure._repr_svg_().startswith("<svg")
    assert full().plot().get_label() == "Robust accuracy against the size of the perturbation"
    both = Comparison((ComparedNetwork("dense", full()), ComparedNetwork("other", full())))
    assert len(both.plot("curves").axes) == 2
    with pytest.raises(InputError, match=r"name: expected one of security_curve, .*; got 'spectrum'"):
        full().plot("spectrum")
    with pytest.raises(InputError, match="name: expected a figure of what was measured; got directions"):
        data_free().plot("directions")
