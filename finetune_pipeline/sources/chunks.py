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

_SENTENCE = re.compile(r"(.+?[.!?])(?:\s+(?=[^a-z\s])|$)")
_LONGEST_SENTENCE = 400
_COMMENT = re.compile(r"^\s*(?:#(?!!)|//[/!]?|/\*[*!]?|\*/|\*)?\s?(.*?)\s*(?:\*/)?\s*$")
_COMMENT_LINE = re.compile(r"\s*(?:#(?![!\[])|//)")
_GOES_ON = re.compile(r"\"\"\"|'''|\\$")
_FIELD = re.compile(r"\s*(?:[:@\\]\w|>>>|(?:Args|Arguments|Parameters|Returns|Raises|Example|Examples):?\s*$)")
_RULE = re.compile(r"[\W_]*")
_PART_OF_NAME = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True)
class Chunk:
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
    def lines(self) -> int:
        """Lines of its code."""
        return self.code.count("\n") + 1

    @property
    def owner(self) -> str:
        """What it stands in; empty at a file's top."""
        return self.name.rpartition(".")[0]

    @property
    def own_name(self) -> str:
        """Its name alone."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Flaw:
    """Something in a file that cannot be used, at this line."""

    line: int
    reason: str


def cut_python(text: str) -> Iterator[Chunk | Flaw]:
    """The classes, methods and functions of a Python file, in its order; those within functions stay with them.

    What has no body of its own (`...`, `pass`, `raise NotImplementedError`) is left out.
    """
    try:
        tree = parse_python(text)
    except SyntaxError as error:
        yield Flaw(error.lineno or 1, f"is not Python that this version reads: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        yield Flaw(1, f"is not Python that can be read: {error}")
    else:
        yield from _definitions(tree.body, "", text.split("\n"))


def parse_python(text: str) -> ast.Module:
    """The syntax tree; what Python warns of in it is nobody's business here.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: it is not Python, or too deep.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def first_sentence(doc: str) -> str:
    """What a docstring says it is about; empty if that is nothing one could ask by."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc))
    about = takewhile(lambda line: not _FIELD.match(line), paragraphs[0].splitlines())
    text = " ".join(" ".join(line for line in about if not _RULE.fullmatch(line)).split())
    if len(re.findall(r"[^\W\d_]{2,}", text)) < 3:
        return ""
    found = _SENTENCE.match(text)
    sentence = found[1] if found else text
    if len(sentence) <= _LONGEST_SENTENCE:
        return sentence
    return sentence[:_LONGEST_SENTENCE].rpartition(" ")[0] + " ..."


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


def _definitions(body: Sequence[ast.stmt], owner: str, lines: list[str]) -> Iterator[Chunk | Flaw]:
    for node in body:
        if isinstance(node, Definition):
            name = f"{owner}.{node.name}" if owner else node.name
            if not _is_empty(node):
                yield _chunk(node, name, bool(owner), lines)
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, name, lines)
        else:  # if TYPE_CHECKING, try ... except ImportError, with
            for part in ("body", "handlers", "orelse", "finalbody", "cases"):
                yield from _definitions(getattr(node, part, ()), owner, lines)


def _chunk(node: Definition, name: str, owned: bool, lines: list[str]) -> Chunk | Flaw:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    own = lines[first - 1 : node.end_lineno]
    indented = own[0][:1].isspace()
    code = moved_left(own, _inside_strings(node, first, own) if indented else set())
    if indented:
        try:
            parse_python(code)
        except SyntaxError:
            return Flaw(first, f"{name} is no Python by itself")
    doc = ast.get_docstring(node, clean=False) or comment_above(lines, first - 1)
    kind = "class" if isinstance(node, ast.ClassDef) else "method" if owned else "function"
    if isinstance(node, ast.AsyncFunctionDef):
        kind = f"async {kind}"
    return Chunk("python", kind, name, first, code, _signature(node), doc)


def _inside_strings(node: Definition, first: int, own: Sequence[str]) -> set[int]:
    """Indexes of the lines of a definition that begin inside a string other than a docstring."""
    docstrings = {
        id(inner.body[0].value)
        for inner in ast.walk(node)
        if isinstance(inner, Definition) and inner.body and isinstance(inner.body[0], ast.Expr)
    }
    inside: set[int] = set()
    for inner in ast.walk(node):
        literal = isinstance(inner, ast.Constant) and isinstance(inner.value, str | bytes)
        if (literal or isinstance(inner, ast.JoinedStr)) and id(inner) not in docstrings:
            assert isinstance(inner, ast.expr)
            start, end = inner.lineno - first, (inner.end_lineno or 0) - first
            # Literals that only stand below each other are one node too.
            if any(_GOES_ON.search(line) for line in own[start : end + 1]):
                inside.update(range(start + 1, end + 1))
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
