"""The field `model` of a request: a loop, one of its versions, or an alias from a loop's YAML."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune_pipeline.serving.errors import UnknownModel
from finetune_pipeline.settings import LoopSettings, SettingsError

SUFFIX = "[A-Za-z0-9._-]{1,64}"
"""Pattern of what a client may add to the name of a fine-tuned model."""

_WITH_SUFFIX = re.compile(f"([0-9a-f]{{16}}):{SUFFIX}")


@dataclass(frozen=True)
class Route:
    """The loop that answers, and the version or challenger that the request names; None is the champion."""

    loop: str
    version: str | None = None


def loops_by_name(loops: Iterable[LoopSettings]) -> dict[str, str]:
    """Return the loop for every name and alias.

    Raises:
        SettingsError: two loops have the same name or alias.
    """
    names: dict[str, str] = {}
    for loop in loops:
        for name in (loop.name, *loop.serving.aliases):
            if names.setdefault(name, loop.name) != loop.name:
                raise SettingsError(
                    f"Both {names[name]} and {loop.name} are served as {name!r}. Remove it from serving.aliases of one "
                    "of them."
                )
    return names


def without_suffix(version: str) -> str:
    """Return the hash of a model's name that a client gave a suffix, and any other version as it is."""
    named = _WITH_SUFFIX.fullmatch(version)
    return named[1] if named else version


def route(model: str, names: Mapping[str, str]) -> Route:
    """Return the route for "aec_parser", "aec_parser@v1.2.0", "aec_parser@base", "aec_parser@1f0c9a2b" or an alias.

    The result of a fine-tuning job may have a suffix for people after its hash: "aec_parser@1f0c9a2b83d4e5f6:short".

    Raises:
        UnknownModel: there is no such loop; the message lists the names.
    """
    name, _, version = model.partition("@")
    version = without_suffix(version)
    if name not in names or "@" in version or model.endswith("@"):
        raise UnknownModel(
            f"There is no model {model[:100]!r}. There are: {', '.join(sorted(names))}, and versions of them, such as "
            f"{next(iter(sorted(names)), 'loop')}@v1.0.0. A loop that is newer than this gateway needs a restart.",
            param="model",
        )
    return Route(names[name], None if version in {"", "champion"} else version)
