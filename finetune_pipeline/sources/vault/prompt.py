"""The question that a note answers, made of what kind of note it is, what it is called and its day; without a model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

_DATED = re.compile(r"(\d{4})([-._]?)(\d\d)\2(\d\d)(?!\d)[ _-]*(.*)", re.DOTALL)
_WEEKDAY = re.compile(r"\W*(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\W*", re.IGNORECASE)
_ZETTEL = re.compile(r"\d{12,14}[ _-]*")
_QUESTIONS = {
    "decision": "What did I decide{about}{day}?",
    "reflection": "What were my thoughts{about}{day}?",
    "learning": "What did I learn{about}{day}?",
}


@dataclass(frozen=True)
class Name:
    """What a note's file is called.

    Attributes:
        title: what it is about; empty for a daily note, and for one that is named by a number only.
        day: that its name begins with, as 2024-05-03 or 20240503.
    """

    title: str
    day: date | None

    @property
    def is_daily(self) -> bool:
        """Named by its day and nothing else, but for the day of the week."""
        return self.day is not None and not self.title

    @property
    def moment(self) -> datetime | None:
        """The beginning of its day."""
        return None if self.day is None else datetime(self.day.year, self.day.month, self.day.day, tzinfo=UTC)


def name_of(stem: str) -> Name:
    """Read the name of a note, without folder and `.md`."""
    dated = _DATED.fullmatch(stem)
    if dated:
        try:
            day = date(int(dated[1]), int(dated[3]), int(dated[4]))
        except ValueError:
            return Name(stem, None)
        rest = dated[5].strip()
        return Name("" if _WEEKDAY.fullmatch(rest) else rest, day)
    return Name(_ZETTEL.sub("", stem, count=1), None)


def question(kind: str, title: str, headings: Sequence[str], day: date | None, folder: str) -> str:
    """What a person would have asked to be told this note or section.

    Args:
        kind: decision, reflection, learning, or any other.
        title: of the note; empty for a daily note.
        headings: down to the section, without those that only say the kind.
        day: of the note's name.
        folder: that tells the note from others of its name; empty where nothing has to.
    """
    names = [name for name in (folder, title, *headings) if name]
    topic = names.pop() if title or headings else ""
    if topic.endswith("?"):  # it is the question already
        around = [*names, *([day.isoformat()] if day else [])]
        return topic + (f" ({', '.join(around)})" if around else "")
    around = [f" ({', '.join(names)})"] if names else []
    about = "".join([f" about {topic}" if topic else "", *around])
    pattern = _QUESTIONS.get(kind, "Which {kind} did I note{about}{day}?")
    return pattern.format(kind=kind, about=about, day=f" on {day.isoformat()}" if day else "")
