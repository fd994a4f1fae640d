"""Write the folder of a new loop: settings, README, data, benchmark and JSON Schema, from a file of rows or empty."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import compress
from pathlib import Path
from typing import Any
from uuid import UUID

from finetune_pipeline.curation.acceptance import Policy, accept, benchmark_overlap
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.curation.redaction import redact_example
from finetune_pipeline.export.gguf_base import is_gguf
from finetune_pipeline.pipeline.benchmark_split import ADVISABLE, choose_questions, count_distinct
from finetune_pipeline.pipeline.loop_files import question_index
from finetune_pipeline.pipeline.loop_template import (
    BENCHMARK,
    DEFAULT_BASE,
    DEFS,
    ROWS,
    SCHEMA,
    NewLoop,
    check_name,
    files_of,
)
from finetune_pipeline.pipeline.row_settings import (
    Answers,
    TokenLengths,
    answers_of,
    evaluation_of,
    slices_of,
    training_of,
)
from finetune_pipeline.records import (
    Example,
    canonical_answer,
    conversation_text,
    normalize,
    without_system_prompt,
)
from finetune_pipeline.schemas import Schema, answer_validator
from finetune_pipeline.settings import (
    DEFS_FOLDER,
    CurationSettings,
    FilesSource,
    SettingsError,
    load_loops,
)
from finetune_pipeline.sources.files import read_file
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.sources.text_files import printable
from finetune_pipeline.wording import counted

_FEWEST = 8
_LISTED = 8
_LONGEST_ROW = FilesSource.model_fields["max_line_bytes"].default
_EARLIER_TURNS = "has earlier turns or its own system message, which a question cannot have"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class WrittenLoop:
    """A loop's new folder.

    Attributes:
        folder: of the loop.
        lines: what was written and decided, for people.
    """

    folder: Path
    lines: tuple[str, ...]


def init_loop(name: str, folder: Path, base: str, data: Path | None = None) -> WrittenLoop:
    """Write the folder of a loop, all of it or nothing.

    Args:
        name: of the loop.
        folder: the folder of loops, which is created; the loop is written to a folder with its name in it.
        base: a Hugging Face id, or a model's folder or GGUF, absolute or relative to the current folder.
        data: a file of rows; None writes a loop without rows and questions.

    Raises:
        SettingsError: the name cannot be a loop's, or exists already; the base model is neither an id nor a folder; or
            the folder cannot be written.
        SourceError: the data cannot be read, or too few of its rows can be used.
    """
    folder = folder.expanduser().resolve()
    check_name(name)
    _check_is_new(name, folder)
    base = _base_model(base)
    loop = NewLoop(name, _base_in_yaml(base, folder))
    lines: list[str] = []
    files: dict[str, str] = {}
    if data is not None:
        rows, skipped = _read_rows(data)
        split = _split(rows, skipped, data, base)
        sizes, said = evaluation_of(split.records, split.lengths)
        training, tiny = training_of(base, split.trained)
        loop = replace(
            loop,
            system_prompt=split.system_prompt,
            has_schema=split.answers.schema is not None,
            metric=split.answers.metric,
            training={**training, "max_length": sizes.pop("max_length")},
            evaluation=sizes,
            row=_shortest(train_rows := [row_of(record) for record in split.rows]),
            question=_shortest(split.questions) if split.questions else loop.question,
        )
        files[BENCHMARK] = _json_lines(split.questions)
        files[ROWS] = _json_lines(train_rows)
        if split.answers.schema is not None:
            files[SCHEMA] = json.dumps(split.answers.schema, ensure_ascii=False, indent=2) + "\n"
        lines = [*_described(split), said, *tiny]
    target = folder / name
    _write(target, {**files_of(loop, target), **files})
    return WrittenLoop(target, tuple(lines))


# --- Name, folder, base model -----------------------------------------------------------------------------------------


def _check_is_new(name: str, folder: Path) -> None:
    target = folder / name
    if folder == DEFS_FOLDER:
        raise SettingsError(
            f"{folder} is the package's own folder, where Dagster's `dg scaffold defs` writes loops; name a folder of "
            "your own"
        )
    if target.exists() or target.is_symlink():
        raise SettingsError(f"{target} exists already; choose another name, or remove it")
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder; name another one")
    if name in load_loops([DEFS_FOLDER, folder] if folder.is_dir() else [DEFS_FOLDER]):
        raise SettingsError(f"a loop named {name!r} is declared already; choose another name")


def _base_model(base: str) -> str:
    """Return the absolute path of a model's folder or GGUF, or a Hugging Face id unchanged."""
    path = Path(base).expanduser()
    if path.is_dir() or is_gguf(path):
        return str(path.resolve())
    if not _HUB_ID.fullmatch(base):
        raise SettingsError(
            f"the base model {base!r} is neither a folder or GGUF ({path.absolute()}) nor a Hugging Face id such as "
            f"{DEFAULT_BASE}; correct it"
        )
    return base


def _base_in_yaml(base: str, folder: Path) -> str:
    """Return a base model for the YAML: a folder near the folder of loops is relative, so that both can be moved."""
    path = Path(base)
    if path.is_absolute() and path.is_relative_to(folder.parent):
        return Path(os.path.relpath(path, folder / "name")).as_posix()
    return base


def _write(target: Path, files: dict[str, str]) -> None:
    """Write files into a new folder, which appears only when it is complete."""
    temporary = target.parent / f".{target.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        for name in sorted(files, key=lambda name: name == DEFS):  # last: it would declare the loop already
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(files[name], encoding="utf-8", newline="\n")
        temporary.rename(target)
    except OSError as error:
        raise SettingsError(f"{target} cannot be written ({error.strerror}); name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _shortest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return min(rows, key=lambda row: len(json.dumps(row)))


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- Rows -------------------------------------------------------------------------------------------------------------


def row_of(record: SourceRecord) -> dict[str, Any]:
    """Return a conversation as a row of the format prompt_completion, from which it is read again unchanged."""
    row: dict[str, Any] = {"prompt": record.prompt, "completion": record.answer}
    if record.model_output is not None:
        row |= {"completion": record.model_output, "correction": record.answer}
    if record.history:
        row["history"] = [turn.model_dump() for turn in record.history]
    if record.created_at is not None:
        row["created_at"] = record.created_at.isoformat()
    optional = {"reward": record.reward, "user": record.user, "domain": record.domain, "kind": record.kind}
    return row | {name: value for name, value in optional.items() if value is not None}


def _read_rows(data: Path) -> tuple[list[SourceRecord], Counter[str]]:
    """Return the conversations of a file, and the reasons of rows that are none -> number of rows."""
    rows: list[SourceRecord] = []
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}
    try:
        for record in read_file(data.expanduser(), printable(data.name), "auto", _LONGEST_ROW):
            if isinstance(record, SkippedRecord):
                skipped[f"{record.reason} (first at {first.setdefault(record.reason, record.provenance)})"] += 1
            else:
                rows.append(record)
    except OSError as error:
        raise SourceError(f"{data} cannot be read ({error.strerror}); name a file of rows with --data") from error
    return rows, skipped


@dataclass(frozen=True)
class _Split:
    """The data of a loop.

    Attributes:
        lengths: counts tokens.
        records: every row that the base can hold, without the system prompt.
        questions: of the benchmark.
        rows: the rows to train on, which no question is a near-duplicate of.
        trained: how many of them train.
        refused: why the others do not -> number.
        left_out: why rows are in neither file -> number.
        redacted: questions of which curation would replace a part, such as an e-mail address, in a training row.
    """

    answers: Answers
    system_prompt: str
    lengths: TokenLengths
    records: list[SourceRecord]
    questions: list[dict[str, Any]]
    rows: list[SourceRecord]
    trained: int
    refused: Counter[str]
    left_out: Counter[str]
    redacted: int


def _split(rows: list[SourceRecord], left_out: Counter[str], data: Path, base: str) -> _Split:
    """Split rows into questions and rows to train on."""
    system_prompt = _shared_system_prompt(rows)
    records = []
    for record in rows:
        prompt, history = without_system_prompt(record.prompt, record.history, system_prompt)
        records.append(replace(record, prompt=prompt or record.prompt, history=history))
    answers = answers_of([record.answer for record in records])
    left_out = Counter(left_out)
    if answers.schema is not None:
        left_out["answer is not a JSON object"] += sum(not answers.is_structured(record.answer) for record in records)
        records = [record for record in records if answers.is_structured(record.answer)]

    policy = _policy(answers.schema, NearIndex({}))
    redaction = policy.settings.redaction
    examples = [redact_example(_example(record), redaction) for record in records]
    reasons = [accept(example, policy).reason for example, _ in examples]
    lengths = TokenLengths(base, system_prompt)
    fits = [lengths.fits(record) for record in records]
    too_long = f"longer than {lengths.limit:,} tokens with its answer"
    reasons = [reason if fit else too_long for reason, fit in zip(reasons, fits, strict=True)]
    prompts, at = _distinct_prompts(records)
    possible = {}  # index of a prompt -> index of the first record with it
    unsuitable: Counter[str] = Counter()
    for index, members in enumerate(at):
        problem = _problem_as_question([records[member] for member in members], reasons[members[0]])
        if problem:
            unsuitable[problem] += len(members)
        else:
            possible[index] = members[0]
    if len(possible) < _FEWEST:
        talks = sum(
            bool(record.history) and reason == "accepted" for record, reason in zip(records, reasons, strict=True)
        )
        if talks < _FEWEST:
            unsuitable["duplicate of another row"] += sum(len(at[index]) - 1 for index in possible)
            raise _too_few(data, len(possible), left_out + unsuitable)
        possible = {}  # the rows can train, and the benchmark has to be written
    slices = slices_of([records[first].answer for first in possible.values()], answers)
    slice_of = dict(zip(possible, slices, strict=True))
    chosen = choose_questions(prompts, slice_of, policy.settings.benchmark_similarity)
    questions = [
        _question(number, len(chosen), records[possible[index]], slice_of[index], answers)
        for number, index in enumerate(chosen, start=1)
    ]
    benchmark = question_index({question["id"]: question["prompt"] for question in questions}, redaction)
    policy = replace(policy, benchmark=benchmark)
    asked = {member for index in chosen for member in at[index]}
    train: list[SourceRecord] = []
    accepted: list[Example] = []
    refused: Counter[str] = Counter()
    for number, record in enumerate(records):
        if number in asked:
            continue
        example = examples[number][0]
        if benchmark_overlap(example.prompt, example.history, policy):
            left_out["near-duplicate of a benchmark question"] += 1
            continue
        train.append(record)
        if reasons[number] == "accepted":
            accepted.append(example)
        else:
            refused[reasons[number]] += 1
    if not train:
        raise SourceError(
            f"{data}: {counted(len(questions), 'question')} could be split off, and no row to train on is left, since "
            "all others are near-duplicates of them; add rows whose prompts differ more, and write text that all of "
            "them share as a system message"
        )
    left_out["same prompt as a benchmark question"] += len(asked) - len(questions)
    trained = count_distinct(
        [normalize(conversation_text(example.prompt, example.history)) for example in accepted],
        [example.target for example in accepted],
        policy.settings.near_similarity or 1.0,
    )
    refused["duplicate or near-duplicate of another row"] += len(accepted) - trained
    redacted = sum(bool(examples[possible[index]][1]) for index in chosen)
    return _Split(
        answers,
        system_prompt,
        lengths,
        list(compress(records, fits)),
        questions,
        train,
        trained,
        +refused,
        +left_out,
        redacted,
    )


def _shared_system_prompt(rows: Sequence[SourceRecord]) -> str:
    """Return the system message of most rows, or the instruction and blank line that every prompt begins with."""
    if not rows:
        return ""
    systems = Counter(row.history[0].content for row in rows if row.history and row.history[0].role == "system")
    if systems:
        text, count = systems.most_common(1)[0]
        return text if text.strip() and count > len(rows) / 2 else ""
    prompts = {row.prompt for row in rows}
    instruction = min(prompts, key=len)
    while instruction := instruction.rpartition("\n\n")[0]:
        start = f"{instruction}\n\n"
        if instruction.strip() and all(prompt.startswith(start) and prompt[len(start) :].strip() for prompt in prompts):
            return instruction if len(prompts) > 1 else ""
    return ""


def _example(record: SourceRecord) -> Example:
    """Return a record as the example that the source `rows` will make of it."""
    corrected = record.model_output is not None
    default = FilesSource.model_fields["reward"].default
    return Example(
        interaction_id=UUID(int=0), ingest_offset=0, created_at=record.created_at or datetime.now(UTC),
        prompt=record.prompt, history=record.history,
        output=record.model_output if record.model_output is not None else record.answer, target=record.answer,
        reward=default if record.reward is None else record.reward, confirmed=False, corrected=corrected,
    )  # fmt: skip


def _policy(schema: Schema | None, index: NearIndex) -> Policy:
    return Policy(CurationSettings(), index, answer_validator(schema))


def _distinct_prompts(records: Sequence[SourceRecord]) -> tuple[list[str], list[list[int]]]:
    """Return every normalized conversation once, and the indices of the records with it."""
    at: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        at.setdefault(normalize(conversation_text(record.prompt, record.history)), []).append(index)
    return list(at), list(at.values())


def _problem_as_question(records: Sequence[SourceRecord], reason: str) -> str:
    """Return why a prompt cannot be a question; empty if it can."""
    if records[0].history:
        return _EARLIER_TURNS
    if len({canonical_answer(record.answer) for record in records}) > 1:
        return "its prompt has different answers"
    return "" if reason == "accepted" else reason


def _question(number: int, count: int, record: SourceRecord, slice: str, answers: Answers) -> dict[str, Any]:
    expected = json.loads(record.answer) if answers.schema is not None else record.answer
    id = f"q{number:0{len(str(count))}}"
    return {"id": id, "slice": slice, "prompt": record.prompt, "expected": expected, "origin": record.provenance}


def _too_few(data: Path, usable: int, reasons: Counter[str]) -> SourceError:
    lines = [f"  {reason}: {counted(number, 'row')}" for reason, number in reasons.most_common(_LISTED)]
    return SourceError(
        "\n".join(
            [
                f"{data}: {counted(usable, 'row')} can be a question of the benchmark or train, at least {_FEWEST} are "
                "needed; add rows, correct them, or leave out --data and write rows and questions yourself",
                *lines,
            ]
        )
    )


def _described(split: _Split) -> list[str]:
    """Return what was written, for people."""
    slices = Counter(question["slice"] for question in split.questions)
    named = ", ".join(f"{name} {number}" for name, number in slices.most_common(6))
    more = f", and {len(slices) - 6} more" if len(slices) > 6 else ""
    lines = [f"{ROWS}: {counted(len(split.rows), 'row')}"]
    if split.questions:
        count = f"{counted(len(split.questions), 'question')} in {counted(len(slices), 'slice')}"
        lines.append(f"{BENCHMARK}: {count} ({named}{more})")
    else:
        lines.append(
            f"{BENCHMARK}: empty, as questions cannot have the earlier turns or system messages that the rows have; "
            f"write at least {ADVISABLE}"
        )
    if split.answers.schema is not None:
        enums = json.dumps(split.answers.schema).count('"enum": [')
        lines.append(f"{SCHEMA}: inferred, {counted(enums, 'enumeration')}; widen it where the task allows more")
        optional = sorted({*split.answers.schema.get("properties", {})} - {*split.answers.schema.get("required", ())})
        if optional:  # perhaps because of one careless row
            lines.append(f"  optional, because answers without them were found: {', '.join(optional)}")
    lines.append(f"metric {split.answers.metric.value}: {split.answers.reason}")
    if split.system_prompt:
        shown = " ".join(split.system_prompt.split())
        lines.append(f"system_prompt: what the rows begin with, {shown[:60] + ' ...' if len(shown) > 60 else shown!r}")
    if split.left_out:
        lines.append(f"left out, {counted(split.left_out.total(), 'row')}:")
        lines += [f"  {reason}: {number:,}" for reason, number in split.left_out.most_common(_LISTED)]
    if split.refused:
        lines.append(f"in {ROWS}, but will not train, {counted(split.refused.total(), 'row')}:")
        lines += [f"  {reason}: {number:,}" for reason, number in split.refused.most_common(_LISTED)]
    needed = CurationSettings().min_examples
    if split.trained < needed:
        lines.append(f"{counted(split.trained, 'row')} to train on, and a run needs {needed}; add rows to data/")
    if 0 < len(split.questions) < ADVISABLE:
        lines.append(
            f"{len(split.questions)} questions decide little: add your own, at least {ADVISABLE} are advisable"
        )
    if split.redacted:
        lines.append(
            f"{counted(split.redacted, 'question')} with an e-mail address, phone number or secret, which curation "
            "replaces by placeholders in what trains: check whether their answers can be learned"
        )
    return lines
