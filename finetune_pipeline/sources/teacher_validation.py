"""Check what a teacher wrote. Each check returns what is wrong, or an empty text."""

import json
import re

from finetune_pipeline.refusals import may_be_refusal
from finetune_pipeline.sources import tree_sitter_chunks
from finetune_pipeline.sources.code_chunks import LANGUAGES, CodeChunk, cut_python, parse_python, words

LONGEST_INSTRUCTION = 2_000
_SHORTEST_INSTRUCTION = 15
_SHINGLE = 6
_COPIED_FRACTION = 0.5
_SHARED_NAMES = 0.3
_LENGTH_FACTOR = 5
FENCE = re.compile(
    r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+#-]*)[^\n]*\n(?P<body>.*?)^[ \t]*(?P=mark)`*~*[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
"""A fenced block in Markdown."""

_NOT_STORABLE = re.compile("[\0\ud800-\udfff]")
_NAMED_LANGUAGE = re.compile(
    r"(?i)(?<![\w.])(python|javascript|typescript|golang|go|rust|java|c\+\+|c#|c|ruby|php|kotlin|swift|scala|perl)"
    r"(?=\s+(?:function|method|class|struct|code|program|module|script)\b)"
)
_SAME_LANGUAGE = {"golang": "go", "c++": "cpp", "typescript": "tsx", "javascript": "tsx"}
_NAME_PARTS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+")
_CODE_LINE = re.compile(r"[=({\[;:]")
_DEFINITION = re.compile(r"\s*(?:@|(?:async\s+)?def\b|class\b|func\b|(?:pub\s+)?fn\b)")
_COMMON_WORDS = words(
    "the and for with that this from into are was not but all any can its has have you your use uses using write "
    "function method class code python return returns value values given none true false self def str int float bool "
    "list dict type types name args when then each other import javascript typescript rust java new get set"
)


def fenced(text: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a Markdown text: language in lower case, and body."""
    return [(match["language"].lower(), match["body"]) for match in FENCE.finditer(text)]


def parse_instructions(text: str) -> list[str] | None:
    """Return the requests in the teacher's JSON, or None if the text has another form."""
    blocks = fenced(text)
    try:
        document = json.loads(blocks[0][1] if blocks else text)
    except (ValueError, RecursionError):
        return None
    found = document.get("instructions") if isinstance(document, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        return None
    return [" ".join(one.split()) for one in found]


def instruction_problem(text: str, chunk: CodeChunk, system: str) -> str:
    """Return why a request for the chunk's code is rejected.

    Args:
        system: the teacher's instruction, which the request must not copy.
    """
    if len(text) < _SHORTEST_INSTRUCTION:
        return "is empty or too short"
    if len(text) > LONGEST_INSTRUCTION:
        return f"is longer than {LONGEST_INSTRUCTION:,} characters"
    if may_be_refusal(text):
        return "is a refusal"
    if not is_storable(text):
        return "contains a character that cannot be stored"
    if copied_fraction(text, system) >= _COPIED_FRACTION:
        return "is a copy of the prompt"
    code = (line.strip() for line in chunk.code.split("\n") if _CODE_LINE.search(line))
    quoted = {" ".join(line.split()) for line in code if len(line) >= 12 and not _DEFINITION.match(line)}
    if sum(line in text for line in quoted) >= 2:
        return "quotes the code, which is the answer"
    named = [found.lower() for found in _NAMED_LANGUAGE.findall(text)]
    own = _SAME_LANGUAGE.get(chunk.language, chunk.language)
    if named and own not in {_SAME_LANGUAGE.get(name, name) for name in named}:
        return f"asks for {named[0]}, but the code is {LANGUAGES[chunk.language]}"
    return "" if is_about(text, chunk) else "is not about this code: it has none of its names"


def parse_refactoring(text: str) -> tuple[str, str] | None:
    """Return the request and the earlier code in the teacher's answer, or None if the answer has another form."""
    blocks = fenced(text)
    request = " ".join(text.partition("```")[0].split()).removeprefix("REQUEST:").strip()
    return (request, blocks[0][1].strip("\n")) if len(blocks) == 1 and request else None


def earlier_code_problem(code: str, chunk: CodeChunk) -> str:
    """Return why a text cannot be an earlier form of the chunk's code."""
    if not code.strip():
        return "is empty"
    if not is_storable(code):
        return "contains a character that cannot be stored"
    if not parses(chunk.language, code, chunk.owner):
        return f"is not {LANGUAGES[chunk.language]} that parses"
    if chunk.language == "python":
        cut = list(cut_python(code))
    else:
        sources = tree_sitter_chunks.with_and_without_type(chunk.language, code, chunk.owner)
        cut = [one for source in sources for one in tree_sitter_chunks.cut(chunk.language, source)]
    if chunk.own_name not in {one.own_name for one in cut if isinstance(one, CodeChunk)}:
        return f"does not define {chunk.own_name}"
    if _bare(code) == _bare(chunk.code):
        return "is the same code"
    if not len(chunk.code) / _LENGTH_FACTOR <= len(code) <= len(chunk.code) * _LENGTH_FACTOR:
        return "has a very different length"
    names = words(chunk.code) - _COMMON_WORDS
    shared = len(names & words(code)) / max(1, len(names))
    return "" if shared >= _SHARED_NAMES else "is not about this code: it has few of its names"


def parses(language: str, code: str, owner: str = "") -> bool:
    """Return whether a text is code of that language. A method without its class is."""
    if language != "python":
        return tree_sitter_chunks.parses(language, code, owner)
    try:
        parse_python(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def is_about(text: str, chunk: CodeChunk) -> bool:
    """Return whether a text contains the chunk's name, or two words of the names in it.

    A name of one word, such as `read`, may be a word of any sentence. It counts only in backticks or before `(`.
    """
    name = rf"(?<!\w){re.escape(chunk.own_name)}(?!\w)"
    if re.search(name if len(_NAME_PARTS.findall(chunk.own_name)) > 1 else rf"{name}\(|`[^`]*{name}[^`]*`", text):
        return True
    return len(words(text) & (words(chunk.code) - _COMMON_WORDS)) >= 2


def copied_fraction(text: str, other: str) -> float:
    """Return the fraction of a text's 6-grams of words that are in another text; 0 for a shorter text."""
    shingles = _shingles(text)
    return len(shingles & _shingles(other)) / len(shingles) if shingles else 0.0


def is_storable(text: str) -> bool:
    """Return whether a database can store a text."""
    return _NOT_STORABLE.search(text) is None


def _shingles(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[n : n + _SHINGLE]) for n in range(len(found) - _SHINGLE + 1)}


def _bare(code: str) -> str:
    """Return code without white space and comment lines."""
    lines = [line for line in code.split("\n") if not line.strip().startswith(("#", "//"))]
    return "".join("".join(lines).split())
