"""A schema that cannot be enforced is refused by keyword and path."""

import json
import re

import llguidance
import pytest

from finetune_pipeline.inference import json_schema
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.grammar import compile_grammar
from finetune_pipeline_tests.inference.byte_grammar import BYTES, check

DEEP = {"type": "integer"}
for _ in range(100):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("part", "keyword"),
    [
        ({"not": {"type": "null"}}, "not"),
        ({"if": {"minimum": 1}, "then": {"maximum": 2}}, "if"),
        ({"contains": {"type": "null"}}, "contains"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"dependentSchemas": {"a": {"required": ["b"]}}}, "dependentSchemas"),
        ({"dependencies": {"a": ["b"]}}, "dependencies"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"unevaluatedItems": False}, "unevaluatedItems"),
        ({"$dynamicRef": "#x"}, "$dynamicRef"),
        ({"propertyNames": {"minLength": 1, "pattern": "a"}}, "propertyNames"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf"),
        ({"format": "hostname"}, "format"),
        ({"format": "no such format"}, "format"),
        ({"type": "integer", "minimum": 2**60 + 1}, "minimum"),
        ({"type": "number", "maximum": 1e300}, "maximum"),
        ({"const": 2**53 + 1}, "const"),
        ({"enum": [1, 10**400]}, "enum"),
        ({"const": "a\x00b"}, "const"),
        ({"multipleOf": 10_007}, "multipleOf"),
        ({"multipleOf": 1e-12}, "multipleOf"),
        ({"minItems": 10**9}, "minItems"),
        ({"pattern": "^a{1000000000}$"}, "pattern"),
        ({"pattern": "^((a{0,90}){0,90})$"}, "pattern"),
        ({"pattern": "^[]]$"}, "pattern"),
        ({"pattern": "(a)\\1"}, "pattern"),
        ({"pattern": "(?=a)b"}, "pattern"),
        ({"pattern": "\\bfoo"}, "pattern"),
        ({"pattern": "[[a-z]]"}, "pattern"),
        ({"pattern": "[a-z&&[b]]"}, "pattern"),
        ({"pattern": "a{,5}"}, "pattern"),
        ({"pattern": r"^\p{L}{1,1500}$"}, "pattern"),
        ({"pattern": "(((("}, "pattern"),
        ({"allOf": [{"anyOf": [{"pattern": "a{1000}"} for _ in range(21)]}]}, "pattern"),
        ({"patternProperties": {f"^{n}a{{1990}}$": {} for n in range(11)}}, "patternProperties"),
        ({"patternProperties": {f"^{n}$": {} for n in range(51)}}, "patternProperties"),
        ({"patternProperties": {"a": {"type": "null"}, "b": {"type": "string"}}}, "patternProperties"),
        ({"properties": {f"p{n}": {} for n in range(501)}}, "properties"),
        ({"properties": {"a": {}}, "maxProperties": 3}, "maxProperties"),
        ({"$id": "https://example.com/a", "type": "object"}, "$id"),
        ({"propertyNames": {"type": "integer"}}, "propertyNames"),
        ({"$ref": "#/nowhere"}, "$ref"),
        ({"type": "gibberish"}, "type"),
    ],
)
def test_an_unenforceable_keyword_is_refused_with_its_path(part, keyword):
    schema = {"type": "object", "properties": {"x": {"type": "array", "items": part}}, "required": ["x"]}
    with pytest.raises(
        RequestRefused,
        match=rf"at #/properties/x/items[^ ]*: {re.escape(keyword)}: |`{re.escape(keyword)}` \(at #/properties/x/items",
    ):
        compile_grammar(BYTES, schema)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "json_schema at #: required"),
        ({"minimum": 3, "maximum": 2, "type": "integer"}, "json_schema at #: minimum"),
        ({"$ref": "#"}, "refers back to itself"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "refers back to itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "refers back to itself"),
        ({"$ref": "other.json"}, "only references within it"),
        ({"$ref": "#anchor"}, "only references within it"),
        ({"enum": ["x" * 90_000]}, "bytes; at most"),
        (DEEP, "levels deep"),
        ({"$schema": "https://example.com/own"}, "is not known"),
        ({"properties": 7}, "properties: not a valid JSON Schema"),
        ({"const": "\ud800"}, "UTF-8"),
        ({"const": float("nan")}, "not JSON"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, "prefixItems"),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "$ref": "#/definitions/a",
                "minimum": 1,
                "definitions": {"a": {}},
            },
            "use allOf",
        ),
    ],
)
def test_an_unusable_schema_is_refused_with_the_reason(schema, reason):
    with pytest.raises(RequestRefused, match=reason):
        compile_grammar(BYTES, schema)


def ref(name):
    return {"$ref": f"#/$defs/{name}"}


def chain(keyword, length, last):
    """Definitions that each refer to the next one twice: a value is checked 2^length times."""
    levels = {f"L{n}": {keyword: [ref(f"L{n + 1}"), ref(f"L{n + 1}")]} for n in range(length)}
    return {**ref("L0"), "$defs": {**levels, f"L{length}": last}}


def chain_of_objects(length):
    def level(n):
        return [
            {"type": "object", "properties": {"a": ref(f"L{n + 1}"), "z": {"const": k}}, "required": ["a", "z"]}
            for k in range(2)
        ]

    return {**ref("L0"), "$defs": {**{f"L{n}": {"anyOf": level(n)} for n in range(length)}, f"L{length}": {}}}


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        (chain("anyOf", 18, {"type": "string"}), "anyOf or allOf"),
        (chain("allOf", 18, {"type": "string"}), "anyOf or allOf"),
        (chain_of_objects(18), "anyOf or allOf"),
        ({**chain("allOf", 18, {"items": ref("L0")}), **ref("L3")}, "anyOf or allOf"),  # in a cycle
        ({"allOf": [{"pattern": f"w{n}"} for n in range(11)]}, "allOf"),
        ({"$defs": {"a": {"allOf": [{"pattern": f"w{n}"} for n in range(9)]}}, "format": "uri", **ref("a")}, None),
        ({"$defs": {"a": {"allOf": [{"pattern": f"w{n}"} for n in range(10)]}}, "format": "uri", **ref("a")}, "allOf"),
        ({"allOf": [{"multipleOf": 101}, {"anyOf": [{"multipleOf": 103}, {"type": "null"}]}]}, "multipleOf"),
        ({"allOf": [{"multipleOf": 0.9973}, {"multipleOf": 1}]}, "multipleOf"),
        ({"prefixItems": [{"multipleOf": 101}, {"multipleOf": 103}]}, None),  # of different values
        ({"allOf": [{"multipleOf": 50}, {"multipleOf": 20}]}, None),
    ],
)
def test_schemas_that_take_exponential_time_are_refused(schema, keyword):
    if keyword is None:
        json_schema.rewrite_schema(schema)
    else:
        with pytest.raises(RequestRefused, match=rf"json_schema at #[^ ]*: {keyword}: |the keyword `{keyword}` \(at #"):
            json_schema.rewrite_schema(schema)


@pytest.mark.parametrize("required", [True, False])
def test_recursive_branches_are_compared_quickly(required):
    names = [f"p{n}" for n in range(20)]
    tree = {name: {"properties": {p: ref(name) for p in names}, "required": names * required} for name in "ab"}
    schema = {"$defs": tree, "oneOf": [ref("a"), ref("b")]}
    with pytest.raises(RequestRefused, match="branches 0 and 1 may match the same value"):
        json_schema.rewrite_schema(schema)


def test_mutually_recursive_types_are_enforced():
    kinds = [f"k{n}" for n in range(30)]
    each = {
        kind: {
            "type": "object",
            "properties": {"kind": {"const": kind}, "left": ref("any"), "right": ref("any")},
            "required": ["kind"],
            "additionalProperties": False,
        }
        for kind in kinds
    }
    schema = {"$defs": {**each, "any": {"oneOf": [ref(kind) for kind in kinds]}}, **ref("any")}
    leaf = {"kind": "k7"}
    check(
        schema,
        [{"kind": "k1", "left": {"kind": "k29", "left": leaf, "right": leaf}}],
        [{"kind": "k30"}, {"kind": "k1", "left": 1}],
    )


def test_repeated_items_in_a_deep_answer_are_refused_with_their_path():
    branches = [
        {"type": "object", "properties": {"a": ref("e"), "z": {"const": k}}, "required": ["a", "z"]} for k in range(3)
    ]
    unique = {"type": "array", "items": {"const": 1}, "uniqueItems": True}
    grammar = compile_grammar(BYTES, {"$defs": {"e": {"anyOf": [*branches, unique]}}, **ref("e")})
    value = [1, 1]
    for _ in range(10):
        value = {"a": value, "z": 2}
    with pytest.raises(
        RequestRefused, match=f"violates uniqueItems of json_schema: two items at #{'/a' * 10} are equal"
    ):
        grammar.check(json.dumps(value))
    grammar.check(json.dumps(value).replace("[1, 1]", "[1]"))


class Letters:
    """A vocabulary of ASCII alone."""

    is_tokenizer_wrapper, bos_token_id, eos_token_id, special_token_ids = True, None, 128, (128,)
    tokens = (*(bytes([n]) for n in range(128)), b"")

    def __call__(self, text):
        return list(text.encode())


def test_a_byte_that_the_vocabulary_lacks_is_refused():
    tokenizer = llguidance.LLTokenizer(Letters(), eos_token=[128])
    assert compile_grammar(tokenizer, {"const": "e"})
    with pytest.raises(RequestRefused, match="vocabulary cannot write 'é'"):
        compile_grammar(tokenizer, {"const": "é"})


@pytest.mark.parametrize(
    "schema",
    [{"enum": ["x" * 90_000]}, {"pattern": "a{9999}"}, {"multipleOf": 99_999}, DEEP],
    ids=["long", "repetitions", "multiple", "deep"],
)
def test_limits_are_checked_before_llguidance_compiles(monkeypatch, schema):
    # It cannot be interrupted: nothing beyond the limits may reach it. Any use of the matcher is an AttributeError.
    monkeypatch.setattr(llguidance, "LLMatcher", None)
    with pytest.raises(AttributeError):
        compile_grammar(BYTES, {"type": "boolean"})
    with pytest.raises(RequestRefused):
        compile_grammar(BYTES, schema)
