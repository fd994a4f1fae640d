"""Wording of validation errors: one line per field with what was found and what was expected."""

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

RENAMED_FIELDS = {"task": "loop", "arm": "variant", "origin": "provenance", "feeds": "sources"}
"""Field names of earlier versions, so that an old log can be read, and the error about it states the new name."""

RENAMED_SETTINGS = {
    "batch_size": "per_device_train_batch_size",
    "bfloat16": "bf16",
    "checkpoints": "save_steps",
    "early_stopping": "early_stopping_patience",
    "epochs": "num_train_epochs",
    "feeds": "sources",
    "forbid_slice_falls": "forbid_slice_regressions",
    "gradient_accumulation": "gradient_accumulation_steps",
    "max_rejected_share": "max_rejected_fraction",
    "max_share": "max_fraction",
    "replay_older": "incremental_replay_ratio",
    "sft_weight": "loss_weights",
    "validation_share": "validation_fraction",
    "warmup_share": "warmup_steps",
    "workers": "num_processes",
}
"""Setting names of earlier versions. A new name is suggested only in a section that has it."""

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
    """Return all problems of a record in one line."""
    return "; ".join(error_messages(error))


def error_messages(error: ValidationError, known_names: Mapping[str, Collection[str]] | None = None) -> list[str]:
    """Return one line per invalid field.

    Args:
        known_names: for settings: section -> valid names in it, to suggest one for a misspelled name; "" is the top
            level. The values of a discriminator stand under its name, such as "kind".
    """
    return [_message(one, known_names or {}) for one in error.errors(include_url=False)]


def short_repr(value: object, limit: int = 80) -> str:
    """Return the `repr` of a value, cut to at most `limit` characters.

    The cut is between two words: redaction could not recognize half an e-mail address or half a key.
    """
    text = repr(value)
    return text if len(text) <= limit else f"{text[: text.rfind(' ', 0, limit) + 1]}..."


def field_path(error: Mapping[str, Any], known_names: Mapping[str, Collection[str]] | None = None) -> str:
    """Return where a field is, such as `sources[0].path`; an empty text if the whole value is invalid.

    Pydantic's location also holds the members of unions that it tried, such as "str", "list[Part]", or the `kind`.
    """
    location = list(error["loc"])
    if known_names:  # a source's kind follows its index
        kinds = known_names.get("kind", ())
        location = [p for n, p in enumerate(location) if not (n and isinstance(location[n - 1], int) and p in kinds)]
    elif location[:1] in (["interaction"], ["feedback"]):  # an event's kind comes first
        del location[0]
    unknown_name = error["type"] == "extra_forbidden"  # may be any text
    path = ""
    for number, part in enumerate(location, start=1):
        if isinstance(part, int):
            path += f"[{part}]"
        elif (part.isidentifier() and part != "str") or (unknown_name and number == len(location)):
            path += f".{part}" if path else part
    return path


def _message(error: Mapping[str, Any], known_names: Mapping[str, Collection[str]]) -> str:
    where = field_path(error, known_names)
    message = str(error["msg"]).removeprefix("Value error, ")
    if not where:
        return message
    if error["type"] == "missing":
        return f"{where}: is missing"
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        if not known_names:
            renamed = f"; renamed to {RENAMED_FIELDS[name]}" if name in RENAMED_FIELDS else ""
            return f"{where}: unknown field{renamed}"
        names = known_names.get(str(error["loc"][0]) if len(error["loc"]) > 1 else "", ())
        if RENAMED_SETTINGS.get(name) in names:
            return f"{where}: unknown setting; renamed to {RENAMED_SETTINGS[name]}"
        meant = nearest(name, names)
        return f"{where}: unknown setting" + (f"; did you mean {meant}?" if meant else "")
    if error["type"] == SENTENCE:
        return f"{where}: {message}"
    if error["type"] == "tuple_type":
        if isinstance(error["input"], Mapping):  # a list of mappings is expected, so brackets around it would be wrong
            return f"{where}: found a mapping with the keys {', '.join(map(str, error['input']))}; expected a list"
        return f"{where}: found {short_repr(error['input'])}, expected a list: [{error['input']}]"
    name = error.get("ctx", {}).get("discriminator", "").strip("'")
    if error["type"] == "union_tag_not_found":
        return f"{where}: {name} is missing; expected one of {', '.join(known_names.get(name, ()))}"
    if error["type"] == "union_tag_invalid":
        tag, expected = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        similar = get_close_matches(tag, re.findall(r"\w+", expected), n=1)
        found = f"{where}: unknown {name} {tag!r}"
        return f"{found}; did you mean {similar[0]}?" if similar else f"{found}; expected one of {expected}"
    expected = re.sub(
        r"^\w+ should (?:be |have )?", "expected ", message.replace("should match", "should be text matching")
    )
    return f"{where}: found {short_repr(error['input'])}, {expected}"
