"""An audit.json of schema version 1, written before results were kept by norm, is still read."""

import json
import math
from pathlib import Path

import pytest

from brittle.reporting.page import report_html
from brittle.reporting.verdict import judge
from brittle.results import SCHEMA_VERSION, Audit

FILE = Path(__file__).parent / "audit_version_1.json"
"""A small network on 40 digits, in l_inf and l_2."""
ONE_A_NORM = {"evaluations": "evaluation", "curves": "curve", "lipschitz": "lipschitz", "certified": "certified"}
"""Lists of version 1 that had one entry a norm, and where the entry is now."""
SEVERAL = ("responses", "universal")


def holds(new, old) -> bool:
    """Whether a document says all that an old one said; fields that came later have defaults."""
    if isinstance(old, dict):
        return all(name in new and holds(new[name], value) for name, value in old.items())
    if isinstance(old, list):
        return len(new) == len(old) and all(map(holds, new, old))
    return new == old


def test_every_result_of_the_old_file_is_in_its_norm():
    old = json.loads(FILE.read_text())
    new = json.loads(Audit.load(FILE).to_json())
    assert (old["schema_version"], new["schema_version"]) == (1, SCHEMA_VERSION)
    for name, part in ONE_A_NORM.items():
        assert holds([norm[part] for norm in new["norms"]], old[name])
    for name in SEVERAL:
        assert holds([entry for norm in new["norms"] for entry in norm[name]], old[name])
    assert holds([*new["flags"], *(flag for norm in new["norms"] for flag in norm["flags"])], old["flags"])
    assert all(flag["p"] is None for flag in new["flags"])
    for norm in new["norms"]:
        entries = [norm[part] for part in ONE_A_NORM.values()]
        entries += [entry for name in (*SEVERAL, "flags") for entry in norm[name]]
        assert {entry["p"] for entry in entries} == {norm["p"]}
    assert new.keys() >= old.keys() - ONE_A_NORM.keys() - set(SEVERAL) | {"norms"}
    assert not new.keys() & {*ONE_A_NORM, *SEVERAL}
    for name in ("model", "verdict", "layers", "not_measured", "signature", "parameters", "seconds"):
        assert holds(new[name], old[name])


def test_what_is_read_from_the_old_file_can_be_saved_drawn_and_judged_anew(tmp_path):
    audit = Audit.load(FILE)
    assert [(norm.p, norm.eps) for norm in audit.norms] == [(math.inf, 0.06), (2.0, 0.3)]
    assert audit.verdict.level == "weakened"  # as the file says
    verdict = judge(audit.norms, audit.layers, audit.flags)
    assert (verdict.level, verdict.decided_by) == ("too few samples", math.inf)
    audit.save(tmp_path / "audit.json")
    again = Audit.load(tmp_path / "audit.json")
    assert again == audit
    assert judge(again.norms, again.layers, again.flags) == verdict
    page = report_html(audit)
    assert page.count("<svg") == 2 * 8
    assert "digits FCN: robustness audit" in page


@pytest.mark.parametrize("attacked", [True, False])
def test_an_old_file_of_one_norm_or_without_data_is_read(attacked):
    old = json.loads(FILE.read_text())
    lists = [*ONE_A_NORM, *SEVERAL, "flags"]
    kept = {name: [entry for entry in old[name] if attacked and entry["p"] == 2] for name in lists}
    kept["lipschitz"] = [entry for entry in old["lipschitz"] if entry["p"] == 2]
    audit = Audit.from_json(json.dumps(old | kept))
    (norm,) = audit.norms
    assert (norm.p, norm.eps) == (2, 0.3 if attacked else None)
    assert (audit.clean_accuracy is not None) == (norm.evaluation is not None) == attacked
