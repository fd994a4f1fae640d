"""Extract the records of one note: the complete note, or sections of it, each with a prompt."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from finetune_pipeline.settings import VaultSource
from finetune_pipeline.sources.source_record import SkippedRecord, SourceRecord
from finetune_pipeline.sources.text_files import TextFile
from finetune_pipeline.sources.vault.frontmatter import FrontmatterError, created, properties, split, tags
from finetune_pipeline.sources.vault.markdown import Section, heading_text, readable, sections, tags_in
from finetune_pipeline.sources.vault.prompt import NoteName, parse_name, prompt_for

_AFTER_KIND = re.compile(r"\s*(?::|–|—|\s-\s)\s*")
_BEFORE_NAME = re.compile(r"[\W\d_]*")
_HEADING_CHARS = 100


class NoteRules:
    """The source's settings, case-folded for comparison."""

    def __init__(self, source: VaultSource) -> None:
        # Tag -> kind, and name of a heading -> kind. If a note has several tags, the first one here counts.
        self.tags = {_fold(tag.lstrip("#")): kind for tag, kind in source.tags.items()}
        self.headings = {_fold(heading): kind for heading, kind in source.headings.items()}
        names = "|".join(re.escape(_fold(tag.lstrip("#"))) for tag in source.private_tags)
        self.private = re.compile(f"#(?:{names})(?![\\w-])" if names else "(?!)")
        self.whole_days = source.whole_daily_notes  # a daily note without any of the tags is a reflection

    def kind(self, found: Iterable[str]) -> str | None:
        """Return the kind of these tags. A nested tag (`decision/architecture`) also counts for its parents."""
        folded = tuple(_fold(tag) + "/" for tag in found)
        return next((kind for tag, kind in self.tags.items() if any(one.startswith(tag + "/") for one in folded)), None)

    def is_private(self, text: str) -> bool:
        """Return whether a text contains a private tag, also in code, comments and URLs.

        Other tags do not count there, but leaving out too much is the smaller harm.
        """
        return "#" in text and self.private.search(_fold(text)) is not None

    def are_of_interest(self, body: str) -> bool:
        """Return whether a text contains any of the tags or headings: a fast check before it is parsed."""
        folded = _fold(body)
        return any(name in folded for name in (*self.tags, *self.headings))

    def of_heading(self, heading: str) -> tuple[str | None, str]:
        """Return the kind that a heading names, and its topic: `Decisions`, `2. Decision: use SQLite`."""
        first, *rest = _AFTER_KIND.split(_BEFORE_NAME.sub("", heading, count=1), maxsplit=1)
        kind = self.headings.get(_fold(first.rstrip(" .!?")))
        return (None, heading) if kind is None else (kind, "".join(rest))


@dataclass
class _Selection:
    """A selected note or section."""

    kind: str  # decision, reflection, learning, or another of the settings
    headings: tuple[str, ...]  # the headings down to it, for the provenance
    topics: tuple[str, ...]  # the same without those that only name a kind, for the prompt
    tagged: bool  # it was selected by a tag
    sections: list[Section] = field(default_factory=list)


@dataclass(frozen=True)
class _Parent:
    """A section that may contain the following ones."""

    level: int
    private: bool
    headings: tuple[str, ...]
    topics: tuple[str, ...]
    selection: _Selection | None


def read_note(file: TextFile, rules: NoteRules, folder: str) -> Iterator[SourceRecord | SkippedRecord]:
    """Yield the records of a note. No text is in two of them.

    A section of another kind than the section around it becomes a separate record and is left out of the outer one.

    Args:
        folder: the note's folder, if other notes have the same name; else empty.
    """
    try:
        frontmatter, body = split(file.text)
        found = properties(frontmatter)
    except FrontmatterError as error:
        yield SkippedRecord(file.path, str(error))
        return
    listed = tags(found)
    if rules.is_private(" ".join([frontmatter, *(f"#{tag}" for tag in listed)])):
        return
    stem = PurePosixPath(file.path).stem
    name, kind = parse_name(stem), rules.kind(listed)
    if kind is None and not (rules.whole_days and name.is_daily) and not rules.are_of_interest(body):
        return
    parsed = sections(body)
    if rules.is_private(parsed[0].raw()):
        return
    title = ""
    if not name.is_daily:
        top = next((section.heading for section in parsed if section.level == 1), "")
        titles = (heading_text(text) for text in (*found.get("title", [])[:1], name.title, top))
        title = next((text for text in titles if text), stem)
    answers: dict[tuple[str, str], tuple[_Selection, list[str]]] = {}
    for selection in _select(parsed, kind, rules, name, title):
        provenance = "#".join([file.path, *selection.headings])
        parts, has_text = [], False
        for number, section in enumerate(selection.sections):
            heading = heading_text(section.heading)
            if number and heading and not _repeats_title(section, heading, name, title):
                parts.append(f"{'#' * section.level} {heading}\n")
            text = readable(section.blocks, lambda tag: rules.kind([tag]) is not None)
            if text.strip():
                has_text = True
                parts.append(f"{text}\n")
        if has_text:
            # Sections with the same heading are one answer.
            texts = answers.setdefault((provenance, selection.kind), (selection, []))[1]
            texts.append("\n".join(parts).strip("\n"))
        elif selection.tagged:
            yield SkippedRecord(provenance, "has the tag, but no text")
    moment = created(found) or name.moment or file.modified
    for (provenance, own_kind), (selection, texts) in answers.items():
        prompt = prompt_for(own_kind, title, selection.topics, name.day, folder)
        yield SourceRecord(provenance, prompt, "\n\n".join(texts), created_at=moment, kind=own_kind)


def _select(
    parsed: list[Section], note_kind: str | None, rules: NoteRules, name: NoteName, title: str
) -> list[_Selection]:
    """Return the selected parts of a note, each with its sections."""
    selections: list[_Selection] = []
    parents: list[_Parent] = []
    for section in parsed:
        while parents and parents[-1].level >= section.level:
            parents.pop()
        parent = parents[-1] if parents else _Parent(-1, False, (), (), None)
        heading = heading_text(section.heading)
        heading_kind, topic = rules.of_heading(heading)
        tag_kind = rules.kind(tag for text in section.prose() for tag in tags_in(text))
        if section.level == 0:
            tag_kind = note_kind or tag_kind
        headings = (*parent.headings, heading[:_HEADING_CHARS]) if section.level else ()
        topics = parent.topics if _repeats_title(section, topic, name, title) else (*parent.topics, topic)
        selection, kind = parent.selection, tag_kind or heading_kind
        if kind is None and section.level == 0 and rules.whole_days and name.is_daily:
            kind = "reflection"
        private = parent.private or rules.is_private(section.raw())
        if kind is not None and not private and (selection is None or selection.kind != kind):
            selection = _Selection(kind, headings, topics, tagged=tag_kind is not None)
            selections.append(selection)
        if selection is not None and not private:
            selection.sections.append(section)
        parents.append(_Parent(section.level, private, headings, topics, selection))
    return selections


def _repeats_title(section: Section, heading: str, name: NoteName, title: str) -> bool:
    """Return whether a heading only repeats the note's name, such as `# Friday, 3 May 2024` in a daily note."""
    if not heading or _fold(heading) == _fold(title):
        return True
    return name.day is not None and name.is_daily and section.level == 1 and str(name.day.year) in heading


def _fold(text: str) -> str:
    """Return a text in the form in which tags and headings are compared."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
