"""``brittle export`` and ``brittle schema`` as a user meets them."""

import json
import pathlib

import pytest

from brittle.cli.commands import run
from helpers import audits
from helpers.command_line import one_line


@pytest.fixture
def saved(tmp_path):
    audits.attentive().save(tmp_path / "audit.json")
    return tmp_path


def test_a_card_replaces_nothing(saved, tmp_path, capsys):
    card = tmp_path / "README.md"
    assert run(["export", "card", str(saved), "-o", str(card)]) == 0
    assert "attn.q" in card.read_text(encoding="utf-8")
    capsys.readouterr()
    assert run(["export", "card", str(saved), "-o", str(card)]) == 2
    one_line(capsys, "not there yet")


def test_tables_go_to_standard_output(saved, capsys):
    assert run(["export", "table", str(saved / "audit.json"), "--format", "latex"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("\\begin{table}")
    assert captured.err == ""


def test_figures_are_files(tmp_path, capsys):
    audits.one_layer().save(tmp_path / "audit.json")
    assert run(["export", "figures", str(tmp_path), "--format", "png", "-o", str(tmp_path / "figures")]) == 0
    named = [line.removeprefix("Figure: ") for line in capsys.readouterr().out.splitlines()]
    assert named == [str(path) for path in map(pathlib.Path, named) if path.read_bytes().startswith(b"\x89PNG")]
    assert named


@pytest.mark.parametrize("what", ["table", "figures"])
def test_another_format_is_refused(what, saved, capsys):
    assert run(["export", what, str(saved), "--format", "docx"]) == 2
    one_line(capsys, "format", "docx")


def test_a_schema_is_json(capsys):
    assert run(["schema", "audit"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Audit"
    assert run(["schema", "audits"]) == 2
    one_line(capsys, "audits", "comparison")
