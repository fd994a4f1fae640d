"""The settings of a loop as rows: each with its value, its default and what it means."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.settings import LoopSettings, RedactionSettings

_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]+@")


@dataclass(frozen=True)
class DeclaredSetting:
    """One setting.

    Attributes:
        name: its path in the YAML, such as training.learning_rate.
        value: as JSON, without secrets.
        default: as JSON; empty for a setting that is required.
        given: it is in the YAML.
    """

    name: str
    value: str
    default: str
    given: bool
    description: str


def declared_settings(loop: LoopSettings) -> list[DeclaredSetting]:
    """Return every setting of a loop, in the order of the reference; secrets in values are replaced."""
    return list(_rows(loop, "", RedactionSettings(), given=True))


def _rows(model: BaseModel, prefix: str, redaction: RedactionSettings, *, given: bool) -> Iterator[DeclaredSetting]:
    for name, field in type(model).model_fields.items():
        value, path = getattr(model, name), f"{prefix}{name}"
        is_given = given and name in model.model_fields_set
        if isinstance(value, BaseModel):
            yield from _rows(value, f"{path}.", redaction, given=is_given)
            continue
        if isinstance(value, tuple) and value and all(isinstance(one, BaseModel) for one in value):
            for number, one in enumerate(value):
                yield from _rows(one, f"{path}[{number}].", redaction, given=is_given)
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "" if default is PydanticUndefined else _json(default)
        yield DeclaredSetting(path, _without_secrets(name, value, redaction), shown, is_given, field.description or "")


def _without_secrets(name: str, value: Any, redaction: RedactionSettings) -> str:
    # With its name before it, since a value may be a secret only by its name.
    text = redact(json.dumps({name: _plain(value)}, ensure_ascii=False), redaction).text
    return _PASSWORD.sub(r"\1:[SECRET]@", text[len(json.dumps(name)) + 3 : -1])


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(one) for one in value]
        return sorted(items) if isinstance(value, set | frozenset) else items
    return value if isinstance(value, str | int | float | bool | None) else str(value)
