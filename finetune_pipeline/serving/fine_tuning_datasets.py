"""Our own paths for datasets: list the versions, export examples for other tools, upload a file with a preview."""

import asyncio
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from finetune_pipeline.artifacts import Artifact, get_latest
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.pipeline import uploaded_files
from finetune_pipeline.pipeline.dataset_export import ExampleFilter, examples_of, find_dataset, list_datasets
from finetune_pipeline.pipeline.datasets import SOURCE, Method, preview_file
from finetune_pipeline.records import Text
from finetune_pipeline.serving.connections import DATASET_UPLOAD_PATH
from finetune_pipeline.serving.errors import BadRequest
from finetune_pipeline.serving.fine_tuning import Admin, Reader, client_errors, receive_form
from finetune_pipeline.serving.fine_tuning_schema import StrictRequest
from finetune_pipeline.serving.http import get_gateway, json_body
from finetune_pipeline.settings import LoopSettings

DATASETS_PATH = "/v1/fine-tuning/datasets"
EXPORT_PATH = f"{DATASETS_PATH}/export"

UPLOAD_BODY = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "loop": {"type": "string", "description": "Name of the loop; absent: the only one."},
        "method": {"enum": list(get_args(Method)), "default": "supervised"},
    },
    "required": ["file"],
    "additionalProperties": False,
}
"""The form of an upload."""

PREVIEWED = 10
"""Rows and errors in the preview of a file."""

_NDJSON = "application/x-ndjson"
_CHUNK = 2**16

router = APIRouter()


# --- Schemas ----------------------------------------------------------------------------------------------------------


class Dataset(BaseModel):
    """A version of a loop's dataset."""

    loop: str
    version: str
    created_at: datetime
    newest: bool = Field(description="The next run of the loop trains on it, unless it builds another one first.")
    origin: Literal["logs", "upload"]
    train: int = Field(description="Examples to train on, replay included.")
    validation: int
    replayed: int = Field(description="Replay examples in train.")
    preference_pairs: int
    undesirable: int = Field(description="Undesirable completions to train on.")
    sources: dict[str, int] = Field(description="Source -> examples of train and validation.")
    left_out: dict[str, int] = Field(description="Reason -> examples left out.")
    redacted: dict[str, int] = Field(description="Kind of secret or personal data -> replacements.")


class Datasets(BaseModel):
    """Versions of datasets, newest first in each loop."""

    data: list[Dataset]


class Filters(ExampleFilter):
    """Which examples to export: those that pass every filter that is given."""

    model_config = ConfigDict(strict=True)


class ExportRequest(StrictRequest):
    """A request for the examples of a dataset in a format of other tools."""

    loop: Annotated[Text, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="Name of the loop; null: the only one."
    )
    version: Annotated[Text, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Version of the dataset; null: the newest."
    )
    format: Literal["alpaca", "chatml", "messages", "sharegpt", "prompt_completion"] = Field(
        description="messages are OpenAI's."
    )
    split: Literal["train", "validation"] = "train"
    filters: Filters = Filters()


class PreviewedRow(BaseModel):
    """A line of a file as the loop's dataset would have it: redacted, and without the loop's own system prompt."""

    line: int
    prompt: str
    completion: str
    rejected: str | None = Field(description="The answer not to prefer; null unless the method is dpo.")
    history: list[dict[str, str]]
    left_out: str = Field(description="Why the dataset would not have it; empty if it would, unless a duplicate.")


class LineError(BaseModel):
    """A line that cannot be used."""

    line: int
    message: str = Field(description="What is wrong; it begins with the field.")


class UploadedDataset(BaseModel):
    """What an uploaded file would give."""

    file: str | None = Field(
        description="Id of the file, for `training_file` of a job; null if lines cannot be used, and it is not kept."
    )
    filename: str
    bytes: int
    loop: str
    examples: int = Field(description="Lines that can be used.")
    left_out: dict[str, int] = Field(description="Reason -> lines that may not be trained on.")
    unusable: int = Field(description="Lines that cannot be used.")
    errors: list[LineError] = Field(description=f"The first {PREVIEWED} of them.")
    rows: list[PreviewedRow] = Field(description=f"The first {PREVIEWED} lines that can be used.")


# --- Routes -----------------------------------------------------------------------------------------------------------


@router.get(DATASETS_PATH)
async def list_dataset_versions(
    request: Request, _: Reader, loop: Annotated[str | None, Query(max_length=200)] = None
) -> Datasets:
    """List the datasets of all loops, or of one."""
    gateway = get_gateway(request)
    loops = [gateway.loop_named(loop)] if loop is not None else list(gateway.loops.values())
    return await asyncio.to_thread(lambda: Datasets(data=[one for loop in loops for one in _datasets(loop)]))


@router.post(
    EXPORT_PATH,
    response_class=Response,
    responses={200: {"content": {_NDJSON: {"schema": {"type": "string"}}}, "description": "JSON lines."}},
)
async def export_dataset(
    request: Request, _: Admin, body: Annotated[ExportRequest, Depends(json_body(ExportRequest))]
) -> Response:
    """Export the examples of a dataset as JSON lines, in a format that other tools and `finetune ingest` read.

    An example whose text contains ChatML's own control tokens is left out of chatml, because it would break its turns.
    """
    from finetune_pipeline.curation.export_formats import export_rows

    loop = get_gateway(request).loop_named(body.loop)

    def start() -> tuple[str, Iterator[str]]:
        with client_errors():
            found = find_dataset(loop, body.version)
            examples = examples_of(found, body.split, body.filters)
        system_prompt = str(found.manifest.settings.get("system_prompt", loop.system_prompt))
        return found.manifest.version, export_rows(examples, body.format, system_prompt)

    version, rows = await asyncio.to_thread(start)
    name = f"{loop.name}-{version}-{body.split}.{body.format}.jsonl"
    return StreamingResponse(
        _chunks(rows), media_type=_NDJSON, headers={"Content-Disposition": f'attachment; filename="{name}"'}
    )


@router.post(DATASET_UPLOAD_PATH)
async def upload_dataset(request: Request, caller: Admin) -> UploadedDataset:
    """Upload a JSON Lines file for a loop, in OpenAI's format, and return what it would give.

    It is kept if every line can be used. A job that names it as `training_file` makes the dataset.
    """
    gateway = get_gateway(request)
    with uploaded_files.new_file() as file:
        fields = await receive_form(request, file, ("loop", "method"))
        loop = gateway.loop_named(fields.get("loop"))
        method: Any = fields.get("method", "supervised")
        if method not in get_args(Method):
            raise BadRequest(
                f"method: found {method[:100]!r}, expected {' or '.join(get_args(Method))}.", param="method"
            )
        with client_errors():
            preview = await asyncio.to_thread(lambda: preview_file(loop, file.flushed(), method, PREVIEWED))
        kept = None
        if preview.examples and not preview.unusable:
            kept = await asyncio.to_thread(file.publish, fields["filename"], caller.name)
    return UploadedDataset(
        file=kept.id if kept else None,
        filename=fields["filename"],
        bytes=file.size,
        loop=loop.name,
        examples=preview.examples,
        left_out=preview.left_out,
        unusable=preview.unusable,
        errors=[LineError(line=line, message=message) for line, message in preview.errors],
        rows=[PreviewedRow(**{**vars(row), "history": list(row.history)}) for row in preview.rows],
    )


def _datasets(loop: LoopSettings) -> Iterator[Dataset]:
    newest = get_latest(DatasetManifest, loop.name)
    for one in list_datasets(loop):
        yield _described(one, newest is not None and newest.manifest.version == one.manifest.version)


def _described(dataset: Artifact[DatasetManifest], newest: bool) -> Dataset:
    manifest = dataset.manifest
    return Dataset(
        **{name: getattr(manifest, name) for name in Dataset.model_fields.keys() & DatasetManifest.model_fields.keys()},
        newest=newest,
        origin="upload" if SOURCE in manifest.settings else "logs",
    )


def _chunks(rows: Iterable[str]) -> Iterator[str]:
    """Yield lines together, because the server sends each chunk by itself."""
    lines, size = list[str](), 0
    for row in rows:
        lines.append(f"{row}\n")
        size += len(row)
        if size >= _CHUNK:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)
