"""Cut classes and functions out of Python code by its syntax tree; `tree_sitter_chunks` does it for other languages."""

import ast
import inspect
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

LANGUAGES = {
    "python": "Python", "javascript": "JavaScript", "typescript": "TypeScript", "tsx": "TypeScript", "go": "Go",
    "rust": "Rust", "java": "Java", "c": "C", "cpp": "C++",
}  # fmt: skip
"""Display names of the languages. `tsx` is TypeScript's other grammar, of .tsx files."""

_SENTENCE = re.compile(r"(.+?(?:[.!?](?=\s+[^a-z\s]|$)|[。！？]))")
_WORD = re.compile(r"[^\W\d_]{2,}")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")  # written without spaces between words
_LONGEST_SENTENCE = 400
_COMMENT = re.compile(r"^\s*(?:#(?!!)|//[/!]?|/\*[*!]?|\*/|\*)?\s?(.*?)\s*(?:\*/)?\s*$")
_COMMENT_LINE = re.compile(r"\s*(?:#(?![!\[])|//)")
_CONTINUES = re.compile(r"\"\"\"|'''|\\$")
_FIELD = re.compile(r"\s*(?:[:@\\]\w|>>>|(?:Args|Arguments|Parameters|Returns|Raises|Example|Examples):?\s*$)")
_UNDERLINE = re.compile(r"[\W_]*")
_NAME_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

ANY_LENGTH = range(1, 1 << 31)

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class CodeChunk:
    """A class or function."""

    language: str
    kind: str  # its language's name for it, such as function, method, class, struct
    name: str  # qualified, such as Class.method
    line: int  # its first line in the file, from 1
    code: str  # its source, without the indentation of the first line
    signature: str  # its head on one line, without keyword and body
    doc: str  # docstring, or the comment above it; empty if there is none

    @property
    def owner(self) -> str:
        """The enclosing class or namespace; empty at the top level."""
        return self.name.rpartition(".")[0]

    @property
    def own_name(self) -> str:
        """The unqualified name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class ChunkError:
    """A place in a file that cannot be read."""

    line: int
    reason: str


def cut_python(text: str, lengths: range = ANY_LENGTH) -> Iterator[CodeChunk | ChunkError]:
    """Yield the classes, methods and functions of a Python file in order. Those inside a function are part of it.

    Definitions with an empty body (`...`, `pass`, `raise NotImplementedError`) are left out.

    Args:
        lengths: allowed numbers of lines.
    """
    try:
        tree = parse_python(text)
    except SyntaxError as error:
        yield ChunkError(error.lineno or 1, f"is not Python that this version can parse: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        yield ChunkError(1, f"is not Python that can be parsed: {error}")
    else:
        lines = text.split("\n")
        yield from _definitions(tree.body, "", lines, lengths, _rows_inside_strings(tree, lines))


def parse_python(text: str) -> ast.Module:
    """Return the syntax tree, without Python's warnings about the code.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: it is not Python, or nested too deep.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def first_sentence(doc: str) -> str:
    """Return the first sentence of a docstring; empty if it is too short to describe anything.

    It needs two words, or four characters of Chinese or Japanese.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc))
    about = takewhile(lambda line: not _FIELD.match(line), paragraphs[0].split("\n"))
    text = " ".join(" ".join(line for line in about if not _UNDERLINE.fullmatch(line)).split())
    if len(_WORD.findall(text)) < 2 and len(_CJK.findall(text)) < 4:
        return ""
    found = _SENTENCE.match(text)
    sentence = found[1] if found else text
    if len(sentence) <= _LONGEST_SENTENCE:
        return sentence
    cut = sentence[:_LONGEST_SENTENCE]
    return (cut.rpartition(" ")[0] or cut) + " ..."


def comment_above(lines: Sequence[str], row: int) -> str:
    """Return the comment that ends on the line directly above `row` (from 0), without comment markers."""
    first = row
    if row > 0 and lines[row - 1].rstrip().endswith("*/"):
        first -= 1
        while first > 0 and "/*" not in lines[first]:
            first -= 1
    else:
        while first > 0 and _COMMENT_LINE.match(lines[first - 1]):
            first -= 1
    return "\n".join(match[1] for line in lines[first:row] if (match := _COMMENT.match(line)))


def indentation(line: str) -> str:
    """Return the white space at the start of a line."""
    return line[: len(line) - len(line.lstrip())]


def dedent(lines: Sequence[str], kept: Collection[int] = ()) -> str:
    """Return lines without the indentation of the first. Lines at the indices `kept` are inside a string and stay."""
    indent = indentation(lines[0])
    return "\n".join(line if n in kept else line.removeprefix(indent) for n, line in enumerate(lines)).rstrip()


def words(text: str) -> set[str]:
    """Return the words of a text and of its names (`parse_size`, `parseSize`), in lower case, from three letters on."""
    return {part.lower() for part in _NAME_PART.findall(text) if len(part) > 2}


def _definitions(
    body: Sequence[ast.stmt], owner: str, lines: Sequence[str], lengths: range, inside_strings: set[int]
) -> Iterator[CodeChunk | ChunkError]:
    """Yield the definitions in a block of a class or namespace; `inside_strings` as `_rows_inside_strings` returns."""
    for node in body:
        if not isinstance(node, _Definition):  # if TYPE_CHECKING, try ... except ImportError, with
            for part in ("body", "handlers", "orelse", "finalbody", "cases"):
                yield from _definitions(getattr(node, part, ()), owner, lines, lengths, inside_strings)
            continue
        name = f"{owner}.{node.name}" if owner else node.name
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        is_empty = all(
            isinstance(statement, ast.Pass)
            or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
            or (isinstance(statement, ast.Raise) and "NotImplementedError" in ast.dump(statement))
            for statement in node.body
        )
        if (node.end_lineno or 0) - first in lengths and not is_empty:
            own = lines[first : node.end_lineno]
            code = dedent(own, {row - first for row in inside_strings.intersection(range(first, first + len(own)))})
            doc = ast.get_docstring(node, clean=False) or comment_above(lines, first)
            if isinstance(node, ast.ClassDef):
                kind = "class"
                bases = [ast.unparse(base) for base in [*node.bases, *node.keywords]]
                signature = f"{node.name}({', '.join(bases)})" if bases else node.name
            else:
                kind = "method" if owner else "function"
                kind = f"async {kind}" if isinstance(node, ast.AsyncFunctionDef) else kind
                returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                signature = f"{node.name}({ast.unparse(node.args)}){returns}"
            if _is_valid_alone(own, code):
                yield CodeChunk("python", kind, name, first + 1, code, signature, doc)
            else:
                yield ChunkError(first + 1, f"{name} is not valid Python on its own")
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, name, lines, lengths, inside_strings)


def _is_valid_alone(lines: Sequence[str], code: str) -> bool:
    """Return whether the lines of a definition are valid Python without their indentation."""
    indent = indentation(lines[0])
    if "\t" not in indent and all(line.startswith(indent) or not line.strip() for line in lines):
        return True
    try:
        parse_python(code)
    except SyntaxError:
        return False
    return True


def _rows_inside_strings(tree: ast.AST, lines: Sequence[str]) -> set[int]:
    """Return the rows (from 0) that begin inside a string other than a docstring."""
    inside: set[int] = set()
    docstrings: set[ast.expr] = set()
    for node in ast.walk(tree):  # a node comes before its children
        if isinstance(node, _Definition) and isinstance(node.body[0], ast.Expr):
            docstrings.add(node.body[0].value)
        literal = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
        if (literal or isinstance(node, ast.JoinedStr)) and node not in docstrings:
            assert isinstance(node, ast.expr)
            start, end = node.lineno - 1, node.end_lineno or node.lineno
            # Adjacent literals on separate lines are one node too, but no line begins inside one of them.
            if end > start + 1 and any(_CONTINUES.search(line) for line in lines[start:end]):
                inside.update(range(start + 1, end))
    return inside
