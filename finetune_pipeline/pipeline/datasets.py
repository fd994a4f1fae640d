"""Make a dataset version of a loop from an uploaded file in OpenAI's fine-tuning format.

    {"messages": [{"role", "content"}, ...]}                                     supervised
    {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}   dpo

A line may also have `user`, `domain`, `kind` and `created_at`, by which an export selects its example like one of logs.
The file goes through the loop's own curation: it is redacted, filtered, deduplicated and compared with the benchmark,
and the dataset has the blocking checks of curated_dataset. One line is in memory at a time.
"""

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from finetune_pipeline.artifacts import Artifact, get_latest, get_or_create, hash_file, set_latest, version_of
from finetune_pipeline.curation.acceptance import Policy, accept
from finetune_pipeline.curation.redaction import redact_example
from finetune_pipeline.database import Database
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.build_dataset import (
    check_and_record,
    curate_into,
    curation_files,
    dataset_settings,
)
from finetune_pipeline.pipeline.source_events import without_own_system_prompt
from finetune_pipeline.records import Example, same_answer
from finetune_pipeline.registry.comparisons import judged_watermark
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.sources.conversations import ExcludedRowError, to_record
from finetune_pipeline.sources.row_readers import read_rows
from finetune_pipeline.wording import count_reason, counted, counted_reasons, kind_of

Method = Literal["supervised", "dpo"]

FORM = 2
"""Part of the version of a dataset from a file. Raise it when the same file may give other examples than before."""

SOURCE = "upload"
"""The source of the examples of a file."""

SHOWN_LINES = 3
"""Unusable lines that an error names; reading ends there."""

_FIELDS = {"supervised": "messages", "dpo": "input"}
_ROWS = 2_000
_NAMESPACE = uuid.UUID("6f0c5d5e-5a63-4c0e-9a0b-6f6a2f0d8a51")
_OF_INTERACTION = ("user", "domain", "kind", "created_at")


class UploadError(ValueError):
    """A file cannot become a dataset of the loop.

    Attributes:
        validation: it is the validation file.
    """

    def __init__(self, message: str, *, validation: bool = False) -> None:
        super().__init__(message)
        self.validation = validation


def dataset_from_file(
    loop: LoopSettings, db: Database, training: Path, method: Method, validation: Path | None = None
) -> Artifact[DatasetManifest]:
    """Return the dataset of a file under the loop's settings, checked; build it if it does not exist yet.

    Args:
        training: JSON Lines.
        validation: JSON Lines of the validation set; None: the hash of a prompt decides its split, as in the loop.

    Raises:
        UploadError: lines are not of the method's format or do not pass the loop's output schema, nothing is left to
            train on, or a check failed. The message names lines and fields.
    """
    files = [(training, False), *([(validation, True)] if validation else [])]
    inputs = {("validation_file" if held_out else "training_file"): hash_file(path) for path, held_out in files}
    inputs |= curation_files(loop)
    settings = {**dataset_settings(loop), "upload": method, "form": FORM}
    version = version_of(inputs, settings)

    def make(folder: Path) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        first_validation_row = 0
        shards = [folder / f"upload-{number}.parquet" for number in range(len(files))]
        for shard, (path, held_out) in zip(shards, files, strict=True):
            rows = _write_shard(shard, loop, path, method, counts, held_out=held_out)
            if not rows:
                reasons = f"; left out: {counted_reasons(counts)}" if counts else ""
                raise UploadError(f"the file has no line to train on{reasons}", validation=held_out)
            first_validation_row = rows if not held_out else first_validation_row
        # Uploaded examples are not of the logs, so the trigger counts on from where it is.
        built = {"inputs": inputs, "settings": settings, "watermark": judged_watermark(db, loop.name)}
        fields = curate_into(
            folder, loop, version, shards, built, validation_from=first_validation_row if validation else None
        )
        for shard in shards:
            shard.unlink()  # it is not redacted
        return {**fields, "left_out": {**fields["left_out"], **counts}}

    dataset = get_or_create(DatasetManifest, loop.name, version, make)
    failed = [check for check in check_and_record(loop, dataset, f"upload {version}") if not check.passed]
    if failed:
        left_out = ", ".join(f"{count} ({reason})" for reason, count in dataset.manifest.left_out.items() if count)
        reasons = "; ".join(f"{check.name}: {check.description or check.metadata}" for check in failed)
        raise UploadError(f"the loop's checks failed: {reasons}. Left out: {left_out or 'nothing'}")
    if get_latest(DatasetManifest, loop.name) is None:
        set_latest(dataset.manifest, f"upload-{version}")  # the asset lora_adapter loads an input in any case
    return dataset


def _write_shard(
    shard: Path, loop: LoopSettings, path: Path, method: Method, left_out: Counter[str], *, held_out: bool
) -> int:
    """Write the examples of a file as Parquet; return their number, and count what is left out by reason."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from finetune_pipeline.curation.snapshot import row_of, schema

    written = 0
    with pq.ParquetWriter(shard, schema(), compression="zstd") as writer:
        found = _examples(loop, path, method, left_out, held_out=held_out)
        while examples := list(islice(found, _ROWS)):
            writer.write_table(pa.Table.from_pylist([row_of(example) for example in examples], schema()))
            written += len(examples)
    return written


def _examples(
    loop: LoopSettings, path: Path, method: Method, left_out: Counter[str], *, held_out: bool
) -> Iterator[Example]:
    """Yield the examples of a file; at its end, or after SHOWN_LINES unusable lines, raise if a line was unusable."""
    unusable: list[str] = []
    for number, found in _read_lines(loop, path, method):
        if isinstance(found, ExcludedRowError):
            count_reason(left_out, str(found))
        elif isinstance(found, ValueError):
            unusable.append(f"line {number}: {found}")
            if len(unusable) == SHOWN_LINES:
                break
        elif not unusable:
            yield found
    if unusable:
        more = " (lines after these were not read)" if len(unusable) == SHOWN_LINES else ""
        raise UploadError(
            f"{counted(len(unusable), 'line')} cannot be used{more}: {'; '.join(unusable)}", validation=held_out
        )


def _read_lines(
    loop: LoopSettings, path: Path, method: Method
) -> Iterator[tuple[int, Example | ExcludedRowError | ValueError]]:
    """Yield the number of each line with its example, or why it is left out or cannot be used."""
    problem, sha256 = loop_files.policy(loop).problem, hash_file(path)
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)  # when it was uploaded
    for number, row, reason, _ in read_rows(path, loop.ingest.max_line_bytes):
        try:
            if reason:
                raise ValueError(reason)
            id = uuid.uuid5(_NAMESPACE, f"{sha256} {number}")
            moment = written + timedelta(microseconds=number)  # a later line is newer
            example = _example(loop, row, method, f"line {number}", id, moment)
            wrong = problem(example.target)
            if wrong is not None:
                name = "messages" if method == "supervised" else "preferred_output"
                raise ValueError(f"{name}: the answer does not pass the output schema of loop {loop.name}: {wrong}")
        except ValueError as error:  # also an ExcludedRowError
            yield number, error
        else:
            yield number, example


@dataclass(frozen=True)
class PreviewedLine:
    """A line of a file as the loop's dataset would have it: redacted, and without the loop's own system prompt.

    Attributes:
        rejected: the answer not to prefer; None unless the method is dpo.
        left_out: why the dataset would not have it; empty if it would, unless it is a duplicate.
    """

    line: int
    prompt: str
    completion: str
    rejected: str | None
    history: tuple[dict[str, str], ...]
    left_out: str


@dataclass(frozen=True)
class FilePreview:
    """What a file would give.

    Attributes:
        examples: lines that can be used.
        left_out: reason -> lines that may not be trained on.
        unusable: lines that cannot be used; the file becomes no dataset while there are any.
        errors: the first ones: line, and what is wrong, beginning with the field.
        rows: the first lines that can be used.
    """

    examples: int
    left_out: dict[str, int]
    unusable: int
    errors: tuple[tuple[int, str], ...]
    rows: tuple[PreviewedLine, ...]


def preview_file(loop: LoopSettings, path: Path, method: Method, rows: int) -> FilePreview:
    """Read a file to its end, and return its first rows with the counts of all lines; nothing is recorded.

    Args:
        rows: number of lines to show, and of errors.
    """
    policy = loop_files.policy(loop)
    left_out, unusable, examples = Counter[str](), 0, 0
    errors: list[tuple[int, str]] = []
    shown: list[PreviewedLine] = []
    for number, found in _read_lines(loop, path, method):
        if isinstance(found, ExcludedRowError):
            count_reason(left_out, str(found))
        elif isinstance(found, ValueError):
            unusable += 1
            if len(errors) < rows:
                errors.append((number, str(found)))
        else:
            examples += 1
            if len(shown) < rows:
                shown.append(_previewed(number, found, policy))
    return FilePreview(examples, dict(left_out), unusable, tuple(errors), tuple(shown))


def _previewed(number: int, example: Example, policy: Policy) -> PreviewedLine:
    example, _ = redact_example(example, policy.settings.redaction)
    decision = accept(example, policy)
    return PreviewedLine(
        number, example.prompt, example.target, example.output if example.corrected else None,
        tuple({"role": turn.role, "content": turn.content} for turn in example.history),
        "" if decision.accepted else decision.reason,
    )  # fmt: skip


def _example(
    loop: LoopSettings, row: Any, method: Method, provenance: str, id: uuid.UUID, uploaded_at: datetime
) -> Example:
    """Return the example of a line; one without a time has that of the upload.

    Raises:
        ExcludedRowError: it may not be trained on.
        ValueError: it has another format; the message begins with the field.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"found {kind_of(row)}, expected a JSON object")
    if _FIELDS[method] not in row:
        found = ", ".join(map(str, row))[:100] or "no fields"
        raise ValueError(f"{_FIELDS[method]}: is missing (found {found}); a line for the method {method} has it")
    rejected = None
    if method == "dpo":
        asked = row["input"].get("messages") if isinstance(row["input"], Mapping) else None
        if not isinstance(asked, list):
            raise ValueError("input.messages: is missing, expected a list of messages")
        said = {"tools": row["input"].get("tools"), **{name: row[name] for name in _OF_INTERACTION if name in row}}
        row, other = (
            {**said, "messages": [*asked, *_output(row, name)]} for name in ("preferred_output", "non_preferred_output")
        )
        rejected = to_record(other, provenance, "messages").answer
    record = without_own_system_prompt(to_record(row, provenance, "messages"), loop)
    if not record.prompt.strip():
        raise ValueError("messages: the last message of the user holds only the loop's system prompt")
    if rejected is not None and same_answer(rejected, record.answer):
        raise ValueError("non_preferred_output: is the same answer as preferred_output")
    return Example(
        interaction_id=id,
        ingest_offset=0,
        created_at=record.created_at or uploaded_at,
        prompt=record.prompt,
        history=record.history,
        output=record.answer if rejected is None else rejected,
        target=record.answer,
        reward=1.0,
        confirmed=True,  # whoever uploads the file answers for it
        corrected=rejected is not None,
        source=SOURCE,
        provenance=provenance,
        user=record.user,
        domain=record.domain,
        kind=record.kind,
        # The loop's reviewers see what its application logs; this file was written to be trained on.
        review="approve" if loop.review.required else None,
    )


def _output(row: Mapping[str, Any], name: str) -> list[Any]:
    output = row.get(name)
    if not isinstance(output, list) or len(output) != 1:
        raise ValueError(f"{name}: expected a list of one message of the assistant")
    return output
