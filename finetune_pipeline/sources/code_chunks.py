"""Classes and functions cut out of source code: Python by its own syntax tree, other languages by `grammars`."""

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
"""Their names as people write them. `tsx` is TypeScript's other grammar, of .tsx files."""

_SENTENCE = re.compile(r"(.+?(?:[.!?](?=\s+[^a-z\s]|$)|[。！？]))")
_WORD = re.compile(r"[^\W\d_]{2,}")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")  # no spaces tell their words apart
_LONGEST_SENTENCE = 400
_COMMENT = re.compile(r"^\s*(?:#(?!!)|//[/!]?|/\*[*!]?|\*/|\*)?\s?(.*?)\s*(?:\*/)?\s*$")
_COMMENT_LINE = re.compile(r"\s*(?:#(?![!\[])|//)")
_GOES_ON = re.compile(r"\"\"\"|'''|\\$")
_FIELD = re.compile(r"\s*(?:[:@\\]\w|>>>|(?:Args|Arguments|Parameters|Returns|Raises|Example|Examples):?\s*$)")
_RULE = re.compile(r"[\W_]*")
_PART_OF_NAME = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

ANY_LENGTH = range(1, 1 << 31)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True)
class CodeChunk:
    """A class or function.

    Attributes:
        kind: what its language calls it, such as function, method, class, struct.
        name: with what it stands in, such as Class.method.
        line: where it begins in its file, from 1.
        code: as it stands there, moved to the left margin.
        signature: its head on one line, without keyword and body.
        doc: docstring, or the comment above it; empty where there is none.
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
        """What it stands in; empty at a file's top."""
        return self.name.rpartition(".")[0]

    @property
    def own_name(self) -> str:
        """Its name alone."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class ChunkError:
    """Something in a file that cannot be used, at this line."""

    line: int
    reason: str


def cut_python(text: str, lengths: range = ANY_LENGTH) -> Iterator[CodeChunk | ChunkError]:
    """The classes, methods and functions of a Python file, in its order; those within functions stay with them.

    What has no body of its own (`...`, `pass`, `raise NotImplementedError`) is left out.

    Args:
        lengths: numbers of lines that are taken.
    """
    try:
        tree = parse_python(text)
    except SyntaxError as error:
        yield ChunkError(error.lineno or 1, f"is not Python that this version reads: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        yield ChunkError(1, f"is not Python that can be read: {error}")
    else:
        lines = text.split("\n")
        yield from _PythonCutter(lines, lengths, _rows_inside_strings(tree, lines)).definitions(tree.body, "")


def parse_python(text: str) -> ast.Module:
    """The syntax tree; what Python warns of in it is nobody's business here.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: it is not Python, or too deep.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def first_sentence(doc: str) -> str:
    """What a docstring says it is about; empty if that is nothing one could ask by.

    That takes two words, or four characters of Chinese or Japanese.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc))
    about = takewhile(lambda line: not _FIELD.match(line), paragraphs[0].splitlines())
    text = " ".join(" ".join(line for line in about if not _RULE.fullmatch(line)).split())
    if len(_WORD.findall(text)) < 2 and len(_CJK.findall(text)) < 4:
        return ""
    found = _SENTENCE.match(text)
    sentence = found[1] if found else text
    if len(sentence) <= _LONGEST_SENTENCE:
        return sentence
    cut = sentence[:_LONGEST_SENTENCE]
    return (cut.rpartition(" ")[0] or cut) + " ..."


def comment_above(lines: Sequence[str], row: int) -> str:
    """The comment that ends on the line directly above `row` (from 0), without its marks."""
    first = row
    if row > 0 and lines[row - 1].rstrip().endswith("*/"):
        first -= 1
        while first > 0 and "/*" not in lines[first]:
            first -= 1
    else:
        while first > 0 and _COMMENT_LINE.match(lines[first - 1]):
            first -= 1
    return "\n".join(match[1] for line in lines[first:row] if (match := _COMMENT.match(line)))


def moved_left(lines: Sequence[str], kept: Collection[int] = ()) -> str:
    """Lines without the indentation of the first; those at the indexes `kept` stay, as they are inside a string."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\n".join(line if n in kept else line.removeprefix(indent) for n, line in enumerate(lines)).rstrip()


def words(text: str) -> set[str]:
    """The words of a text and of the names in it (`parse_size`, `parseSize`), in lower case, from three letters on."""
    return {part.lower() for part in _PART_OF_NAME.findall(text) if len(part) > 2}


@dataclass(frozen=True)
class _PythonCutter:
    lines: list[str]
    lengths: range
    inside: set[int]
    """Rows (from 0) that begin inside a string."""

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
        code = moved_left(own, {row - first for row in self.inside.intersection(range(first, first + len(own)))})
        if own[0][:1].isspace() and not _moves_as_a_whole(own):
            try:
                parse_python(code)
            except SyntaxError:
                return ChunkError(first + 1, f"{name} is no Python by itself")
        doc = ast.get_docstring(node, clean=False) or comment_above(self.lines, first)
        kind = "class" if isinstance(node, ast.ClassDef) else "method" if owned else "function"
        if isinstance(node, ast.AsyncFunctionDef):
            kind = f"async {kind}"
        return CodeChunk("python", kind, name, first + 1, code, _signature(node), doc)


def _moves_as_a_whole(lines: Sequence[str]) -> bool:
    """Whether every line has the first one's indentation, in spaces: without it they are Python still."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\t" not in indent and all(line.startswith(indent) or not line.strip() for line in lines)


def _rows_inside_strings(tree: ast.AST, lines: Sequence[str]) -> set[int]:
    """Rows (from 0) that begin inside a string other than a docstring."""
    inside: set[int] = set()
    docstrings: set[ast.expr] = set()
    for node in ast.walk(tree):  # what stands in a node comes after it
        if isinstance(node, Definition) and isinstance(node.body[0], ast.Expr):
            docstrings.add(node.body[0].value)
        literal = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
        if (literal or isinstance(node, ast.JoinedStr)) and node not in docstrings:
            assert isinstance(node, ast.expr)
            start, end = node.lineno - 1, node.end_lineno or node.lineno
            # Literals that only stand below each other are one node too.
            if end > start + 1 and any(_GOES_ON.search(line) for line in lines[start:end]):
                inside.update(range(start + 1, end))
    return inside


def _signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = [ast.unparse(base) for base in [*node.bases, *node.keywords]]
        return f"{node.name}({', '.join(bases)})" if bases else node.name
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def _is_empty(node: Definition) -> bool:
    return all(_says_nothing(statement) for statement in node.body)


def _says_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise):
        return "NotImplementedError" in ast.dump(statement)
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
