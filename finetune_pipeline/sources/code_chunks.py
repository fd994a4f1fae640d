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

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True)
class CodeChunk:
    """A class or function.

    Attributes:
        kind: its language's name for it, such as function, method, class, struct.
        name: qualified name, such as Class.method.
        line: its first line in the file, from 1.
        code: its source, without the indentation of the first line.
        signature: its head on one line, without keyword and body.
        doc: docstring, or the comment above it; empty if there is none.
    """

    language: str
    kind: str
    name: str
    line: int
    code: str
    signature: str
    doc: str

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
        yield from _PythonCutter(lines, lengths, _rows_inside_strings(tree, lines)).definitions(tree.body, "")


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
    about = takewhile(lambda line: not _FIELD.match(line), paragraphs[0].splitlines())
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


def dedent(lines: Sequence[str], kept: Collection[int] = ()) -> str:
    """Return lines without the indentation of the first. Lines at the indices `kept` are inside a string and stay."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\n".join(line if n in kept else line.removeprefix(indent) for n, line in enumerate(lines)).rstrip()


def words(text: str) -> set[str]:
    """Return the words of a text and of its names (`parse_size`, `parseSize`), in lower case, from three letters on."""
    return {part.lower() for part in _NAME_PART.findall(text) if len(part) > 2}


@dataclass(frozen=True)
class _PythonCutter:
    """Cuts the definitions of one file; `inside_strings` are the rows (from 0) that begin inside a string."""

    lines: list[str]
    lengths: range
    inside_strings: set[int]

    def definitions(self, body: Sequence[ast.stmt], owner: str) -> Iterator[CodeChunk | ChunkError]:
        for node in body:
            if isinstance(node, Definition):
                name = f"{owner}.{node.name}" if owner else node.name
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
                if (node.end_lineno or 0) - first in self.lengths and not _is_empty(node):
                    yield self._chunk(node, first, name, bool(owner))
                if isinstance(node, ast.ClassDef):
                    yield from self.definitions(node.body, name)
            else:  # if TYPE_CHECKING, try ... except ImportError, with
                for part in ("body", "handlers", "orelse", "finalbody", "cases"):
                    yield from self.definitions(getattr(node, part, ()), owner)

    def _chunk(self, node: Definition, first: int, name: str, owned: bool) -> CodeChunk | ChunkError:
        own = self.lines[first : node.end_lineno]
        code = dedent(own, {row - first for row in self.inside_strings.intersection(range(first, first + len(own)))})
        if own[0][:1].isspace() and not _is_evenly_indented(own):
            try:
                parse_python(code)
            except SyntaxError:
                return ChunkError(first + 1, f"{name} is not valid Python on its own")
        doc = ast.get_docstring(node, clean=False) or comment_above(self.lines, first)
        kind = "class" if isinstance(node, ast.ClassDef) else "method" if owned else "function"
        if isinstance(node, ast.AsyncFunctionDef):
            kind = f"async {kind}"
        return CodeChunk("python", kind, name, first + 1, code, _signature(node), doc)


def _is_evenly_indented(lines: Sequence[str]) -> bool:
    """Return whether every line has the first one's indentation, in spaces. Without it they are still valid Python."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\t" not in indent and all(line.startswith(indent) or not line.strip() for line in lines)


def _rows_inside_strings(tree: ast.AST, lines: Sequence[str]) -> set[int]:
    """Return the rows (from 0) that begin inside a string other than a docstring."""
    inside: set[int] = set()
    docstrings: set[ast.expr] = set()
    for node in ast.walk(tree):  # a node comes before its children
        if isinstance(node, Definition) and isinstance(node.body[0], ast.Expr):
            docstrings.add(node.body[0].value)
        literal = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
        if (literal or isinstance(node, ast.JoinedStr)) and node not in docstrings:
            assert isinstance(node, ast.expr)
            start, end = node.lineno - 1, node.end_lineno or node.lineno
            # Adjacent literals on separate lines are one node too, but no line begins inside one of them.
            if end > start + 1 and any(_CONTINUES.search(line) for line in lines[start:end]):
                inside.update(range(start + 1, end))
    return inside


def _signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = [ast.unparse(base) for base in [*node.bases, *node.keywords]]
        return f"{node.name}({', '.join(bases)})" if bases else node.name
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def _is_empty(node: Definition) -> bool:
    return all(
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        or (isinstance(statement, ast.Raise) and "NotImplementedError" in ast.dump(statement))
        for statement in node.body
    )
