"""Split a note into sections, and convert Obsidian's Markdown to plain text. Code stays as it is.

markdown-it-py (CommonMark) finds the blocks. Its inline parser does not know wiki links, tags and comments and would
take most of the time, so one regular expression finds these. A line of dashes below a text is a divider and never makes
the text a heading, since that is what people mean by it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, heading

IsLabel = Callable[[str], bool]
"""A function that returns whether a tag, without `#`, selects notes."""

_NOT_IN_TAGS = r"""\s!"#$%&'()*+,.:;<=>?@\[\]^`{|}~\\\u2000-\u206f\u2e00-\u2e7f"""
_TAG = rf"\#(?=\d*[^\d{_NOT_IN_TAGS}])[^{_NOT_IN_TAGS}]+"  # as in Obsidian: not only digits
_ONLY_A_TAG = re.compile(_TAG)
# Every repetition ends where the next one begins, so that a malicious note cannot take quadratic time.
_INLINE = re.compile(
    rf"""
      (?P<kept> \\[^\w\s] | https?://[^\s<>\])]+
              | (?<!`)(?P<tick>`+)(?!`) (?:(?!\n[ \t]*\n)[\s\S]){{0,2000}}? (?<!`)(?P=tick)(?!`) )
    | (?P<gone> %%[\s\S]*?(?:%%|\Z) | <!--[\s\S]*?(?:-->|\Z) | !\[\[[^\[\]\n]*\]\]
              | !\[[^\[\]\n]*\]\((?:[^()\n]|\([^()\n]*\))*\)
              | (?<!\S)\^[A-Za-z0-9-]+(?=[ \t]*(?:\n|\Z)) )
    | \[\[(?P<wiki>[^\[\]\n]+)\]\]
    | \[(?P<text>[^\[\]\n]*)\]\((?P<target>(?:[^()\n]|\([^()\n]*\))*)\)
    | ==(?P<marked>[^=\n]+)==
    | (?<!\S)(?P<tag>{_TAG})
    """,
    re.VERBOSE,
)
_CALLOUT = re.compile(r"^([ \t]*(?:>[ \t]?)+)\[!([\w-]+)[^\]\n]*\][+-]?[ \t]*(.*)$", re.MULTILINE)
_MARKER = re.compile(r"[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+(?:\[.\][ \t]+)?)?")
_QUERIES = {"dataview", "dataviewjs", "tasks", "query"}


@dataclass
class Section:
    """A heading with the text up to the next heading. The first section of a note has no heading."""

    level: int  # 1 to 6; 0 without a heading
    heading: str
    blocks: list[tuple[list[str], bool]] = field(default_factory=list)  # lines, and whether they are code

    def raw(self) -> str:
        """Return the section as it is written."""
        return "\n".join([self.heading, *(line for lines, _ in self.blocks for line in lines)])

    def prose(self) -> Iterator[str]:
        """Yield the heading and the text blocks, without code."""
        yield self.heading
        yield from ("\n".join(lines) for lines, is_code in self.blocks if not is_code)


def sections(body: str) -> list[Section]:
    """Return the sections of a note in order."""
    lines = body.split("\n")
    found, at = [Section(0, "")], 0
    tokens = _parser().parse(body)
    for number, token in enumerate(tokens):
        if token.map is None or token.map[0] < at:
            continue
        start, end = token.map
        is_heading = token.type == "heading_open" and token.level == 0
        if not is_heading and token.type not in {"fence", "code_block", "comment"}:
            continue
        if at < start:
            found[-1].blocks.append((lines[at:start], False))
        if is_heading:
            found.append(Section(int(token.tag[1]), tokens[number + 1].content))
        elif token.type == "comment":  # a separate block, so that no text before it can hide it
            found[-1].blocks.append(([*token.content.splitlines(), *lines[start:end]], False))
        # A query is left out: what the plugin would show in its place is not part of the note.
        elif token.info.strip().split(" ")[0].lower() not in _QUERIES:
            found[-1].blocks.append((lines[start:end], True))
        at = end
    found[-1].blocks.append((lines[at:], False))
    return found


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark").disable(["lheading", "reference"])
    parser.core.ruler.disable(["inline", "text_join"])
    parser.block.ruler.after("fence", "comment", _comment, {"alt": ["paragraph", "blockquote", "list"]})
    return parser


def _comment(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """Parse a comment (`%%`) of several lines, in which nothing is a heading or code. A rule of markdown-it-py."""
    begin = state.bMarks[start_line] + state.tShift[start_line]
    if state.is_code_block(start_line) or not _opens_comment(state.src[begin : state.eMarks[start_line]]):
        return False
    if silent:
        return True
    of_heading = heading(state, start_line, end_line, silent)
    first = start_line + 1 if of_heading else start_line
    line, is_open = start_line + 1, True
    while line < end_line and is_open:
        _, mark, behind = state.src[state.bMarks[line] : state.eMarks[line]].partition("%%")
        is_open = not mark or _opens_comment(behind)
        line += 1
    state.line = line
    token = state.push("comment", "", 0)
    token.content = "%%" if of_heading else ""  # the heading contains the opening %%
    token.map = [first, state.line]
    return True


def _opens_comment(line: str) -> bool:
    """Return whether a comment begins in a line and does not end in it."""
    gone = (found["gone"] or "" for found in _INLINE.finditer(line)) if "%%" in line else ()
    return any(text.startswith("%%") and (len(text) < 4 or not text.endswith("%%")) for text in gone)


def tags_in(text: str) -> list[str]:
    """Return the tags in a text without code blocks, without `#`. Code, links, URLs and comments contain no tags."""
    if "#" not in text:
        return []
    return [found["tag"][1:] for found in _INLINE.finditer(text) if found["tag"]]


def heading_text(heading: str) -> str:
    """Return a heading as plain text, without tags and markup."""
    kept = [word for word in heading.split() if not _ONLY_A_TAG.fullmatch(word)]
    return " ".join(re.sub(r"\*+|~~|`", "", _plain(" ".join(kept))).split())


def readable(blocks: list[tuple[list[str], bool]], is_label: IsLabel) -> str:
    """Return text and code as a reader sees them.

    Links become their names, and callouts a title. Comments, embeds, images and block ids are removed, and so are lines
    of tags only and selecting tags at either end of a line. A tag within a sentence is a word.
    """
    result: list[str] = []
    for lines, is_code in blocks:
        if not is_code:
            text = _CALLOUT.sub(lambda m: f"{m[1]}**{m[3].strip() or m[2].capitalize()}**", "\n".join(lines))
            if "#" in text:
                kept = (_without_labels(line, is_label) if "#" in line else line for line in text.split("\n"))
                text = "\n".join(line for line in kept if line is not None)
            # Two spaces at the end of a line are an invisible line break in Markdown.
            lines = [line.rstrip() for line in _plain(text).split("\n")]
        for line in lines:
            if line or is_code or (result and result[-1]):  # several blank lines become one, except in code
                result.append(line)
    return "\n".join(result).strip("\n")


def _without_labels(line: str, is_label: IsLabel) -> str | None:
    """Return a line without selecting tags at its ends, or None if it has only tags."""
    marker = _MARKER.match(line)
    begin = marker.end() if marker else 0
    words = line[begin:].split()
    are_tags = [_ONLY_A_TAG.fullmatch(word) is not None for word in words]
    if words and all(are_tags):
        return None
    rest = line[begin:]
    last = sum(1 for _ in takewhile(bool, reversed(are_tags)))
    if last and (last > 1 or words[-2][-1] in ".!?" or is_label(words[-1][1:])):
        rest = rest.rsplit(None, last)[0]
    first = sum(1 for _ in takewhile(bool, are_tags))
    if any(is_label(word[1:]) for word in words[:first]):
        rest = rest.split(None, first)[-1]
    return line[:begin] + rest


def _plain(text: str) -> str:
    """Return inline markup as plain text."""
    return _INLINE.sub(_replacement, text)


def _replacement(found: re.Match[str]) -> str:
    if found["kept"]:
        return found["kept"]
    if found["gone"] is not None:
        return ""
    if found["tag"]:
        return found["tag"][1:]
    if found["marked"]:
        return _plain(found["marked"])
    if found["wiki"]:
        return _link_text(found["wiki"])
    # A web address belongs to the text, a link to another note does not.
    return found[0] if found["target"].startswith(("http://", "https://")) else _plain(found["text"])


def _link_text(link: str) -> str:
    """Return what Obsidian shows for a wiki link, without the note's folders."""
    target, _, alias = link.replace("\\|", "|").partition("|")
    if alias.strip():
        return alias.strip()
    note, *headings = target.split("#")
    names = [note.rsplit("/", 1)[-1].strip().removesuffix(".md")]
    names += [heading.strip() for heading in headings if not heading.startswith("^")]
    return " > ".join(filter(None, names))
