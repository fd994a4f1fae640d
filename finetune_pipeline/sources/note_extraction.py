"""Extract facts from a meeting note or a list of requirements by fixed patterns, to fill a template.

Nothing is guessed: what a document does not say in one of these forms is not found.
"""

import re
from collections.abc import Iterable

_HEADING = re.compile(r"^#{1,6}[ \t]+(?P<text>\S.*)$", re.M)
_MARKER = r"^[ \t]*(?:[-*+]|\d{1,3}[.)])[ \t]+(?:\[[ xX]\][ \t]+)?"
_BULLET = re.compile(_MARKER + r"(?P<text>\S.*)$", re.M)
_NAMED_BLOCK = r"^[ \t]*(?:[-*+][ \t]+)?(?:\*\*|__)?(?:{names})(?:\*\*|__)?[ \t]*:(?:\*\*|__)?[ \t]*(?P<text>\S.*)$"
_ACTORS = re.compile(
    _NAMED_BLOCK.format(names="attendees|participants|present|actors|stakeholders|people"), re.I | re.M
)
_DECISIONS = re.compile(_NAMED_BLOCK.format(names="decision|decided|we decided"), re.I | re.M)
_ACTIONS = re.compile(_NAMED_BLOCK.format(names="action|action item|todo|to do|next step"), re.I | re.M)
_LABELED = re.compile(r"\s*(?:\*\*|__)?[A-Z][\w -]{1,30}(?:\*\*|__)?:")
_STORY = re.compile(r"\bAs an? (?P<text>[A-Za-z][\w -]{1,40}?),? I (?:want|need|can|would like|must)\b", re.I)
_SPOKEN = re.compile(r"^[ \t]*(?:[-*+][ \t]+)?\*\*(?P<text>[A-Z][\w .'-]{1,40}?)(?::\*\*|\*\*:)", re.M)
_REQUIREMENT = re.compile(r"\b(?:must|shall|should|needs? to)\b|\bAs an? [\w -]{2,40}?,? I (?:want|need)\b", re.I)
_ENTITY = re.compile(
    r"^[ \t]*(?:[-*+][ \t]+)?(?:An?|The|Each|Every)[ \t]+(?:\*\*|`)?(?P<name>[A-Za-z][\w -]{0,40}?)(?:\*\*|`)?[ \t]+"
    r"(?:has|have|holds|consists of|contains)[ \t]+(?P<fields>[^.;:/`\n]{3,300})", re.M,
)  # fmt: skip
_ENDPOINT = re.compile(r"\b(?P<text>(?:GET|POST|PUT|PATCH|DELETE)[ \t]+/[\w/{}:.-]*)")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_MARKUP = re.compile(r"[*_`]{1,3}")
_UNFIT_IN_DIAGRAM = re.compile(r"[^\w .,'/&-]+")
_MAX_VALUES = 30

PLACEHOLDERS = frozenset(
    {
        "title", "summary", "sections", "points", "actors", "decisions", "actions", "requirements", "endpoints",
        "entities", "participants", "flow", "mindmap", "entity_blocks",
    }
)  # fmt: skip
"""The placeholders of templates: the keys of `extract_facts`."""


def extract_facts(title: str, text: str) -> dict[str, str]:
    """Return the value of each placeholder; empty if the document says nothing about it."""
    attendees = [name for line in _found(_ACTORS, text) for name in re.split(r",|;|\s+and\s+", line)]
    actors = _unique([*attendees, *_found(_STORY, text), *_found(_SPOKEN, text)])
    sections = _unique(match["text"] for match in _HEADING.finditer(text) if _plain(match["text"]) != title)
    lines = (re.sub(_MARKER, "", line) for line in text.split("\n"))
    sentences = (part for line in lines if not line.startswith("#") for part in _SENTENCE.split(line))
    entities: dict[str, list[str]] = {}
    for match in _ENTITY.finditer(text):
        parts = (part.strip() for part in re.split(r",\s*(?:and\s+)?|\s+and\s+", match["fields"]))
        fields = [re.sub(r"^(?:an?|the|its|one|several|many)\s+", "", part, flags=re.I) for part in parts]
        name = _plain(match["name"])
        entities[name] = _unique([*entities.get(name, []), *fields])
    entities = dict(list(entities.items())[:_MAX_VALUES])
    lists = {
        "sections": sections,
        "points": _unique(_found(_BULLET, text)),
        "actors": actors,
        "decisions": _unique([*_found(_DECISIONS, text), *_under(text, "decision")]),
        "actions": _unique([*_found(_ACTIONS, text), *_under(text, "action", "next step", "todo")]),
        "requirements": _unique(sentence for sentence in sentences if _REQUIREMENT.search(sentence)),
        "endpoints": _unique(_found(_ENDPOINT, text)),
        "entities": [f"{name}: {', '.join(fields)}" for name, fields in entities.items()],
    }
    # The first paragraph of prose.
    summary = ""
    for paragraph in re.split(r"\n\s*\n", text):
        prose = not paragraph.lstrip().startswith(("#", "-", "*", "+", "|", ">", "`")) and not _LABELED.match(paragraph)
        if prose and len(paragraph.split()) > 4 and paragraph.rstrip().endswith((".", "!", "?")):
            summary = " ".join(_MARKUP.sub("", paragraph).split())
            break
    # Parts of Mermaid diagrams.
    topics = _labels(sections)
    nodes = [f'    s{n}["{label}"]' for n, label in enumerate(topics, start=1)]
    arrows = [f"    s{n} --> s{n + 1}" for n in range(1, len(topics))]
    blocks = []
    for name, fields in entities.items():
        rows = "\n".join(f"        string {_identifier(field)}" for field in fields)
        blocks.append(f"    {_identifier(name).upper()} {{\n{rows}\n    }}")
    return {
        "title": title,
        "summary": summary,
        **{name: "\n".join(f"- {value}" for value in values) for name, values in lists.items()},
        "participants": "\n".join(f"    participant p{n} as {label}" for n, label in enumerate(_labels(actors), 1)),
        "flow": "\n".join(nodes + arrows),
        "mindmap": "\n".join(f"    {label}" for label in topics),
        "entity_blocks": "\n".join(blocks),
    }


def _labels(values: Iterable[str]) -> list[str]:
    """Return texts without what has a meaning in a Mermaid diagram."""
    labels = (" ".join(_UNFIT_IN_DIAGRAM.sub(" ", value).split()) for value in values)
    return [f"{label}_" if label.lower() == "end" else label for label in labels if label]


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_").lower() or "field"


def _under(text: str, *names: str) -> list[str]:
    """Return the list entries in sections whose heading contains one of these words."""
    headings = [*_HEADING.finditer(text)]
    ends = [*(heading.start() for heading in headings[1:]), len(text)]
    found: list[str] = []
    for heading, end in zip(headings, ends, strict=False):
        if any(name in heading["text"].lower() for name in names):
            found += _found(_BULLET, text[heading.end() : end])
    return found


def _found(pattern: re.Pattern[str], text: str) -> list[str]:
    return [match["text"] for match in pattern.finditer(text)]


def _unique(values: Iterable[str]) -> list[str]:
    plain = (_plain(value) for value in values)
    return list(dict.fromkeys(value for value in plain if value))[:_MAX_VALUES]


def _plain(text: str) -> str:
    """Return a text as one line without Markdown, so that it cannot open a fenced block."""
    return " ".join(_MARKUP.sub("", text).split()).strip(" .#")
