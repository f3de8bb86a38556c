"""From jobs to one page: what is done once, what failed, what is drawn again, and how tables compare."""

import dataclasses
import json

import pandas as pd
import pytest

from brittle.errors import InputError
from brittle.experiments import redraw, reproduce, reproducing
from brittle.experiments.stored import Made, compare_tables, read_table, write_table
from brittle.results import ClaimVerdict
from helpers.experiments import lines
from helpers.grids import in_this_process

VERDICTS = [ClaimVerdict.REPRODUCED, ClaimVerdict.OPPOSITE, ClaimVerdict.NOT_TESTABLE]


def reproduced(experiments, out, **options):
    return reproduce(experiments, "smoke", out, executor=in_this_process, **options)


def test_claims_are_judged_and_everything_is_on_the_page(tmp_path):
    told = []
    result = reproduced([lines()], tmp_path, progress=lambda *parts: told.append(parts))
    (experiment,) = result.experiments
    assert [claim.verdict for claim in experiment.claims] == VERDICTS
    assert (experiment.rows, experiment.jobs, experiment.failed) == (12, 12, ())
    page = (tmp_path / "report.html").read_text()
    for claim in experiment.claims:
        assert claim.sentence in page
        assert claim.verdict in page
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "lines" / "figure.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "results.json").read_text())["experiments"][0]
    assert [claim["verdict"] for claim in written["claims"]] == VERDICTS
    assert written["claims"][0]["statistic"]["value"] == experiment.claims[0].statistic.value
    assert told[-1] == ("lines jobs", 12, 12)


def test_what_is_done_is_not_done_again_and_other_grids_stay_apart(tmp_path):
    wide = lines(smoke={"x": (1, 2, 3, 4, 5), "seed": (0, 1, 2)})
    reproduced([wide], tmp_path)
    keys = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "lines" / "jobs").glob("*/row.json")}
    (experiment,) = reproduced([lines()], tmp_path).experiments
    assert experiment.rows == 12
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "lines" / "jobs").glob("*/row.json")} == keys


def test_jobs_that_fail_are_named_and_the_rest_is_judged(tmp_path):
    broken = lines(smoke={"x": (1, 2, 3, 4), "seed": (0, 1, 2), "broken": 3})
    (experiment,) = reproduced([broken], tmp_path).experiments
    assert (experiment.rows, len(experiment.failed)) == (9, 3)
    assert "3 is broken" in experiment.failed[0]
    assert [claim.verdict for claim in experiment.claims] == VERDICTS
    assert "3 is broken" in (tmp_path / "report.html").read_text()


def test_without_a_single_row_nothing_is_judged(tmp_path):
    (experiment,) = reproduced([lines(smoke={"x": 1, "seed": 0, "broken": 1})], tmp_path).experiments
    assert (experiment.rows, experiment.claims) == (0, ())
    assert "1 is broken" in (tmp_path / "report.html").read_text()


def test_figures_and_verdicts_are_drawn_again_from_the_table_alone(tmp_path):
    first = reproduced([lines()], tmp_path)
    page = (tmp_path / "report.html").read_text()
    for path in sorted((tmp_path / "lines" / "jobs").rglob("*.json")):
        path.unlink()
    assert redraw([lines()], tmp_path) == first
    assert (tmp_path / "report.html").read_text() == page
    strict = dataclasses.replace(lines().claims[0], at_least=5.0)
    (experiment,) = redraw([lines(claims=(strict,))], tmp_path).experiments
    assert experiment.claims[0].verdict == ClaimVerdict.NOT_REPRODUCED


def test_flags_are_counted_row_by_row():
    table = pd.DataFrame({"flags": ["", "masked at 1", "masked at 1; flat curve"]})
    assert reproducing.flags_raised(table) == ("masked at 1 in 2 of 3 rows", "flat curve in 1 of 3 rows")
    assert (
        reproducing.flags_raised(table.rename(columns={"flags": "flags_90"}))[1]
        == "flat curve (flags_90) in 1 of 3 rows"
    )
    assert reproducing.flags_raised(table.drop(columns="flags")) == ()


def test_names_and_errors_of_strangers_cannot_act_on_the_page(tmp_path):
    odd = dataclasses.replace(lines(), title="<script>alert(1)</script>", about=("a\x1b[2J",))
    reproduced([odd], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "\x1b" not in page


# --- tables -------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    rows = [
        {"x": x, "kind": kind, "seed": seed, "effect": 2 * x + 0.1 * ((seed * x) % 3), "flat": 1.0, "word": "w"}
        for x in (1, 2, 3, 4)
        for kind in "ab"
        for seed in (0, 1, 2)
    ]
    return pd.DataFrame(rows)


def test_a_table_is_read_as_it_was_written(table, tmp_path):
    table["parts"] = [[1, 2]] * len(table)
    made = Made("lines", "small", "brittle reproduce lines", 24, ("one failed",))
    write_table(table, tmp_path / "table.parquet", made)
    read, told = read_table(tmp_path / "table.parquet")
    assert told == made
    pd.testing.assert_frame_equal(read.drop(columns="parts"), table.drop(columns="parts"))
    assert [list(parts) for parts in read["parts"]] == table["parts"].tolist()


def test_a_file_that_is_no_such_table_is_refused(table, tmp_path):
    table.to_parquet(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("text")
    for name in ("other", "text", "none"):
        with pytest.raises(InputError, match="table: expected a table of brittle reproduce"):
            read_table(tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match="values of one type"):
        write_table(table.assign(mixed=[1, "a"] * 12), tmp_path / "mixed.parquet", Made("x", "small", "x", 1))


def test_a_table_agrees_with_itself_and_not_with_its_opposite(table):
    checks = {check.column: check for check in compare_tables(table, table, ("x", "kind"))}
    assert set(checks) == {"effect", "flat"}
    same = checks["effect"]
    assert (same.points, same.correlation, same.overlap, same.turned, same.agrees) == (
        8,
        pytest.approx(1),
        1.0,
        (),
        True,
    )
    assert checks["flat"].correlation is None
    assert checks["flat"].agrees
    (turned, _) = compare_tables(table.assign(effect=10 - table.effect), table, ("x", "kind"))
    assert turned.correlation == pytest.approx(-1)
    assert turned.turned == ("x",)
    assert not turned.agrees
    (moved, _) = compare_tables(table.assign(effect=table.effect + 100), table, ("x", "kind"))
    assert (moved.correlation, moved.overlap, moved.agrees) == (pytest.approx(1), 0.0, False)


def test_tables_are_compared_over_what_both_have(table):
    (effect, _) = compare_tables(table[table.x < 4], table[table.x > 1], ("x", "kind"))
    assert effect.points == 4
    with pytest.raises(InputError, match="none in common"):
        compare_tables(table[table.x < 2], table[table.x > 2], ("x", "kind"))


def test_a_check_needs_a_stored_table_and_tells_where_they_differ(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="table: expected one of lines"):
        reproduced([lines()], tmp_path, check=True)
    monkeypatch.setattr("brittle.experiments.reproducing.STORED", tmp_path)
    kept, made = read_table(tmp_path / "lines" / "table.parquet")
    write_table(kept.assign(effect=-kept["effect"]), tmp_path / "lines.parquet", made)
    (experiment,) = reproduced([lines()], tmp_path, check=True).experiments
    assert [check.agrees for check in experiment.checks] == [False]
    page = (tmp_path / "report.html").read_text()
    assert "apart in effect" in page
    empty = tmp_path / "empty"
    (drawn,) = redraw([lines()], empty).experiments
    assert drawn.claims[0].verdict == ClaimVerdict.OPPOSITE
    assert reproducing.stored_path(lines()) == tmp_path / "lines.parquet"
