"""Extract the records of one note: the complete note, or sections of it, each with a prompt."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import PurePosixPath

from finetune_pipeline.sources.source_record import SkippedRecord, SourceRecord
from finetune_pipeline.sources.text_files import TextFile
from finetune_pipeline.sources.vault.frontmatter import FrontmatterError, created, properties, split, tags
from finetune_pipeline.sources.vault.markdown import Section, heading_text, readable, sections, split_long, tags_in
from finetune_pipeline.sources.vault.prompt import NoteName, parse_name, prompt_for
from finetune_pipeline.sources.vault.rules import NoteRules, fold

_HEADING_CHARS = 100
_MIN_UNSELECTED_CHARS = 40


@dataclass(frozen=True)
class UnselectedSection:
    """A section that no rule selects, without its subsections."""

    provenance: str
    path: str  # of the note
    text: str
    prompt_of: Callable[[str], str]  # kind -> prompt
    created_at: datetime | None


@dataclass(frozen=True)
class _Part:
    """A section at its place in the note."""

    section: Section
    headings: tuple[str, ...]  # the headings down to it, for the provenance
    topics: tuple[str, ...]  # the same without those that only name a kind, for the prompt


@dataclass
class _Selection:
    """A selected note or section, with its subsections."""

    kind: str  # decision, reflection, learning, or another of the settings
    parts: list[_Part] = field(default_factory=list)


@dataclass(frozen=True)
class _Parent:
    """A section that may contain the following ones."""

    level: int
    private: bool
    headings: tuple[str, ...]
    topics: tuple[str, ...]
    selection: _Selection | None


@dataclass
class _Answer:
    """What becomes a record: the texts of one part of a note, or of several under the same headings."""

    kind: str
    part: _Part
    texts: list[str]
    is_whole: bool = True  # False for a part of a section that is too long; no other text is added to it


def read_note(
    file: TextFile, rules: NoteRules, folder: str
) -> Iterator[SourceRecord | SkippedRecord | UnselectedSection]:
    """Yield the records of a note. No text is in two of them.

    A section of another kind than the section around it becomes a separate record and is left out of the outer one.
    What no rule selects is yielded too if there is a teacher.

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
    name, kind = parse_name(stem), rules.kind(listed) or rules.of_properties(found)
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
    moment = created(found) or name.moment or file.modified

    def prompt_of(kind: str, part: _Part) -> str:
        return prompt_for(kind, title, part.topics, name.day, folder, rules.source.prompts)

    answers: dict[str, _Answer] = {}
    selections, unselected = _select(parsed, kind, rules, name, title)
    for selection in selections:
        pieces = [*_pieces(selection.parts, rules, name, title)]
        for part, texts in pieces:
            for text in texts:
                new = _Answer(selection.kind, part, [text], is_whole=len(texts) == 1)
                _add(answers, file.path, new, rules.source.max_answer_chars)
        if not pieces:
            yield SkippedRecord("#".join([file.path, *selection.parts[0].headings]), "is selected, but has no text")
    prompts = [prompt_of(answer.kind, answer.part) for answer in answers.values()]
    for (provenance, answer), prompt in zip(answers.items(), _distinct(prompts, list(answers.values())), strict=True):
        text = "\n\n".join(answer.texts)
        yield SourceRecord(provenance, prompt, text, created_at=moment, kind=answer.kind, file=file.path)
    for part in unselected if rules.source.teacher is not None else ():
        text = readable(part.section.blocks, rules.is_label)
        if len(text) >= _MIN_UNSELECTED_CHARS:
            provenance = "#".join([file.path, *part.headings])
            yield UnselectedSection(provenance, file.path, text, partial(prompt_of, part=part), moment)


def _select(
    parsed: list[Section], note_kind: str | None, rules: NoteRules, name: NoteName, title: str
) -> tuple[list[_Selection], list[_Part]]:
    """Return the selected parts of a note, and the other sections that are not private."""
    selections: list[_Selection] = []
    unselected: list[_Part] = []
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
        by_text = None
        if kind is None and selection is None and rules.patterns:
            by_text = rules.of_text(readable([block for block in section.blocks if not block[1]], rules.is_label))
        part = _Part(section, headings, topics)
        private = parent.private or rules.is_private(section.raw())
        kind = kind or by_text
        if kind is not None and not private and (selection is None or selection.kind != kind):
            selection = _Selection(kind)
            selections.append(selection)
        if selection is not None and not private:
            selection.parts.append(part)
        elif not private:
            unselected.append(part)
        if by_text is not None:
            selection = None  # what a text says applies to its own section, not to those below it
        parents.append(_Parent(section.level, private, headings, topics, selection))
    return selections, unselected


def _pieces(parts: list[_Part], rules: NoteRules, name: NoteName, title: str) -> Iterator[tuple[_Part, list[str]]]:
    """Yield a selection with its text, or if that is too long, each of its subsections; nothing empty.

    A section that is too long itself has several texts.
    """
    text, limit = _text(parts, rules, name, title), rules.source.max_answer_chars
    if len(text) <= limit or len(parts) == 1:
        if text:
            yield parts[0], split_long(text, limit)
        return
    groups: list[list[_Part]] = [[parts[0]]]
    for part in parts[1:]:
        if len(groups) == 1 or part.section.level <= groups[-1][0].section.level:
            groups.append([])
        groups[-1].append(part)
    for group in groups:
        yield from _pieces(group, rules, name, title)


def _text(parts: list[_Part], rules: NoteRules, name: NoteName, title: str) -> str:
    """Return the text of a part of a note, without its own heading and without subsections that have no text."""
    kept: list[str] = []
    following = 0  # level of the section that was kept last; the sections are visited from the end
    for number, part in reversed(list(enumerate(parts))):
        text = readable(part.section.blocks, rules.is_label)
        text = text and text + "\n"
        level, heading = part.section.level, heading_text(part.section.heading)
        if not text and following <= level:
            continue
        following = level
        if text:
            kept.append(text)
        if number and heading and not _repeats_title(part.section, heading, name, title):
            kept.append(f"{'#' * level} {heading}\n")
    return "\n".join(reversed(kept)).strip("\n")


def _add(answers: dict[str, _Answer], path: str, new: _Answer, max_chars: int) -> None:
    """Add an answer under its provenance. Sections with the same headings are one answer until it is too long."""
    base, number = "#".join([path, *new.part.headings]), 1
    while True:
        provenance = base if number == 1 else f"{base} [{number}]"
        answer = answers.setdefault(provenance, new)
        if answer is new:
            return
        if (
            answer.is_whole
            and new.is_whole
            and answer.kind == new.kind
            and sum(map(len, answer.texts + new.texts)) <= max_chars
        ):
            answer.texts += new.texts
            return
        number += 1


def _distinct(prompts: list[str], answers: list[_Answer]) -> list[str]:
    """Return the prompts of a note's answers; the same one twice gets the headings, and then a number."""
    counts = Counter(prompts)
    with_headings = [
        f"{prompt} ({' > '.join(answer.part.headings)})" if counts[prompt] > 1 and answer.part.headings else prompt
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    seen: Counter[str] = Counter()
    result = []
    for prompt in with_headings:
        seen[prompt] += 1
        result.append(prompt if seen[prompt] == 1 else f"{prompt} ({seen[prompt]})")
    return result


def _repeats_title(section: Section, heading: str, name: NoteName, title: str) -> bool:
    """Return whether a heading only repeats the note's name, such as `# Friday, 3 May 2024` in a daily note."""
    if not heading or fold(heading) == fold(title):
        return True
    return name.day is not None and name.is_daily and section.level == 1 and str(name.day.year) in heading
