"""A YAML reader for settings that refuses duplicate keys, and aliases that expand without end.

YAML itself lets the last of two equal keys win, and a few lines of aliases stand for billions of values.
"""

import re
from typing import Any

import yaml

MAX_VALUES = 100_000
"""Values of a document with its aliases written out."""


class YamlError(ValueError):
    """A text is not valid YAML; the message says where and what to change."""


def load_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        YamlError: it is not YAML, has a key twice in one mapping, or aliases that contain themselves or too much.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Checker(loader).size(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(f"{where}{problem}; correct it") from error
    except RecursionError:
        raise YamlError("its values are nested too deeply; write them flatter") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise YamlError(f"{' '.join(str(error).split())}; correct it") from error
    except YamlError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # from PyYAML's constructors
        raise YamlError(f"a value cannot be read ({error}); put it in quotes, or correct it") from error


def line_of(text: str, path: str) -> int | None:
    """Return the line of a value in a YAML document, or of the nearest mapping or list around it that exists.

    Args:
        text: a document that `load_yaml` reads.
        path: keys and indexes, such as "attributes.sources[0].path".
    """
    node, line = yaml.compose(text, yaml.SafeLoader), None
    for name in re.findall(r"[^.\[\]]+", path):
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == name), None)
        elif isinstance(node, yaml.SequenceNode) and name.isdigit() and int(name) < len(node.value):
            found = (node.value[int(name)],) * 2
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


class _Checker:
    """Checks the nodes of a document, each of them once, however often an alias names it."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self._sizes: dict[int, int] = {}
        self._open: set[int] = set()

    def size(self, node: yaml.Node) -> int:
        """Return the number of values in a node with aliases written out."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        known = self._sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in self._open:
            raise YamlError(f"{_line(node)}: an alias (*) in this value refers to the value itself; write it out")
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._refuse_duplicates(node)
            children = [child for pair in node.value for child in pair]
        else:
            children = node.value
        total = 1 + sum(map(self.size, children))
        if total > MAX_VALUES:
            raise YamlError(
                f"{_line(node)}: with its aliases (*) written out, this value has more than {MAX_VALUES:,} values; use "
                "fewer aliases"
            )
        self._open.remove(id(node))
        self._sizes[id(node)] = total
        return total

    def _refuse_duplicates(self, node: yaml.MappingNode) -> None:
        lines: dict[Any, str] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # it cannot be a key, and PyYAML says so
            merges = key.tag == "tag:yaml.org,2002:merge"
            value = key.value if merges else self._loader.construct_object(key)
            if value in lines:
                raise YamlError(
                    f"{_line(key)}: the key {key.value} is already on {lines[value]}, and one would replace the other; "
                    "merge them, or remove one"
                )
            lines[value] = _line(key)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
