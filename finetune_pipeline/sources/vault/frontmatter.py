"""A note's frontmatter: its keys, and the texts under each, read as YAML events and never built into objects.

Building them, as `yaml.safe_load` does, ends the process by a segmentation fault where a note nests some 100,000
brackets, and fills memory where its aliases or merge keys multiply. Tags, dates and titles need neither.
"""

import re
from datetime import UTC, datetime

import yaml

_HEAD = re.compile(r"\s*---[ \t]*\n(?P<head>.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_START = re.compile(r"\s*---[ \t]*(?:\n|\Z)")
_MAX_CHARS = 65_536
_MAX_DEPTH = 20
_DATES = ("created", "date", "created_at", "date created")


class Broken(ValueError):
    """The frontmatter cannot be read. The message quotes nothing of the note, which may be private."""


def split(text: str) -> tuple[str, str]:
    """The frontmatter of a note without its dashes, and the text below it.

    Raises:
        Broken: it begins and never ends.
    """
    found = _HEAD.match(text)
    if found:
        return found["head"], text[found.end() :]
    if _START.match(text):
        raise Broken("its frontmatter has no end; close it with a line ---")
    return "", text


def properties(head: str) -> dict[str, list[str]]:
    """The frontmatter's keys in lower case, and all texts under each, as they are written.

    Raises:
        Broken: it is not YAML, or no mapping, or says the same key twice, of which nobody knows which one counts.
    """
    if len(head) > _MAX_CHARS:
        raise Broken(f"its frontmatter is longer than {_MAX_CHARS} characters")
    reader = _Reader()
    try:
        for event in yaml.parse(head, Loader=yaml.CSafeLoader):
            reader.take(event)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 2}"
        raise Broken(f"its frontmatter is not YAML{where}; correct it, so that its tags can be read") from None
    return reader.found


class _Reader:
    """Takes YAML's events one by one."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}
        self.depth = 0
        self.key: str | None = None

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.AliasEvent):
            raise Broken("its frontmatter uses a YAML alias (*name); write the value itself")
        if isinstance(event, yaml.CollectionStartEvent):
            self._begin(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.depth -= 1
            self._end_of_value()
        elif isinstance(event, yaml.ScalarEvent):
            self._text(event.value)

    def _begin(self, event: yaml.CollectionStartEvent) -> None:
        if self.depth == 0 and not isinstance(event, yaml.MappingStartEvent):
            raise Broken("its frontmatter is a list, expected `key: value` lines")
        if self.depth == 1 and self.key is None:
            raise Broken("its frontmatter has a key that is no text; put it into quotes")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Broken(f"its frontmatter is nested deeper than {_MAX_DEPTH}")

    def _text(self, value: str) -> None:
        if self.depth == 0:
            raise Broken("its frontmatter is a text, expected `key: value` lines")
        if self.key is None:
            self.key = value.strip().casefold()
            if self.key in self.found:
                raise Broken("its frontmatter has a key twice; leave one")
            self.found[self.key] = []
        else:
            self.found[self.key].append(value)
            self._end_of_value()

    def _end_of_value(self) -> None:
        if self.depth == 1:
            self.key = None


def tags(found: dict[str, list[str]]) -> list[str]:
    """The tags of a frontmatter without `#`: `tags` or `tag`, a list or one text with commas or spaces."""
    values = found.get("tags", []) + found.get("tag", [])
    return [tag.lstrip("#") for value in values for tag in re.split(r"[,\s]+", value) if tag.strip("#")]


def created(found: dict[str, list[str]]) -> datetime | None:
    """When the note says that it was made; without a time zone it is taken as UTC."""
    for value in (value for key in _DATES for value in found.get(key, [])[:1]):
        try:
            moment = datetime.fromisoformat(value.strip(' []"'))
            return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        except (ValueError, OverflowError):
            continue
    return None
