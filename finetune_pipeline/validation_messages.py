"""Wording of validation errors: one line per field with what was found and what was expected."""

import re
from collections.abc import Collection, Iterable, Mapping, Sized
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from finetune_pipeline.wording import kind_of

RENAMED_FIELDS = {"task": "loop", "arm": "variant", "origin": "provenance", "feeds": "sources"}
"""Field names of earlier versions, so that an old log can be read, and the error about it states the new name."""

RENAMED_SETTINGS = {
    "batch_size": "per_device_train_batch_size",
    "bfloat16": "bf16",
    "checkpoints": "save_steps",
    "early_stopping": "early_stopping_patience",
    "epochs": "num_train_epochs",
    "feeds": "sources",
    "forbid_slice_falls": "slices",
    "forbid_slice_regressions": "slices",
    "gradient_accumulation": "gradient_accumulation_steps",
    "max_rejected_share": "max_rejected_fraction",
    "max_share": "max_fraction",
    "replay_older": "incremental_replay_ratio",
    "require_significance": "significance",
    "sft_weight": "loss_weights",
    "validation_share": "validation_fraction",
    "warmup_share": "warmup_steps",
    "workers": "num_processes",
}
"""Setting names of earlier versions. A new name is suggested only in a section that has it."""

ALIASES = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length",
    "model": "base_model",
    "r": "lora_r",
    "rank": "lora_r",
    "target_modules": "lora_target_modules",
}
"""Names that people try, and the settings that they mean; as in RENAMED_SETTINGS."""

_TIME = "a time such as 2026-03-02T09:14:00Z"
_CONTAINER = ("dict_type", "model_type", "model_attributes_type", "dataclass_type", "mapping_type")
_LIST = ("list_type", "tuple_type", "set_type", "frozen_set_type")

EXPECTED = {
    **dict.fromkeys(_LIST, "a list"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "decimal_type", "decimal_parsing"), "a number"),
    "finite_number": "a finite number",
    "invalid-json-value": "a JSON value",
    **dict.fromkeys(("string_type", "string_unicode", "bytes_type", "invalid_key"), "a text"),
    **dict.fromkeys(("uuid_type", "uuid_parsing", "uuid_version"), "a UUID"),
    **dict.fromkeys(
        (
            "datetime_type", "datetime_parsing", "datetime_object_invalid", "datetime_from_date_parsing",
            "timezone_naive", "timezone_aware", "timezone_offset",
        ),
        _TIME,
    ),
    **dict.fromkeys(
        ("date_type", "date_parsing", "date_from_datetime_parsing", "date_from_datetime_inexact"),
        "a date such as 2026-03-02",
    ),
    **dict.fromkeys(("time_type", "time_parsing"), "a time of day such as 09:14"),
    **dict.fromkeys(("time_delta_type", "time_delta_parsing"), "a duration"),
    **dict.fromkeys(("url_type", "url_parsing", "url_syntax_violation"), "a URL"),
    "greater_than": "greater than {gt}",
    "greater_than_equal": "greater than or equal to {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "less than or equal to {le}",
    "multiple_of": "a multiple of {multiple_of}",
    **dict.fromkeys(("literal_error", "enum"), "{expected}"),
}  # fmt: skip
"""What was expected, by the type of pydantic's error. Types that need what was found are in `_problem`."""

_SHOWN = 3
_CONSIDERED = 200  # errors of a record: describing all of a large one would take minutes

PATTERNS = {
    "^[a-z][a-z0-9_]*$": "lower-case letters, digits and _, starting with a letter",
    "^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$": "up to 100 letters, digits and . _ : / -, starting with a letter or a digit",
    "^[a-z0-9][a-z0-9._/-]{0,79}$": "up to 80 lower-case letters, digits and . _ / -, first a letter or a digit",
    "^[a-zA-Z0-9_.:-]{1,128}$": "up to 128 letters, digits and _ . : -",
    "^[0-9a-f]{64}$": "a SHA-256 of 64 hexadecimal digits",
    r"^(team:[A-Za-z0-9_.-]+|[^@\s:]+@[^@\s:]+\.[^@\s:]+)$": "an email address, or team:NAME",
    r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$": "a dotted path such as my_package.metrics.tone",
    "^https?://": "a URL that starts with http:// or https://",
    r"^v\d+\.\d+\.\d+$": "a version such as v1.2.0",
}
"""What the patterns of fields match, in words."""

FORMATS = ("text", "json_object", "json_schema")
"""Types of `response_format` and `text.format`, which pydantic has in the locations below these fields."""

METADATA_FIELDS = ("metadata.interaction_id", "metadata.domain", "metadata.kind", "metadata.retrieved_context")
"""Fields in the metadata of a request whose names are not data."""

SENTENCE = "sentence"
"""Type of a validation error whose message says what was found."""


def sentence_error(message: str) -> PydanticCustomError:
    """Return a ValueError for a validator, whose message is shown without the value before it."""
    return PydanticCustomError(SENTENCE, "{message}", {"message": message})


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the first known name that a misspelled or shortened one may mean; None if there is none."""
    names = [one for one in known if one != name]
    longer = [one for one in names if name and one.startswith(name)]
    return longer[0] if longer else next(iter(get_close_matches(name, names, n=1)), None)


def error_message(error: ValidationError) -> str:
    """Return the first problems of a record in one line, and how many more there are."""
    errors = error.errors(include_url=False)
    lines = messages_of(errors[:_CONSIDERED])
    more = f" (and {len(lines) - _SHOWN} more)" if len(lines) > _SHOWN else ""
    if len(errors) > _CONSIDERED:
        more = " (and many more)"
    return "; ".join(lines[:_SHOWN]) + more


def error_messages(error: ValidationError, known_names: Mapping[str, Collection[str]] | None = None) -> list[str]:
    """Return one line per invalid field.

    Args:
        known_names: for settings: section -> valid names in it, to suggest one for a misspelled name; "" is the top
            level. The values of a discriminator stand under its name, such as "kind".
    """
    return messages_of(error.errors(include_url=False), known_names)


def messages_of(
    errors: Iterable[Mapping[str, Any]], known_names: Mapping[str, Collection[str]] | None = None
) -> list[str]:
    """Return one line per invalid field, of errors in the form of `ValidationError.errors`."""
    names = known_names or {}
    problems: dict[str, list[_Problem]] = {}
    labels = {}
    for one in errors:
        where = field_path(one, names)
        labels[where] = _label(where, one, names)
        problems.setdefault(where, []).append(_problem(one, names))
    lines = []
    for where, found in problems.items():
        # Of a union, the members of another type do not matter if one has the right type, but an invalid value in it.
        if where and any(other.startswith((f"{where}.", f"{where}[")) for other in problems):
            continue
        found = [one for one in found if not one.of_type] or found
        given, expected = found[0].given, [one.expected for one in found]
        if given and all(expected):
            text = f"found {given}, expected {', or '.join(dict.fromkeys(expected))}"
        else:
            text = "; ".join(dict.fromkeys(str(one) for one in found))
        lines.append(f"{labels[where]}: {text}" if where else text)
    return lines


def _label(where: str, error: Mapping[str, Any], known_names: Mapping[str, Collection[str]]) -> str:
    """Return a field's path without names that are data: unknown fields of a record are quoted, keys left out."""
    name = str(error["loc"][-1]) if error["loc"] else ""
    if not known_names and "metadata" in error["loc"][:-1] and where not in METADATA_FIELDS:  # of an event
        return where[: where.index("metadata") + len("metadata")]
    if known_names or error["type"] != "extra_forbidden" or name in RENAMED_FIELDS:
        return where
    return where.removesuffix(name) + short_repr(name)


def short_repr(value: object, limit: int = 80) -> str:
    """Return the `repr` of a value, cut to about `limit` characters.

    The cut is between two words: redaction could not recognize half an e-mail address or half a key. A quotation that
    it cuts is closed, for `without_values`.
    """
    text = repr(value)
    return text if len(text) <= limit else _closed(f"{text[: text.rfind(' ', 0, limit) + 1]}...")


def short_message(text: str, limit: int) -> str:
    """Return a message, cut to at most `limit` characters; a quotation that this cuts is closed."""
    return text if len(text) <= limit else _closed(f"{text[: limit - 4]}...")


_QUOTED = re.compile(r"""(?<!\w)b?(?P<quote>["'])(?:\\.|(?!(?P=quote)).)*(?P<end>(?P=quote))?""", re.DOTALL)


def _closed(text: str) -> str:
    """Return a text with the quotation mark that its last quotation lacks, if it lacks one."""
    unclosed = [one["quote"] for one in _QUOTED.finditer(text) if one["end"] is None]
    return text + "".join(unclosed)


def without_values(text: str) -> str:
    """Return a message without what it quotes.

    Messages quote what they found (`short_repr`), which in data may be personal. This leaves the rest for places that
    such data must not reach, like Dagster's database.

    >>> without_values("prompt: found 'call Ann', expected a number; correct the loop's file")
    "prompt: found '...', expected a number; correct the loop's file"
    """
    return _QUOTED.sub("'...'", text)


def field_path(error: Mapping[str, Any], known_names: Mapping[str, Collection[str]] | None = None) -> str:
    """Return where a field is, such as `sources[0].path`; an empty text if the whole value is invalid.

    Pydantic's location also holds the members of unions that it tried, such as "str", "list[Part]", or the `kind`.
    """
    location = list(error["loc"])
    if known_names:  # the kind of a source or metric follows its index, or the setting's name
        kinds = known_names.get("kind", ())
        location = [
            part
            for before, part in zip([None, *location], location, strict=False)
            if not ((isinstance(before, int) or before == "metric") and part in kinds)
        ]
    elif location[:1] in (["interaction"], ["feedback"]):  # an event's kind comes first
        del location[0]
    for number, name in enumerate(location[:-1]):
        if name in ("format", "response_format") and location[number + 1] in FORMATS:
            del location[number + 1]
            break
    unknown_name = error["type"] == "extra_forbidden"  # may be any text
    path = ""
    for number, part in enumerate(location, start=1):
        if isinstance(part, int):
            path += f"[{part}]"
        elif (part.isidentifier() and part != "str") or (unknown_name and number == len(location)):
            path += f".{part}" if path else part
    return path


def first_field(error: ValidationError) -> str:
    """Return the path of the field that `error_message` names first; an empty text if the whole value is invalid."""
    paths = [field_path(one) for one in error.errors(include_url=False)[:_CONSIDERED]]
    return next(path for path in paths if not any(other.startswith((f"{path}.", f"{path}[")) for other in paths))


class _Problem(NamedTuple):
    """What is wrong with a value: what was found and what was expected, or another sentence."""

    text: str = ""
    given: str = ""
    expected: str = ""
    of_type: bool = False  # the value has another type

    def __str__(self) -> str:
        return self.text or f"found {self.given}, expected {self.expected}"


def _problem(error: Mapping[str, Any], known_names: Mapping[str, Collection[str]]) -> _Problem:
    kind, value, context = error["type"], error.get("input"), error.get("ctx", {})
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind == SENTENCE:
        return _Problem(message)
    if kind in {"value_error", "assertion_error"}:
        of_field = field_path(error, known_names) and not isinstance(value, Mapping)
        return _Problem(f"found {_shown(value)}, {message}" if of_field else message)
    if kind in {"missing", "missing_argument", "missing_keyword_only_argument", "missing_positional_only_argument"}:
        return _Problem("is missing")
    if kind in {"extra_forbidden", "unexpected_keyword_argument"}:
        return _Problem(_unknown_name(error, known_names))
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        return _Problem(_unknown_tag(error, known_names))
    if kind == "json_invalid":
        return _Problem(f"not JSON: {context.get('error', message)}")
    if known_names and value is None and kind in EXPECTED.keys() | {*_CONTAINER}:
        of_section = kind in _CONTAINER or kind in _LIST
        return _Problem(f"is empty; remove the key, or {'put settings under it' if of_section else 'give it a value'}")
    if kind == "none_required" or (kind == "too_long" and context["max_length"] == 0):
        return _Problem("is not supported; leave it out")
    if kind in {"too_short", "string_too_short", "bytes_too_short"} and not value:
        return _Problem("is empty")
    if kind in {"too_short", "too_long"}:
        limit = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return _Problem("", f"{len(value):,} items" if isinstance(value, Sized) else _shown(value), limit)
    of_type = kind.endswith("_type") or kind in {"literal_error", "is_instance_of"}
    return _Problem("", *_found_and_expected(kind, value, context, message, bool(known_names)), of_type)


def _found_and_expected(
    kind: str, value: object, context: Mapping[str, Any], message: str, of_settings: bool
) -> tuple[str, str]:
    """Return what was found and what was expected, for an error that has no sentence of its own."""
    found = _shown(value)
    if kind in _CONTAINER:
        return (found, "a mapping") if of_settings else (kind_of(value), "a JSON object")
    if kind in _LIST and of_settings:
        if isinstance(value, Mapping):  # a list of mappings is expected, so brackets around it would be wrong
            return f"a mapping with the keys {', '.join(map(str, value))}", "a list"
        return found, f"a list: [{value}]"
    if kind == "string_pattern_mismatch":
        pattern = context["pattern"]
        return found, PATTERNS.get(pattern, f"text that matches the pattern {pattern}")
    if kind in EXPECTED:
        expected = EXPECTED[kind].format(**context)
        return found, expected.replace("'", "") if of_settings and kind == "literal_error" else expected
    if limit := context.get("min_length", context.get("max_length")):
        return found, f"at {'least' if 'min_length' in context else 'most'} {limit} characters"
    # Types of errors that no field of this package has today.
    return found, re.sub(r"^.*? should (?:be |have )?(?:a valid )?|, unable to .*$", "", message)


def _shown(value: object) -> str:
    """Return a value as JSON and YAML write it, cut to a line's length."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else short_repr(value)


def _unknown_name(error: Mapping[str, Any], known_names: Mapping[str, Collection[str]]) -> str:
    name = str(error["loc"][-1])
    if not known_names:
        return "unknown field" + (f"; renamed to {RENAMED_FIELDS[name]}" if name in RENAMED_FIELDS else "")
    names = known_names.get(str(error["loc"][0]) if len(error["loc"]) > 1 else "", ())
    if RENAMED_SETTINGS.get(name) in names:
        return f"unknown setting; renamed to {RENAMED_SETTINGS[name]}"
    meant = ALIASES[name] if ALIASES.get(name) in names else nearest(name, names)
    return "unknown setting" + (f"; did you mean {meant}?" if meant else "")


def _unknown_tag(error: Mapping[str, Any], known_names: Mapping[str, Collection[str]]) -> str:
    context = error.get("ctx", {})
    name = str(context.get("discriminator", "")).strip("'")
    expected = str(context.get("expected_tags", "")).replace("'", "") or ", ".join(known_names.get(name, ()))
    if error["type"] == "union_tag_not_found":
        return f"{name} is missing" + (f"; expected one of {expected}" if expected else "")
    similar = get_close_matches(str(context["tag"]), re.findall(r"\w+", expected), n=1)
    found = f"unknown {name} {str(context['tag'])!r}"
    return f"{found}; did you mean {similar[0]}?" if similar else f"{found}; expected one of {expected}"
