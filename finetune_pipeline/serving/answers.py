"""Answers in the wire format: OpenAI's objects, extended by confidence and seed."""

import json
from typing import Literal
from uuid import UUID

from pydantic import BaseModel, Field

from finetune_pipeline.inference.protocol import Completion

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(BaseModel):
    """One token of the answer."""

    token: str
    logprob: float = Field(description="Natural log of its probability.")
    bytes: list[int]
    top_logprobs: list[None] = []


class Logprobs(BaseModel):
    """The tokens of the answer."""

    content: list[TokenLogprob]


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


class ChatCompletion(BaseModel):
    """The answer to POST /v1/chat/completions."""

    id: UUID = Field(description="Id of the interaction, for feedback.")
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="Who answered: loop@version.")
    choices: list[ChatChoice]
    usage: Usage
    confidence: float | None = Field(description="Lowest probability among the tokens of the answer's values.")
    seed: int | None = Field(
        description="Seed of the answer, null at temperature 0; the same request with it, alone, gives the same answer."
    )


class TextChoice(BaseModel):
    """The answer, and why it ended."""

    index: Literal[0] = 0
    text: str
    finish_reason: FinishReason
    logprobs: None = None


class TextCompletion(BaseModel):
    """The answer to POST /v1/completions."""

    id: UUID = Field(description="Id of the interaction, for feedback.")
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    confidence: float | None
    seed: int | None


def chat_completion(id: UUID, created: int, model: str, completion: Completion, *, logprobs: bool) -> ChatCompletion:
    """The whole answer at once."""
    choice = ChatChoice(
        message=AnswerMessage(content=completion.text),
        finish_reason=completion.finish_reason,
        logprobs=_logprobs(completion) if logprobs else None,
    )
    return ChatCompletion(
        id=id,
        created=created,
        model=model,
        choices=[choice],
        usage=usage(completion),
        confidence=completion.confidence,
        seed=completion.seed,
    )


def text_completion(id: UUID, created: int, model: str, completion: Completion) -> TextCompletion:
    """The whole answer at once."""
    choice = TextChoice(text=completion.text, finish_reason=completion.finish_reason)
    return TextCompletion(
        id=id,
        created=created,
        model=model,
        choices=[choice],
        usage=usage(completion),
        confidence=completion.confidence,
        seed=completion.seed,
    )


def usage(completion: Completion) -> Usage:
    """Tokens of prompt and answer."""
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


class Chunks:
    """The parts of a streamed answer, as server-sent events."""

    def __init__(self, id: UUID, created: int, model: str, *, chat: bool) -> None:
        self._model = model
        self._id = str(id)
        self._created = created
        self._chat = chat

    def start(self) -> str:
        """The first event of a chat: who speaks."""
        return self._event({"role": "assistant", "content": ""}, None) if self._chat else ""

    def piece(self, text: str) -> str:
        """A piece of the answer."""
        return self._event({"content": text} if self._chat else text, None)

    def end(self, completion: Completion, *, logprobs: bool, with_usage: bool) -> str:
        """The last events: why it ended, how many tokens, and that nothing follows."""
        tokens = _logprobs(completion).model_dump() if logprobs and self._chat else None
        extra = {"confidence": completion.confidence, "seed": completion.seed}
        last = self._event({} if self._chat else "", completion.finish_reason, tokens, extra)
        total = self._line({"choices": [], "usage": usage(completion).model_dump()}) if with_usage else ""
        return f"{last}{total}data: [DONE]\n\n"

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


def _logprobs(completion: Completion) -> Logprobs:
    pairs = zip(completion.token_texts, completion.token_logprobs, strict=True)
    return Logprobs(
        content=[TokenLogprob(token=text, logprob=value, bytes=list(text.encode())) for text, value in pairs]
    )
