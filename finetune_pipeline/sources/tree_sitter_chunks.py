"""Cut classes and functions out of code in languages other than Python, with tree-sitter (extra `code`).

Each grammar is a package that contains its parser, so nothing is downloaded at run time.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

from finetune_pipeline.sources.code_chunks import (
    ANY_LENGTH,
    LANGUAGES,
    ChunkError,
    CodeChunk,
    comment_above,
    dedent,
    indentation,
)
from finetune_pipeline.sources.source_record import SourceError

if TYPE_CHECKING:
    from tree_sitter import Node, Parser


@dataclass(frozen=True)
class _Grammar:
    """The nodes of a language's syntax tree that are cut."""

    package: str  # the Python package with the parser
    functions: Mapping[str, str]  # node type -> kind of the chunk; a function inside a type is a method
    types: Mapping[str, str]  # node type -> kind of the chunk
    inside: Mapping[str, str] = field(default_factory=dict)  # other searched node types -> the field that names them
    wrapped: str = "class {owner} {{\n{code}\n}}"  # puts a method into a class, so that it parses
    function: str = "language"  # of the package; returns the language


_SCRIPT_FUNCTIONS = {
    "function_declaration": "function", "generator_function_declaration": "generator function",
    "method_definition": "method", "arrow_function": "function", "function_expression": "function",
}  # fmt: skip
_C_INSIDE = {"preproc_if": "", "preproc_ifdef": "", "preproc_else": "", "linkage_specification": ""}
_GRAMMARS = {
    "javascript": _Grammar("tree_sitter_javascript", _SCRIPT_FUNCTIONS, {"class_declaration": "class"}),
    "typescript": _Grammar(
        "tree_sitter_typescript", _SCRIPT_FUNCTIONS,
        {"class_declaration": "class", "abstract_class_declaration": "abstract class",
         "interface_declaration": "interface"},
        {"internal_module": "name", "module": "", "expression_statement": "", "statement_block": ""},
        function="language_typescript",
    ),
    "go": _Grammar(
        "tree_sitter_go", {"function_declaration": "function", "method_declaration": "method"},
        {"struct_type": "struct", "interface_type": "interface"}, wrapped="{code}",
    ),
    "rust": _Grammar(
        "tree_sitter_rust", {"function_item": "function"},
        {"struct_item": "struct", "enum_item": "enum", "trait_item": "trait"},
        {"impl_item": "type", "mod_item": "name", "declaration_list": ""}, "impl {owner} {{\n{code}\n}}",
    ),
    "java": _Grammar(
        "tree_sitter_java", {"method_declaration": "method", "constructor_declaration": "constructor"},
        {"class_declaration": "class", "interface_declaration": "interface", "enum_declaration": "enum",
         "record_declaration": "record"},
        {"enum_body_declarations": ""},
    ),
    "c": _Grammar("tree_sitter_c", {"function_definition": "function"}, {}, _C_INSIDE, "{code}"),
    "cpp": _Grammar(
        "tree_sitter_cpp", {"function_definition": "function"},
        {"class_specifier": "class", "struct_specifier": "struct"},
        {"namespace_definition": "name", "declaration_list": "", "declaration": "", **_C_INSIDE},
        "class {owner} {{\n{code}\n}};",
    ),
}  # fmt: skip
_GRAMMARS["tsx"] = replace(_GRAMMARS["typescript"], function="language_tsx")
_WRAPPERS = {"export_statement", "template_declaration"}  # around a definition, and part of it
_DECLARATIONS = {
    "lexical_declaration": ("value", {"arrow_function", "function_expression"}),
    "type_declaration": ("type", {"struct_type", "interface_type"}),
}


def cut(language: str, text: str, lengths: range = ANY_LENGTH) -> Iterator[CodeChunk | ChunkError]:
    """Yield the classes and functions of a file that have a body, in order. Those inside a function are part of it.

    If the grammar cannot parse the file, the first error is yielded, and the definitions without an error inside.

    Args:
        lengths: allowed numbers of lines.

    Raises:
        SourceError: the language's grammar is not installed.
    """
    source = text.encode()
    root = _parser(language).parse(source).root_node
    if root.has_error:
        reason = f"is not {LANGUAGES[language]} that its grammar can parse; definitions with an error are left out"
        node = root
        below: Node | None = root
        while below is not None and not (below.is_error or below.is_missing):
            node = below
            below = next((child for child in node.children if child.has_error or child.is_missing), None)
        yield ChunkError(int((below or node).start_point.row) + 1, reason)
    yield from _definitions(_File(language, source, text.split("\n"), lengths), root, "")


def parses(language: str, code: str, owner: str) -> bool:
    """Return whether a text is code of that language. A method may be parsed inside a class of its owner's name."""
    sources = with_and_without_type(language, code, owner)
    return any(not _parser(language).parse(source.encode()).root_node.has_error for source in sources)


def with_and_without_type(language: str, code: str, owner: str) -> list[str]:
    """Return code as it is, and if it has an owner, inside a class of that name, as far as the grammar needs one."""
    wrapped = [_GRAMMARS[language].wrapped.format(owner=owner.rpartition(".")[2], code=code)] if owner else []
    return [f"{source}\n" for source in (code, *wrapped)]


@lru_cache
def _parser(language: str) -> "Parser":
    grammar = _GRAMMARS[language]
    try:
        from tree_sitter import Language, Parser

        package = import_module(grammar.package)
    except ImportError as error:
        raise SourceError(
            f"{LANGUAGES[language]} is parsed with {error.name}, which is not installed: "
            ".venv/bin/pip install -c constraints.txt -e '.[code]'"
        ) from error
    return Parser(Language(getattr(package, grammar.function)()))


@dataclass(frozen=True)
class _File:
    language: str
    source: bytes
    lines: list[str]
    lengths: range


def _definitions(file: _File, node: "Node", owner: str) -> Iterator[CodeChunk]:
    """Yield the definitions below a node."""
    grammar = _GRAMMARS[file.language]
    for outer in node.named_children:
        inner = _unwrapped(outer)
        body = inner.child_by_field_name("body")
        if inner.type in grammar.types or (inner.type in grammar.functions and body is not None):
            yield from _chunk(file, outer, inner, owner)
        if inner.type in grammar.types and body is not None:
            yield from _definitions(file, body, _joined(owner, _name(inner)))
        elif inner.type in grammar.inside:
            by = grammar.inside[inner.type]
            name = _normalized(_text(inner.child_by_field_name(by))) if by else ""
            yield from _definitions(file, body or inner, _joined(owner, name))


def _chunk(file: _File, outer: "Node", inner: "Node", owner: str) -> Iterator[CodeChunk]:
    """Yield the chunk of a definition (inner) with its wrappers (outer), unless it has an error."""
    grammar, name, first = _GRAMMARS[file.language], _name(inner), outer
    while (before := first.prev_named_sibling) is not None and before.type in {"attribute_item", "decorator"}:
        first = before
    row = first.start_point.row
    if outer.has_error or not name or outer.end_point.row - row + 1 not in file.lengths:
        return
    # The type that a Go method belongs to.
    receiver = re.search(r"(\w+)\s*(?:\[[^)]*)?\)$", _text(inner.child_by_field_name("receiver")))
    owner = receiver[1] if receiver else owner
    kind = grammar.functions.get(inner.type) or grammar.types[inner.type]
    within = inner.parent.parent if inner.parent is not None else None
    in_type = within is not None and within.type in {"impl_item", "trait_item", *grammar.types}
    body = inner.child_by_field_name("body")
    head = file.source[outer.start_byte : body.start_byte if body is not None else outer.end_byte].decode()
    if body is None:
        head = head.partition("{")[0]
    indent = indentation(file.lines[row])
    end = outer.end_byte + (file.source[outer.end_byte : outer.end_byte + 1] == b";")
    own = (indent + file.source[first.start_byte : end].decode()).split("\n")
    kept = {inside - row for inside in _rows_inside_strings(outer)} if indent else set()
    yield CodeChunk(
        language=file.language,
        kind="method" if kind == "function" and owner and in_type else kind,
        name=_joined(owner, name),
        line=row + 1,
        code=dedent(own, kept),
        signature=" ".join(head.split()).removesuffix("=>").rstrip(" {="),
        doc=comment_above(file.lines, row),
    )


def _unwrapped(node: "Node") -> "Node":
    """Return the definition itself, without `export`, `template <...>`, `const name =` or `type name`."""
    if node.type in _WRAPPERS and node.named_children:
        return _unwrapped(node.child_by_field_name("declaration") or node.named_children[-1])
    if node.type in _DECLARATIONS and len(node.named_children) == 1:
        by, wanted = _DECLARATIONS[node.type]
        value = node.named_children[0].child_by_field_name(by)
        if value is not None and value.type in wanted:
            return value
    return node


def _name(node: "Node") -> str:
    """Return the name of a definition or of the variable it is assigned to; in C, it is inside the declarators."""
    named = node.child_by_field_name("name")
    if named is None and node.parent is not None and node.parent.type in {"variable_declarator", "type_spec"}:
        named = node.parent.child_by_field_name("name")
    while named is None and (inner := node.child_by_field_name("declarator")) is not None:
        node = inner
        if node.child_by_field_name("declarator") is None:
            named = node
    return _normalized(_text(named))


def _rows_inside_strings(node: "Node") -> Iterator[int]:
    nodes = [node]
    while nodes:
        one = nodes.pop()
        if one.start_point.row == one.end_point.row:
            continue
        if "string" in one.type:
            yield from range(one.start_point.row + 1, one.end_point.row + 1)
        else:
            nodes += one.children


def _text(node: "Node | None") -> str:
    return (node.text or b"").decode() if node is not None else ""


def _normalized(name: str) -> str:
    """Return a name without type parameters, and with dots between its parts."""
    return re.sub(r"<.*", "", name, flags=re.DOTALL).replace("::", ".").strip()


def _joined(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner and name else owner or name
