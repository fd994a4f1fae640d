"""The benchmark: a JSONL file of questions with expected answers, identified by its hash.

A line is `{"id", "slice", "prompt", "expected"}`. Optional are `"history"` (the messages before the prompt),
`"context"` (a text before the prompt), `"cluster"` (questions about one thing, which are not independent), `"wording"`,
`"origin"` and `"tests"` (code that checks an answer's code). A question without `"expected"` is answered for people to
compare and never counted.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.records import Message, Turn, chat_messages, normalize
from finetune_pipeline.schemas import InvalidJsonError, Schema, compile_schema, parse_json, unique_members
from finetune_pipeline.validation_messages import error_messages
from finetune_pipeline.wording import counted, kind_of

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

_REQUIRED = ("id", "slice", "prompt")
_OPTIONAL = ("expected", "history", "context", "cluster", "wording", "origin", "tests")
_HISTORY = TypeAdapter(tuple[Turn, ...])
_MAX_PROBLEMS = 20

SAMPLE = 50
"""Questions that are also answered without constrained decoding."""

EXAMPLE_QUESTION = {
    "id": "q1", "slice": "hardware", "prompt": "My screen stays black.", "expected": "hardware",
}  # fmt: skip
"""A line of a benchmark, for messages and documentation."""


class BenchmarkError(ValueError):
    """The benchmark cannot be used; each line of the message names file, line, problem and remedy."""


@dataclass(frozen=True, kw_only=True)
class OpenQuestion:
    """One prompt without an expected answer. Models answer it for people to compare; it is never counted.

    Attributes:
        history: the messages before the prompt.
        context: a text that a model gets before the prompt, such as a document.
        cluster: name of what several questions are about; the paired test treats them as one observation.
        tests: Python code that the metric `tests` runs after the answer's.
    """

    id: str
    slice: str
    prompt: str
    wording: str | None = None
    origin: str | None = None
    history: tuple[Turn, ...] = ()
    context: str | None = None
    cluster: str | None = None
    tests: str | None = None

    def messages(self, system_prompt: str) -> list[Message]:
        """Return the chat messages that a model gets."""
        asked = self.prompt if self.context is None else f"{self.context}\n\n{self.prompt}"
        return chat_messages(system_prompt, asked, self.history)

    @property
    def asked_hash(self) -> str:
        """Hash of what a model is asked: the prompt with its context and history, as prompts are compared."""
        turns = [(turn.role, normalize(turn.content)) for turn in self.history]
        return hash_of([normalize(self.prompt), normalize(self.context or ""), turns])

    def as_json(self) -> dict[str, Any]:
        """Return the question as in its line of the file."""
        fields = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        if self.history:
            fields["history"] = [turn.model_dump() for turn in self.history]
        return fields


@dataclass(frozen=True, kw_only=True)
class BenchmarkQuestion(OpenQuestion):
    """One prompt and its expected answer."""

    expected: dict[str, Any] | str


@dataclass(frozen=True)
class Benchmark:
    """All questions in the file's order, and the SHA-256 of the file.

    Attributes:
        questions: those with an expected answer, which are scored.
        open_questions: those without one.
    """

    questions: tuple[BenchmarkQuestion, ...]
    sha256: str
    open_questions: tuple[OpenQuestion, ...] = ()

    @property
    def all_questions(self) -> tuple[OpenQuestion, ...]:
        """Every question that a model is asked: the scored ones, then the open ones."""
        return self.questions + self.open_questions

    @cached_property
    def sample(self) -> "Benchmark":
        """A fixed sample of `SAMPLE` questions, or all of them if there are fewer.

        It is chosen by a hash of each id, because positions often follow slices or wordings.
        """
        return self.sample_of(SAMPLE)

    def sample_of(self, count: int) -> "Benchmark":
        """Return a fixed sample of so many questions, chosen as `sample` is; all questions if there are no more."""
        if len(self.questions) <= count:
            return self
        by_hash = sorted(self.questions, key=lambda question: hashlib.sha256(question.id.encode()).digest())
        chosen = {question.id for question in by_hash[:count]}
        sha256 = hashlib.sha256(f"{count} questions of {self.sha256}".encode()).hexdigest()
        return Benchmark(tuple(question for question in self.questions if question.id in chosen), sha256)


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
        text = content.decode()
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
    # Joined files have a byte order mark in the middle too.
    lines = [line.removeprefix("\ufeff").strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    found = (parser.parse(number, line) for number, line in enumerate(lines, start=1) if line)
    questions = tuple(question for question in found if question)
    if parser.problems:
        more = len(parser.problems) - _MAX_PROBLEMS
        rest = [f"and {more} more"] if more > 0 else []
        raise BenchmarkError("\n".join([*parser.problems[:_MAX_PROBLEMS], *rest]))
    if not questions:
        example = json.dumps(EXAMPLE_QUESTION | ({"expected": {"...": "..."}} if schema is not None else {}))
        raise BenchmarkError(f"{path} has no questions; write one on each line, such as {example}")
    scored = tuple(question for question in questions if isinstance(question, BenchmarkQuestion))
    if not scored:
        raise BenchmarkError(
            f'{path}: none of {counted(len(questions), "question")} has an "expected" answer, so nothing can be '
            "scored; add the expected answers that you know"
        )
    open_questions = tuple(question for question in questions if not isinstance(question, BenchmarkQuestion))
    return Benchmark(scored, hashlib.sha256(content).hexdigest(), open_questions)


@dataclass
class _BenchmarkParser:
    """Parses line by line and collects all problems, so that one error reports them together."""

    path: Path
    validator: "Draft202012Validator | None"
    problems: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # id -> first line with it
    prompts: dict[tuple[str, ...], tuple[int, Any]] = field(default_factory=dict)  # -> first line with it, its answer

    def parse(self, number: int, line: str) -> OpenQuestion | None:
        try:
            item = parse_json(line, members=unique_members)
        except InvalidJsonError as error:
            problems = [f"{error}; write one JSON object on each line"]
        else:
            problems = [*_shape_problems(item)] or [*self._content_problems(number, item)]
        self.problems += [f"{self.path}, line {number}: {problem}" for problem in problems]
        if problems:
            return None
        item["history"] = _HISTORY.validate_python(item.get("history", ()))
        if item.get("expected") is None:
            item.pop("expected", None)
            return OpenQuestion(**item)
        return BenchmarkQuestion(**item)

    def _content_problems(self, number: int, item: dict[str, Any]) -> Iterator[str]:
        first = self.ids.setdefault(item["id"], number)
        if first != number:
            yield f"the id {item['id']!r} is already on line {first}; give each question its own id"
        expected = item.get("expected")
        asked = (json.dumps(item.get("history", [])), normalize(item.get("context", "")), normalize(item["prompt"]))
        first, answer = self.prompts.setdefault(asked, (number, expected))
        if first != number:
            yield (
                f"the same prompt is already on line {first}; remove one of them"
                if answer == expected
                else f"the same prompt is already on line {first} with another expected answer, and no model can give "
                "both; correct one of the prompts, or remove the line with the wrong answer"
            )
        if self.validator is not None and expected is not None:
            for error in self.validator.iter_errors(expected):
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
        elif name == "history":
            yield from _history_problems(item[name])
        elif name == "expected" and (item[name] is None or isinstance(item[name], dict)):
            continue
        elif not isinstance(item[name], str) or not item[name].strip():
            wanted = "a non-empty object or text" if name == "expected" else "a non-empty text"
            yield f'"{name}" is {_kind(item[name])}; expected {wanted}'
    for name in sorted(set(item) - {*_REQUIRED, *_OPTIONAL}):
        yield f'"{name}" is not a field of a question; remove it (known: {", ".join((*_REQUIRED, *_OPTIONAL))})'


def _history_problems(value: Any) -> Iterator[str]:
    try:
        turns = _HISTORY.validate_python(value)
    except ValidationError as error:
        yield from (f"history: {message}" for message in error_messages(error))
        return
    if turns and turns[-1].role == "user":
        yield '"history" ends with a message of the user, as the prompt is; expected an answer of the assistant last'


def _kind(value: Any) -> str:
    return "an empty text" if isinstance(value, str) and not value.strip() else kind_of(value)
