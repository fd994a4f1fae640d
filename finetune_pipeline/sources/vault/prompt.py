"""Make the prompt of a note from its kind, name and date, without a model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

_DATED = re.compile(r"(\d{4})([-._]?)(\d\d)\2(\d\d)(?!\d)[ _-]*(.*)", re.DOTALL)
_WEEKDAY = re.compile(r"\W*(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\W*", re.IGNORECASE)
_ZETTEL = re.compile(r"\d{12,14}[ _-]*")
_PROMPTS = {
    "decision": "What did I decide[ about {topic}][ on {day}]?",
    "reflection": "What were my thoughts[ about {topic}][ on {day}]?",
    "learning": "What did I learn[ about {topic}][ on {day}]?",
}
_OTHER_PROMPT = 'What did I note under "{kind}"[ about {topic}][ on {day}]?'
_OPTIONAL = re.compile(r"\[([^\[\]]*)\]")
_PLACEHOLDER = re.compile(r"\{(topic|day|kind)\}")


@dataclass(frozen=True)
class NoteName:
    """The file name of a note."""

    title: str  # the topic; empty for a daily note, or if the name is only a number
    day: date | None  # the date at the start of the name, such as 2024-05-03 or 20240503

    @property
    def is_daily(self) -> bool:
        """Return whether the name is a date, with or without the day of the week."""
        return self.day is not None and not self.title

    @property
    def moment(self) -> datetime | None:
        """The beginning of the day."""
        return None if self.day is None else datetime(self.day.year, self.day.month, self.day.day, tzinfo=UTC)


def parse_name(stem: str) -> NoteName:
    """Parse the name of a note, without folder and `.md`."""
    dated = _DATED.fullmatch(stem)
    if dated:
        try:
            day = date(int(dated[1]), int(dated[3]), int(dated[4]))
        except ValueError:
            return NoteName(stem, None)
        rest = dated[5].strip()
        return NoteName("" if _WEEKDAY.fullmatch(rest) else rest, day)
    return NoteName(_ZETTEL.sub("", stem, count=1), None)


def prompt_for(
    kind: str, title: str, headings: Sequence[str], day: date | None, folder: str, templates: Mapping[str, str]
) -> str:
    """Return the question that a note or section answers.

    Args:
        kind: decision, reflection, learning, or any other.
        title: the note's title; empty for a daily note.
        headings: the headings above the section, without those that only name the kind.
        day: the date in the note's name.
        folder: the note's folder, if other notes have the same name; else empty.
        templates: kind -> prompt with placeholders, instead of the English ones.
    """
    names = [name for name in (folder, title, *headings) if name]
    topic = names.pop() if names else ""
    if topic.endswith("?"):  # already a question
        context = [*names, *([day.isoformat()] if day else [])]
        return topic + (f" ({', '.join(context)})" if context else "")
    about = " ".join(filter(None, [topic, f"({', '.join(names)})" if names else ""]))
    values = {"kind": kind, "topic": about, "day": day.isoformat() if day else ""}
    template = templates.get(kind) or _PROMPTS.get(kind, _OTHER_PROMPT)
    # A placeholder in a note's title is not replaced: the optional parts are chosen before anything is filled in.
    chosen = _OPTIONAL.sub(lambda part: part[1] if all(values[name] for name in _names(part[1])) else "", template)
    return " ".join(_PLACEHOLDER.sub(lambda name: values[name[1]], chosen).split())


def _names(text: str) -> list[str]:
    return _PLACEHOLDER.findall(text)
