"""JSON Schema is enforced token by token."""

import json
from decimal import Decimal

import pytest

from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.grammar import compile_grammar
from finetune_pipeline_tests.inference.byte_grammar import BYTES, accepts, check


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        # keywords that other converters drop silently
        ({"type": "integer", "minimum": 3, "maximum": 5}, [3, 4, 5], [2, 6, 150, 3.5, "4"]),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}], "maximum": 5}, [3, 5], [2, 150]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, [0.1, 0.5], [0, 0.6, -0.1]),
        ({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, [-1.5, -1.25], [-1, -2, 0]),
        ({"allOf": [{"type": "number", "exclusiveMinimum": 0}, {"maximum": 0.5}]}, [0.5], [0]),
        ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5.5}, [4, 5], [3, 6]),
        ({"type": "integer", "maximum": 2**63 - 1}, [2**63 - 1, -5], [2**63]),
        ({"type": "string", "format": "date"}, ["2024-02-29"], ["2023-02-29", "2024-2-9", "x"]),
        ({"format": "date-time"}, ["2024-02-29T10:00:00Z", 7], ["2023-02-29T10:00:00Z", "2024-01-01"]),
        ({"format": "ipvanyaddress"}, ["10.0.0.1", "::1"], ["10.0.0.256"]),
        ({"type": "integer", "format": "int32"}, [2**31 - 1], [2**31]),
        ({"required": ["a"], "allOf": [{"properties": {"a": {"type": "null"}}}]}, [{"a": None}], [{}, {"a": 1}]),
        ({"multipleOf": 0.01, "type": "number"}, [19.99, -0.01], [19.999]),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [[1, 2], []], [[1, 1]]),
        (
            {"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}},
            [{"a": 1, "b": 2}],
            [{"a": 1}],
        ),
        ({"const": 1.0}, [1, 1.0], [2, 1.1, 1.5]),
        ({"enum": [1.0, 1.25, 1.5, "1.0"]}, [1, 1.0, 1.25, 1.5, "1.0"], [1.1, 1.2, 1.05, 2.0]),
        ({"type": "number", "enum": [0.0, -1.0, 1e6]}, [0, 0.0, -1.0, 1e6], [0.1, -0.5, -1.1, 1.0, 1000000.5]),
        ({"type": "integer", "enum": [1.0, 2]}, [1, 2], [1.5, 3]),
        ({"enum": [1.0, 2.0], "const": 2.0}, [2, 2.0], [1.0]),
        ({"enum": [1, 2.5]}, [1, 2.5], [1.0]),  # written so in the schema, and so in the answers
        ({"enum": [1.0, 2.5], "multipleOf": 0.5}, [1, 2.5], [2]),
        ({"oneOf": [{"const": 1.0}, {"const": 2.0}]}, [1.0, 2.0], [3.0]),
        ({"enum": ["é", {"a": [1, None]}, True]}, ["é", {"a": [1, None]}, True], ["e", 1]),
        # names and items
        ({"propertyNames": {"enum": ["a", "b.c"]}, "type": "object"}, [{"a": 1}, {"b.c": 2}], [{"bxc": 2}, {"d": 1}]),
        (
            {
                "patternProperties": {"^x": {"type": "integer"}},
                "anyOf": [{"required": ["x"]}],
                "additionalProperties": False,
            },
            [{"x": 1}],
            [{"x": "1"}, {"y": 1}, {}],
        ),
        ({"items": [{"type": "integer"}], "additionalItems": False}, [[], [1]], [["1"], [1, 2]]),
        (
            {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
            [{}, {"a": 1}],
            [{"a": "1"}],
        ),
        # references
        ({"$ref": "#/$defs/a", "$defs": {"a": {"id": "A", "type": "integer"}}}, [1], ["1"]),  # as zod names types
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "integer"}}},
            [1],
            ["1"],
        ),
        (
            {"properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
            [{"next": {"next": {}}}],
            [{"nxt": 1}],
        ),
        ({"$ref": "#/properties/a~1b", "properties": {"a/b": {"type": "integer"}}}, [1], ["1"]),
        # patterns
        ({"type": "string", "pattern": "^a]b$"}, ["a]b"], ["ab"]),
        ({"type": "string", "pattern": r"^\[[A-Z]+]$"}, ["[AB]"], ["[]", "[ab]"]),
        ({"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, ["1.5", "-2"], ["", "-", ".", "x"]),
        # a schema cannot turn refusals off
        ({"x-guidance": {"lenient": True}, "type": "integer", "maximum": 3}, [3], [4]),
    ],
)
def test_a_schema_is_enforced(schema, valid, invalid):
    check(schema, valid, invalid)


def test_no_property_is_generated_in_two_spellings():
    grammar = compile_grammar(BYTES, {"properties": {"a": {"type": "integer"}}})
    assert accepts(grammar, None, '{"a":1, "b":2}')
    assert not accepts(grammar, None, r'{"a":1, "\u0061":"x"}')


def nested(levels, leaf):
    value = leaf
    for _ in range(levels):
        value = {"a": value}
    return json.dumps(value)


def test_checking_a_deep_answer_takes_no_exponential_time():
    parts = [{"properties": {"a": {"$ref": "#/$defs/n"}, "tags": {"type": "array"}}} for _ in range(4)]
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "anyOf": parts}}}
    deep = nested(60, {"tags": [1, 1]})
    compile_grammar(BYTES, schema).check(deep)
    for part in parts:  # every branch fails, and each only after the value within
        part["properties"]["tags"]["uniqueItems"] = True
    with pytest.raises(RequestRefused, match="uniqueItems"):
        compile_grammar(BYTES, schema).check(deep)


def test_unique_items_are_checked_at_any_depth():
    node = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}, "a": {"$ref": "#"}}}
    compile_grammar(BYTES, node).check(nested(60, {"tags": [1, 2]}))
    with pytest.raises(RequestRefused, match=r"two items at #.*/a/tags are equal"):
        compile_grammar(BYTES, node).check(nested(60, {"tags": [1, 1]}))


def test_a_number_beyond_floats_is_refused():
    grammar = compile_grammar(BYTES, {"type": "number"})
    assert accepts(grammar, None, "1e99") and not accepts(grammar, None, "1e999")


def test_a_pattern_whose_names_are_all_used_leaves_other_tokens():
    schema = {"propertyNames": {"const": "a"}, "type": "object", "properties": {"a": {"type": "integer"}, "b": {}}}
    matcher = compile_grammar(BYTES, schema).matcher()
    for byte in b'{"a":1':
        matcher.accept(byte)
    assert not matcher.allowed()[ord(",")] and matcher.allowed()[ord("}")]


BOUNDS = [-1000.25, -2, -1.5, -1, -0.001, 0, 0.25, 0.5, 1, 1.5, 2, 9, 10, 99.9, 1000000]
NUMBERS = [*BOUNDS, -1.4999, -0.5, 0.0009, 0.1, 0.26, 0.999, 1.0001, 3, 10.5, 100, 123456.789]


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(("low", "high"), [("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
def test_every_pair_of_bounds_is_exact(kind, low, high):
    wrong = []
    for least in [None, *BOUNDS]:
        for most in [None, *BOUNDS]:
            schema = {"type": kind, low: least, high: most}
            schema = {name: value for name, value in schema.items() if value is not None}
            over = (lambda a, b: a > b) if "exclusive" in low else (lambda a, b: a >= b)
            expected = [
                number
                for number in NUMBERS
                if (least is None or over(Decimal(str(number)), Decimal(str(least))))
                and (most is None or over(Decimal(str(most)), Decimal(str(number))))
                and (kind == "number" or float(number).is_integer())
            ]
            try:
                grammar = compile_grammar(BYTES, schema)
                found = [number for number in NUMBERS if accepts(grammar, number)]
            except RequestRefused:
                found = []  # no value is between them
            if found != expected:
                wrong.append((schema, found, expected))
    assert wrong == []
