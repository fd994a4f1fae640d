"""Rewrite a JSON Schema into the subset that llguidance enforces exactly, or refuse it by keyword and path.

llguidance refuses most of what it cannot enforce, but in some cases it silently enforces something else (exclusive
bounds, integers that a float cannot represent, differences between regex dialects). Here, every keyword that is not
known to be enforced exactly is refused. The result is a schema of draft 2020-12 whose only references are `#/$defs/N`;
drafts 4 to 2019-09 are translated.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from finetune_pipeline.inference.errors import RequestRefused

Node = dict[str, Any] | bool

MAX_BYTES = 64_000
"""Larger schemas take seconds to compile, and llguidance cannot be interrupted."""

MAX_DEPTH = 60
"""Levels of nesting in a schema; native code recurses over them on a thread's stack."""

MAX_REPEATS = 10_000
"""Largest minimum length or count that a schema may require; each repetition can be a state of the lexer."""

MAX_PATTERN_SIZE = 2_000
"""Characters of a pattern with its repetitions expanded; masks of larger patterns take 0.1 s and more."""

MAX_PATTERN_SIZES = 20_000
"""The same for all patterns of a schema together; the validator of complete answers takes 1 to 7 kB for each."""

MAX_OPTIONAL = 500
"""Optional properties of one object; any of them may come next, and the time for the mask is quadratic in them."""

MAX_PATTERN_PROPERTIES = 50
"""llguidance intersects each with every other one."""

MAX_MULTIPLE = 10_000
"""Largest multipleOf without its decimal point (the least common multiple of all that apply to one value); the
automaton has one state for each remainder."""

MAX_PATTERNS = 10
"""Patterns and formats that all apply to one value; time and memory of their intersection double with each."""

MAX_WORK = 100_000
"""Schemas that one value of a complete answer is checked against; chains of `anyOf` or `allOf` and $ref multiply."""

MAX_SPELLED = 1_000_000
"""Largest number of `enum` and `const` that may be generated as it is written in the schema, with `.0`."""

_EXACT = 2**53
_NUMBER_LIMIT = 1e15
_DECIMALS = 15
_DRAFTS = {
    "json-schema.org/draft-04/schema": 4,
    "json-schema.org/draft-06/schema": 6,
    "json-schema.org/draft-07/schema": 7,
    "json-schema.org/draft/2019-09/schema": 2019,
    "json-schema.org/draft/2020-12/schema": 2020,
}
_REFUSED = {
    "not": "list what is allowed instead",
    "if": "use anyOf with one branch for each case",
    "contains": "give the items a schema with `items`",
    "dependencies": "use anyOf with one branch for each case",
    "dependentRequired": "use anyOf with one branch for each case",
    "dependentSchemas": "use anyOf with one branch for each case",
    "unevaluatedItems": "use `items: false` beside prefixItems",
    "unevaluatedProperties": "use `additionalProperties: false`",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
    "extends": "use allOf",
    "disallow": "list what is allowed instead",
    "divisibleBy": "use multipleOf",
}
_LENGTHS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_TYPES = frozenset({"null", "boolean", "number", "string", "array", "object"})

_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_DATE = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|"
    r"02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
FORMAT_PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[tT]{_TIME}$",
    "uuid": r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$",
}
"""Patterns for formats that llguidance does not enforce exactly (29 February); without leap seconds, which no library
parses."""

_FORMATS = {"duration", "email", "ipv4", "ipv6", "uri"}
_ANY_TEXT = {"binary", "directory-path", "file-path", "password", "path"}
_ANY_NUMBER = {"double", "float", "time-delta"}
_INTEGERS = {"int32": (-(2**31), 2**31 - 1)}


@dataclass(frozen=True)
class EnforceableSchema:
    """A schema that llguidance enforces exactly.

    Attributes:
        schema: for llguidance.
        checked: the same with uniqueItems, for the check of complete answers.
        nodes: every subschema, inner ones first, with its path in the original schema.
    """

    schema: dict[str, Any]
    checked: dict[str, Any]
    nodes: list[tuple[str, dict[str, Any]]]


def rewrite_schema(schema: dict[str, Any]) -> EnforceableSchema:
    """Return an equivalent schema that llguidance enforces.

    Raises:
        RequestRefused: a keyword cannot be enforced or exceeds a limit; the message names it and its path.
    """
    size = len(json.dumps(schema, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise RequestRefused(
            f"The json_schema has {size} bytes; at most {MAX_BYTES} are allowed. Make its enumerations smaller."
        )
    check_depth(schema)
    rewriter = _Rewriter(schema, unique=False)
    rewritten = rewriter.rewrite()
    return EnforceableSchema(rewritten, _Rewriter(schema, unique=True).rewrite(), rewriter.nodes)


def check_depth(schema: dict[str, Any]) -> None:
    """Raise RequestRefused if a schema is nested more than MAX_DEPTH levels deep."""
    if any(depth == MAX_DEPTH for depth, _ in enumerate(_levels(schema))):
        raise RequestRefused(
            f"The json_schema is nested more than {MAX_DEPTH} levels deep; move parts of it into $defs."
        )


def _levels(value: Any) -> Iterator[list[Any]]:
    """Yield all values at depth 0, 1, ... of a JSON value."""
    level = [value]
    while level:
        yield level
        containers = (
            part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)
        )
        level = [child for container in containers for child in container]


class _Rewriter:
    """Rewrites one schema; paths in messages are JSON pointers into the original schema."""

    def __init__(self, schema: dict[str, Any], *, unique: bool) -> None:
        self.nodes: list[tuple[str, dict[str, Any]]] = []
        self._root = schema
        self._unique = unique
        self._draft = _draft_of(schema)
        self._names: dict[str, str] = {}  # name in $defs of each reference
        self._pending: list[str] = []  # references whose definitions are not rewritten yet
        self._definitions: dict[str, Node] = {}
        self._one_ofs: list[tuple[list[Node], str]] = []  # branches and path
        self._multiples: list[tuple[int, int]] = []  # without decimal point, and number of decimals
        self._pattern_property_count = 0
        self._pattern_sizes = 0  # total, with repetitions expanded
        self._known_facts: dict[tuple[str, int], _Facts] = {}
        self._spelled: list[tuple[dict[str, Any], str, list[int]]] = []  # node, keyword, and its numbers with `.0`

    def rewrite(self) -> dict[str, Any]:
        """Return the rewritten schema with its definitions."""
        root = self._rewrite(self._root, "#")
        while self._pending:
            reference = self._pending.pop()
            self._definitions[self._names[reference]] = self._rewrite(self._resolve(reference), reference)
        self._refuse_direct_recursion()
        self._refuse_exponential(root)
        for branches, path in self._one_ofs:
            self._refuse_overlap(branches, path)
        if not self._multiples:  # of which one more could be too large
            self._allow_decimal_points()
        assert isinstance(root, dict)
        return {"$defs": self._definitions, **root} if self._definitions else root

    def _rewrite(self, schema: Any, path: str) -> Node:
        if isinstance(schema, bool):
            return schema
        self._refuse_keywords(schema, path)
        if "$ref" in schema and self._draft < 2019:
            ignored = [name for name in schema if name in _SIBLINGS]
            if ignored:
                raise _refused(path, ignored[0], "before draft 2019-09 keywords beside $ref have no effect; use allOf")
        node: dict[str, Any] = {"type": schema["type"]} if "type" in schema else {}
        self._rewrite_numbers(schema, path, node)
        self._rewrite_strings(schema, path, node)
        self._rewrite_arrays(schema, path, node)
        self._rewrite_objects(schema, path, node)
        for name in _LENGTHS:
            if name in schema:
                length = schema[name]
                if name.startswith("min") and length > MAX_REPEATS:
                    raise _refused(path, name, f"{length} is more than {MAX_REPEATS}, the most that can be enforced")
                node[name] = min(int(length), 2**31 - 1)
        if "$ref" in schema:
            node["$ref"] = self._rewrite_reference(schema["$ref"], path)
        every = [self._rewrite(part, f"{path}/allOf/{n}") for n, part in enumerate(schema.get("allOf", []))]
        node["allOf"] = every + node.pop("allOf", [])
        if "anyOf" in schema:
            node["anyOf"] = [self._rewrite(part, f"{path}/anyOf/{n}") for n, part in enumerate(schema["anyOf"])]
        if "oneOf" in schema:
            branches = [self._rewrite(part, f"{path}/oneOf/{n}") for n, part in enumerate(schema["oneOf"])]
            self._one_ofs.append((branches, f"{path}/oneOf"))
            node["allOf"].append({"anyOf": branches})
        if not node["allOf"]:
            del node["allOf"]
        if "enum" in schema:
            node["enum"] = [_exact_literal(value, "enum", path) for value in schema["enum"]]
            self._note_spelling(node, "enum", schema["enum"])
        if "const" in schema:
            node["const"] = _exact_literal(schema["const"], "const", path)
            self._note_spelling(node, "const", [schema["const"]])
        self.nodes.append((path, node))
        return node

    def _note_spelling(self, node: dict[str, Any], keyword: str, values: list[Any]) -> None:
        numbers = [value for value in values if isinstance(value, float) and value.is_integer()]
        if found := [int(number) for number in numbers if abs(number) <= MAX_SPELLED]:
            self._spelled.append((node, keyword, found))

    def _allow_decimal_points(self) -> None:
        """Allow `1.0` beside `1` where the schema writes 1.0; its examples do so too, and a model learned it from them.

        llguidance writes a constant in one way only. With one decimal, the only multiple of 0.5 from 1 to 1.1 is 1.0.
        """
        for node, keyword, numbers in self._spelled:
            literal = {keyword: node.pop(keyword)}
            bounds = [sorted((number, number + math.copysign(0.1, number))) for number in numbers]
            ranges = [{"type": "number", "minimum": low, "maximum": high, "multipleOf": 0.5} for low, high in bounds]
            node.setdefault("allOf", []).append({"anyOf": [literal, *ranges]})

    def _refuse_keywords(self, schema: dict[str, Any], path: str) -> None:
        for name, instead in _REFUSED.items():
            is_trivial = name.startswith(("dependen", "unevaluated")) and schema.get(name) in ({}, True)
            has_no_effect = is_trivial or (name == "if" and not {"then", "else"} & {*schema})
            if name in schema and not has_no_effect:
                raise _unsupported(path, name, instead)
        for name in ("contentMediaType", "contentEncoding"):
            if name in schema and self._draft < 2019:
                raise _unsupported(path, name, "since draft 2019-09 it is an annotation")
        for name in ("$schema", "id" if self._draft == 4 else "$id"):
            if path != "#" and isinstance(schema.get(name), str) and schema[name] != self._root.get(name):
                raise _refused(path, name, "subschemas with their own identifier are not supported")

    def _rewrite_numbers(self, schema: dict[str, Any], path: str, node: dict[str, Any]) -> None:
        types = _types(schema)
        integral = "number" not in types and "integer" in types
        bounds = {name: schema[name] for name in _BOUNDS if not isinstance(schema.get(name, False), bool)}
        for name, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if schema.get(exclusive) is True and name in bounds:  # as in draft 4
                bounds[exclusive] = bounds.pop(name)
        bounds |= _bounds_of_format(schema, types, path)
        ranged = {name: _exact_bound(bound, name, path, integral=integral) for name, bound in bounds.items()}
        _make_bounds_inclusive(ranged, integral=integral)
        shorter = [] if integral else _prefixes_of_bounds(ranged)
        if shorter and types & {"number", "integer"}:
            others = [{"type": sorted(types - {"number", "integer"})}] if types - {"number", "integer"} else []
            numbers: list[Node] = [{"type": "number", **ranged}, *({"const": number} for number in shorter)]
            node.setdefault("allOf", []).append({"anyOf": [*others, *numbers]})
        else:
            node.update(ranged)
        if "multipleOf" in schema:
            node["multipleOf"] = self._check_multiple(schema["multipleOf"], path)

    def _check_multiple(self, multiple: float, path: str) -> float:
        scaled, decimals = _without_decimal_point(multiple)
        if not 0 < scaled <= MAX_MULTIPLE or decimals > 9:
            raise _refused(
                path, "multipleOf", f"it may have at most {MAX_MULTIPLE} without its decimal point, and 9 decimals"
            )
        self._multiples.append((scaled, decimals))
        most = max(digits for _, digits in self._multiples)
        together = 1
        for coefficient, digits in set(self._multiples):
            number = coefficient * 10 ** (most - digits)
            if together * number >= 2**32:
                raise _refused(path, "multipleOf", "combined with the other multipleOf its multiples are too large")
            together = math.lcm(together, number)
        return int(multiple) if float(multiple).is_integer() else multiple

    def _rewrite_strings(self, schema: dict[str, Any], path: str, node: dict[str, Any]) -> None:
        if "pattern" in schema:
            patterns = self._check_sizes(_translate_patterns(schema["pattern"], path), "pattern", path)
            node["pattern"] = patterns[0]
            node.setdefault("allOf", []).extend({"pattern": pattern} for pattern in patterns[1:])
        name = schema.get("format")
        if name is None or name in _ANY_TEXT or name in _ANY_NUMBER or name in _INTEGERS:
            return
        if name in FORMAT_PATTERNS:
            node.setdefault("allOf", []).append({"pattern": FORMAT_PATTERNS[name]})
        elif name == "ipvanyaddress":
            node.setdefault("allOf", []).append({"anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]})
        elif name in _FORMATS:
            node["format"] = name
        else:
            known = ", ".join(sorted(_FORMATS | {*FORMAT_PATTERNS}))
            raise _refused(path, "format", f"{name!r} is not enforced; use one of {known}, or `pattern`")

    def _check_sizes(self, patterns: list[tuple[str, int]], keyword: str, path: str) -> list[str]:
        self._pattern_sizes += sum(size for _, size in patterns)
        if self._pattern_sizes > MAX_PATTERN_SIZES:
            limit = f"{MAX_PATTERN_SIZES} characters with their repetitions expanded"
            raise _refused(path, keyword, f"all patterns up to here have more than {limit}; reduce them")
        return [pattern for pattern, _ in patterns]

    def _rewrite_arrays(self, schema: dict[str, Any], path: str, node: dict[str, Any]) -> None:
        prefix, items, rest = schema.get("prefixItems"), schema.get("items"), "items"
        if self._draft < 2020:
            if prefix is not None:
                raise _refused(
                    path, "prefixItems", "it belongs to draft 2020-12; in this draft use `items` with a list"
                )
            if isinstance(items, list):
                prefix, items, rest = items, schema.get("additionalItems"), "additionalItems"
        if prefix is not None:
            name = "prefixItems" if self._draft >= 2020 else "items"
            node["prefixItems"] = [self._rewrite(part, f"{path}/{name}/{n}") for n, part in enumerate(prefix)]
        if items is not None:
            node["items"] = self._rewrite(items, f"{path}/{rest}")
        if schema.get("uniqueItems") and self._unique:
            node["uniqueItems"] = True

    def _rewrite_objects(self, schema: dict[str, Any], path: str, node: dict[str, Any]) -> None:
        for key in ("properties", "patternProperties"):
            if key in schema:
                node[key] = {
                    _exact_literal(name, key, path): self._rewrite(part, f"{path}/{key}/{_escaped(name)}")
                    for name, part in schema[key].items()
                }
        if "required" in schema:
            node["required"] = [_exact_literal(name, "required", path) for name in schema["required"]]
        if len({*node.get("properties", {})} - {*node.get("required", [])}) > MAX_OPTIONAL:
            raise _refused(
                path, "properties", f"at most {MAX_OPTIONAL} of them may be optional; make the others required"
            )
        if "additionalProperties" in schema:
            node["additionalProperties"] = self._rewrite(schema["additionalProperties"], f"{path}/additionalProperties")
        for pattern in schema.get("patternProperties", {}):
            every = _translate_patterns(pattern, f"{path}/patternProperties")
            if len(self._check_sizes(every, "patternProperties", path)) > 1:
                raise _refused(path, "patternProperties", f"{pattern!r} has a lookahead; write it without (?!...)")
        self._pattern_property_count += len(schema.get("patternProperties", {}))
        if self._pattern_property_count > MAX_PATTERN_PROPERTIES:
            raise _refused(
                path, "patternProperties", f"at most {MAX_PATTERN_PROPERTIES} of them are allowed in a schema"
            )
        names = schema.get("propertyNames", True)
        is_trivial = isinstance(names, dict) and {*names} & _KNOWN <= {"type"} and "string" in _types(names)
        if names is not True and not is_trivial:  # zod declares names as strings in every record
            self._rewrite_property_names(schema, path, node)

    def _rewrite_property_names(self, schema: dict[str, Any], path: str, node: dict[str, Any]) -> None:
        """Express propertyNames (an enumeration, a pattern, a format or a length) as patternProperties."""
        names, where = schema["propertyNames"], f"{path}/propertyNames"
        for _ in range(MAX_DEPTH):
            if isinstance(names, dict) and {*names} & _KNOWN == {"$ref"}:
                self._rewrite_reference(names["$ref"], where)
                names = self._resolve(names["$ref"])
        if "patternProperties" in node or not isinstance(names, dict):
            raise _refused(
                path, "propertyNames", "it is enforced only without patternProperties, and only as an object"
            )
        self._rewrite(names, where)
        if _pattern_of_names(names) is None:
            raise _refused(
                path, "propertyNames", "it may have one of enum, const, pattern, format, or minLength and maxLength"
            )
        own = node.get("properties", {})
        if own:
            if not {"enum", "const"} & {*names}:
                raise _refused(
                    path, "propertyNames", "together with `properties` only an enum or const of names is enforced"
                )
            every = names.get("enum", [names.get("const")])
            node["properties"] = {name: part if name in every else False for name, part in own.items()}
            # llguidance finds no next token where a pattern matches only names that are already used.
            names = {"enum": [name for name in every if name not in own]}
        pattern = _pattern_of_names(names)
        if pattern is not None:
            node["patternProperties"] = {pattern: node.get("additionalProperties", True)}
        node["additionalProperties"] = False

    def _rewrite_reference(self, reference: str, path: str) -> str:
        if reference != "#" and not reference.startswith("#/"):
            raise RequestRefused(
                f"json_schema at {path}: $ref: it refers to {reference[:200]!r}; only references within it (#/...) are "
                "followed"
            )
        if reference not in self._names:
            target = self._resolve(reference)
            if not isinstance(target, bool | dict):
                raise _refused(path, "$ref", f"there is no schema at {reference[:200]!r}")
            self._names[reference] = str(len(self._names))
            self._pending.append(reference)
            if not re.fullmatch(r"#/definitions/[^/]*|#/\$defs/[^/]*", reference) or self._draft < 2019:
                _check_meta_schema(target, self._draft, reference)
        return f"#/$defs/{self._names[reference]}"

    def _resolve(self, reference: str) -> Any:
        from urllib.parse import unquote

        found: Any = self._root
        for part in reference.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isascii() and name.isdigit() and int(name) < len(found):
                found = found[int(name)]
            else:
                found = found.get(name) if isinstance(found, dict) else None
        return found

    def _refuse_direct_recursion(self) -> None:
        """Refuse a definition that refers to itself before any value begins; llguidance would allow no token."""
        references = {name: reference for reference, name in self._names.items()}
        following = {name: set(_references_to_same_value(node)) for name, node in self._definitions.items()}
        while leaves := [name for name, names in following.items() if not names & {*following}]:
            for name in leaves:
                del following[name]
        if following:
            path = references[min(following)]
            raise _refused(path, "$ref", "it refers back to itself without an object or array in between")

    def _refuse_exponential(self, root: Node) -> None:
        """Refuse what takes exponential time: intersections of patterns, and chains of unions."""
        references = {name: reference for reference, name in self._names.items()}
        weights: dict[str, _Weight] = {}
        for name in _leaves_first({name: set(_references(node)) for name, node in self._definitions.items()}):
            weights[name] = _weight(self._definitions[name], weights)
            weights[name].check(references[name])
        _weight(root, weights).check("#")

    def _refuse_overlap(self, branches: list[Node], path: str) -> None:
        facts = [_Facts(branch, self._facts) for branch in branches]
        compared: dict[tuple[_Facts, _Facts], bool] = {}
        for first in range(len(facts)):
            for second in range(first):
                if not facts[first].excludes(facts[second], compared):
                    overlap = f"branches {second} and {first} may match the same value"
                    instead = "give each a required property with its own const, or use anyOf"
                    raise _refused(path.removesuffix("/oneOf"), "oneOf", f"{overlap}; {instead}")

    def _facts(self, name: str, depth: int) -> "_Facts":
        if (name, depth) not in self._known_facts:
            self._known_facts[name, depth] = _Facts(self._definitions[name], self._facts, depth)
        return self._known_facts[name, depth]


_KNOWN = frozenset(
    {"type", "format", "pattern", "items", "prefixItems", "additionalItems", "uniqueItems", "properties", "required"}
    | {"patternProperties", "additionalProperties", "propertyNames", "allOf", "anyOf", "oneOf", "enum", "const", "$ref"}
    | {*_REFUSED, *_LENGTHS, *_BOUNDS, "multipleOf"}
)
_SIBLINGS = _KNOWN - {"$ref"}


class _Facts:
    """What is known about the values that a node matches: types, possible values, and required properties."""

    def __init__(self, node: Node, named: "Callable[[str, int], _Facts]", depth: int = 0) -> None:
        self.types: frozenset[str] = _TYPES if node is not False else frozenset()
        self.values: frozenset[str] | None = None
        self.properties: dict[str, _Facts] = {}
        self.required: set[str] = set()
        if isinstance(node, bool) or depth > 20:
            return
        self.types = frozenset("number" if kind == "integer" else kind for kind in _types(node))
        given = node.get("enum", [node["const"]] if "const" in node else None)
        if given is not None:
            self.values = frozenset(json.dumps(value, sort_keys=True) for value in given)
            self.types &= {_type_of(value) for value in given}
        self.required = {*node.get("required", [])}
        for name, part in node.get("properties", {}).items():
            if name in self.required:
                self.properties[name] = _Facts(part, named, depth + 1)
        for part in node.get("allOf", []):
            self._add(_Facts(part, named, depth + 1))
        if "$ref" in node:
            self._add(named(node["$ref"][8:], depth + 1))
        if len(node.get("anyOf", [])) and given is None:
            every = [_Facts(part, named, depth + 1) for part in node["anyOf"]]
            self.types &= frozenset().union(*(one.types for one in every))

    def _add(self, other: "_Facts") -> None:
        self.types &= other.types
        if other.values is not None:
            self.values = other.values if self.values is None else self.values & other.values
        self.required |= other.required
        self.properties = {**other.properties, **self.properties}

    def excludes(self, other: "_Facts", compared: "dict[tuple[_Facts, _Facts], bool]") -> bool:
        """Return whether no value can match both.

        Args:
            compared: results so far, because the same definitions occur many times.
        """
        if not self.types & other.types:
            return True
        if self.values is not None and other.values is not None and not self.values & other.values:
            return True
        if self.types & other.types != {"object"}:
            return False
        if (self, other) not in compared:
            compared[self, other] = any(
                name in other.properties and facts.excludes(other.properties[name], compared)
                for name, facts in self.properties.items()
            )
        return compared[self, other]


@dataclass(frozen=True)
class _Weight:
    """The constraints that apply to one value at the same time.

    Attributes:
        work: number of schemas that the value, or one value within it, is checked against.
        patterns: number of patterns and formats.
        multiples: each multipleOf without its decimal point, and its number of decimals.
    """

    work: int = 1
    patterns: int = 0
    multiples: frozenset[tuple[int, int]] = frozenset()

    @property
    def remainders(self) -> int:
        """Number of states of the automaton for all multiples."""
        most = max((decimals for _, decimals in self.multiples), default=0)
        return math.lcm(*(scaled * 10 ** (most - decimals) for scaled, decimals in self.multiples))

    def check(self, path: str) -> None:
        """Check the limits.

        Raises:
            RequestRefused: one is exceeded; the message names the keyword.
        """
        if self.patterns > MAX_PATTERNS:
            raise _refused(path, "allOf", f"at most {MAX_PATTERNS} patterns and formats may apply to one value")
        if len(self.multiples) > 1 and self.remainders > MAX_MULTIPLE:
            why = f"those of one value have a least common multiple of {self.remainders}, more than {MAX_MULTIPLE}"
            raise _refused(path, "multipleOf", why)
        if self.work > MAX_WORK:
            why = (
                f"with all $ref expanded one value is checked against more than {MAX_WORK} schemas; nest fewer of them"
            )
            raise _refused(path, "anyOf or allOf", why)


def _weight(node: Node, weights: dict[str, _Weight]) -> _Weight:
    """Return the weight of a node; a definition without a weight is part of a cycle and counts as one schema."""
    if isinstance(node, bool):
        return _Weight()
    every = [_weight(part, weights) for part in node.get("allOf", [])]
    if "$ref" in node:
        every.append(weights.get(node["$ref"].removeprefix("#/$defs/"), _Weight()))
    branches = [_weight(part, weights) for part in node.get("anyOf", [])] or [_Weight(work=0)]
    within = [_weight(part, weights).work for part in _inner_nodes(node)]
    own = {_without_decimal_point(node["multipleOf"])} if "multipleOf" in node else set()
    heaviest = max(branches, key=lambda branch: branch.remainders)
    return _Weight(
        work=1 + sum(one.work for one in (*every, *branches)) + max(within, default=0),
        patterns=sum(name in node for name in ("pattern", "format"))
        + sum(one.patterns for one in every)
        + max(one.patterns for one in branches),
        multiples=frozenset(own).union(heaviest.multiples, *(one.multiples for one in every)),
    )


def _inner_nodes(node: dict[str, Any]) -> list[Node]:
    """Return the parts of a node that apply to values within its own."""
    named = [part for key in ("properties", "patternProperties") for part in node.get(key, {}).values()]
    return [
        *named,
        *node.get("prefixItems", []),
        *(node[key] for key in ("items", "additionalProperties") if key in node),
    ]


def _references(node: Node) -> Iterator[str]:
    """Yield the names of all definitions that a node refers to."""
    yield from _references_to_same_value(node)
    if isinstance(node, dict):
        for part in (*node.get("allOf", []), *node.get("anyOf", []), *_inner_nodes(node)):
            yield from _references(part)


def _leaves_first(following: dict[str, set[str]]) -> list[str]:
    """Return the names in topological order, references first, except in cycles."""
    order: list[str] = []
    seen: set[str] = set()
    stack = [(name, False) for name in following]
    while stack:
        name, done = stack.pop()
        if done:
            order.append(name)
        elif name not in seen:
            seen.add(name)
            stack += [(name, True), *((other, False) for other in following[name])]
    return order


def _draft_of(schema: dict[str, Any]) -> int:
    """Return the draft of `$schema`; without it 2020-12, or 7 for a schema that is only valid in draft 7."""
    try:
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise RequestRefused(f"The json_schema is not JSON that can be encoded as UTF-8: {error}") from error
    uri = schema.get("$schema")
    if isinstance(uri, str):
        draft = _DRAFTS.get(uri.removesuffix("#").removeprefix("http://").removeprefix("https://"))
        if draft is None:
            known = ", ".join(_DRAFTS)
            raise _refused("#", "$schema", f"{uri[:200]!r} is not known; use one of {known}, or leave it out")
        _check_meta_schema(schema, draft, "#")
        return draft
    try:
        _check_meta_schema(schema, 2020, "#")
    except RequestRefused:
        parts = (part for level in _levels(schema) for part in level if isinstance(part, dict))
        if any(isinstance(part.get("items"), list) for part in parts):  # tuples of pydantic 1, without $schema
            _check_meta_schema(schema, 7, "#")
            return 7
        raise
    return 2020


def _check_meta_schema(schema: Any, draft: int, path: str) -> None:
    """Check a schema against the meta-schema of its draft."""
    import jsonschema_rs

    if isinstance(schema, bool):
        return
    uris = {number: f"https://{name}" if number > 7 else f"http://{name}#" for name, number in _DRAFTS.items()}
    try:
        jsonschema_rs.meta.validate({**schema, "$schema": uris[draft]})
    except jsonschema_rs.ValidationError as error:
        pointer = [str(part) for part in error.instance_path]
        keyword = pointer.pop() if pointer else "schema"
        where = "/".join([path, *map(_escaped, pointer)])
        raise _refused(where, keyword, f"not a valid JSON Schema: {error.message[:300]}") from None


def _refused(path: str, keyword: str, why: str) -> RequestRefused:
    return RequestRefused(f"json_schema at {path[:300]}: {keyword}: {why}")


def _unsupported(path: str, keyword: str, instead: str) -> RequestRefused:
    return RequestRefused(f"json_schema: the keyword `{keyword}` (at {path[:300]}) is not supported; {instead}")


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _types(schema: dict[str, Any]) -> frozenset[str]:
    given = schema.get("type", _TYPES)
    return frozenset({given} if isinstance(given, str) else given)


def _type_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    kinds = {dict: "object", list: "array", str: "string"}
    return next((kind for cls, kind in kinds.items() if isinstance(value, cls)), "number")


def _references_to_same_value(node: Node) -> Iterator[str]:
    """Yield the names of the definitions that apply to the same value as a node."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].removeprefix("#/$defs/")
        for part in (*node.get("allOf", []), *node.get("anyOf", [])):
            yield from _references_to_same_value(part)


def _without_decimal_point(number: float) -> tuple[int, int]:
    """Return a number without its decimal point, and how many decimals it has."""
    from decimal import Decimal

    _, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    assert isinstance(exponent, int)
    coefficient = int("".join(map(str, digits))) * 10 ** max(0, min(exponent, 30))
    return coefficient, max(0, -exponent)


def _exact_bound(bound: float, name: str, path: str, *, integral: bool) -> float:
    if integral and abs(bound) <= _EXACT:
        return int(bound) if float(bound).is_integer() else bound
    if integral and name == "maximum" and bound == 2**63 - 1:
        return bound
    if not integral and abs(bound) <= _NUMBER_LIMIT and _without_decimal_point(bound)[1] <= _DECIMALS:
        return int(bound) if float(bound).is_integer() else bound
    limit = f"2^53 = {_EXACT}" if integral else f"{_NUMBER_LIMIT:g}, with {_DECIMALS} decimals"
    raise _refused(path, name, f"{bound!r:.40} cannot be enforced exactly; bounds may go up to {limit}")


def _make_bounds_inclusive(bounds: dict[str, float], *, integral: bool) -> None:
    """Replace exclusive bounds that llguidance does not always exclude by the next number."""
    for name, inclusive, direction in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
        bound = bounds.get(name)
        if bound is None or (not integral and direction * bound < 0):
            continue
        if integral:
            beyond: float = math.floor(bound) + 1 if direction > 0 else math.ceil(bound) - 1
        else:
            beyond = direction * max(math.nextafter(abs(bound), math.inf), abs(bound) + 1e-12)
        del bounds[name]
        stricter = max if direction > 0 else min
        bounds[inclusive] = stricter(bounds.get(inclusive, beyond), beyond)


def _prefixes_of_bounds(bounds: dict[str, float]) -> list[float]:
    """Return numbers that are prefixes of a bound: below 0.55 llguidance accepts 0.50, but not 0.5."""
    from decimal import Decimal

    found = []
    for name, bound in bounds.items():
        text = format(Decimal(repr(bound)), "f")
        outward = name.lower().endswith("maximum") == (bound > 0)
        if outward and "." in text:
            found += [float(text[:end]) for end in range(text.index(".") + 2, len(text))]
    least = max((bound for name, bound in bounds.items() if "inimum" in name), default=-math.inf)
    most = min((bound for name, bound in bounds.items() if "aximum" in name), default=math.inf)
    return [int(number) if number.is_integer() else number for number in found if least <= number <= most]


def _bounds_of_format(schema: dict[str, Any], types: frozenset[str], path: str) -> dict[str, int]:
    """Return the bounds of `format: int32`, if it applies to numbers."""
    limits = _INTEGERS.get(schema.get("format", ""))
    if limits is None or not types & {"integer", "number"}:
        return {}
    if {*_BOUNDS} & {*schema}:
        raise _refused(path, "format", "not supported together with bounds; leave it out")
    return {"minimum": limits[0], "maximum": limits[1]}


def _exact_literal(value: Any, keyword: str, path: str) -> Any:
    """Return a value as the grammar generates it: integers without a decimal point.

    Raises:
        RequestRefused: a number is not exact as a float, or a string has a control character other than white space.
    """
    if isinstance(value, dict):
        return {
            _exact_literal(name, keyword, path): _exact_literal(part, keyword, path) for name, part in value.items()
        }
    if isinstance(value, list):
        return [_exact_literal(part, keyword, path) for part in value]
    if isinstance(value, str) and re.search(r"[\x00-\x07\x0b\x0e-\x1f\x7f]", value):
        raise _refused(path, keyword, "it has a control character, which answers cannot contain")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    integral = float(value).is_integer() if abs(value) <= _EXACT else False
    if not integral and (abs(value) > _NUMBER_LIMIT or _without_decimal_point(value)[1] > _DECIMALS):
        raise _refused(path, keyword, f"{value!r:.40} cannot be enforced exactly; use at most 2^53 and 15 decimals")
    return int(value) if integral else value


def _pattern_of_names(names: dict[str, Any]) -> str | None:
    given = {name for name in names if name in _KNOWN and name != "type"}
    if given == {"enum"} or given == {"const"}:
        every = [name for name in names.get("enum", [names.get("const")]) if isinstance(name, str)]
        quoted = [re.sub(r"[.^$*+?()\[\]{}|\\]", r"\\\g<0>", name) for name in every]
        return f"^(?:{'|'.join(quoted)})$" if every else None
    if given == {"pattern"} and len(_translate_patterns(names["pattern"], "")) == 1:
        return str(names["pattern"])
    if given == {"format"}:
        return FORMAT_PATTERNS.get(names["format"])
    if given and given <= {"minLength", "maxLength"}:
        most = int(names["maxLength"]) if "maxLength" in names else ""
        return rf"^[\s\S]{{{int(names.get('minLength', 0))},{most}}}$"
    return None


_SPACE = r"\t\n\x0b\x0c\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_TOKEN = re.compile(
    r"(?P<escape>\\(?:[dDwWsStnrfv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[pP]\{[\w=]+\}|[!-/:-@\[-`{-~]))"
    r"|(?P<group>\((?:\?(?::|P?<[A-Za-z_]\w*>))?)(?!\?)"
    r"|(?P<end>\))"
    r"|(?P<set>\[\^?(?:\\.|[^\]\[\\])(?:\\.|[^\]\[\\])*\])"
    r"|(?P<count>[*+?]\??|\{(?P<least>\d+)(?P<most>,\d*)?\}\??)"
    r"|(?P<plain>[^\\(\[{*+?])"
)
_AHEAD = re.compile(r"\^\(\?!\^?\[(?P<set>(?!\^)(?:[^\]\[\\]|\\.)*)\]\*\$\)(?P<rest>[^|]*)")


def _translate_patterns(pattern: str, path: str) -> list[tuple[str, int]]:
    """Translate an ECMA 262 pattern to regular expressions of llguidance's dialect, with their sizes; all must match.

    More than one is needed for `^(?!^[-+.]*$)`, with which pydantic requires a digit in a decimal.

    Raises:
        RequestRefused: it is too large, or regex dialects interpret it differently.
    """
    ahead = _AHEAD.fullmatch(pattern)
    if ahead:
        return [_translate_pattern("^" + ahead["rest"], path), _translate_pattern(f"[^{ahead['set']}]", path)]
    return [_translate_pattern(pattern, path)]


def _translate_pattern(pattern: str, path: str) -> tuple[str, int]:
    written: list[str] = []
    sizes, before = [0], 0
    position = 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None or (token["set"] and re.search(r"&&|--|~~", token["set"])):
            rest = pattern[position : position + 40]
            raise _refused(
                path,
                "pattern",
                f"the part from {rest!r} on is not supported, or regex dialects interpret it differently",
            )
        position = token.end()
        written.append(_translate_token(token))
        if token["group"]:
            sizes.append(0)
        elif token["count"]:
            times = max(int(token["least"] or 1), int((token["most"] or ",0")[1:] or 0), 1)
            sizes[-1] += before * (times - 1)
        else:
            before = (sizes.pop() if len(sizes) > 1 else 0) if token["end"] else 1
            sizes[-1] += before
        if sizes[-1] > MAX_PATTERN_SIZE:
            raise _refused(
                path,
                "pattern",
                f"with its repetitions expanded it has more than {MAX_PATTERN_SIZE} characters; reduce them",
            )
    return "".join(written), sum(sizes)


def _translate_token(token: "re.Match[str]") -> str:
    text = token[0]
    if text == ".":
        return r"[^\n\r\u2028\u2029]"
    if text in (r"\s", r"\S"):
        return ("[" if text == r"\s" else "[^") + _SPACE + "]"
    if token["set"]:
        return re.sub(r"\\(.)", lambda found: _SPACE if found[1] == "s" else found[0], text, flags=re.DOTALL)
    return text
