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
        known_names: section -> valid names in it, to suggest one for a misspelled name; "" is the top level.
    """
    return [_message(one, known_names or {}) for one in error.errors(include_url=False)]


def short_repr(value: object, limit: int = 80) -> str:
    """Return the `repr` of a value, cut to at most `limit` characters.

    The cut is between two words: redaction could not recognize half an e-mail address or half a key.
    """
    text = repr(value)
    return text if len(text) <= limit else f"{text[: text.rfind(' ', 0, limit) + 1]}..."


def _message(error: Mapping[str, Any], known_names: Mapping[str, Collection[str]]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if not where:
        return message
    if error["type"] == "missing":
        return f"{where}: is missing"
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        if name in RENAMED_FIELDS and not known_names:
            return f"{where}: there is no such field; it is named {RENAMED_FIELDS[name]} now"
        names = known_names.get(str(error["loc"][0]) if len(error["loc"]) > 1 else "", ())
        if RENAMED_SETTINGS.get(name) in names:
            return f"{where}: there is no such field; it is named {RENAMED_SETTINGS[name]} now"
        meant = nearest(name, names)
        return f"{where}: there is no such field" + (f"; did you mean {meant}?" if meant else "")
    if error["type"] == SENTENCE:
        return f"{where}: {message}"
    if error["type"] == "tuple_type":
        if isinstance(error["input"], Mapping):  # a list of mappings is expected, so brackets around it would be wrong
            return f"{where}: found a mapping with the keys {', '.join(map(str, error['input']))}; expected a list"
        return f"{where}: found {short_repr(error['input'])}, expected a list: [{error['input']}]"
    if error["type"] == "union_tag_not_found":
        return f"{where}: {error['ctx']['discriminator']} is missing; it selects the type of this entry"
    if error["type"] == "union_tag_invalid":
        tag, expected = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        similar = get_close_matches(tag, re.findall(r"\w+", expected), n=1)
        found = f"{where}: there is no {error['ctx']['discriminator']} {tag!r}"
        return f"{found}; did you mean {similar[0]}?" if similar else f"{found}; expected one of {expected}"
    return f"{where}: found {short_repr(error['input'])}, {message.replace('Input should be', 'expected')}"
