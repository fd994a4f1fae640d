"""JSON Schema's official test suite is enforced, or refused by name."""

import json
import re
import tarfile

import pytest

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.grammar import compile_grammar
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.inference.byte_grammar import BYTES, accepts, written

SUITE = PROJECT_ROOT / "finetune_pipeline_tests" / "data" / "json_schema_test_suite.tar.xz"
"""The folder json/tests of jsonschema 4.26.0's source package, without draft 3 and the next draft; MIT license."""


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    """Return the folder of JSON Schema's official test suite."""
    folder = tmp_path_factory.mktemp("json_schema_test_suite")
    with tarfile.open(SUITE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "tests"


NOT_WRITTEN = {
    # A leap second: no library reads one.
    "a valid date-time with a leap second, UTC",
    "a valid date-time with a leap second, with minus offset",
    "a valid time string with leap second, Zulu",
    "valid leap second, zero time-offset",
    "valid leap second, positive time-offset",
    "valid leap second, large positive time-offset",
    "valid leap second, negative time-offset",
    "valid leap second, large negative time-offset",
    # Control characters other than white space.
    "Line tabulation matches",
    "Non-whitespace control matches",
    # Rare forms of addresses.
    "a quoted string with a space in the local part is valid",
    "a quoted string with a double dot in the local part is valid",
    "a quoted string with a @ in the local part is valid",
    "an IPv6-address-literal after the @ is valid",
    "mixed format with the ipv4 section as decimal octets",
    "mixed format with double colons between the sections",
    "mixed format with leading double colons (ipv4-mapped ipv6 address)",
    "a long valid ipv6",
    # A number that no float holds: 1e308 is written with all its digits.
    "valid if optional overflow handling is implemented",
    # 2^53 as a float, a form that is not generated.
    "float is valid",
}
"""Valid values in forms that are never generated: the grammar is narrower than the schema there."""

ANNOTATIONS = "format.json"  # it treats `format` as an annotation; here it is enforced


def names_in_order(schema):
    """Return every property name in llguidance's order: those of `properties` first, then those of subschemas."""
    if isinstance(schema, list):
        return [name for part in schema for name in names_in_order(part)]
    if not isinstance(schema, dict):
        return []
    own = [*schema.get("properties", {}), *schema.get("const", {})] if isinstance(schema.get("const", {}), dict) else []
    return [*own, *names_in_order(list(schema.values()))]


NAMED = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}


OFTEN = {"draft7", "draft2020-12"}
"""Drafts that are tested each time; the others take three seconds each."""


@pytest.mark.parametrize(
    "draft", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in NAMED]
)
def test_the_official_test_suite_is_enforced_or_refused_by_name(suite, draft):
    counts = {"enforced": 0, "refused": 0}
    wrong = []
    for path in sorted((suite / draft).rglob("*.json")):
        if path.name == ANNOTATIONS and path.parent.name == draft:
            continue
        if path.name == "zeroTerminatedFloats.json":
            continue  # 1.0 is no integer in draft 4, but `written` turns it into 1; 1.0 is never generated
        for group in json.loads(path.read_text(encoding="utf-8")):
            schema = group["schema"]
            if isinstance(schema, bool):
                continue  # requests have an object as schema
            if draft != "draft2020-12":
                schema = {"$schema": NAMED[draft], **schema}
            try:
                grammar = compile_grammar(BYTES, schema)
            except RequestRefused as refused:
                counts["refused"] += 1
                assert re.search(r"json_schema(: the keyword \S+ \(| )at #", str(refused)) or "levels deep" in str(
                    refused
                ), str(refused)
                continue
            order = names_in_order(schema)
            for case in group["tests"]:
                value = written(case["data"], order)
                if accepts(grammar, value) != case["valid"] and not (
                    case["valid"] and case["description"] in NOT_WRITTEN
                ):
                    wrong.append((path.name, group["description"], case["description"], value))
                counts["enforced"] += 1
    assert wrong == []
    assert counts["enforced"] > 650 and counts["refused"] < 250, counts
