"""Responses in the format of OpenAI's Responses API, extended by confidence and seed."""

import json
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, Field, JsonValue, ValidationError

from finetune_pipeline.inference.protocol import Delta
from finetune_pipeline.records import Interaction
from finetune_pipeline.serving.api import GATEWAY_METADATA
from finetune_pipeline.serving.completion_format import LINE_SEPARATORS, Logprobs, TokenLogprob, tool_call_id
from finetune_pipeline.serving.errors import GatewayError
from finetune_pipeline.serving.interactions import FinishedInteraction, PreparedRequest
from finetune_pipeline.serving.responses_schema import ResponsesRequest

Status = Literal["in_progress", "completed", "incomplete"]


class ResponseRecord(BaseModel):
    """What is recorded with the interaction of a response, in its metadata, in addition to the interaction.

    Attributes:
        key: the name of the API key whose requests may refer to the response; None: it was sent without a key.
        instructions: whether the first message of the history is the request's `instructions`.
        function: the name of the function whose arguments are the answer; None for text.
    """

    api: Literal["responses"] = "responses"
    key: str | None
    instructions: bool = False
    function: str | None = None
    previous_response_id: str | None = None
    finish_reason: Literal["stop", "length"] = "stop"

    @classmethod
    def of(cls, interaction: Interaction) -> "ResponseRecord | None":
        """Return the record of an interaction; None if it is not a response."""
        kept = (interaction.metadata or {}).get(GATEWAY_METADATA)
        if not isinstance(kept, dict) or "api" not in kept:
            return None
        try:
            return cls.model_validate(kept | {"instructions": bool(kept.get("instructions") and interaction.history)})
        except ValidationError:  # an application may log any metadata
            return None


class OutputText(BaseModel):
    """The text of the answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[JsonValue] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(BaseModel):
    """The answer as a message."""

    type: Literal["message"] = "message"
    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputFunctionCall(BaseModel):
    """The answer as a call of a function."""

    type: Literal["function_call"] = "function_call"
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str = Field(description="The arguments as JSON text.")


class InputTokensDetails(BaseModel):
    """Not measured, and always 0."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """Not measured, and always 0."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> "ResponseUsage":
        """Return the counts of a prompt and its answer."""
        return cls(input_tokens=prompt, output_tokens=completion, total_tokens=prompt + completion)


class IncompleteDetails(BaseModel):
    """Why the answer is not complete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(BaseModel):
    """Response of POST /v1/responses and GET /v1/responses/{id}.

    The settings of the request are not recorded, so GET returns null for them, and no tools.
    """

    id: UUID = Field(description="Id of the interaction; feedback refers to it.")
    object: Literal["response"] = "response"
    created_at: int = Field(description="Unix time in seconds.")
    status: Status
    background: Literal[False] = False
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    model: str = Field(description="The model that answered, as loop@version.")
    output: list[OutputMessage | OutputFunctionCall]
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, JsonValue] | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool = True
    temperature: float | None = None
    text: dict[str, JsonValue] | None = None
    tool_choice: JsonValue = "auto"
    tools: list[JsonValue] = []
    top_logprobs: int | None = None
    top_p: float | None = None
    truncation: str | None = None
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, JsonValue] = {}
    confidence: float | None = Field(
        default=None, description="Lowest probability among the tokens of the answer's values."
    )
    seed: int | None = Field(default=None, description="Seed of the answer, null at temperature 0.")


def finished_response(
    body: ResponsesRequest, prepared: PreparedRequest, created: int, done: FinishedInteraction
) -> ResponseObject:
    """Return the response for an answer."""
    completion = done.completion
    logprobs = Logprobs.of(completion).content if body.logprobs_wanted and not done.replayed else []
    status = _status(completion.finish_reason)
    return ResponseObject(
        **_head(body, prepared, created, done.model),
        status=status,
        incomplete_details=IncompleteDetails() if status == "incomplete" else None,
        output=[_output(prepared.id, completion.text, prepared.function, status, logprobs)],
        usage=ResponseUsage.of(completion.prompt_tokens, completion.completion_tokens),
        confidence=completion.confidence,
        seed=completion.seed,
    )


def stored_response(interaction: Interaction, record: ResponseRecord) -> ResponseObject:
    """Return the response for a recorded interaction."""
    status = _status(record.finish_reason)
    metadata = dict(interaction.metadata or {})
    del metadata[GATEWAY_METADATA]
    named = ("domain", "kind", "retrieved_context")
    metadata |= {name: value for name in named if (value := getattr(interaction, name)) is not None}
    return ResponseObject(
        id=interaction.id,
        created_at=int(interaction.created_at.timestamp()),
        status=status,
        incomplete_details=IncompleteDetails() if status == "incomplete" else None,
        instructions=interaction.history[0].content if record.instructions else None,
        model=interaction.model or interaction.loop,
        output=[_output(interaction.id, interaction.output, record.function, status, [])],
        previous_response_id=record.previous_response_id,
        usage=ResponseUsage.of(interaction.prompt_tokens or 0, interaction.completion_tokens or 0),
        user=interaction.user,
        metadata=metadata,
        confidence=interaction.confidence,
        seed=interaction.seed,
    )


def _head(body: ResponsesRequest, prepared: PreparedRequest, created: int, model: str) -> dict[str, Any]:
    """Return the fields that do not depend on the answer: its id and model, and what the request asked for."""
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    choice = body.tool_choice
    return {
        "id": prepared.id,
        "created_at": created,
        "model": model,
        "instructions": body.instructions,
        "max_output_tokens": body.completion_limit,
        "max_tool_calls": body.max_tool_calls,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": body.reasoning,
        "safety_identifier": body.safety_identifier,
        "service_tier": body.service_tier,
        "store": body.store is not False,
        "temperature": body.temperature or 0.0,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump() if choice else "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs_wanted,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
        "metadata": body.metadata.model_dump(mode="json", exclude_none=True) if body.metadata else {},
    }


def _status(finish_reason: Literal["stop", "length"]) -> Status:
    return "completed" if finish_reason == "stop" else "incomplete"


def _item_id(interaction_id: UUID, function: str | None) -> str:
    return f"{'msg' if function is None else 'fc'}_{interaction_id.hex}"


def _output(
    interaction_id: UUID, text: str, function: str | None, status: Status, logprobs: list[TokenLogprob]
) -> OutputMessage | OutputFunctionCall:
    id = _item_id(interaction_id, function)
    if function is None:
        return OutputMessage(id=id, status=status, content=[OutputText(text=text, logprobs=logprobs)])
    call_id = tool_call_id(interaction_id)
    return OutputFunctionCall(id=id, status=status, call_id=call_id, name=function, arguments=text)


class ResponseEvents:
    """The server-sent events of a streamed response."""

    def __init__(self, body: ResponsesRequest, prepared: PreparedRequest, created: int, model: str) -> None:
        self._body = body
        self._prepared = prepared
        self._created = created
        self._model = model
        self._sequence_number = 0
        self._item = {"output_index": 0, "item_id": _item_id(prepared.id, prepared.function)}
        self._part = {**self._item, "content_index": 0}

    def start(self) -> str:
        """Return the events before the first delta: the response and its one item."""
        response = ResponseObject(
            **_head(self._body, self._prepared, self._created, self._model), status="in_progress", output=[]
        )
        item = _output(self._prepared.id, "", self._prepared.function, "in_progress", [])
        events = [
            self._event("response.created", response=response.model_dump(mode="json")),
            self._event("response.in_progress", response=response.model_dump(mode="json")),
        ]
        if isinstance(item, OutputFunctionCall):
            return "".join([*events, self._event("response.output_item.added", output_index=0, item=item.model_dump())])
        added = item.model_dump() | {"content": []}
        events.append(self._event("response.output_item.added", output_index=0, item=added))
        part = item.content[0].model_dump()
        return "".join([*events, self._event("response.content_part.added", **self._part, part=part)])

    def delta(self, delta: Delta) -> str:
        """Return the event for a part of the answer."""
        if self._prepared.function is not None:
            return self._event("response.function_call_arguments.delta", **self._item, delta=delta.text)
        logprobs = Logprobs.of(delta).model_dump()["content"] if self._body.logprobs_wanted else []
        return self._event("response.output_text.delta", **self._part, delta=delta.text, logprobs=logprobs)

    def finish(self, done: FinishedInteraction) -> str:
        """Return the events after the last delta, with the complete answer."""
        response = finished_response(self._body, self._prepared, self._created, done)
        [item] = response.output
        if isinstance(item, OutputFunctionCall):
            call = {"name": item.name, "arguments": item.arguments}
            events = [self._event("response.function_call_arguments.done", **self._item, **call)]
        else:
            part = item.content[0].model_dump()
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._event("response.output_text.done", **self._part, **text),
                self._event("response.content_part.done", **self._part, part=part),
            ]
        events.append(self._event("response.output_item.done", output_index=0, item=item.model_dump()))
        events.append(self._event(f"response.{response.status}", response=response.model_dump(mode="json")))
        return "".join(events)

    def failed(self, error: GatewayError, *, local: bool) -> str:
        """Return the last event of an answer that failed; it also has OpenAI's form of errors, which clients raise."""
        body = error.body(local=local)
        details = {name: body["error"][name] for name in ("code", "message", "param")}
        return self._event("error", **details, **body)

    def _event(self, type: str, **values: object) -> str:
        values = {"type": type, "sequence_number": self._sequence_number, **values}
        self._sequence_number += 1
        text = json.dumps(values, ensure_ascii=False).translate(LINE_SEPARATORS)
        return f"event: {type}\ndata: {text}\n\n"
