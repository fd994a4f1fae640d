"""Completions in OpenAI's format, extended by confidence and seed."""

import json
from typing import Literal
from uuid import UUID

from pydantic import BaseModel, Field

from finetune_pipeline.inference.protocol import Completion

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, completion: Completion) -> "Usage":
        """Return the token counts of a completion."""
        prompt, generated = completion.prompt_tokens, completion.completion_tokens
        return cls(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)


class TokenLogprob(BaseModel):
    """One token of the answer."""

    token: str
    logprob: float = Field(description="Natural log of the token's probability.")
    bytes: list[int]
    top_logprobs: list[None] = []


class Logprobs(BaseModel):
    """The tokens of the answer."""

    content: list[TokenLogprob]

    @classmethod
    def of(cls, completion: Completion) -> "Logprobs":
        """Return the tokens of a completion."""
        tokens = zip(completion.token_texts, completion.token_logprobs, strict=True)
        return cls(
            content=[TokenLogprob(token=text, logprob=value, bytes=list(text.encode())) for text, value in tokens]
        )


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The answer, and why it ended."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: Logprobs | None = None


class TextChoice(BaseModel):
    """The answer, and why it ended."""

    index: Literal[0] = 0
    text: str
    finish_reason: FinishReason
    logprobs: None = None


class CompletionResponse(BaseModel):
    """The fields that both endpoints return."""

    id: UUID = Field(description="Id of the interaction; feedback refers to it.")
    created: int = Field(description="Unix time in seconds.")
    model: str = Field(description="The model that answered, as loop@version.")
    usage: Usage
    confidence: float | None = Field(description="Lowest probability among the tokens of the answer's values.")
    seed: int | None = Field(
        description="Seed of the answer, null at temperature 0. The same request with this seed gives the same answer "
        "if no other request is decoded at the same time."
    )


class ChatCompletion(CompletionResponse):
    """Response of POST /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextCompletion(CompletionResponse):
    """Response of POST /v1/completions."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


def completion_response(
    id: UUID, created: int, model: str, completion: Completion, *, chat: bool, logprobs: bool
) -> ChatCompletion | TextCompletion:
    """Return the response for a completion that is not streamed."""
    common = {
        "id": id,
        "created": created,
        "model": model,
        "usage": Usage.of(completion),
        "confidence": completion.confidence,
        "seed": completion.seed,
    }
    if not chat:
        return TextCompletion(
            choices=[TextChoice(text=completion.text, finish_reason=completion.finish_reason)], **common
        )
    choice = ChatChoice(
        message=AnswerMessage(content=completion.text),
        finish_reason=completion.finish_reason,
        logprobs=Logprobs.of(completion) if logprobs else None,
    )
    return ChatCompletion(choices=[choice], **common)


class CompletionChunks:
    """The server-sent events of a streamed completion."""

    def __init__(self, id: UUID, created: int, model: str, *, chat: bool) -> None:
        self._model = model
        self._id = str(id)
        self._created = created
        self._chat = chat

    def start(self) -> str:
        """Return the first event of a chat, with the role."""
        return self._event({"role": "assistant", "content": ""}, None) if self._chat else ""

    def delta(self, text: str) -> str:
        """Return the event for a text delta."""
        return self._event({"content": text} if self._chat else text, None)

    def end(self, completion: Completion, *, logprobs: bool, with_usage: bool) -> str:
        """Return the last events: finish reason, confidence and seed, usage, and [DONE]."""
        tokens = Logprobs.of(completion).model_dump() if logprobs and self._chat else None
        extra = {"confidence": completion.confidence, "seed": completion.seed}
        last = self._event({} if self._chat else "", completion.finish_reason, tokens, extra)
        usage = self._line({"choices": [], "usage": Usage.of(completion).model_dump()}) if with_usage else ""
        return f"{last}{usage}data: [DONE]\n\n"

    def _event(
        self,
        content: object,
        finish_reason: FinishReason | None,
        logprobs: object = None,
        extra: dict[str, float | int | None] | None = None,
    ) -> str:
        key = "delta" if self._chat else "text"
        choice = {"index": 0, key: content, "finish_reason": finish_reason, "logprobs": logprobs}
        return self._line({"choices": [choice], **(extra or {})})

    def _line(self, values: dict[str, object]) -> str:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return f"data: {json.dumps({**head, **values}, ensure_ascii=False)}\n\n"
