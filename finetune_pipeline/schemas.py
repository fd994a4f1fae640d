"""JSON answers: the output schema of a loop, its compliance rules, and a strict JSON parser.

Curation and evaluation share this module, so that "valid" means the same in both. A `$ref` is never fetched.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.wording import kind_of

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

Schema = dict[str, Any]
Validator = Callable[[str], str | None]
"""A function that returns what is wrong with an answer, or None if it is valid."""

_MAX_DEPTH = 100


class SchemaError(ValueError):
    """A schema or rules file cannot be used; the message says which one, why, and what to do."""


class InvalidJsonError(ValueError):
    """An answer is not JSON."""


@dataclass(frozen=True)
class Rule:
    """A condition that every answer must meet, such as "a fire door is rated for at least 20 minutes"."""

    id: str
    title: str
    schema: Schema


def compile_schema(schema: Schema) -> "Draft202012Validator":
    """Compile a JSON Schema (draft 2020-12) into a validator; compile once and use it for every answer.

    Raises:
        SchemaError: the value is not a JSON Schema.
    """
    from jsonschema import Draft202012Validator
    from jsonschema import SchemaError as NotASchema
    from referencing import Registry

    try:
        Draft202012Validator.check_schema(schema)
    except NotASchema as error:
        raise SchemaError(f"not a JSON Schema (draft 2020-12): at {error.json_path} {error.message}") from error
    # jsonschema's default registry would open the URL of an unknown $ref; an empty one does not.
    return Draft202012Validator(schema, registry=Registry())


def load_schema(path: Path) -> Schema:
    """Load the JSON Schema in a file.

    Raises:
        SchemaError: the file is missing, not JSON, or not a schema.
    """
    schema = _read_json(path, "output_schema")
    if not isinstance(schema, dict):
        raise SchemaError(f"{path}: expected a JSON Schema object, found {kind_of(schema)}")
    _checked(schema, str(path))
    return schema


def load_rules(path: Path) -> tuple[Rule, ...]:
    """Load the compliance rules in a file: a JSON list of `{"id", "title", "schema"}`.

    Raises:
        SchemaError: the file is missing or not such a list, an id is used twice, or a schema is invalid.
    """
    items = _read_json(path, "evaluation.compliance")
    if not isinstance(items, list):
        raise SchemaError(f"{path}: expected a JSON list of rules, found {kind_of(items)}")
    rules: dict[str, Rule] = {}
    for number, item in enumerate(items, start=1):
        where = f"{path}: rule {number}"
        if not isinstance(item, dict) or set(item) != {"id", "title", "schema"}:
            found = ", ".join(sorted(item)) or "none" if isinstance(item, dict) else kind_of(item)
            raise SchemaError(f'{where}: expected the fields "id", "title" and "schema", found {found}')
        rule = Rule(**item)
        if not (isinstance(rule.id, str) and isinstance(rule.title, str) and isinstance(rule.schema, dict)):
            raise SchemaError(f"{where}: expected a text as id and title, and an object as schema")
        _checked(rule.schema, where)
        if rule.id in rules:
            raise SchemaError(f"{where}: the id {rule.id!r} is already used; give each rule its own id")
        rules[rule.id] = rule
    return tuple(rules.values())


def _checked(schema: Schema, where: str) -> None:
    try:
        compile_schema(schema)
    except SchemaError as error:
        raise SchemaError(f"{where}: {error}; correct it, then run again") from error


def _read_json(path: Path, setting: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_members)
    except FileNotFoundError:
        raise SchemaError(f"{path} does not exist; create it, or change {setting} in the loop's defs.yaml") from None
    except OSError as error:
        raise SchemaError(
            f"{path} cannot be read ({error.strerror}); correct {setting} in the loop's defs.yaml"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path} is not JSON: {error}; correct it, then run again") from error


Members = Callable[[list[tuple[str, Any]]], Any]
"""A function that makes an object of the names and values of its members, see `json.loads`."""


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of a JSON object, for the `object_pairs_hook` of files that people write.

    Without it, the last of two equal names silently replaces the others.

    Raises:
        ValueError: a name is there twice.
    """
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is twice in one object, and the last would replace the first; remove one")
    return members


def parse_json(
    text: str,
    constant: Callable[[str], Any] | None = None,
    members: Members | None = None,
) -> Any:
    """Parse an answer as strict JSON: no code fences, NaN, infinity or lone surrogates; at most 100 levels deep.

    Args:
        text: the answer.
        constant: parses NaN and infinity; without it they are errors.
        members: makes an object of its members; without it, the last of two equal names counts.

    Raises:
        InvalidJsonError: the text is not JSON; the message says where.
    """
    try:
        value = json.loads(
            text,
            parse_constant=constant or _finite,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=members,
        )
    except (ValueError, RecursionError) as error:
        raise InvalidJsonError(f"not JSON: {error}") from error
    if _deeper_than(value, _MAX_DEPTH):
        raise InvalidJsonError(f"nested too deeply: more than {_MAX_DEPTH} levels")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidJsonError("not valid Unicode: it has a lone surrogate") from None
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _integer(text: str) -> int:
    _finite(text)  # a larger integer could not be compared with a float
    return int(text)


def _deeper_than(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [child for parent in level for _, child in children(parent)]
        if not level:
            return False
    return True


def children(value: Any) -> list[tuple[str | int, Any]]:
    """Return the members of an object (by name) or a list (by index); an empty list for anything else."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def answer_validator(schema: Schema | None) -> Validator:
    """Return a validator of answers that can be pickled: JSON under the schema, or for free text nothing.

    Args:
        schema: JSON Schema (draft 2020-12), or None for free text.
    """
    if schema is None:
        return _accept_any
    validator = _AnswerValidator(schema)
    validator.compiled  # noqa: B018  refuses an invalid schema here
    return validator


def _accept_any(answer: str) -> None:
    return None


_KEYWORDS = """
    $schema $id title description default examples type enum const properties required additionalProperties items
    prefixItems minimum maximum exclusiveMinimum exclusiveMaximum minLength maxLength minItems maxItems minProperties
    maxProperties anyOf allOf oneOf not if then else
"""
_COMMON_KEYWORDS = frozenset(_KEYWORDS.split())
"""Keywords that all validators understand alike. Patterns, formats and references are not among them."""


class _AnswerValidator:
    """Validates answers; under a schema of common keywords, a faster validator in Rust accepts most of them."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def __getstate__(self) -> dict[str, Any]:
        return {"_schema": self._schema}

    @cached_property
    def compiled(self) -> Any:
        return compile_schema(self._schema)

    @cached_property
    def fast(self) -> Any:
        if not _has_common_keywords_only(self._schema):
            return None
        from jsonschema_rs import Draft202012Validator

        return Draft202012Validator(self._schema)

    def __call__(self, answer: str) -> str | None:
        try:
            value = parse_json(answer)
        except InvalidJsonError as error:
            return str(error)
        if self.fast is not None and self.fast.is_valid(value):
            return None
        first = next(self.compiled.iter_errors(value), None)
        return None if first is None else f"{first.json_path}: {first.message}"


def _has_common_keywords_only(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return isinstance(schema, bool)
    if not schema.keys() <= _COMMON_KEYWORDS:
        return False
    parts = list(schema.get("properties", {}).values())
    parts += [part for name in ("prefixItems", "anyOf", "allOf", "oneOf") for part in schema.get(name, [])]
    parts += [schema[name] for name in ("additionalProperties", "items", "not", "if", "then", "else") if name in schema]
    return all(_has_common_keywords_only(part) for part in parts)
