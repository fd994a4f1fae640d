"""The benchmark: a JSONL file of questions with expected answers, identified by its hash.

A line is `{"id", "slice", "prompt", "expected"}`, with optional `"wording"` and `"origin"`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_pipeline.records import normalize
from finetune_pipeline.schemas import Schema, compile_schema
from finetune_pipeline.wording import kind_of

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

_REQUIRED = ("id", "slice", "prompt", "expected")
_OPTIONAL = ("wording", "origin")
_MAX_PROBLEMS = 20


class BenchmarkError(ValueError):
    """The benchmark cannot be used; each line of the message names file, line, problem and remedy."""


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One prompt and its expected answer."""

    id: str
    slice: str
    prompt: str
    expected: dict[str, Any] | str
    wording: str | None = None
    origin: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """All questions in the file's order, and the SHA-256 of the file."""

    questions: tuple[BenchmarkQuestion, ...]
    sha256: str


def load_benchmark(path: Path, schema: Schema | None) -> Benchmark:
    """Load a benchmark and check every line of it.

    Args:
        path: the JSONL file; blank lines are ignored.
        schema: schema of every expected answer; None for loops of free text.

    Raises:
        BenchmarkError: the file cannot be read, is empty or not UTF-8, or has invalid lines; up to 20 are named.
        SchemaError: `schema` is not a JSON Schema.
    """
    try:
        content = path.read_bytes()  # read once, so that the hash is of these very questions
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise BenchmarkError(
            f"{path} does not exist; write the benchmark, or change evaluation.benchmark in the loop's defs.yaml"
        ) from None
    except OSError as error:
        raise BenchmarkError(
            f"{path} cannot be read ({error.strerror}); correct evaluation.benchmark in the loop's defs.yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    parser = _BenchmarkParser(path, compile_schema(schema) if schema is not None else None)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    questions = tuple(question for number, line in lines if (question := parser.parse(number, line)))
    if parser.problems:
        more = len(parser.problems) - _MAX_PROBLEMS
        rest = [f"and {more} more"] if more > 0 else []
        raise BenchmarkError("\n".join([*parser.problems[:_MAX_PROBLEMS], *rest]))
    if not questions:
        raise BenchmarkError(f"{path} has no questions; write at least one line with {', '.join(_REQUIRED)}")
    return Benchmark(questions, hashlib.sha256(content).hexdigest())


@dataclass
class _BenchmarkParser:
    """Parses line by line and collects all problems, so that one error reports them together."""

    path: Path
    validator: "Draft202012Validator | None"
    problems: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # id -> first line with it
    prompts: dict[str, int] = field(default_factory=dict)

    def parse(self, number: int, line: str) -> BenchmarkQuestion | None:
        try:
            item = json.loads(line, parse_constant=_reject_constant)
        except (ValueError, RecursionError) as error:
            problems = [f"not JSON ({error}); write one JSON object on each line"]
        else:
            problems = [*_shape_problems(item)] or [*self._content_problems(number, item)]
        self.problems += [f"{self.path}, line {number}: {problem}" for problem in problems]
        return None if problems else BenchmarkQuestion(**item)

    def _content_problems(self, number: int, item: dict[str, Any]) -> Iterator[str]:
        first = self.ids.setdefault(item["id"], number)
        if first != number:
            yield f"the id {item['id']!r} is already on line {first}; give each question its own id"
        first = self.prompts.setdefault(normalize(item["prompt"]), number)
        if first != number:
            yield f"the same prompt is already on line {first}; remove one of them"
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
            wanted = "a non-empty object or text" if name == "expected" else "a non-empty text"
            yield f'"{name}" is {_kind(item[name])}; expected {wanted}'
    for name in sorted(set(item) - {*_REQUIRED, *_OPTIONAL}):
        yield f'"{name}" is not a field of a question; remove it (known: {", ".join((*_REQUIRED, *_OPTIONAL))})'


def _kind(value: Any) -> str:
    return "an empty text" if isinstance(value, str) and not value.strip() else kind_of(value)


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
