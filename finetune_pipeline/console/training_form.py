"""A field for every setting of `training`, made from the settings' own fields and descriptions."""

from contextlib import suppress
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import streamlit as st
import yaml
from pydantic.fields import FieldInfo
from streamlit.delta_generator import DeltaGenerator

from finetune_pipeline.settings import TrainingSettings

FIRST = ("preset", "method", "num_train_epochs", "learning_rate")
"""Settings that most trainings change; the others are shown on request."""

_COLUMNS = 3
_NONE = "none"


class FieldError(ValueError):
    """A field has a text that is no YAML; the message names the field."""


def all_wanted() -> bool:
    """Let the user choose, outside of the form, whether it has all settings: dozens of fields take long to show."""
    others = len(TrainingSettings.model_fields) - len(FIRST)
    return bool(st.toggle(f"All other settings of training ({others})"))


def training_fields(training: TrainingSettings, *, everything: bool) -> dict[str, Any]:
    """Show the fields of a form, and return those settings that differ from the loop's.

    Args:
        everything: show all settings, not only FIRST.

    Raises:
        FieldError: a text is no YAML. What the settings refuse is found where they are validated.
    """
    fields = type(training).model_fields
    columns = st.columns(len(FIRST))
    given = {name: _field(column, name, fields[name], training) for name, column in zip(FIRST, columns, strict=True)}
    others = [name for name in fields if name not in FIRST and everything]
    for start in range(0, len(others), _COLUMNS):
        for name, column in zip(others[start : start + _COLUMNS], st.columns(_COLUMNS), strict=False):
            given[name] = _field(column, name, fields[name], training)
    shown = {name: _shown(getattr(training, name)) for name in fields}
    return {name: _value(name, value) for name, value in given.items() if value != shown[name]}


def _field(column: DeltaGenerator, name: str, field: FieldInfo, training: TrainingSettings) -> str:
    """Show the field of a setting, with its description; return what it holds, in the form of `_shown`."""
    value, key = _shown(getattr(training, name)), f"training-{name}"
    options = _options(field.annotation)
    if options:
        return str(column.selectbox(name, options, options.index(value), help=field.description, key=key))
    return str(column.text_input(name, value, help=field.description, key=key, placeholder=_NONE))


def _options(annotation: Any) -> list[str]:
    """Return the values of a setting that has only certain ones; empty for others."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(one) for one in get_args(annotation)]
    parts = [one for one in get_args(annotation) if one is not NoneType]
    if len(parts) == 1 and get_origin(parts[0]) is Literal and NoneType in get_args(annotation):
        return [_NONE, *_options(parts[0])]
    return []


def _shown(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, float):
        return f"{value:g}"
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=100_000)
    return text.removesuffix("...\n").strip() if plain is not None else _NONE


def _value(name: str, shown: str) -> Any:
    """Return what a field means, with `2e-4` as a number, which is a text in YAML."""
    if shown.strip() in {"", _NONE}:
        return None
    try:
        value = yaml.safe_load(shown)
    except yaml.YAMLError as error:
        raise FieldError(f"training.{name}: found {shown!r}, expected a value as in YAML") from error
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value
