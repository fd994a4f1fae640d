"""Completions in OpenAI's format, extended by interaction_id, confidence and seed."""

import json
from collections.abc import Sequence
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, Field

from finetune_pipeline.inference.protocol import Completion, Delta, PromptTokens, Tokens
from finetune_pipeline.serving.api import CompletionRequest, Generation
from finetune_pipeline.serving.interactions import FinishedInteraction, PreparedRequest

FinishReason = Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    """Token counts of all answers; a prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, answers: Sequence[FinishedInteraction], choices: int) -> "Usage":
        """Return the token counts of a request with so many answers to each conversation."""
        prompts = sum(done.completion.prompt_tokens for done in answers[::choices])
        generated = sum(done.completion.completion_tokens for done in answers)
        return cls(prompt_tokens=prompts, completion_tokens=generated, total_tokens=prompts + generated)


class TopToken(BaseModel):
    """One of the most probable tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(BaseModel):
    """One token of the answer."""

    token: str
    logprob: float = Field(description="Natural log of the token's probability.")
    bytes: list[int]
    top_logprobs: list[TopToken] = []


class Logprobs(BaseModel):
    """The tokens of the answer."""

    content: list[TokenLogprob]

    @classmethod
    def of(cls, tokens: Tokens, first: int = 0) -> "Logprobs":
        """Return the tokens of an answer or a delta, from the first of these."""
        texts, logprobs = tokens.token_texts[first:], tokens.token_logprobs[first:]
        tops = tokens.top_logprobs[first:] or [[]] * len(texts)
        return cls(
            content=[
                TokenLogprob(
                    token=text,
                    logprob=logprob,
                    bytes=list(text.encode()),
                    top_logprobs=[TopToken(token=one.text, logprob=one.logprob, bytes=one.bytes) for one in top],
                )
                for text, logprob, top in zip(texts, logprobs, tops, strict=True)
            ]
        )


class TextLogprobs(BaseModel):
    """The tokens of the answer, in the format of completions."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int] = Field(description="Where each token starts in the text.")

    @classmethod
    def of_all(cls, completion: Completion) -> "TextLogprobs":
        """Return the tokens of an answer, after those of its prompt if that is scored."""
        if completion.scored is None:
            return cls.of(completion)
        prompt = cls.of(completion.scored)
        answer = cls.of(completion, offset=sum(map(len, prompt.tokens)))
        tops = [*(prompt.top_logprobs or []), *(answer.top_logprobs or [])]
        return cls(
            tokens=prompt.tokens + answer.tokens,
            token_logprobs=prompt.token_logprobs + answer.token_logprobs,
            top_logprobs=tops if any(tops) else None,
            text_offset=prompt.text_offset + answer.text_offset,
        )

    @classmethod
    def of(cls, tokens: Tokens | PromptTokens, first: int = 0, offset: int = 0) -> "TextLogprobs":
        """Return the tokens of an answer or a delta, from the first of these, which starts at this offset."""
        texts, offsets = tokens.token_texts[first:], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        tops: list[dict[str, float] | None] = []
        for top in tokens.top_logprobs[first:]:
            found: dict[str, float] = {}
            for one in top:  # of two tokens with the same text, the more probable one
                found.setdefault(one.text, one.logprob)
            tops.append(found or None)
        return cls(
            tokens=texts,
            token_logprobs=[*tokens.token_logprobs[first:]],
            top_logprobs=tops or None,
            text_offset=offsets,
        )


class FunctionCall(BaseModel):
    """The function to call."""

    name: str
    arguments: str = Field(description="The arguments as JSON text.")


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AnswerMessage(BaseModel):
    """The answer: text, or a tool call."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(default=None, exclude_if=lambda calls: calls is None)


class Choice(BaseModel):
    """One answer, which is an interaction of its own, and why it ended."""

    index: int
    finish_reason: FinishReason
    interaction_id: UUID = Field(description="Id of this answer's interaction; the first one's is the response's.")
    confidence: float | None
    seed: int | None


class ChatChoice(Choice):
    """One answer to a conversation."""

    message: AnswerMessage
    logprobs: Logprobs | None = None


class TextChoice(Choice):
    """One answer to a prompt."""

    text: str
    logprobs: TextLogprobs | None = None


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


def tool_call_id(interaction_id: UUID) -> str:
    """Return the id of the tool call that is the answer of an interaction."""
    return f"call_{interaction_id.hex}"


def finish_reason(done: FinishedInteraction, function: str | None) -> FinishReason:
    """Return why an answer ended; a complete tool call ends with `tool_calls`."""
    ended = done.completion.finish_reason
    return "tool_calls" if function is not None and ended == "stop" else ended


def completion_response(
    body: Generation, prepared: PreparedRequest, created: int, answers: Sequence[FinishedInteraction]
) -> ChatCompletion | TextCompletion:
    """Return the response for answers that are not streamed."""
    first = answers[0]
    common = {
        "id": prepared.id,
        "created": created,
        "model": first.model,
        "usage": Usage.of(answers, prepared.choices),
        "confidence": first.completion.confidence,
        "seed": first.completion.seed,
    }
    choices = [_choice(body, prepared, number, done) for number, done in enumerate(answers)]
    if isinstance(body, CompletionRequest):
        return TextCompletion(choices=choices, **common)
    return ChatCompletion(choices=choices, **common)


def _choice(body: Generation, prepared: PreparedRequest, number: int, done: FinishedInteraction) -> dict[str, Any]:
    completion, function = done.completion, prepared.function
    choice: dict[str, Any] = {
        "index": number,
        "finish_reason": finish_reason(done, function),
        "interaction_id": done.interaction.id,
        "confidence": completion.confidence,
        "seed": completion.seed,
    }
    logprobs = body.logprobs_wanted and not done.replayed
    if isinstance(body, CompletionRequest):
        echoed = body.prompts[number // prepared.choices] if body.echo else ""
        return choice | {
            "text": echoed + completion.text,
            "logprobs": TextLogprobs.of_all(completion) if logprobs else None,
        }
    message = AnswerMessage(content=completion.text)
    if function is not None:
        call = FunctionCall(name=function, arguments=completion.text)
        message = AnswerMessage(
            content=None, tool_calls=[ToolCall(id=tool_call_id(done.interaction.id), function=call)]
        )
    return choice | {"message": message, "logprobs": Logprobs.of(completion) if logprobs else None}


# These do not end a line in server-sent events, but many clients use `str.splitlines` or the like, for which they do.
# `json.dumps` escapes the other such characters.
LINE_SEPARATORS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


class CompletionChunks:
    """The server-sent events of streamed answers.

    The ids of the interactions are in the first event of each choice. Confidence and seed are in the last, also in its
    `delta`, because clients that put a stream together keep only what the deltas have.
    """

    def __init__(self, body: Generation, prepared: PreparedRequest, created: int, model: str) -> None:
        self._body = body
        self._prepared = prepared
        self._model = model
        self._created = created
        self._chat = not isinstance(body, CompletionRequest)
        self._tokens = [0] * len(prepared.pending)  # that were sent with log-probabilities
        self._characters = [0] * len(prepared.pending)

    def start(self) -> str:
        """Return the first event of each choice: the role, or the prompt that is echoed; empty if there is none."""
        return "".join(map(self._start, range(len(self._prepared.pending))))

    def _start(self, number: int) -> str:
        body, id = self._body, self._prepared.pending[number].id
        extra = {"interaction_id": str(id)}
        if isinstance(body, CompletionRequest):
            return self._event(number, body.prompts[number // self._prepared.choices] if body.echo else "", extra=extra)
        if self._prepared.function is None:
            return self._event(number, {"role": "assistant", "content": ""}, extra=extra)
        function = {"name": self._prepared.function, "arguments": ""}
        call = {"index": 0, "id": tool_call_id(id), "type": "function", "function": function}
        return self._event(number, {"role": "assistant", "content": None, "tool_calls": [call]}, extra=extra)

    def delta(self, number: int, delta: Delta) -> str:
        """Return the event for a delta of one choice."""
        return self._event(number, self._content(delta.text), logprobs=self._logprobs(number, delta))

    def end(self, number: int, done: FinishedInteraction) -> str:
        """Return the last event of a choice: finish reason, confidence, seed, and the tokens that no delta had."""
        completion = done.completion
        extra = {"confidence": completion.confidence, "seed": completion.seed}
        rest = None if done.replayed else self._logprobs(number, completion, self._tokens[number])
        return self._event(
            number,
            dict(extra) if self._chat else "",
            logprobs=rest,
            finish_reason=finish_reason(done, self._prepared.function),
            top=extra if number == 0 else None,
            extra=None if self._chat else extra,
        )

    def finish(self, answers: Sequence[FinishedInteraction]) -> str:
        """Return the last events: usage, if the client wants it, and [DONE]."""
        options, usage = self._body.stream_options, ""
        if options is not None and options.include_usage:
            usage = self._line({"choices": [], "usage": Usage.of(answers, self._prepared.choices).model_dump()})
        return f"{usage}data: [DONE]\n\n"

    def _content(self, text: str) -> object:
        if not self._chat:
            return text
        if self._prepared.function is None:
            return {"content": text}
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

    def _logprobs(self, number: int, tokens: Tokens, first: int = 0) -> dict[str, Any] | None:
        count = len(tokens.token_texts) - first
        if not self._body.logprobs_wanted or count <= 0:
            return None
        offset = self._characters[number]
        self._tokens[number] += count
        self._characters[number] += sum(map(len, tokens.token_texts[first:]))
        if self._chat:
            return Logprobs.of(tokens, first).model_dump()
        return TextLogprobs.of(tokens, first, offset).model_dump()

    def _event(
        self,
        number: int,
        content: object,
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: FinishReason | None = None,
        top: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> str:
        choice = {
            "index": number,
            "delta" if self._chat else "text": content,
            "finish_reason": finish_reason,
            "logprobs": logprobs,
            **(extra or {}),
        }
        return self._line({"choices": [choice], **(top or {})})

    def _line(self, values: dict[str, object]) -> str:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        head = {"id": str(self._prepared.id), "object": kind, "created": self._created, "model": self._model}
        text = json.dumps({**head, **values}, ensure_ascii=False).translate(LINE_SEPARATORS)
        return f"data: {text}\n\n"
