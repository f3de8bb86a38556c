"""An audit.json whose form is right and whose values cannot be is refused, and the message says where."""

import functools
import json
import math

import pytest

from brittle.cli.commands import run
from brittle.errors import InputError
from brittle.results import Audit
from helpers import audits
from helpers.command_line import one_line

AUDITS = (audits.full, audits.data_free, audits.one_layer)
SQUARE = "norms.1"
EVALUATION, CURVE, CERTIFIED = f"{SQUARE}.evaluation", f"{SQUARE}.curve", f"{SQUARE}.certified"


@functools.cache
def text() -> str:
    return audits.full().to_json()


def changed(path: str, value: object) -> str:
    """The full audit as JSON, with another value at a place."""
    document = json.loads(text())
    *parents, last = (int(part) if part.isdecimal() else part for part in path.split("."))
    functools.reduce(lambda part, key: part[key], parents, document)[last] = value
    return json.dumps(document)


@pytest.mark.parametrize("make", AUDITS)
def test_what_an_audit_finds_passes(make):
    assert Audit.from_json(make().to_json()) == make()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{EVALUATION}.robust_correct", 2000, "norms.1.evaluation: expected 0 <= proven <= robust_correct"),
        (f"{EVALUATION}.proven", 900, "norms.1.evaluation: expected 0 <= proven <= robust_correct"),
        (f"{EVALUATION}.n", -1, "norms.1.evaluation: expected 0 <= proven"),
        (f"{EVALUATION}.p", 3, "norms.1.evaluation: expected p of 2 or inf; got 3.0"),
        (f"{EVALUATION}.eps", -0.5, "norms.1.evaluation: expected a finite eps above 0; got -0.5"),
        (f"{EVALUATION}.eps", "inf", "norms.1.evaluation: expected a finite eps above 0; got inf"),
        (f"{EVALUATION}.eps", "nan", "norms.1.evaluation.eps: expected a number"),
        (f"{EVALUATION}.bounds", [1, 0], "norms.1.evaluation: expected bounds"),
        (f"{EVALUATION}.rejected", -1, "norms.1.evaluation: expected counts of at least 0"),
        (f"{EVALUATION}.seed", 2**70, "norms.1.evaluation.seed: "),
        (f"{CURVE}.eps", [0.5, 0.25, 1.0, 2.0], "norms.1.curve: expected budgets that rise"),
        (f"{CURVE}.eps", [0.5, 0.5, 1.0, 2.0], "norms.1.curve: expected budgets that rise"),
        (f"{CURVE}.eps", [0.5, 1.0], "norms.1.curve: expected one rate for each budget"),
        (f"{CURVE}.robust.0", {"hits": 5, "n": 3}, "norms.1.curve.robust.0: expected hits from 0 to n; got 5 of 3"),
        (f"{CURVE}.robust.0", {"hits": -1, "n": 3}, "norms.1.curve.robust.0: expected hits from 0 to n"),
        (f"{CERTIFIED}.certified", [], "norms.1.certified: expected one rate for each budget"),
        (f"{CERTIFIED}.median_radius", -1, "norms.1.certified: expected numbers of at least 0 as median_radius"),
        (f"{CERTIFIED}.median_radius", "nan", "norms.1.certified.median_radius: expected a number"),
        (f"{SQUARE}.responses.0.energy", [0.1], "norms.1.responses.0: expected as many k as energy"),
        (f"{SQUARE}.responses.0.gain", -1, "norms.1.responses.0: expected numbers of at least 0"),
        (f"{SQUARE}.universal.0.kind", "magic", "norms.1.universal.0: expected kind of fitted or data-free; got magic"),
        (f"{SQUARE}.universal.0.random_fooled", [], "norms.1.universal.0: expected random_fooled"),
        (f"{SQUARE}.lipschitz.upper", -1, "norms.1.lipschitz: expected numbers of at least 0"),
        (f"{SQUARE}.lipschitz.arguments", [["path", -1]], "norms.1.lipschitz: expected arguments of at least 0"),
        (f"{SQUARE}.eps", 0.25, "norms.1: expected eps of the evaluation, 0.5; got 0.25"),
        (
            f"{SQUARE}.p",
            "inf",
            "norms.1: expected every part in the norm inf",
        ),
        ("norms", [], "audit: expected results in one norm at least"),
        ("parameters", -1, "audit: expected parameters of at least 0"),
        ("layers.0.shape", [0, 27], "layers.0: expected a shape"),
        ("layers.0.row_error", [0.1], "layers.0: expected 4 numbers each"),
        ("layers.0.singular_values", [], "layers.0: expected numbers above 0 as row_norms and singular_values"),
        ("layers.0.row_norms", [1.0, 2.0], "layers.0: expected the largest number first"),
        ("layers.0.frobenius", 0, "layers.0: expected a Frobenius norm above 0"),
        ("layers.0.stable_rank", "inf", "layers.0: expected finite numbers"),
        ("layers.0.bounds", [], None),
        ("layers.0.operator_norms.0.lower", 1e9, "layers.0.operator_norms.0: expected 0 <= lower <= upper"),
        ("layers.0.operator_norms.0.p", 3, "layers.0.operator_norms.0: expected p of 1, 2 or inf"),
        ("layers.0.name", "head", "audit: expected layers of different names"),
        ("layers.0.name", "\ud800", "layers.0.name: expected text"),
        ("signature.settings", {"a": "nan", "b": [1, 2]}, None),
        ("features.pairs.0.cosine", 1.5, "features.pairs.0: expected a cosine from 0 to 1; got 1.5"),
        ("features.pairs.0.distance", 0, "features.pairs.0: expected a finite distance above 0"),
        ("features.pairs.0.other", 9, "features.pairs.0: expected two classes; got 9"),
        ("features.pairs.0.followed", False, "features.pairs.0: expected a radius of pairs that were followed alone"),
        ("features.layers.0.kept", -0.1, "features.layers.0: expected cosine, kept and strong from 0 to 1"),
        ("features.jacobians", 9, "features: expected jacobians from 0 to the pairs that were followed; got 9"),
        ("features.interpolant", 2, "features: expected an interpolant from 0 to 1; got 2"),
        ("features", None, None),
        ("verdict.decided_by", 7, "verdict: expected decided_by of 2, inf or null"),
    ],
)
def test_a_value_that_cannot_be_is_refused_where_it_stands(path, value, message):
    if message is None:
        Audit.from_json(changed(path, value))
        return
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        Audit.from_json(changed(path, value))


def test_the_command_line_says_so_in_one_line(tmp_path, capsys):
    path = tmp_path / "audit.json"
    path.write_text(changed(f"{CURVE}.robust.0", {"hits": 5, "n": 3}))
    assert run(["report", str(path), "-o", str(tmp_path / "report.html")]) == 2
    one_line(capsys, "audit.norms.1.curve.robust.0: expected hits from 0 to n; got 5 of 3")
    assert not (tmp_path / "report.html").exists()


def test_not_a_number_is_refused_wherever_a_number_stands():
    """Every float of the document in turn, but for those that a setting may hold as text."""

    def places(part, path=""):
        for key, entry in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(entry, dict | list):
                yield from places(entry, f"{path}{key}.")
            elif isinstance(entry, float) and "settings" not in path:
                yield f"{path}{key}"

    document = json.loads(text())
    document["layers"] = document["layers"][:1]
    for path in list(places(document))[::7]:
        with pytest.raises(InputError):
            Audit.from_json(changed(path, "nan"))


def test_a_file_too_large_for_an_audit_is_not_read(tmp_path):
    path = tmp_path / "audit.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(InputError, match="expected a file of at most"):
        Audit.load(path)
    with pytest.raises(InputError, match="got no file at"):
        Audit.load(tmp_path)
    assert math.isfinite(path.stat().st_size)
