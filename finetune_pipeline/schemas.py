"""A model's JSON: the schema of a loop's answers, its compliance rules, and the strict reading of an answer.

Curation and evaluation share it, so that both mean the same by "valid". Nothing is ever fetched for a `$ref`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

Schema = dict[str, Any]
_MAX_DEPTH = 100


class SchemaError(ValueError):
    """A schema or rules file cannot be used; the message says which, why, and what to do."""


class Unreadable(ValueError):
    """An answer is not JSON."""


@dataclass(frozen=True)
class Rule:
    """A condition that every answer has to keep, such as "a fire door is rated for at least 20 minutes"."""

    id: str
    title: str
    schema: Schema


def compile_schema(schema: Schema) -> "Draft202012Validator":
    """A validator of draft 2020-12, to be made once and used for every answer.

    Raises:
        SchemaError: it is not a JSON Schema.
    """
    from jsonschema import Draft202012Validator
    from jsonschema import SchemaError as NotASchema
    from referencing import Registry

    try:
        Draft202012Validator.check_schema(schema)
    except NotASchema as error:
        raise SchemaError(f"not a JSON Schema (draft 2020-12): at {error.json_path} {error.message}") from error
    # jsonschema's own registry would open the URL of an unknown $ref; an empty one does not.
    return Draft202012Validator(schema, registry=Registry())


def load_schema(path: Path) -> Schema:
    """The JSON Schema in a file.

    Raises:
        SchemaError: the file is missing, not JSON, or not a schema.
    """
    schema = _read_json(path, "output_schema")
    if not isinstance(schema, dict):
        raise SchemaError(f"{path}: expected a JSON Schema object, found {type(schema).__name__}")
    _checked(schema, str(path))
    return schema


def load_rules(path: Path) -> tuple[Rule, ...]:
    """The compliance rules in a file: a JSON list of `{"id", "title", "schema"}`.

    Raises:
        SchemaError: the file is missing or not such a list, an id comes twice, or a schema is none.
    """
    items = _read_json(path, "evaluation.compliance")
    if not isinstance(items, list):
        raise SchemaError(f"{path}: expected a JSON list of rules, found {type(items).__name__}")
    rules: dict[str, Rule] = {}
    for number, item in enumerate(items, start=1):
        rule = _rule(item, f"{path}: rule {number}")
        if rule.id in rules:
            raise SchemaError(f"{path}: rule {number}: the id {rule.id!r} is used before; give each rule its own")
        rules[rule.id] = rule
    return tuple(rules.values())


def _rule(item: Any, where: str) -> Rule:
    if not isinstance(item, dict) or set(item) != {"id", "title", "schema"}:
        found = sorted(item) if isinstance(item, dict) else type(item).__name__
        raise SchemaError(f'{where}: expected the fields "id", "title" and "schema", found {found}')
    rule = Rule(**item)
    if not (isinstance(rule.id, str) and isinstance(rule.title, str) and isinstance(rule.schema, dict)):
        raise SchemaError(f"{where}: expected a text as id and title, and an object as schema")
    _checked(rule.schema, where)
    return rule


def _checked(schema: Schema, where: str) -> None:
    try:
        compile_schema(schema)
    except SchemaError as error:
        raise SchemaError(f"{where}: {error}; correct it, then run again") from error


def _read_json(path: Path, setting: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SchemaError(f"{path} is not there; write it, or change {setting} in the loop's defs.yaml") from None
    except ValueError as error:
        raise SchemaError(f"{path} is not JSON: {error}; correct it, then run again") from error


def parse_json(text: str, constant: Callable[[str], Any] | None = None) -> Any:
    """The JSON value of an answer, strictly: no fences, NaN, infinity or half characters; at most 100 levels.

    Args:
        constant: parses NaN and infinity, which are refused without it.

    Raises:
        Unreadable: it is not JSON; the message says where.
    """
    try:
        value = json.loads(text, parse_constant=constant or _finite, parse_float=_finite, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from error
    if _deeper_than(value, _MAX_DEPTH):
        raise Unreadable(f"not JSON that anybody expects: more than {_MAX_DEPTH} levels deep")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Unreadable("not JSON that can be written to a file: it has half of a surrogate pair") from None
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _integer(text: str) -> int:
    _finite(text)  # a longer one cannot be compared with a float
    return int(text)


def _deeper_than(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [child for parent in level for _, child in children(parent)]
        if not level:
            return False
    return True


def children(value: Any) -> list[tuple[str | int, Any]]:
    """The parts of an object (by name) or a list (by place); none of anything else."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []
