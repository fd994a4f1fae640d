"""JSON Schema is enforced token by token, or refused by keyword and path; nothing in between."""

import datetime
import enum
import json
import re
import tarfile
import threading
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Optional

import llguidance
import pydantic
import pytest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from finetune_pipeline.inference import json_schema
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.grammar import compile_grammar
from finetune_pipeline.settings import PROJECT_ROOT

BYTES = llguidance.LLTokenizer("byte")


def accepts(grammar, value, text=None):
    """Return whether a model could generate this value, token by token."""
    matcher = grammar.matcher()
    text = json.dumps(value, ensure_ascii=False) if text is None else text
    for byte in text.encode():
        if not matcher.allowed()[byte]:
            return False
        matcher.accept(byte)
    if not matcher.allowed()[BYTES.eos_token]:
        return False
    try:
        grammar.check(text)
    except RequestRefused:
        return False
    return True


def check(schema, valid=(), invalid=()):
    grammar = compile_grammar(BYTES, schema)
    assert [value for value in valid if not accepts(grammar, value)] == [], "a valid value is not accepted"
    assert [value for value in invalid if accepts(grammar, value)] == [], "an invalid value is accepted"


# ---- enforced


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
        ({"const": 1.0}, [1], [2]),
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


@pytest.mark.timeout(60)
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


# ---- what pydantic writes


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


class Everything(BaseModel):
    model_config = ConfigDict(extra="forbid")

    optional: int | None = None
    union: int | str
    enumeration: Color
    literal: Literal["x", 1]
    bounded: Annotated[int, Field(ge=3, le=5)]
    fraction: Annotated[float, Field(gt=0, lt=0.5)]
    listed: list[Annotated[int, Field(multiple_of=5)]] = Field(max_length=3)
    unique: set[int]
    pair: tuple[int, str]
    by_name: dict[str, int] = Field(min_length=1, max_length=2)
    by_color: dict[Color, int]
    by_literal: dict[Literal["a", "b"], int]
    by_id: dict[uuid.UUID, str]
    by_day: dict[datetime.date, float]
    by_text: dict[Annotated[str, StringConstraints(min_length=2)], int]
    by_pattern: dict[Annotated[str, StringConstraints(pattern="^x")], int]
    amount: Annotated[Decimal, Field(gt=0, max_digits=5, decimal_places=2)]
    at: datetime.datetime
    day: datetime.date
    time: datetime.time
    span: datetime.timedelta
    id: uuid.UUID
    url: pydantic.HttpUrl
    path: Path
    raw: bytes
    secret: pydantic.SecretStr
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    child: Optional["Everything"] = None
    text: Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}\d{3}$")]


VALID = {
    "optional": None,
    "union": "u",
    "enumeration": "red",
    "literal": 1,
    "bounded": 4,
    "fraction": 0.25,
    "listed": [5, 10],
    "unique": [1, 2],
    "pair": [1, "x"],
    "by_name": {"a": 1},
    "by_color": {"red": 1},
    "by_literal": {"b": 1},
    "by_id": {"6ba7b810-9dad-11d1-80b4-00c04fd430c8": "x"},
    "by_day": {"2024-02-29": 1.5},
    "by_text": {"ab": 1},
    "by_pattern": {"xy": 1},
    "amount": 1.25,
    "at": "2024-02-29T10:00:00Z",
    "day": "2024-02-29",
    "time": "10:00:00Z",
    "span": "P1D",
    "id": "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
    "url": "https://example.com/a?b=c",
    "path": "/tmp",
    "raw": "abc",
    "secret": "s",
    "pet": {"kind": "dog", "name": "Rex"},
    "child": None,
    "text": "AB123",
}
WRONG = {
    "optional": "x",
    "union": None,
    "enumeration": "green",
    "literal": 2,
    "bounded": 150,
    "fraction": 0,
    "listed": [3],
    "unique": [1, 1],
    "pair": ["x", 1],
    "by_name": {},
    "by_color": {"green": 1},
    "by_literal": {"c": 1},
    "by_id": {"x": "x"},
    "by_day": {"2023-02-29": 1.5},
    "by_text": {"a": 1},
    "amount": 0,
    "at": "2024-02-29",
    "day": "2023-02-29",
    "time": "25:00:00Z",
    "span": "1 day",
    "id": "x",
    "url": "no url",
    "path": 1,
    "pet": {"kind": "dog", "lives": 9},
    "child": {},
    "text": "ab123",
}


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_schemas_of_pydantic_2_are_enforced(mode):
    grammar = compile_grammar(BYTES, Everything.model_json_schema(mode=mode))
    valid = VALID | ({"amount": "1.25"} if mode == "serialization" else {})
    assert accepts(grammar, valid)
    assert accepts(grammar, {**valid, "child": valid})
    assert [name for name, wrong in WRONG.items() if accepts(grammar, {**valid, name: wrong})] == []


PYDANTIC_1 = {
    "title": "Model",
    "type": "object",
    "properties": {
        "optional": {"title": "Optional", "type": "integer"},
        "union": {"title": "Union", "anyOf": [{"type": "integer"}, {"type": "string"}]},
        "enumeration": {"$ref": "#/definitions/Color"},
        "described": {"title": "Described", "default": "red", "allOf": [{"$ref": "#/definitions/Color"}]},
        "literal": {"title": "Literal", "enum": ["x", "y"], "type": "string"},
        "bounded": {"title": "Bounded", "exclusiveMinimum": 2, "maximum": 5, "type": "integer"},
        "fraction": {"title": "Fraction", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5, "type": "number"},
        "listed": {"title": "Listed", "minItems": 1, "maxItems": 3, "type": "array", "items": {"type": "integer"}},
        "pair": {
            "title": "Pair",
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "items": [{"type": "integer"}, {"type": "string"}],
        },
        "unique": {"title": "Unique", "type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        "by_name": {"title": "By Name", "type": "object", "additionalProperties": {"type": "integer"}},
        "child": {"$ref": "#/definitions/Model"},
        "at": {"title": "At", "type": "string", "format": "date-time"},
        "span": {"title": "Span", "type": "number", "format": "time-delta"},
        "pet": {
            "title": "Pet",
            "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/definitions/Cat"}},
            "oneOf": [{"$ref": "#/definitions/Cat"}, {"$ref": "#/definitions/Dog"}],
        },
    },
    "required": ["bounded"],
    "additionalProperties": False,
    "definitions": {
        "Color": {"title": "Color", "description": "An enumeration.", "enum": ["red", "blue"], "type": "string"},
        "Model": {
            "type": "object",
            "properties": {"child": {"$ref": "#/definitions/Model"}},
            "additionalProperties": False,
        },
        "Cat": {"type": "object", "properties": {"kind": {"enum": ["cat"], "type": "string"}}, "required": ["kind"]},
        "Dog": {"type": "object", "properties": {"kind": {"enum": ["dog"], "type": "string"}}, "required": ["kind"]},
    },
}


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        ("optional", 1, None),
        ("union", "x", None),
        ("enumeration", "blue", "green"),
        ("described", "blue", "green"),
        ("literal", "y", "z"),
        ("fraction", 0.25, 0),
        ("listed", [1], []),
        ("pair", [1, "x"], [1, 2]),
        ("unique", [1, 2], [1, 1]),
        ("by_name", {"a": 1}, {"a": "1"}),
        ("child", {"child": {"child": {}}}, {"child": {"x": 1}}),
        ("at", "2024-01-01T00:00:00Z", "now"),
        ("span", 1.5, "1.5"),
        ("pet", {"kind": "dog"}, {"kind": "cow"}),
    ],
)
def test_schemas_of_pydantic_1_are_enforced(name, valid, invalid):
    schema = {**PYDANTIC_1, "properties": {n: s for n, s in PYDANTIC_1["properties"].items() if n in (name, "bounded")}}
    order = list(schema["properties"])
    complete = [{n: ({"bounded": 3} | {name: value})[n] for n in order} for value in (valid, invalid)]
    check(schema, complete[:1], [complete[1], {**complete[0], "bounded": 2}, {**complete[0], "bounded": 150}])
    check(PYDANTIC_1, [{"bounded": 3}], [{"bounded": 2}, {}])


def test_the_schemas_of_this_repository_are_enforced_on_their_benchmarks():
    schema = json.loads((PROJECT_ROOT / "data/benchmarks/aec_parser.schema.json").read_text())
    grammar = compile_grammar(BYTES, schema)
    lines = (PROJECT_ROOT / "data/benchmarks/aec_parser.jsonl").read_text().splitlines()
    expected = [json.loads(line)["expected"] for line in lines]
    values = [json.loads(value) if isinstance(value, str) else value for value in expected]
    order = list(schema["properties"])
    values = [written(value, order) for value in values]
    assert len(values) > 50 and [value for value in values if not accepts(grammar, value)] == []
    assert not accepts(grammar, {**values[0], "element": "spaceship"})


# ---- refused by keyword and path


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
    with pytest.raises(RequestRefused, match=rf"json_schema at #/properties/x/items[^ ]*: {re.escape(keyword)}: "):
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
        with pytest.raises(RequestRefused, match=rf"json_schema at #[^ ]*: {keyword}: "):
            json_schema.rewrite_schema(schema)


@pytest.mark.parametrize("required", [True, False])
def test_recursive_branches_are_compared_quickly(required):
    names = [f"p{n}" for n in range(20)]
    tree = {name: {"properties": {p: ref(name) for p in names}, "required": names * required} for name in "ab"}
    schema = {"$defs": tree, "oneOf": [ref("a"), ref("b")]}
    found = []

    def refuse():
        try:
            json_schema.rewrite_schema(schema)
        except RequestRefused as refused:
            found.append(str(refused))

    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    thread.join(60)
    assert found and "branches 0 and 1 may match the same value" in found[0]


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


# ---- the official test suite


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


def written(value, order):
    """Return a value with its keys in the schema's order, and integers without a decimal point."""
    if isinstance(value, dict):
        positions = {name: position for position, name in enumerate(order)}
        names = sorted(value, key=lambda name: positions.get(name, len(order)))
        return {name: written(value[name], order) for name in names}
    if isinstance(value, list):
        return [written(part, order) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


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
                assert "json_schema at #" in str(refused) or "levels deep" in str(refused), str(refused)
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


def test_limits_are_checked_before_llguidance_compiles(monkeypatch):
    # It cannot be interrupted: nothing beyond the limits may reach it. Any use of the matcher is an AttributeError.
    monkeypatch.setattr(llguidance, "LLMatcher", None)
    with pytest.raises(AttributeError):
        compile_grammar(BYTES, {"type": "boolean"})
    for schema in ({"enum": ["x" * 90_000]}, {"pattern": "a{9999}"}, {"multipleOf": 99_999}, DEEP):
        with pytest.raises(RequestRefused):
            compile_grammar(BYTES, schema)
