"""Checks of what a teacher wrote. Each says what is wrong with it, or nothing: an empty text."""

import json
import re

from finetune_pipeline.sources import tree_sitter_chunks
from finetune_pipeline.sources.code_chunks import LANGUAGES, CodeChunk, cut_python, parse_python, words
from finetune_pipeline.sources.teacher import is_refusal

LONGEST_INSTRUCTION = 2_000
_SHORTEST_INSTRUCTION = 15
_SHINGLE = 6
_COPIED_SHARE = 0.5
_SAME_NAMES = 0.3
_TIMES_AS_LONG = 5
FENCE = re.compile(
    r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+#-]*)[^\n]*\n(?P<body>.*?)^[ \t]*(?P=mark)`*~*[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
"""A fenced block of Markdown."""

_UNFIT = re.compile("[\0\ud800-\udfff]")
_NAMED_LANGUAGE = re.compile(
    r"(?i)(?<![\w.])(python|javascript|typescript|golang|go|rust|java|c\+\+|c#|c|ruby|php|kotlin|swift|scala|perl)"
    r"(?=\s+(?:function|method|class|struct|code|program|module|script)\b)"
)
_SAME_LANGUAGE = {"golang": "go", "c++": "cpp", "typescript": "tsx", "javascript": "tsx"}
_PARTS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+")
_CODE_LINE = re.compile(r"[=({\[;:]")
_HEAD = re.compile(r"\s*(?:@|(?:async\s+)?def\b|class\b|func\b|(?:pub\s+)?fn\b)")
_COMMON = words(
    "the and for with that this from into are was not but all any can its has have you your use uses using write "
    "function method class code python return returns value values given none true false self def str int float bool "
    "list dict type types name args when then each other import javascript typescript rust java new get set"
)


def fenced(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a Markdown text: language in lower case, and body."""
    return [(match["language"].lower(), match["body"]) for match in FENCE.finditer(text)]


def read_instructions(text: str) -> list[str] | None:
    """The requests in the teacher's JSON; None if that is not what it sent."""
    blocks = fenced(text)
    try:
        document = json.loads(blocks[0][1] if blocks else text)
    except (ValueError, RecursionError):
        return None
    found = document.get("instructions") if isinstance(document, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        return None
    return [" ".join(one.split()) for one in found]


def instruction_flaw(text: str, chunk: CodeChunk, asked: str) -> str:
    """What speaks against a request whose answer is the chunk's code.

    Args:
        asked: what the teacher was told, of which the request is to be no copy.
    """
    if len(text) < _SHORTEST_INSTRUCTION:
        return "is empty or too short to ask for anything"
    if len(text) > LONGEST_INSTRUCTION:
        return f"is longer than {LONGEST_INSTRUCTION:,} characters"
    if is_refusal(text):
        return "is a refusal"
    if not is_storable(text):
        return "holds a character that no text has"
    if copied_share(text, asked) >= _COPIED_SHARE:
        return "is a copy of the prompt"
    if len([line for line in _code_lines(chunk.code) if line in text]) >= 2:
        return "quotes the code that is to be its answer"
    other = _other_language(text, chunk.language)
    if other:
        return f"asks for {other}, and the code is {LANGUAGES[chunk.language]}"
    return "" if is_about(text, chunk) else "is not about this code: it has none of its names"


def read_refactoring(text: str) -> tuple[str, str] | None:
    """The request and the earlier code in the teacher's answer; None if that is not what it sent."""
    blocks = fenced(text)
    request = " ".join(text.partition("```")[0].split()).removeprefix("REQUEST:").strip()
    return (request, blocks[0][1].strip("\n")) if len(blocks) == 1 and request else None


def earlier_code_flaw(code: str, chunk: CodeChunk) -> str:
    """What speaks against earlier code, of which the chunk's is said to be the refactored form."""
    if not code.strip():
        return "is empty"
    if not is_storable(code):
        return "holds a character that no text has"
    if not parses(chunk.language, code, chunk.owner):
        return f"is no {LANGUAGES[chunk.language]} that parses"
    if chunk.own_name not in _defined(chunk.language, code, chunk.owner):
        return f"does not define {chunk.own_name}"
    if _bare(code) == _bare(chunk.code):
        return "is the same code"
    if not len(chunk.code) / _TIMES_AS_LONG <= len(code) <= len(chunk.code) * _TIMES_AS_LONG:
        return "is of quite another length"
    now = words(chunk.code) - _COMMON
    shared = len(now & words(code)) / max(1, len(now))
    return "" if shared >= _SAME_NAMES else "is not about this code: it has few of its names"


def parses(language: str, code: str, owner: str = "") -> bool:
    """Whether it is code of that language; a method alone is."""
    if language != "python":
        return tree_sitter_chunks.parses(language, code, owner)
    try:
        parse_python(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def is_about(text: str, chunk: CodeChunk) -> bool:
    """Whether a text speaks of the chunk: it has its name, or two words of the names in it.

    A name of one word, such as `read`, may be a word of any sentence: it counts as a name where it is written as one.
    """
    name = rf"(?<!\w){re.escape(chunk.own_name)}(?!\w)"
    if re.search(name if len(_PARTS.findall(chunk.own_name)) > 1 else rf"{name}\(|`[^`]*{name}[^`]*`", text):
        return True
    return len(words(text) & (words(chunk.code) - _COMMON)) >= 2


def copied_share(text: str, of: str) -> float:
    """Share of a text's runs of six words that stand in another text, 0 to 1; 0 for a shorter text."""
    runs = _runs(text)
    return len(runs & _runs(of)) / len(runs) if runs else 0.0


def is_storable(text: str) -> bool:
    """Whether a database can hold it."""
    return _UNFIT.search(text) is None


def _runs(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[n : n + _SHINGLE]) for n in range(len(found) - _SHINGLE + 1)}


def _code_lines(code: str) -> set[str]:
    lines = {line.strip() for line in code.splitlines() if _CODE_LINE.search(line) and not _HEAD.match(line)}
    return {" ".join(line.split()) for line in lines if len(line) >= 12}


def _other_language(text: str, language: str) -> str:
    named = [found.lower() for found in _NAMED_LANGUAGE.findall(text)]
    keys = {_SAME_LANGUAGE.get(name, name) for name in named}
    own = _SAME_LANGUAGE.get(language, language)
    return named[0] if named and own not in keys else ""


def _defined(language: str, code: str, owner: str) -> set[str]:
    if language == "python":
        found = list(cut_python(code))
    else:
        sources = [code, *([tree_sitter_chunks.in_its_type(language, code, owner)] if owner else [])]
        found = [one for source in sources for one in tree_sitter_chunks.cut(language, source + "\n")]
    return {one.own_name for one in found if isinstance(one, CodeChunk)}


def _bare(code: str) -> str:
    """Code without white space and comments on lines of their own."""
    lines = [line for line in code.splitlines() if not line.strip().startswith(("#", "//"))]
    return "".join("".join(lines).split())
