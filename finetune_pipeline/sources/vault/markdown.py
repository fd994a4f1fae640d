"""Split a note into sections, and convert Obsidian's Markdown to plain text. Code stays as it is.

markdown-it-py (CommonMark) finds the blocks. Its inline parser does not know wiki links, tags and comments and would
take most of the time, so one regular expression finds these. A line of dashes below a text is a divider and never makes
the text a heading, since that is what people mean by it.
"""

import html
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile

import regex
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, heading

IsLabel = Callable[[str], bool]
"""A function that returns whether a tag, without `#`, selects notes."""

_NOT_IN_TAGS = r"""\s!"#$%&'()*+,.:;<=>?@\[\]^`{|}~\\\u2000-\u206f\u2e00-\u2e7f"""
_TAG = rf"\#(?=\d*[^\d{_NOT_IN_TAGS}])[^{_NOT_IN_TAGS}]+"  # as in Obsidian: not only digits
_ONLY_A_TAG = re.compile(_TAG)
_TARGET = r"\((?:[^()\n]|\([^()\n]*\))*\)"  # of a link, with its parentheses
_IMAGE = rf"!\[[^\[\]\n]*\](?:{_TARGET}|\[[^\[\]\n]*\])"
_HTML_BREAKS = (
    "address|article|aside|audio|blockquote|br|button|canvas|caption|center|dd|details|div|dl|dt|embed|figcaption|"
    "figure|footer|form|h[1-6]|header|hr|iframe|img|input|legend|li|main|nav|object|ol|p|picture|pre|section|select|"
    "source|summary|svg|table|tbody|td|textarea|tfoot|th|thead|tr|ul|video"
)
_HTML_INLINE = (
    "a|abbr|acronym|b|bdi|bdo|big|cite|code|del|dfn|em|font|i|ins|kbd|label|mark|q|rp|rt|ruby|s|samp|small|span|strike|"
    "strong|sub|sup|time|tt|u|var|wbr"
)
# Attributes of an HTML tag. A quoted value may contain >, but no beginning of a tag, as that would be searched again.
_QUOTED = r""""(?:[^"<]|<(?![a-z/]))*+"|'(?:[^'<]|<(?![a-z/]))*+'"""
_ATTRIBUTES = rf"""(?:\s(?:[^<>"']++|{_QUOTED})*+)?"""
# Of unknown tags, as CommonMark defines them: `<x, y>` is none.
_STRICT_ATTRIBUTES = rf"""(?:\s++[a-z_:][\w.:-]*+(?:\s*+=\s*+(?:[^\s"'=<>`]++|{_QUOTED}))?+)*+\s*+"""
# Every repetition ends where the next one begins, so that a malicious note cannot take quadratic time.
_INLINE = re.compile(
    rf"""
      (?P<kept> \\[^\w\s] | https?://[^\s<>\])]+
              | (?<!`)(?P<tick>`+)(?!`) (?:(?!\n[ \t]*\n)[\s\S]){{0,2000}}? (?<!`)(?P=tick)(?!`) )
    | (?P<gone> %%[\s\S]*?(?:%%|\Z) | <!--[\s\S]*?(?:-->|\Z) | !\[\[[^\[\]\n]*\]\]
              | \[{_IMAGE}\]{_TARGET} | {_IMAGE}
              | <(?P<hidden>script|style)\b[\s\S]*?(?:</(?P=hidden)\s*>|\Z)
              | <(?P<drawn>svg|math)(?=[\s>])(?![^<>]*/>)[\s\S]*?(?:</(?P=drawn)\s*>|(?=\n[ \t]*\n)|\Z)
              | (?<![^\n])\[\^[^\[\]\s]+\]:[ \t]* | \[\^[^\[\]\s]+\]
              | (?<![^\n])[ ]{{0,3}}\[[^\[\]\n]+\]:[ \t]*(?=\S*(?:[/\#<]|\.\w)|mailto:)\S+
                (?:[ \t]+(?:"[^"\n]*"|'[^'\n]*'|\([^()\n]*\)))?[ \t]*(?=\n|\Z)
              | (?<!\S)\^[A-Za-z0-9-]+(?=[ \t]*(?:\n|\Z)) )
    | (?P<html> </?(?:(?P<breaks>{_HTML_BREAKS})|{_HTML_INLINE})(?:{_ATTRIBUTES}|\s[^<>]*)/?>
              | (?-i:<(?:(?<!\w<)[a-z][\w-]*+|[a-z]\w*+-[\w-]*+)){_STRICT_ATTRIBUTES}/?>
              | (?-i:</[a-z][\w-]*+)\s*+> )
    | (?P<entity> &(?:\#\d{{1,7}}|\#[xX][0-9a-fA-F]{{1,6}}|[A-Za-z][A-Za-z0-9]{{1,31}}); )
    # Not x^[2] or a regular expression such as ^[a-z ]+$.
    | \^\[(?=[^\[\]\n]*(?:[^\s\[\]][ ][^\s\[\]]|\[\[|[\u2e80-\uffff]))
      (?P<note>(?:[^\[\]\n]|\[\[[^\[\]\n]*\]\])+)\](?![*+?{{])
    | \[\[(?P<wiki>[^\[\]\n]+)\]\]
    | \[(?P<text>[^\[\]\n]*)\](?P<target>{_TARGET})
    | (?<!\w)\[(?!\d+\])(?P<reference>[^\[\]\n]+)\]\[[^\[\]\n]*\]
    | ==(?P<marked>[^=\n]+)==
    | (?<!\S)(?P<tag>{_TAG})
    """,
    re.VERBOSE | re.IGNORECASE,
)
_MARK = "\x00"  # stands for a removed part until the spaces around it are removed too; no note contains it
_AROUND_MARK = re.compile(r"(?P<before>[,;]?)(?<![ \t\x00])[ \t\x00]+(?P<after>[,;]?)")
_BLOCK_ID = re.compile(r"(?<!\S)\^[A-Za-z0-9-]+[ \t]*\Z")
_ITEM = re.compile(r"(?:[-*+]|\d{1,9}[.)])?+[ \t]*+(?:\[.?\])?+[ \t]*+")
_EMPTY_ITEM = re.compile(r"(?:[-*+]|\d{1,9}[.)])[ \t]*+(?:\[.?\])?")
_NO_TEXT = " \t-*_=|:~`+#.…"
_CHARACTER = regex.compile(r"[\p{L}\p{N}\p{Emoji_Presentation}]|\p{Emoji}\uFE0F")
_SENTENCE_END = re.compile(r"(?<=[.!?…؟۔।॥။።] )|(?<=[。｡！？])")
_FENCE = re.compile(r"[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*(?:```|~~~)")
_CALLOUT_TYPE = re.compile(r"^(?:[ \t]*>)+[ \t]*\[![\w-]+[^\]\n]*\][+-]?")
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
            found[-1].blocks.append(([*filter(None, [token.content]), *lines[start:end]], False))
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

    Links become their names, and callouts a title. Comments, embeds, images, HTML tags, footnote marks, definitions
    of links and block ids are removed with the spaces and empty lines that they would leave, and so are list items
    without text, lines of tags only, and selecting tags at either end of a line. A tag within a sentence is a word.

    A text is empty if it has no letter, digit or emoji apart from list markers, check boxes, code fences and the types
    of callouts.
    """
    result: list[str] = []
    has_text = False
    for lines, is_code in blocks:
        if is_code:
            has_text = has_text or any(map(_CHARACTER.search, lines[1:] if _FENCE.match(lines[0]) else lines))
        else:
            text = _without_removed("\n".join(lines))
            if "#" in text:
                kept = (_without_labels(line, is_label) if "#" in line else line for line in text.split("\n"))
                text = "\n".join(line for line in kept if line is not None)
            # Two spaces at the end of a line are an invisible line break in Markdown.
            lines = _without_empty_items([line.rstrip() for line in _plain(text).split("\n")])
            has_text = has_text or any(_CHARACTER.search(_content(_CALLOUT_TYPE.sub("", line))) for line in lines)
            text = _CALLOUT.sub(lambda m: f"{m[1]}**{m[3].strip() or m[2].capitalize()}**", "\n".join(lines))
            lines = text.split("\n")
        for line in lines:
            if line or is_code or (result and result[-1]):  # several blank lines become one, except in code
                result.append(line)
    return "\n".join(result).strip("\n") if has_text else ""


def split_long(text: str, max_chars: int) -> list[str]:
    """Split a text of more than `max_chars` characters into parts of about the same length.

    It is split between paragraphs; a paragraph that is too long itself between its lines, such as the items of a list,
    and a line between its sentences. Code blocks, tables and what is indented below a line stay whole, so a part may
    be longer.
    """
    units: list[str] = []
    for paragraph in _split_lines(text, after_blank=True):
        for lines in _split_lines(paragraph, after_blank=False) if len(paragraph) > max_chars else [paragraph]:
            is_text = len(lines) > max_chars and "\n" not in lines.strip("\n")
            units += _SENTENCE_END.split(lines) if is_text else [lines]
    wanted = len(text) / math.ceil(len(text) / max_chars)
    parts = [""]
    for unit in units:
        if parts[-1] and (len(parts[-1]) >= wanted or len(parts[-1]) + len(unit) > max_chars):
            parts.append("")
        parts[-1] += unit
    return [part.strip("\n").rstrip() for part in parts]


def _split_lines(text: str, *, after_blank: bool) -> list[str]:
    """Return a text in pieces that begin with a line that is neither indented nor in a code block or table.

    Args:
        after_blank: a piece begins after a blank line only.
    """
    pieces = [""]
    fence, before = "", "\n"
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        in_table = line.startswith("|") and before.startswith("|")
        begins = not line[0].isspace() and not fence and not in_table
        if pieces[-1] and begins and (before == "\n" or not after_blank):
            pieces.append("")
        pieces[-1] += line
        if (marker := line.lstrip(" \t>")[:3]) in {"```", "~~~"}:
            fence = "" if marker == fence else fence or marker
        before = line
    return pieces


def _without_empty_items(lines: list[str]) -> list[str]:
    """Return lines without list markers and check boxes that no text follows, in their line or indented below it."""
    result: list[str] = []
    indent = -1  # of the lines below, as far as they belong to the same block of lines
    for line in reversed(lines):
        rest = line.lstrip(" \t>")
        own = len(line) - len(rest)
        if not _EMPTY_ITEM.fullmatch(rest) or own < indent:
            result.append(line)
            indent = own if rest else -1
    return result[::-1]


def _content(line: str) -> str:
    """Return a line without the quote marks, list markers and check boxes at its beginning."""
    rest, at = line.strip(" \t>"), 0
    while (item := _ITEM.match(rest, at)) and item.end() > at:
        at = item.end()
    return rest[at:]


def _without_removed(text: str) -> str:
    """Return Markdown without what a reader does not see: comments, embeds, images, HTML tags and block ids."""

    def mark(found: re.Match[str]) -> str:
        if found["breaks"]:
            return f"{_MARK} {_MARK}"
        if found["gone"] is not None or (found["html"] or "").endswith("/>"):
            return _MARK
        return "" if found["html"] else found[0]

    def spaced(found: re.Match[str]) -> str:
        before, after = found["before"], found["after"]
        if _MARK not in found[0]:
            return found[0]
        if after:
            return after if before in {"", after} else before + after
        follows = found.string[found.end() : found.end() + 1]
        is_space = follows not in {"", *".:!?)"} and found[0].strip(_MARK + before) != ""
        return before + (" " if is_space else "")

    lines = []
    for line in _INLINE.sub(mark, text).split("\n"):
        if _MARK not in line:
            lines.append(line)
        elif _content(line.replace(_MARK, "")).strip(_NO_TEXT):
            rest = line.lstrip(" \t>")
            lines.append(line[: len(line) - len(rest)] + _AROUND_MARK.sub(spaced, rest.lstrip(_MARK + " \t")))
    return "\n".join(lines)


def _without_labels(line: str, is_label: IsLabel) -> str | None:
    """Return a line without selecting tags at its ends, or None if it has only tags."""
    line = _BLOCK_ID.sub("", line)
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
    if found["gone"] is not None or found["html"]:
        return " " if found["breaks"] else ""
    if found["entity"]:
        return html.unescape(found["entity"])
    if found["tag"]:
        return found["tag"][1:]
    if found["marked"]:
        return _plain(found["marked"])
    if found["reference"]:
        return _plain(found["reference"])
    if found["note"]:
        before = found.string[found.start() - 1 : found.start()]
        return ("" if before.isspace() or not before else " ") + f"({_plain(found['note']).strip()})"
    if found["wiki"]:
        return _link_text(found["wiki"])
    # A web address belongs to the text, a link to another note does not.
    return found[0] if found["target"].startswith(("(http://", "(https://")) else _plain(found["text"])


def _link_text(link: str) -> str:
    """Return what Obsidian shows for a wiki link, without the note's folders."""
    target, _, alias = link.replace("\\|", "|").partition("|")
    if alias.strip():
        return alias.strip()
    note, *headings = target.split("#")
    names = [note.rsplit("/", 1)[-1].strip().removesuffix(".md")]
    names += [heading.strip() for heading in headings if not heading.startswith("^")]
    return " > ".join(filter(None, names))
