"""Read a note's frontmatter: its keys, and the texts under each.

The frontmatter is read as a stream of YAML events and never built into objects. Building objects, as `yaml.safe_load`
does, crashes the process on some 100,000 nested brackets, and fills the memory when aliases or merge keys multiply.
"""

import re
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
    found = _FRONTMATTER.match(text)
    if found:
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
    parser = _PropertyParser()
    try:
        for event in yaml.parse(frontmatter, Loader=yaml.CSafeLoader):
            parser.add(event)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 2}"
        raise FrontmatterError(
            f"its frontmatter is not YAML{where}; correct it, so that its tags can be read"
        ) from None
    return parser.found


class _PropertyParser:
    """Collects keys and texts from YAML events."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}
        self.depth = 0
        self.key: str | None = None

    def add(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.AliasEvent):
            raise FrontmatterError("its frontmatter uses a YAML alias (*name); write the value itself")
        if isinstance(event, yaml.CollectionStartEvent):
            if self.depth == 0 and not isinstance(event, yaml.MappingStartEvent):
                raise FrontmatterError("its frontmatter is a list, expected `key: value` lines")
            if self.depth == 1 and self.key is None:
                raise FrontmatterError("its frontmatter has a key that is not text; put it into quotes")
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise FrontmatterError(f"its frontmatter is nested deeper than {_MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            self.depth -= 1
            self._end_value()
        elif isinstance(event, yaml.ScalarEvent):
            self._add_scalar(event.value)

    def _add_scalar(self, value: str) -> None:
        if self.depth == 0:
            raise FrontmatterError("its frontmatter is text, expected `key: value` lines")
        if self.key is None:
            self.key = value.strip().casefold()
            if self.key in self.found:
                raise FrontmatterError("its frontmatter has a key twice; remove one")
            self.found[self.key] = []
        else:
            self.found[self.key].append(value)
            self._end_value()

    def _end_value(self) -> None:
        if self.depth == 1:
            self.key = None


def tags(found: dict[str, list[str]]) -> list[str]:
    """Return the tags without `#`: `tags` or `tag`, a list or one text with commas or spaces."""
    values = found.get("tags", []) + found.get("tag", [])
    return [tag.lstrip("#") for value in values for tag in re.split(r"[,\s]+", value) if tag.strip("#")]


def created(found: dict[str, list[str]]) -> datetime | None:
    """Return the note's date of creation, or None. Without a time zone it is UTC."""
    for value in (value for key in _DATES for value in found.get(key, [])[:1]):
        try:
            moment = datetime.fromisoformat(value.strip(' []"'))
            return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        except (ValueError, OverflowError):
            continue
    return None
