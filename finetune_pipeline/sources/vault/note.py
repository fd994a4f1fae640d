"""What one note teaches: the whole of it, or sections, each with the question that it answers."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath

from finetune_pipeline.settings import VaultSource
from finetune_pipeline.sources.source_record import SkippedRecord, SourceRecord
from finetune_pipeline.sources.vault.folder import File
from finetune_pipeline.sources.vault.frontmatter import Broken, created, properties, split, tags
from finetune_pipeline.sources.vault.markdown import Section, heading_text, readable, sections, tags_in
from finetune_pipeline.sources.vault.prompt import Name, name_of, question

_AFTER_KIND = re.compile(r"\s*(?::|–|—|\s-\s)\s*")
_BEFORE_NAME = re.compile(r"[\W\d_]*")
_HEADING_CHARS = 100


@dataclass(frozen=True)
class Rules:
    """What to look for, in the form in which it is compared.

    Attributes:
        tags: kind by tag, the first of which counts where a note has several.
        headings: kind by the name of a heading.
        private: finds a private tag in folded text.
        whole_days: a daily note without any of the tags is a reflection.
    """

    tags: Mapping[str, str]
    headings: Mapping[str, str]
    private: re.Pattern[str]
    whole_days: bool

    @classmethod
    def of(cls, source: VaultSource) -> "Rules":
        """As a loop's YAML says."""
        names = "|".join(re.escape(_fold(tag.lstrip("#"))) for tag in source.private_tags)
        return cls(
            tags={_fold(tag.lstrip("#")): kind for tag, kind in source.tags.items()},
            headings={_fold(heading): kind for heading, kind in source.headings.items()},
            private=re.compile(f"#(?:{names})(?![\\w-])" if names else "(?!)"),
            whole_days=source.whole_daily_notes,
        )

    def kind(self, found: Iterable[str]) -> str | None:
        """The kind that tags stand for; a nested one (`decision/architecture`) counts for those it is nested in."""
        folded = tuple(_fold(tag) + "/" for tag in found)
        return next((kind for tag, kind in self.tags.items() if any(one.startswith(tag + "/") for one in folded)), None)

    def is_private(self, text: str) -> bool:
        """Whether a private tag stands in a text.

        In code, comments and addresses too, where none would count that is looked for: too much left out is the smaller
        harm.
        """
        return "#" in text and self.private.search(_fold(text)) is not None

    def are_of_interest(self, body: str) -> bool:
        """Whether a body holds any tag or heading at all, asked before it is parsed."""
        folded = _fold(body)
        return any(name in folded for name in (*self.tags, *self.headings))

    def of_heading(self, heading: str) -> tuple[str | None, str]:
        """The kind that a heading names, and what else it says: `Decisions`, `2. Decision: use SQLite`."""
        first, *rest = _AFTER_KIND.split(_BEFORE_NAME.sub("", heading, count=1), maxsplit=1)
        kind = self.headings.get(_fold(first.rstrip(" .!?")))
        return (None, heading) if kind is None else (kind, "".join(rest))


@dataclass
class _Taken:
    """A note or section that is taken: its kind, where it stands, and its parts."""

    kind: str
    headings: tuple[str, ...]
    topics: tuple[str, ...]
    tagged: bool
    parts: list[Section] = field(default_factory=list)


@dataclass(frozen=True)
class _Open:
    """A section within which the next ones may stand."""

    level: int
    private: bool
    headings: tuple[str, ...]
    topics: tuple[str, ...]
    taken: _Taken | None


def read_note(file: File, rules: Rules, folder: str) -> Iterator[SourceRecord | SkippedRecord]:
    """Everything that a note teaches; no text of it twice.

    A section of another kind than what it stands in is taken for itself and left out there.

    Args:
        folder: that tells it from other notes of its name; empty where nothing has to.
    """
    try:
        head, body = split(file.text)
        found = properties(head)
    except Broken as error:
        yield SkippedRecord(file.path, str(error))
        return
    listed = tags(found)
    if rules.is_private(" ".join([head, *(f"#{tag}" for tag in listed)])):
        return
    name, kind = name_of(PurePosixPath(file.path).stem), rules.kind(listed)
    if kind is None and not (rules.whole_days and name.is_daily) and not rules.are_of_interest(body):
        return
    parsed = sections(body)
    title = _title(file, name, found, parsed)
    moment = created(found) or name.moment or file.modified
    yield from _items(_taken(parsed, kind, rules, name, title), file.path, title, name, moment, folder, rules)


def _title(file: File, name: Name, found: Mapping[str, list[str]], parsed: list[Section]) -> str:
    if name.is_daily:
        return ""
    first = next((section.heading for section in parsed if section.level == 1), "")
    given = (heading_text(text) for text in (*found.get("title", [])[:1], name.title, first))
    return next((text for text in given if text), PurePosixPath(file.path).stem)


def _taken(parsed: list[Section], kind: str | None, rules: Rules, name: Name, title: str) -> list[_Taken]:
    """What is taken of a note, each with the sections that belong to it."""
    if rules.is_private(parsed[0].raw()):
        return []
    found: list[_Taken] = []
    path: list[_Open] = []
    for section in parsed:
        while path and path[-1].level >= section.level:
            path.pop()
        outer = path[-1] if path else _Open(-1, False, (), (), None)
        heading = heading_text(section.heading)
        of_heading, topic = rules.of_heading(heading)
        own = rules.kind(tag for text in section.prose() for tag in tags_in(text))
        if section.level == 0:
            own = kind or own
        headings = (*outer.headings, heading[:_HEADING_CHARS]) if section.level else ()
        topics = outer.topics if _is_title(section, topic, name, title) else (*outer.topics, topic)
        taken, here = outer.taken, own or of_heading
        if here is None and section.level == 0 and rules.whole_days and name.is_daily:
            here = "reflection"
        private = outer.private or rules.is_private(section.raw())
        if here is not None and not private and (taken is None or taken.kind != here):
            taken = _Taken(here, headings, topics, tagged=own is not None)
            found.append(taken)
        if taken is not None and not private:
            taken.parts.append(section)
        path.append(_Open(section.level, private, headings, topics, taken))
    return found


def _is_title(section: Section, topic: str, name: Name, title: str) -> bool:
    if not topic or _fold(topic) == _fold(title):
        return True
    # `# Friday, 3 May 2024` over a daily note says nothing that its name does not.
    return name.day is not None and name.is_daily and section.level == 1 and str(name.day.year) in topic


def _items(
    found: list[_Taken], path: str, title: str, name: Name, moment: datetime | None, folder: str, rules: Rules
) -> Iterator[SourceRecord | SkippedRecord]:
    answers: dict[tuple[str, str], tuple[_Taken, list[str]]] = {}
    for taken in found:
        provenance = "#".join([path, *taken.headings])
        answer = _answer(taken, rules, name, title)
        if answer:
            # Two sections of one name answer one question.
            answers.setdefault((provenance, taken.kind), (taken, []))[1].append(answer)
        elif taken.tagged:
            yield SkippedRecord(provenance, "has the tag, but nothing is written there")
    for (provenance, kind), (taken, texts) in answers.items():
        prompt = question(kind, title, taken.topics, name.day, folder)
        yield SourceRecord(provenance, prompt, "\n\n".join(texts), created_at=moment, kind=kind)


def _answer(taken: _Taken, rules: Rules, name: Name, title: str) -> str:
    parts, said = [], False
    for number, section in enumerate(taken.parts):
        heading = heading_text(section.heading)
        if number and heading and not _is_title(section, heading, name, title):
            parts.append(f"{'#' * section.level} {heading}\n")
        text = readable(section.blocks, lambda tag: rules.kind([tag]) is not None)
        if text.strip():
            said = True
            parts.append(f"{text}\n")
    return "\n".join(parts).strip("\n") if said else ""


def _fold(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
