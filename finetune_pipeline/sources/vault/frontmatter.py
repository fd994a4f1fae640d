"""Read a note's frontmatter: its keys, and the texts under each.

The frontmatter is read as a stream of YAML events and never built into objects. Building objects, as `yaml.safe_load`
does, crashes the process on some 100,000 nested brackets, and fills the memory when aliases or merge keys multiply.
"""

import re
from contextlib import suppress
from datetime import UTC, datetime

import yaml

_FRONTMATTER = re.compile(r"\s*---[ \t]*\n(?P<yaml>.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_START = re.compile(r"\s*---[ \t]*(?:\n|\Z)")
_MAX_CHARS = 65_536
_MAX_DEPTH = 20
_DATES = ("created", "date", "created_at", "date created")


class FrontmatterError(ValueError):
    """The frontmatter cannot be read. The message quotes nothing of the note, which may be private."""


def split(text: str) -> tuple[str, str]:
    """Return the frontmatter of a note without its dashes, and the text below it.

    Raises:
        FrontmatterError: the frontmatter is not closed.
    """
    if found := _FRONTMATTER.match(text):
        return found["yaml"], text[found.end() :]
    if _START.match(text):
        raise FrontmatterError("its frontmatter is not closed; add a line ---")
    return "", text


def properties(frontmatter: str) -> dict[str, list[str]]:
    """Return the keys in lower case, each with all texts under it.

    Raises:
        FrontmatterError: it is not YAML, not a mapping, or has a key twice.
    """
    if len(frontmatter) > _MAX_CHARS:
        raise FrontmatterError(f"its frontmatter is longer than {_MAX_CHARS} characters")
    found: dict[str, list[str]] = {}
    depth, key = 0, None
    try:
        for event in yaml.parse(frontmatter, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise FrontmatterError("its frontmatter uses a YAML alias (*name); write the value itself")
            if isinstance(event, yaml.CollectionStartEvent):
                if depth == 0 and not isinstance(event, yaml.MappingStartEvent):
                    raise FrontmatterError("its frontmatter is a list, expected `key: value` lines")
                if depth == 1 and key is None:
                    raise FrontmatterError("its frontmatter has a key that is not text; put it into quotes")
                depth += 1
                if depth > _MAX_DEPTH:
                    raise FrontmatterError(f"its frontmatter is nested deeper than {_MAX_DEPTH} levels")
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif not isinstance(event, yaml.ScalarEvent):
                continue
            elif depth == 0:
                raise FrontmatterError("its frontmatter is text, expected `key: value` lines")
            elif key is None:
                key = event.value.strip().casefold()
                if key in found:
                    raise FrontmatterError("its frontmatter has a key twice; remove one")
                found[key] = []
                continue
            else:
                found[key].append(event.value)
            if depth == 1:  # the end of the key's value
                key = None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 2}"
        reason = f"its frontmatter is not YAML{where}; correct it, so that its tags can be read"
        raise FrontmatterError(reason) from None
    return found


def tags(found: dict[str, list[str]]) -> list[str]:
    """Return the tags without `#`: `tags` or `tag`, a list or one text with commas or spaces."""
    values = found.get("tags", []) + found.get("tag", [])
    return [tag.lstrip("#") for value in values for tag in re.split(r"[,\s]+", value) if tag.strip("#")]


def created(found: dict[str, list[str]]) -> datetime | None:
    """Return the note's date of creation, or None. Without a time zone it is UTC."""
    for value in (value for key in _DATES for value in found.get(key, [])[:1]):
        with suppress(ValueError, OverflowError):
            moment = datetime.fromisoformat(value.strip(' []"'))
            return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return None
