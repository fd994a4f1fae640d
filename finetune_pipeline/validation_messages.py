"""Wording of validation errors: one line per field with what was found and what was expected."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

RENAMED_FIELDS = {"task": "loop", "arm": "variant", "origin": "provenance", "feeds": "sources"}
"""Field names of earlier versions, so that the error about an old log or YAML file states the new name."""


def error_message(error: ValidationError) -> str:
    """Return all problems of a record in one line."""
    return "; ".join(error_messages(error))


def error_messages(error: ValidationError, known_names: Collection[str] = ()) -> list[str]:
    """Return one line per invalid field.

    Args:
        known_names: valid names, to suggest one for a misspelled name.
    """
    return [_message(one, known_names) for one in error.errors(include_url=False)]


def short_repr(value: object, limit: int = 80) -> str:
    """Return the `repr` of a value, cut to at most `limit` characters.

    The cut is between two words: redaction could not recognize half an e-mail address or half a key.
    """
    text = repr(value)
    return text if len(text) <= limit else f"{text[: text.rfind(' ', 0, limit) + 1]}..."


def _message(error: Mapping[str, Any], known_names: Collection[str]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if not where:
        return message
    if error["type"] == "missing":
        return f"{where}: is missing"
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        if name in RENAMED_FIELDS:
            return f"{where}: there is no such field; it is named {RENAMED_FIELDS[name]} now"
        # Without the name itself: it may be a valid name at another place.
        similar = get_close_matches(name, set(known_names) - {name}, n=1)
        return f"{where}: there is no such field" + (f"; is it {similar[0]}?" if similar else "")
    if error["type"] == "tuple_type":
        return f"{where}: found {short_repr(error['input'])}, expected a list: [{error['input']}]"
    if error["type"] == "union_tag_not_found":
        return f"{where}: {error['ctx']['discriminator']} is missing; say what it is"
    if error["type"] == "union_tag_invalid":
        tag, expected = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        similar = get_close_matches(tag, re.findall(r"\w+", expected), n=1)
        found = f"{where}: there is no {error['ctx']['discriminator']} {tag!r}"
        return f"{found}; is it {similar[0]}?" if similar else f"{found}; there are {expected}"
    return f"{where}: found {short_repr(error['input'])}, {message.replace('Input should be', 'expected')}"
