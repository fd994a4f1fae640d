"""What the field `model` of a request means: a loop, one of its versions, or an alias from a loop's YAML."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune_pipeline.serving.errors import UnknownModel
from finetune_pipeline.settings import LoopSettings, SettingsError


@dataclass(frozen=True)
class Route:
    """Who answers: the champion of a loop, or the version that was asked for by name."""

    loop: str
    version: str | None = None


def names_of(loops: Iterable[LoopSettings]) -> dict[str, str]:
    """Every name by which a loop can be asked for, and the loop.

    Raises:
        SettingsError: two loops claim one name.
    """
    names: dict[str, str] = {}
    for loop in loops:
        for name in (loop.name, *loop.serving.aliases):
            if names.setdefault(name, loop.name) != loop.name:
                raise SettingsError(
                    f"both {names[name]} and {loop.name} answer to the name {name!r}; take it out of one's "
                    "serving.aliases"
                )
    return names


def route(model: str, names: Mapping[str, str]) -> Route:
    """Who answers for this value of `model`: "aec_parser", "aec_parser@v1.2.0", "aec_parser@base" or an alias.

    Raises:
        UnknownModel: it names no loop; the message lists the names that there are.
    """
    name, _, version = model.partition("@")
    if name not in names or "@" in version:
        raise UnknownModel(
            f"there is no model {model[:100]!r}; there are: {', '.join(sorted(names))}, and versions of them such as "
            f"{next(iter(sorted(names)), 'loop')}@v1.0.0",
            param="model",
        )
    return Route(names[name], None if version in {"", "champion"} else version)
