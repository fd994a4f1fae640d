"""The questions on which models are compared: a JSONL file that never changes under a comparison (its hash names it).

A line: `{"id", "slice", "prompt", "expected"}` and, if wanted, `"wording"` and `"origin"`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.records import normalize
from finetune_pipeline.schemas import Schema, compile_schema

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

_REQUIRED = ("id", "slice", "prompt", "expected")
_OPTIONAL = ("wording", "origin")
_SHOWN = 20


class BenchmarkError(ValueError):
    """The benchmark cannot be used; each line of the message names a file, a line, what was found and what to do."""


@dataclass(frozen=True)
class Question:
    """One prompt and the answer that counts as right."""

    id: str
    slice: str
    prompt: str
    expected: dict[str, Any] | str
    wording: str | None = None
    origin: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """All questions in the file's order, and the SHA-256 of the file's bytes."""

    questions: tuple[Question, ...]
    sha256: str


def load_benchmark(path: Path, schema: Schema | None) -> Benchmark:
    """Read a benchmark and check every line of it.

    Args:
        path: the JSONL file; blank lines are passed over.
        schema: what every expected answer has to pass; None for loops of free text.

    Raises:
        BenchmarkError: the file is missing, empty or not UTF-8, or lines are wrong; up to 20 of them are named.
        SchemaError: `schema` is not a JSON Schema.
    """
    text, sha256 = _read(path)
    reader = _Reader(path, compile_schema(schema) if schema is not None else None)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    questions = tuple(question for number, line in lines if (question := reader.question(number, line)))
    if reader.problems:
        more = len(reader.problems) - _SHOWN
        rest = [f"and {more} more"] if more > 0 else []
        raise BenchmarkError("\n".join([*reader.problems[:_SHOWN], *rest]))
    if not questions:
        raise BenchmarkError(f"{path} holds no question; write at least one line with {', '.join(_REQUIRED)}")
    return Benchmark(questions, sha256)


def _read(path: Path) -> tuple[str, str]:
    # One read: what is hashed is what is asked, also while somebody edits the file.
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        raise BenchmarkError(
            f"{path} is not there; write the benchmark, or change evaluation.benchmark in the loop's defs.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


@dataclass
class _Reader:
    """Reads line by line and remembers what it has seen, so that all problems are told at once."""

    path: Path
    validator: "Draft202012Validator | None"
    problems: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    prompts: dict[str, int] = field(default_factory=dict)

    def question(self, number: int, line: str) -> Question | None:
        try:
            item = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            problems = [f"not JSON ({error}); write one JSON object on each line"]
        else:
            problems = [*_shape_problems(item)] or [*self._content_problems(number, item)]
        self.problems += [f"{self.path}, line {number}: {problem}" for problem in problems]
        return None if problems else Question(**item)

    def _content_problems(self, number: int, item: dict[str, Any]) -> Iterator[str]:
        first = self.ids.setdefault(item["id"], number)
        if first != number:
            yield f"the id {item['id']!r} is already on line {first}; give each question its own id"
        first = self.prompts.setdefault(normalize(item["prompt"]), number)
        if first != number:
            yield f"the same prompt is already on line {first}; take one of them out"
        if self.validator is not None:
            for error in self.validator.iter_errors(item["expected"]):
                yield (
                    f"the expected answer of {item['id']!r} does not pass the output schema: at {error.json_path} "
                    f"{error.message}; correct the answer, or the schema"
                )


def _shape_problems(item: Any) -> Iterator[str]:
    if not isinstance(item, dict):
        yield f"expected an object with {', '.join(_REQUIRED)}, found {_kind(item)}"
        return
    for name in (*_REQUIRED, *_OPTIONAL):
        if name not in item:
            if name in _REQUIRED:
                yield f'"{name}" is missing (found: {", ".join(item) or "nothing"}); add it'
        elif name == "expected" and isinstance(item[name], dict):
            continue
        elif not isinstance(item[name], str) or not item[name].strip():
            wanted = "an object or a text" if name == "expected" else "a text"
            yield f'"{name}" is {_kind(item[name])}; expected {wanted} that is not empty'
    for name in sorted(set(item) - {*_REQUIRED, *_OPTIONAL}):
        yield f'"{name}" is not a field of a question; take it out (known: {", ".join((*_REQUIRED, *_OPTIONAL))})'


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "an empty text" if not value.strip() else "a text"
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
