"""The schemas that pydantic writes, and those of this repository, are enforced."""

import datetime
import enum
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Optional

import pydantic
import pytest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from finetune_pipeline.inference.grammar import compile_grammar
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.inference.byte_grammar import BYTES, accepts, check, written


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
