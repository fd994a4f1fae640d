"""Choose a new loop's settings from its rows and base model: metric, schema, slices, learning rate, lengths."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_pipeline.curation.acceptance import TokenCounter
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.export.base import dequantized_base
from finetune_pipeline.pipeline.benchmark_split import FRACTION
from finetune_pipeline.pipeline.loop_template import Setting
from finetune_pipeline.pipeline.schema_inference import infer_schema, repeats
from finetune_pipeline.records import conversation_text, normalize
from finetune_pipeline.schemas import InvalidJsonError, Schema, parse_json
from finetune_pipeline.sources.source_record import SourceRecord
from finetune_pipeline.training.architecture import architecture_of
from finetune_pipeline.training.job import TrainingError
from finetune_pipeline.wording import counted

# --- Answers ----------------------------------------------------------------------------------------------------------

_STRUCTURED = 0.9  # fraction of the answers that are JSON objects, from which the others are left out
_MAX_LABEL_CHARS = 60


@dataclass(frozen=True)
class Answers:
    """What the answers of a loop are.

    Attributes:
        metric: `evaluation.metric`.
        reason: why, for people.
        schema: of JSON answers; None for texts.
        labels: the texts are of a few values.
    """

    metric: Setting
    reason: str
    schema: Schema | None = None
    labels: bool = False

    def is_structured(self, answer: str) -> bool:
        """Return whether an answer is a JSON object."""
        return _object(answer) is not None


def answers_of(answers: Sequence[str]) -> Answers:
    """Return what these answers are: JSON objects, labels, or free text."""
    objects = [value for answer in answers if (value := _object(answer)) is not None]
    if objects and len(objects) >= _STRUCTURED * len(answers):
        metric = Setting("parameters", "correct values of the JSON, each at its path")
        return Answers(metric, "the answers are JSON objects", infer_schema(objects))
    also = f"; {counted(len(objects), 'answer')} of {len(answers):,} are JSON, too few for a schema" if objects else ""
    texts = [normalize(answer) for answer in answers]
    if repeats(texts) and all(len(text) <= _MAX_LABEL_CHARS for text in texts):
        metric = Setting("exact", "answers that are equal but for case and white space")
        return Answers(metric, f"the answers are {len({*texts})} labels{also}", labels=True)
    return Answers(Setting("rouge1", "words of the expected answer (ROUGE-1 recall)"), f"the answers are texts{also}")


def slices_of(answers: Sequence[str], kind: Answers) -> list[str]:
    """Return the slice of each answer: its label, the most telling enumeration or boolean in it, or its length."""
    if kind.labels:
        return [" ".join(answer.split()) for answer in _first_spelling(answers)]
    if kind.schema is not None:
        objects = [_object(answer) or {} for answer in answers]
        path = _most_telling(kind.schema, objects)
        if path:
            return [_slice_name(value, path) for value in objects]
    lengths = sorted(map(len, answers)) or [0]
    low, high = lengths[len(lengths) // 3], lengths[2 * len(lengths) // 3]
    if low == high:
        return ["all"] * len(answers)
    return [
        "short answer" if len(answer) < low else "medium answer" if len(answer) < high else "long answer"
        for answer in answers
    ]


def _object(answer: str) -> dict[str, Any] | None:
    try:
        value = parse_json(answer)
    except InvalidJsonError:
        return None
    return value if isinstance(value, dict) else None


def _first_spelling(answers: Sequence[str]) -> list[str]:
    """Return each answer as its label is first written, so that "Yes" and "yes" are one slice."""
    spellings: dict[str, str] = {}
    return [spellings.setdefault(normalize(answer), answer) for answer in answers]


def _most_telling(schema: Schema, objects: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the path of the enumeration or boolean with the highest entropy; empty if there is none.

    One with so many values that a slice of the benchmark would have fewer than four questions is left out.
    """
    most = max(2, round(FRACTION * len(objects)) // 4)
    best: tuple[str, ...] = ()
    highest = 0.0
    for path in _closed_paths(schema):
        counts = Counter(_slice_name(value, path) for value in objects)
        if len(counts) > most:
            continue
        entropy = -sum(count / len(objects) * math.log2(count / len(objects)) for count in counts.values())
        if entropy > highest:
            best, highest = path, entropy
    return best


def _closed_paths(schema: Schema, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of enumerations and booleans, not those within arrays."""
    found = []
    for name, child in schema.get("properties", {}).items():
        if "enum" in child or child.get("type") == "boolean":
            found.append((*path, name))
        found += _closed_paths(child, (*path, name))
    return found


def _at(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _slice_name(answer: dict[str, Any], path: Sequence[str]) -> str:
    """Return the value at a path; one that does not say alone what it is about follows the name: `urgent true`."""
    value = _at(answer, path)
    if isinstance(value, str):
        return value if value.strip() else f"{path[-1]} empty"
    return f"{path[-1]} {'none' if value is None else json.dumps(value)}"


# --- Training ---------------------------------------------------------------------------------------------------------

_TINY = 50_000_000
_TINY_RATE = 3e-3
_TINY_PASSES = 1_600  # examples seen by a tiny model: 200 updates of 8


def training_of(base: str, rows: int) -> tuple[dict[str, Setting], list[str]]:
    """Return the training settings that a base model needs, and what to say about them.

    A normal model needs none: the defaults suit it. A model below 50 million parameters learns a task only with a
    higher learning rate and more passes over few rows.

    Args:
        base: a folder, or a Hugging Face id, whose size may be unknown.
        rows: rows to train on.
    """
    try:
        parameters = architecture_of(dequantized_base(base)).parameters
    except TrainingError:
        return {}, []
    if parameters >= _TINY:
        return {}, []
    epochs = min(20, max(3, math.ceil(_TINY_PASSES / max(1, rows))))
    settings = {
        "learning_rate": Setting(_TINY_RATE, "high, because the base model is tiny; remove it for a larger one"),
        "num_train_epochs": Setting(epochs, "passes over the rows; the same holds"),
    }
    size = f"the base has {parameters / 1e6:.1f} million parameters"
    return settings, [f"learning rate {_TINY_RATE:g} and {epochs} epochs, since {size}"]


# --- Lengths ----------------------------------------------------------------------------------------------------------

_TEMPLATE = 48  # tokens of a chat template and its default system message
_TURN = 8  # of a template for each further turn
_LONGEST = 4_096  # no length is set above it
_COUNTED = 500  # rows with the longest texts, of which tokens are counted


class TokenLengths:
    """Lengths of rows in tokens of a base model, with its chat template.

    Attributes:
        limit: tokens of prompt and answer together that the base can hold, at most 4,096.
        is_estimated: the tokenizer of the base is not on this machine, so tokens are estimated from bytes.
    """

    def __init__(self, base: str, system_prompt: str) -> None:
        """Read the tokenizer of a base model, a folder or a Hugging Face id, if it is on this machine."""
        self._count, self.is_estimated = _token_count(base)
        self.limit = min(_LONGEST, _positions(base) or _LONGEST)
        self._overhead = _TEMPLATE + self._count(system_prompt)

    def prompt(self, record: SourceRecord) -> int:
        """Return the tokens of a row's prompt with the system prompt and earlier turns."""
        text = conversation_text(record.prompt, record.history)
        return self._overhead + _TURN * len(record.history) + self._count(text)

    def answer(self, record: SourceRecord) -> int:
        """Return the tokens of a row's answer."""
        return self._count(record.answer)

    def fits(self, record: SourceRecord) -> bool:
        """Return whether the base can hold a row."""
        if self._overhead + _TURN * len(record.history) + _bytes_of(record) <= self.limit:
            return True  # no token is shorter than a byte
        return self.prompt(record) + self.answer(record) <= self.limit


def evaluation_of(records: Sequence[SourceRecord], lengths: TokenLengths) -> tuple[dict[str, Setting], str]:
    """Return max_tokens, context and training's max_length for these rows, and what to say about them.

    Lengths are powers of two with room for half more than the longest row has, in serving for prompts twice as long.
    """
    limit = lengths.limit
    answer = max(map(lengths.answer, _longest(records, lambda record: len(record.answer.encode()))))
    prompt = max(map(lengths.prompt, _longest(records, lambda record: _bytes_of(record) - len(record.answer.encode()))))
    whole = max(lengths.prompt(record) + lengths.answer(record) for record in _longest(records, _bytes_of))
    max_tokens = min(limit // 2, _power_of_two(1.5 * answer, 16))
    length = min(limit, _power_of_two(1.5 * whole, 128))
    context = min(limit, _power_of_two(2 * prompt + max_tokens, 512))
    about = "about " if lengths.is_estimated else ""
    settings = {
        "max_length": Setting(length, f"tokens; the longest row has {about}{whole:,}, longer ones are left out"),
        "max_tokens": Setting(max_tokens, f"of an answer; the longest has {about}{answer:,}"),
        "context": Setting(context, "of prompt and answer together, in serving too"),
    }
    why = " (estimated, since the tokenizer of the base is not on this machine)" if lengths.is_estimated else ""
    said = f"max_length {length}, max_tokens {max_tokens}, context {context}"
    return settings, f"{said}: the longest row has {about}{whole:,} tokens{why}"


def too_long(records: Sequence[SourceRecord], folder: Path, system_prompt: str, max_length: int) -> str:
    """Return what is wrong if at least half of the examples have more than `max_length` tokens; else an empty text.

    Training leaves out longer ones. The tokens are counted as in training, with the chat template. That takes seconds,
    so it is not done if most examples are short enough with an estimate of the template.

    Args:
        folder: of the base model's tokenizer.

    Raises:
        TrainingError: the chat template writes no end of an answer.
    """
    estimate = TokenLengths(str(folder), system_prompt)
    estimated = sum(estimate.prompt(record) + estimate.answer(record) > max_length for record in records)
    if not estimated or 2 * estimated < len(records):
        return ""
    from finetune_pipeline.inference.tokenizer import load_tokenizer
    from finetune_pipeline.training.conversations import TokenizedRow, tokenize_rows

    rows = [
        {
            "prompt": record.prompt,
            "history": [turn.model_dump() for turn in record.history],
            "completion": record.answer,
        }
        for record in records
    ]
    tokenized = tokenize_rows(rows, ("completion",), system_prompt, load_tokenizer(folder))
    lengths = sorted(row.length for row in tokenized if isinstance(row, TokenizedRow))
    longer = sum(length > max_length for length in lengths)
    if not longer or 2 * longer < len(lengths):
        return ""
    positions = _positions(str(folder))
    needed = _power_of_two(lengths[-1], 1)
    value = min(needed, positions or needed)
    advice = f"set training.max_length to {value:,}"
    if value <= max_length:
        advice = f"the base model's context has {value:,} tokens, so shorten them, or choose another one"
    elif value < lengths[-1]:
        advice += ", which is the base model's context, and shorten what is longer"
    return (
        f"training.max_length: {longer:,} of {len(lengths):,} examples have more than {max_length:,} tokens (median "
        f"{lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}), and training would leave them out; {advice}"
    )


def _longest(records: Sequence[SourceRecord], size: Callable[[SourceRecord], int]) -> list[SourceRecord]:
    """Return the rows with the most bytes, one of which has the most tokens."""
    return sorted(records, key=size)[-_COUNTED:]


def _bytes_of(record: SourceRecord) -> int:
    return len(conversation_text(record.prompt, record.history).encode()) + len(record.answer.encode())


def _token_count(base: str) -> tuple[Callable[[str], int], bool]:
    """Return a function that counts tokens, and whether it only estimates them."""
    folder = _folder_of(base)
    if folder is not None:
        try:
            return TokenCounter(folder).count, False
        except CurationError:  # it has no tokenizer; `finetune check` says so
            pass
    # Byte-level tokenizers need 2.5 to 4 bytes for a token of prose, code and JSON in most languages.
    return lambda text: math.ceil(len(text.encode()) / 2), True


def _folder_of(base: str) -> Path | None:
    """Return the folder of a base model's tokenizer, if it is on this machine."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import try_to_load_from_cache

    for name in ("tokenizer.json", "tokenizer.model"):
        cached = try_to_load_from_cache(base, name)
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _positions(base: str) -> int | None:
    """Return the context length that a base model on this machine was trained with, if its config.json says so."""
    folder = _folder_of(base)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):  # `finetune check` says so
        return None
    positions = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return positions if isinstance(positions, int) and positions > 0 else None


def _power_of_two(tokens: float, least: int) -> int:
    return max(least, 1 << (math.ceil(tokens) - 1).bit_length())
