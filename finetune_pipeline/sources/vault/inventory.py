"""What a vault has that its settings could select: the tags, headings and properties of its notes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from finetune_pipeline.sources.text_files import TextFile
from finetune_pipeline.sources.vault.frontmatter import FrontmatterError, properties, split, tags
from finetune_pipeline.sources.vault.markdown import heading_text, sections, tags_in
from finetune_pipeline.sources.vault.rules import NoteRules
from finetune_pipeline.wording import counted

_SHOWN = 10
_SHOWN_VALUES = 3
_SHOWN_CHARS = 40


@dataclass
class Inventory:
    """Counts of a vault's notes by what they have. Private notes and sections are not looked at."""

    notes: int = 0
    tags: Counter[str] = field(default_factory=Counter)
    headings: Counter[str] = field(default_factory=Counter)
    properties: Counter[str] = field(default_factory=Counter)
    values: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Return the most frequent of each in one line, quoted like every value in a message."""
        tags = _most_common(Counter({f"#{tag}": count for tag, count in self.tags.items()}))
        names = []
        for name, count in self.properties.most_common(_SHOWN):
            values = Counter({value: n for (own, value), n in self.values.items() if own == name})
            shown = ", ".join(repr(value) for value, _ in values.most_common(_SHOWN_VALUES))
            more = ", ..." if len(values) > _SHOWN_VALUES else ""
            names.append(f"{name!r} ({count}: {shown}{more})" if shown else f"{name!r} ({count})")
        return (
            f"the {counted(self.notes, 'note')} that may be read have the tags {tags}; the headings "
            f"{_most_common(self.headings)}; the properties {', '.join(names) or 'none'}"
        )


def take_inventory(files: Iterable[TextFile], rules: NoteRules) -> Inventory:
    """Return the tags, headings and properties of notes, each counted once a note."""
    result = Inventory()
    for file in files:
        try:
            frontmatter, body = split(file.text)
            found = properties(frontmatter)
        except FrontmatterError:
            continue
        listed = tags(found)
        parsed = sections(body)
        private = " ".join([frontmatter, *(f"#{tag}" for tag in listed), parsed[0].raw()])
        if rules.is_private(private):
            continue
        result.notes += 1
        own_tags, own_headings = set(listed), set()
        hidden_below = 0  # level of the private section that a section is in; 0 outside of any
        for section in parsed:
            if hidden_below and section.level > hidden_below:
                continue
            hidden_below = section.level if rules.is_private(section.raw()) else 0
            if not hidden_below:
                own_tags |= {tag for text in section.prose() for tag in tags_in(text)}
                own_headings |= {heading_text(section.heading)} - {""}
        result.tags.update(tag for tag in sorted(own_tags) if len(tag) <= _SHOWN_CHARS)
        result.headings.update(heading for heading in sorted(own_headings) if len(heading) <= _SHOWN_CHARS)
        result.properties.update(name for name in found if name not in {"tags", "tag"})
        result.values.update(
            (name, value)
            for name, values in found.items()
            for value in dict.fromkeys(values)
            if 0 < len(value) <= _SHOWN_CHARS
        )
    return result


def _most_common(counts: Counter[str]) -> str:
    shown = [f"{name!r} ({count})" for name, count in counts.most_common(_SHOWN)]
    more = len(counts) - len(shown)
    return (", ".join(shown) or "none") + (f" and {more} more" if more > 0 else "")
