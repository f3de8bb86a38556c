"""Tables, cards and figure files say what the audit says, and nothing in a name acts in them."""

import dataclasses

import huggingface_hub
import pytest

from brittle.reporting.card import model_card
from brittle.reporting.redrawing import write_figures
from brittle.reporting.tables import accuracies, in_latex, latex_table, layers, markdown_table
from helpers import audits


def test_accuracies_are_those_of_the_evaluations():
    table = accuracies(audits.full())
    assert [row[:5] for row in table.rows] == [
        ("ℓ∞", "8/255", "1,000", "91.2 % (89.3 to 92.8)", "41.7 % (38.7 to 44.8)"),
        ("ℓ₂", "0.5", "1,000", "91.2 % (89.3 to 92.8)", "58.3 % (55.2 to 61.3)"),
    ]
    assert accuracies(audits.data_free()) is None


def test_layers_have_a_row_each():
    audit = audits.full()
    table = layers(audit)
    assert [row[0] for row in table.rows] == [layer.name for layer in audit.layers]
    assert {len(row) for row in table.rows} == {len(table.head)}
    assert " to " in table.rows[0][3]  # between bounds
    assert " to " not in table.rows[1][3]  # exact


@pytest.mark.parametrize("audit", [audits.full(), audits.data_free(), audits.one_layer()], ids=lambda each: each.model)
def test_markdown_keeps_its_columns_whatever_layers_are_called(audit):
    table = layers(dataclasses.replace(audit, layers=(*audit.layers, audits.layer("a|b\nc", seed=3))))
    lines = markdown_table(table).replace("\\|", "").splitlines()
    assert {line.count("|") for line in lines} == {len(table.head) + 1}
    assert "<img" not in markdown_table(table).replace("\\<", "")


def test_latex_is_plain_ascii_and_names_do_not_act_in_it():
    assert in_latex(r"50 % of $x_1$ & \input{a}") == r"50~\% of \$x\_1\$ \& \textbackslash{}input\{a\}"
    for table in (accuracies(audits.full()), layers(audits.full()), layers(audits.one_layer())):
        text = latex_table(table)
        assert text.isascii(), [sign for sign in text if not sign.isascii()]
        assert text.count("\\\\\n") == len(table.rows) + 1


def test_the_card_says_what_the_audit_says():
    audit = audits.full()
    card = model_card(audit)
    assert audit.verdict.headline in card.replace("\\", "")
    assert "41.7 % (38.7 to 44.8)" in card
    assert audit.signature.weights[:12] in card
    assert huggingface_hub.ModelCard(card).data.tags == ["adversarial-robustness", "brittle"]


def test_hubs_read_the_accuracies_from_the_card():
    results = huggingface_hub.ModelCard(model_card(audits.full(), data="cifar10")).data.eval_results
    assert [(each.dataset_name, each.metric_type, each.metric_value) for each in results] == [
        ("cifar10", "accuracy", 0.912), ("cifar10", "robust_accuracy", 0.417), ("cifar10", "robust_accuracy", 0.583)
    ]  # fmt: skip


def test_nothing_in_a_name_acts_on_the_card():
    assert "<" not in model_card(audits.one_layer()).replace("\\<", "")


@pytest.mark.parametrize(("kind", "begins"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_figures_are_files_of_their_kind_and_always_the_same(kind, begins, tmp_path):
    audit = audits.one_layer()
    written = [write_figures(audit, tmp_path / name, kind) for name in ("one", "two")]
    assert written[0]
    for first, second in zip(*written, strict=True):
        assert first.suffix == f".{kind}"
        assert first.read_bytes().startswith(begins)
        assert first.read_bytes() == second.read_bytes()
