"""The schemas describe what is saved: whole documents conform to them, broken ones do not."""

import json

import jsonschema
import pytest

from brittle.results.schemas import DOCUMENTS, schema_of
from helpers import audits


def check(document):
    jsonschema.Draft202012Validator(schema_of("audit")).validate(document)


@pytest.mark.parametrize("audit", [audits.full, audits.data_free, audits.one_layer])
def test_saved_audits_conform(audit):
    check(json.loads(audit().to_json()))


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("verdict"),
        lambda document: document["norms"][0].update(p="big"),
        lambda document: document["layers"][0].update(shape=[1, "two"]),
        lambda document: document.update(parameters=1.5),
    ],
)
def test_broken_ones_do_not(change):
    document = json.loads(audits.full().to_json())
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        check(document)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_schema_is_one_and_explains_every_field(name):
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    for record in [schema, *schema.get("$defs", {}).values()]:
        for field, described in record.get("properties", {}).items():
            assert described.get("description"), (record["title"], field)


def test_what_is_kept_out_of_json_is_kept_out_of_the_schema():
    assert "samples" not in schema_of("audit")["$defs"]["Evaluation"]["properties"]
