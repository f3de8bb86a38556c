"""The HTML report of synthetic audits: complete, self-contained, deterministic and safe against hostile names."""

import ast
import base64
import functools
import hashlib
import html
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from brittle.reporting import figures
from brittle.reporting import page as report
from brittle.reporting.columns import VISIBLE_GROUPS, layer_columns
from brittle.reporting.glossary import GLOSSARY, glossary_of
from brittle.reporting.page import report_html, write_report
from brittle.reporting.verdict import short_findings
from brittle.reporting.weighing import uses
from brittle.results import Audit, ClassAccuracy, Flag, NotMeasured, Rate, Signature, Verdict
from brittle.results.wording import number, share
from helpers.audits import HOSTILE, INF, SUP, TWO, attentive, data_free, full, one_layer, with_parts
from helpers.processes import run_code

AUDITS = [full, data_free, one_layer, attentive]
VOID = {"meta", "br", "input", "img", "link", "hr"}


@functools.cache
def page(make) -> str:
    """The report, rendered once for all the tests that only read it."""
    return report_html(make())


@functools.cache
def parsed(make) -> "Page":
    """The same, parsed once."""
    return Page(page(make))


class Page(HTMLParser):
    """Elements with their attributes and the text in them; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style", "svg"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def embedded(text: str) -> str:
    return re.search(r'<script type="application/json" id="audit-data">(.*?)</script>', text, re.DOTALL)[1]


@pytest.mark.parametrize("make", AUDITS)
def test_the_verdict_and_three_short_findings_come_first_and_all_findings_under_why(make):
    audit, text = make(), parsed(make).text.replace("\N{NO-BREAK SPACE}", " ")
    start = text.index(audit.verdict.headline)
    assert text.index(audit.verdict.level.capitalize()) < start
    short = [text.index(finding) for finding in short_findings(audit)]
    assert len(short) <= 3
    numbers = text.index("Key numbers", text.index("Provenance and data", start))
    assert [start, *short] == sorted([start, *short])
    why = text.index(" Why ", numbers)
    assert max([start, *short]) < numbers < why < text.index("What was not measured")
    positions = [text.index(finding, why) for finding in audit.verdict.findings]
    assert positions == sorted(positions)


@pytest.mark.parametrize("make", AUDITS)
def test_every_layer_and_everything_not_measured_is_named_beside_its_reason(make):
    audit, source = make(), page(make)
    table = source[source.index('<table id="layer-table"') : source.index("</table>", source.index("layer-table"))]
    for layer in audit.layers:
        assert f"<code>{html.escape(layer.name)}</code>" in table
    part = source[source.index('<section id="not-measured">') : source.index('<section id="glossary">')]
    for item in audit.not_measured:
        assert f"<code>{html.escape(item.name)}</code>" in part
        assert part.count(f"<dt>{html.escape(item.reason)}</dt>") == 1


@pytest.mark.parametrize("make", AUDITS)
def test_the_page_is_well_formed_and_asks_for_nothing_outside_itself(make):
    source = page(make)
    for tag, attributes in parsed(make).elements:
        assert tag not in {"link", "iframe", "img", "image", "object", "embed", "base"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))
    assert set(re.findall(r"https?://[^\s\"'<]*", source)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("make", AUDITS)
def test_drawings_are_wellformed_and_ids_unique_over_the_page(make):
    source = page(make)
    drawings = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    expected = {full: 20, data_free: 6, one_layer: 4, attentive: 6}[make]  # each wide and narrow
    assert len(drawings) == expected
    for drawing in drawings:
        ET.fromstring(drawing)
    elements = parsed(make).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {(attributes.get("href") or "#")[1:] for _, attributes in elements} - {""}
    assert targets <= set(ids)


@pytest.mark.parametrize("make", AUDITS)
def test_the_embedded_data_are_the_audit(make):
    assert Audit.from_json(embedded(page(make))) == make()


def test_the_same_audit_gives_the_same_bytes_in_any_process(tmp_path):
    assert report_html(full()) == page(full)
    write_report(full(), tmp_path / "new" / "report.html")
    written = (tmp_path / "new" / "report.html").read_bytes()
    assert written == page(full).encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    code = (
        "import hashlib, sys, helpers.audits, brittle.reporting.page as r\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "print(hashlib.sha256(r.report_html(helpers.audits.full()).encode()).hexdigest())"
    )
    other = run_code(code, env={"PYTHONHASHSEED": "7"})
    assert other.strip() == hashlib.sha256(written).hexdigest()


def test_a_report_survives_the_audits_json():
    assert report_html(replace(Audit.from_json(full().to_json()), seconds=full().seconds)) == page(full)


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")
    monkeypatch.setattr(report, "report_html", lambda audit: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write_report(full(), target)
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_hostile_text_stays_text_wherever_it_comes_from():
    quote = "\"'><script>alert(1)</script><!--"
    audit = replace(
        one_layer(),
        verdict=Verdict(quote, quote, (quote, HOSTILE)),
        not_measured=(NotMeasured(quote, quote),),
        signature=Signature({quote: quote}, quote, 0, {quote: (quote,)}, quote, quote),
    )
    source = report_html(audit)
    read = Page(source)
    assert [tag for tag, _ in read.elements].count("script") == 2
    assert "alert(1)" in read.text
    assert quote in read.text
    body = dict(next(attributes for tag, attributes in read.elements if tag == "body"))
    assert body["data-model"] == HOSTILE
    assert not re.search(r"<img|<script>alert|<!--", source)
    assert Audit.from_json(embedded(source)) == audit


def test_only_the_pages_own_script_may_run():
    source = page(full)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', source)[1]
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert script.count("\n") <= 65


def test_key_numbers_carry_counts_intervals_and_the_attack():
    text = parsed(full).text
    for words in (
        "91.2 % 912 of 1,000 95 % interval 89.3 to 92.8 %",
        "ℓ∞, eps 8/255 41.7 % 417 of 1,000 95 % interval 38.7 to 44.8 %",
        "ℓ₂, eps 0.5 58.3 % 583 of 1,000 95 % interval 55.2 to 61.3 % proven: 12.1 %",
        "apgd-ce, apgd-dlr, square",
        "steps 20; step_size 0.25; targeted yes; note none; sizes 1, 2",
        "upper estimate",
    ):
        assert words in text


def test_sensitivity_names_the_side_of_each_number_and_the_module_that_forbids_one():
    text = parsed(full).text
    assert "Largest found (lower bound)" in text
    assert "Certified (upper bound)" in text
    assert "12.4 1844 149 200 multipliers" in text
    assert "96.2 not available – 200 norm (LayerNorm): not Lipschitz on all inputs" in text


def test_proven_and_attacked_accuracy_stand_side_by_side_at_every_budget_of_the_curve():
    part = page(full).partition('aria-label="Proven and attacked accuracy"')[2].partition("</table>")[0]
    rows = re.findall(r'<tr[^>]*><th scope="row" class="nowrap">(.*?)</th>(.*?)</tr>', part)
    read = [[eps, *re.findall(r'<td class="nowrap">(.*?)</td>', cells)] for eps, cells in rows]
    assert [[html.unescape(cell).replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in read] == [
        ["ℓ₂, 0.125", "60.0 %", "600 of 1,000", "84.2 %", "842 of 1,000"],
        ["ℓ₂, 0.25", "45.6 %", "456 of 1,000", "76.0 %", "760 of 1,000"],
        ["ℓ₂, 0.5 (standard)", "12.1 %", "121 of 1,000", "58.3 %", "583 of 1,000"],
        ["ℓ₂, 1", "0.0 %", "0 of 1,000", "24.0 %", "240 of 1,000"],
    ]
    assert "Proven and attacked accuracy" not in page(data_free)


def test_what_is_weighed_stands_in_a_table_where_it_was_measured():
    older = Page(report_html(with_parts(full(), INF, random_responses=(), class_responses=()))).text
    assert "Whether compressibility explains it" not in older
    text, found = parsed(full).text, uses(full().norm(INF), full().layers)
    assert len(found) == len(full().layers)
    for use in found:
        energies = f"{100 * use.attack:.1f} % {100 * use.random:.1f} %"
        assert f"{use.layer} {number(use.excess)} {use.k} {energies} 2.50 1.00 2.50" in text
    assert uses(full().norm(2.0), full().layers) == []


def test_what_the_network_decides_by_has_a_section_where_it_was_measured():
    text, features = parsed(full).text.replace("\N{NO-BREAK SPACE}", " "), full().features
    assert f"all 40 {share(features.cosine)} {number(features.distance / 2)} {share(features.ratio)} 8" in text
    assert f"4 and 9 40 {share(features.cosine)}" in text
    assert "a linear classifier through all samples at most 4.1 %" in text
    older = Page(report_html(replace(full(), features=None))).text
    assert "What the network decides by" not in older
    assert "Share it decides by" not in older


def test_the_badge_names_the_budget_that_decided_and_warnings_stand_out():
    verdict = replace(full().verdict, decided_by=INF, findings=("Warning: Only <b>3 %.", "Plain."))
    source = report_html(replace(full(), verdict=verdict))
    assert '<span class="by">ℓ∞, eps 8/255</span>' in source
    assert '<strong class="fragile">Warning:</strong> Only &lt;b&gt;3' in source
    assert "Warning: Only <b>3 %." in Page(source).text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_gap_between_proof_and_attack_is_stated_at_every_standard_budget():
    text = parsed(full).text
    assert (
        "At eps 0.5 in ℓ₂ at least 12.1 % (proven) and at most 58.3 % (attacked) of the samples are robust: 46.2 points"
        " are not decided. The median certified radius of the samples that are right is 0.246, 0.493 times the standard"
        " budget."
    ) in text
    assert (
        "At eps 8/255 in ℓ∞ at most 41.7 % (attacked) of the samples are robust; no certificate bounds their share from"
        " below."
    ) in text
    nothing_right = with_parts(full(), 2.0, certified=replace(full().norm(2).certified, median_radius=None))
    unlike = Page(report_html(nothing_right)).text
    assert "46.2 points are not decided. At" not in unlike
    assert "The median certified radius" not in unlike
    assert "Between proof and attack" not in parsed(data_free).text


def bounds_of(make) -> list[list[tuple[str, str, str]]]:
    """The rows of every table of bounds."""
    part = page(make).partition('<div class="arguments">')[2].partition("</section>")[0]
    row = r'<tr[^>]*><th scope="row">(.*?)</th><td class="nowrap">(.*?)</td><td class="nowrap">(.*?)</td></tr>'
    tables = re.findall(r'aria-label="(?:Methods|More methods).*?</table>', part, re.DOTALL)
    return [[tuple(map(html.unescape, cells)) for cells in re.findall(row, table)] for table in tables]


def test_every_bound_is_listed_the_least_first_and_all_but_the_best_three_are_folded():
    best, folded = bounds_of(full)
    assert len(best) == 3
    table = best + folded
    assert [name for name, _, _ in table] == ["multipliers (least)", *sorted(TWO.keys() - {"multipliers"}, key=TWO.get)]
    assert table[0] == ("multipliers (least)", "1844", "149")
    assert table[1] == ("exponents", "2300", "185")
    assert table[-1] == ("paper form", "∞", "∞")
    best, folded = bounds_of(one_layer)
    table = best + folded
    assert {name for name, _, _ in table} == {"product of norms (least)", *SUP} - {"product of norms"}
    assert {times for _, _, times in table} == {"–"}  # nothing was found without data
    assert bounds_of(data_free) == []
    assert page(full).count('class="least"') == page(one_layer).count('class="least"') == 1


def test_the_glossary_explains_the_arguments_and_certificates_of_this_report_alone():
    def terms(make):
        return set(re.findall(r"<dt>([^<]*)</dt>", page(make).partition('<section id="glossary">')[2]))

    certificates = {"Certified accuracy", "Certified radius"}
    assert {*TWO, *certificates} <= terms(full)
    assert not terms(full) & (SUP.keys() - TWO.keys())
    assert terms(one_layer) >= SUP.keys()
    assert not terms(one_layer) & ((TWO.keys() - SUP.keys()) | certificates)
    assert not terms(data_free) & (TWO.keys() | SUP.keys() | certificates)


def test_every_universal_perturbation_has_its_row_beside_the_random_ones():
    table = page(full).partition('aria-label="Universal perturbation"')[2].partition("</table>")[0]
    caption, _, body = table.partition("<tbody>")
    assert "500 and judged on 500 other samples" in caption
    assert "5 draws" in caption
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]
    rows = [[html.unescape(cell).replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in cells]
    random = ["1.8 %", "0.2 to 3.7 %"]
    assert rows == [
        ["ℓ∞, 8/255", "fitted: projected ascent (best)", "30.7 %", "26.6 to 35.1 %", *random, "66.0 %"],
        ["ℓ∞, 8/255", f"data-free: + sign of row 3 of “{HOSTILE}”", "12.3 %", "9.6 to 15.6 %", *random, "80.2 %"],
        ["ℓ₂, 0.5", "fitted: projected ascent", "9.0 %", "6.7 to 12.0 %", *random, "83.6 %"],
    ]
    audit = full()
    for norm in audit.norms:
        nothing = [replace(result, fooled=Rate(0, 0), random_fooled=(Rate(0, 0),) * 5) for result in norm.universal]
        audit = with_parts(audit, norm.p, universal=tuple(nothing))
    assert "not measured" in Page(report_html(audit)).text


def test_classes_and_fragile_samples_have_their_tables_worst_first():
    counted = ((0, 460, 17), (7, 452, 400))
    classes = tuple(ClassAccuracy(label, Rate(clean, 500), Rate(left, 500)) for label, clean, left in counted[::-1])
    evaluation = replace(full().norm(INF).evaluation, classes=classes)
    text = Page(report_html(with_parts(full(), INF, evaluation=evaluation))).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "0 500 92.0 % 460 3.4 % 17 7 500 90.4 % 452 80.0 % 400" in text
    sample = full().norm(INF).most_fragile[0]
    assert f"{sample.index} 0 7 {number(sample.distance, 'upper')}" in text
    assert "Accuracy by class" not in parsed(full).text


def test_margins_stand_beside_the_sensitivity_where_they_were_measured():
    text = parsed(full).text
    assert "ℓ∞ 4.20 9.50 0.0400 1.28" in text
    assert "Margin over sensitivity" not in parsed(data_free).text


def test_checks_and_reasons_are_folded_where_nothing_is_raised():
    flag = Flag("zero gradients", False, "0 of 64 are zero.", "why")
    for raised in (False, True):
        page = report_html(replace(full(), flags=(replace(flag, raised=raised),)))
        assert ("<details open><summary>The 1 checks" in page) is raised
        assert page.count('<details class="part">') >= 5


def test_without_data_no_accuracy_is_shown_and_the_report_says_why():
    text = parsed(data_free).text
    assert "The model was not attacked" in text
    assert "Robust accuracy" not in text
    assert "Universal" not in text
    assert "not available not available not available" in text


def test_an_audit_of_nothing_still_renders():
    empty = replace(data_free(), layers=(), norms=(), not_measured=(), parameters=0)
    text = Page(report_html(empty)).text
    assert "Everything that the audit looks for was measured." in text
    assert "Nothing that could explain the verdict was measured." in text
    assert '<table id="layer-table"' not in report_html(empty)


def test_an_evaluation_of_no_samples_is_not_a_percentage():
    norm = full().norm(INF)
    nothing = replace(norm.evaluation, n=0, clean_correct=0, robust_correct=0)
    curve = replace(norm.curve, eps=(0.1,), robust=(Rate(0, 0),))
    text = Page(report_html(replace(full(), norms=(replace(norm, evaluation=nothing, curve=curve),)))).text
    assert "not measured" in text
    assert "95 % interval 0.0" not in text


def layer_cells(make) -> tuple[list[str], list[list[tuple[str, str | None]]]]:
    """Keys of the columns, and each row's cells as (text, exact value)."""
    source = page(make)
    table = source[source.index('<table id="layer-table"') :].partition("</table>")[0]
    cell = r'<t[hd](?: scope="row"| class="[^"]*")(?: data-v="([^"]*)")?>(?:<code>)?(.*?)(?:</code>)?</t[hd]>'
    rows = table.partition("<tbody>")[2].split("</tr>")[:-1]
    return re.findall(r'data-key="([^"]*)"', table), [
        [(html.unescape(text), exact or None) for exact, text in re.findall(cell, row)] for row in rows
    ]


@pytest.mark.parametrize("make", AUDITS)
def test_the_table_has_the_exact_values_of_the_frame_under_its_names(make):
    keys, rows = layer_cells(make)
    frame = make().to_frame()
    assert len(keys) == len(set(keys))
    assert set(frame.columns) - set(keys) == {"degenerate", "spectrum"}
    for row, (_, expected) in zip(rows, frame.iterrows(), strict=True):
        assert len(row) == len(keys)
        for key, (text, exact) in zip(keys, row, strict=True):
            if key in frame.columns and not isinstance(expected[key], str):
                assert float(exact) == expected[key]
            elif key in ("name", "kind"):
                assert text == expected[key]


def test_infinite_missing_and_exact_values_are_printed_as_such():
    keys, rows = layer_cells(data_free)
    paper, method = keys.index("structure_inf_paper_10pct"), keys.index("operator_norm_2_method")
    assert rows[1][paper] == ("∞", "Infinity")
    assert {row[method][0] for row in rows} == {"exact", "torus", "exact (torus)"}
    assert rows[7][keys.index("structure_2_exact")] == ("–", None)  # 0 / 0 in the layer of zeros
    lower, upper = keys.index("operator_norm_2_lower"), keys.index("operator_norm_2_upper")
    assert all((row[lower] == row[upper]) == row[method][0].startswith("exact") for row in rows)


def test_every_column_head_sorts_by_keyboard_and_is_explained():
    source = page(full)
    heads = re.findall(
        r'<th scope="col" data-key="([^"]*)" class="[^"]*" title="([^"]+)"><button type="button">', source
    )
    assert [key for key, _ in heads] == layer_cells(full)[0]
    glossary = html.unescape(source[source.index('<section id="glossary">') :])
    assert all(html.unescape(explanation) in glossary for _, explanation in heads)


def test_the_glossary_has_every_column_and_no_entry_is_left_unused():
    used = set().union(
        *(glossary_of(make(), [column.term for column in layer_columns(make().layers)]) for make in AUDITS)
    )
    assert used == set(GLOSSARY)


def test_column_groups_can_be_hidden_and_at_first_show_the_main_ones():
    source = page(full)
    boxes = re.findall(r'<input type="checkbox" id="show-(\d)" autocomplete="off"( checked)?> ([^<]*)</label>', source)
    assert [int(place) for place, _, _ in boxes] == list(range(1, 9))
    assert {name for _, checked, name in boxes if checked} == set(VISIBLE_GROUPS) - {"Layer"}
    for place, _, _ in boxes:
        assert f"section:has(#show-{place}:not(:checked)) .g{place} {{ display: none; }}" in source
        assert len(re.findall(rf'<td class="g{place}[" ]', source)) >= len(full().layers)


def test_light_dark_and_print_are_styled():
    source = page(full)
    for words in ("prefers-color-scheme: dark", "@media print", "@page layers", 'lang="en"', "width=device-width"):
        assert words in source


@pytest.mark.parametrize(
    ("seconds", "printed"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (192.4, "3 min 12 s"), (7265.0, "2 h 1 min")]
)
def test_durations_read_like_durations(seconds, printed):
    assert f"<dd>{printed}</dd>" in report_html(replace(one_layer(), layers=(), norms=(), seconds=seconds))


@pytest.mark.parametrize("module", [report, figures])
def test_a_report_needs_neither_torch_nor_global_plotting_state(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    assert not any(name.split(".")[0] == "torch" or "pyplot" in name for name in names)
    own = {".".join(name.split(".")[:2]) for name in names if name.startswith("brittle")}
    assert own <= {"brittle.reporting", "brittle.results", "brittle.storage"}
