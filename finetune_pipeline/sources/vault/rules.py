"""Which notes and sections of a vault are selected, as what kind, and which are private."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from finetune_pipeline.settings import VaultSource

_AFTER_KIND = re.compile(r"\s*(?::|–|—|\s-\s)\s*")
_BEFORE_NAME = re.compile(r"[\W\d_]*")
_ANY_VALUE = "*"


class NoteRules:
    """The source's settings, case-folded for comparison."""

    def __init__(self, source: VaultSource) -> None:
        self.source = source
        # Tag -> kind, and name of a heading -> kind. If a note has several tags, the first one here counts.
        self.tags = {fold(tag.lstrip("#")): kind for tag, kind in source.tags.items()}
        self.headings = {fold(heading): kind for heading, kind in source.headings.items()}
        self.properties = {
            fold(name): {fold(value): kind for value, kind in values.items()}
            for name, values in source.properties.items()
        }
        self.patterns = [
            (re.compile(text, re.IGNORECASE | re.MULTILINE), kind) for text, kind in source.patterns.items()
        ]
        names = "|".join(re.escape(fold(tag.lstrip("#"))) for tag in source.private_tags)
        self.private = re.compile(f"#(?:{names})(?![\\w-])" if names else "(?!)")
        self.whole_days = source.whole_daily_notes  # a daily note without any of the tags is a reflection

    def kind(self, found: Iterable[str]) -> str | None:
        """Return the kind of these tags. A nested tag (`decision/architecture`) also counts for its parents."""
        folded = tuple(fold(tag) + "/" for tag in found)
        return next((kind for tag, kind in self.tags.items() if any(one.startswith(tag + "/") for one in folded)), None)

    def is_label(self, tag: str) -> bool:
        """Return whether a tag, without `#`, selects notes."""
        return self.kind([tag]) is not None

    def of_properties(self, found: Mapping[str, Sequence[str]]) -> str | None:
        """Return the kind of a frontmatter's properties. A value may be a link: `[[Kinds/Decided|decided]]`."""
        for name, kinds in self.properties.items():
            values = {fold(text) for value in found.get(name, ()) for text in _names_in(value)} - {""}
            for value, kind in kinds.items():
                if value in values or (value == _ANY_VALUE and values):
                    return kind
        return None

    def of_text(self, text: str) -> str | None:
        """Return the kind of the first pattern that matches a text."""
        return next((kind for pattern, kind in self.patterns if pattern.search(text)), None)

    def is_private(self, text: str) -> bool:
        """Return whether a text contains a private tag, also in code, comments and URLs.

        Other tags do not count there, but leaving out too much is the smaller harm.
        """
        return "#" in text and self.private.search(fold(text)) is not None

    def are_of_interest(self, body: str) -> bool:
        """Return whether a text may have something to select: a fast check before it is parsed."""
        if self.source.teacher is not None or self.patterns:
            return True
        folded = fold(body)
        return any(name in folded for name in (*self.tags, *self.headings))

    def of_heading(self, heading: str) -> tuple[str | None, str]:
        """Return the kind that a heading names, and its topic: `Decisions`, `2. Decision: use SQLite`."""
        first, *rest = _AFTER_KIND.split(_BEFORE_NAME.sub("", heading, count=1), maxsplit=1)
        kind = self.headings.get(fold(first.rstrip(" .!?")))
        return (None, heading) if kind is None else (kind, "".join(rest))


def _names_in(value: str) -> tuple[str, ...]:
    """Return a property's value without brackets, and as a link the name of its note and what it is shown as.

    A link without quotes is a nested list in YAML, whose brackets are gone.
    """
    whole = value.strip().removeprefix("[[").removesuffix("]]").replace("\\|", "|").strip()
    target, _, alias = whole.partition("|")
    note = target.partition("#")[0].rpartition("/")[2].strip().removesuffix(".md")
    return whole, note, alias.strip()


def fold(text: str) -> str:
    """Return a text in the form in which tags, headings and properties are compared."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
