"""A model behind another OpenAI-compatible server: vLLM, llama-server, Ollama, or a cloud service."""

import codecs
import io
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune_pipeline.inference.confidence import confidence
from finetune_pipeline.inference.errors import ContextExceeded, RequestRefused, UpstreamFailed
from finetune_pipeline.inference.escaped_prompt import EscapedPrompts
from finetune_pipeline.inference.protocol import Completion, Delta, GenerateRequest, TopLogprob
from finetune_pipeline.settings import UpstreamSettings

VIA_HEADER = "X-Finetune-Via"
"""Header with the id of the gateway that sends the request, so that a gateway detects requests to itself."""

_CONTEXT_EXCEEDED = re.compile(r"context_length_exceeded|exceed_context_size|maximum context length", re.IGNORECASE)
"""By this, servers say that a prompt is too long: OpenAI, llama-server, vLLM."""

_SAMPLING = (
    "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "ignore_eos", "chat_template_kwargs",
)  # fmt: skip
"""Fields that are sent under their own names, and only if they change something: not every server knows them."""

_QUOTED_CHARACTERS = 300
"""How much of a server's message is quoted in errors."""


class RemoteModel:
    """Client for one model of one server, for use in an event loop.

    Args:
        via: the id of the gateway that sends the requests.
        named_by: the setting or argument that names the server, for errors.
        vocabulary: a GGUF with the model's tokenizer, if the server reads control tokens in messages and takes token
            ids instead.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        via: str = "",
        named_by: str = "serving.upstream",
        vocabulary: Path | None = None,
    ) -> None:
        import httpx

        self.settings = settings
        self._escaped = EscapedPrompts(vocabulary) if vocabulary else None
        self._named_by = named_by
        headers = {VIA_HEADER: via}
        if settings.api_key_env is not None:
            key = os.environ.get(settings.api_key_env)
            if not key:
                raise UpstreamFailed(
                    f"The environment variable {settings.api_key_env} is not set. Set it to the API key of "
                    f"{settings.url}."
                )
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx.AsyncClient(
            base_url=settings.url.rstrip("/") + "/",
            headers=headers,
            timeout=httpx.Timeout(settings.timeout_seconds, connect=min(5.0, settings.timeout_seconds)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),  # serving.queue is the limit
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._escaped is not None:
            await self._escaped.close()
        await self._client.aclose()

    async def generate(self, request: GenerateRequest, on_delta: Callable[[Delta], None] | None = None) -> Completion:
        """Return the completion of one request; its confidence comes from the server's log-probabilities, if any.

        Args:
            on_delta: called with each text delta as it arrives.

        Raises:
            RequestRefused: the server refuses this request.
            UpstreamFailed: the server cannot be reached, fails, or ends the stream early.
        """
        import httpx

        seed = request.pick_seed()
        partial = _PartialCompletion(seed=seed)
        path, body = "chat/completions", self._body(request, seed)
        tokens = await self._escaped.tokens(request) if self._escaped else None
        if tokens is not None:
            path, body = "completions", _with_tokens(body, tokens)
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if response.status_code >= 400:
                    reply = (await response.aread())[:_QUOTED_CHARACTERS].decode("utf-8", "replace")
                    message = f"{self.settings.url} returned status {response.status_code}: {reply}"
                    if response.status_code in {400, 413, 422}:
                        raise (ContextExceeded if _CONTEXT_EXCEEDED.search(reply) else RequestRefused)(message)
                    raise UpstreamFailed(f"{message} Check the server, its model name and its key ({self._named_by}).")
                async for line in event_lines(response.aiter_bytes()):
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        break
                    delta = partial.add(json.loads(data, parse_constant=_reject_constant))
                    if delta.text and on_delta:
                        on_delta(delta)
        except httpx.HTTPError as error:
            raise UpstreamFailed(
                f"{self.settings.url} does not answer ({type(error).__name__}: {error}). Start the server, or correct "
                f"{self._named_by}."
            ) from error
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise UpstreamFailed(
                f"{self.settings.url} sent something that is not an OpenAI-compatible stream ({type(error).__name__}: "
                f"{str(error)[:_QUOTED_CHARACTERS]}). Check the URL in {self._named_by}; it usually ends in /v1."
            ) from error
        if partial.finish_reason is None:
            raise UpstreamFailed(f"{self.settings.url} ended the stream in the middle of a completion; see its log.")
        return partial.completion()

    def _body(self, request: GenerateRequest, seed: int | None) -> dict[str, Any]:
        if request.messages is None:
            raise RequestRefused(
                "A raw prompt cannot be sent to another server, so its tokens cannot be scored either; send messages, "
                "or a request without echo."
            )
        messages = request.messages
        if request.prefill:
            messages = [*messages, {"role": "assistant", "content": request.prefill}]
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": messages,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
        }
        if request.prefill:  # llama-server continues a last answer by itself, vLLM needs these
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        body |= request.model_dump(mode="json", include=set(_SAMPLING), exclude_defaults=True)
        if request.repeat_penalty != 1:  # llama-server's name, then vLLM's
            body |= {"repeat_penalty": request.repeat_penalty, "repetition_penalty": request.repeat_penalty}
        if request.logit_bias:
            body["logit_bias"] = {str(id): -100 if bias is None else bias for id, bias in request.logit_bias.items()}
        if request.top_logprobs:
            body["top_logprobs"] = request.top_logprobs
        if seed is not None:
            body["seed"] = seed
        if request.stop:
            body["stop"] = list(request.stop)
        if request.json_schema is not None:
            schema = {"name": "answer", "schema": request.json_schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body | self.settings.extra_body


def _with_tokens(body: dict[str, Any], tokens: list[int]) -> dict[str, Any]:
    """Return the body of a chat completion as one of a completion whose prompt is token ids."""
    chat_only = {
        "messages", "continue_final_message", "add_generation_prompt", "chat_template_kwargs", "logprobs",
        "top_logprobs",
    }  # fmt: skip
    rest = {name: value for name, value in body.items() if name not in chat_only}
    if "response_format" in rest:  # vLLM's name; llama-server has it for messages only
        rest["json_schema"] = rest["response_format"]["json_schema"]["schema"]
    return {**rest, "prompt": tokens, "logprobs": max(1, body.get("top_logprobs", 0))}


async def event_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Yield the lines of a stream of server-sent events, which is UTF-8 and in which only LF, CRLF and CR end a line.

    httpx's `aiter_lines` ends lines at every character at which `str.splitlines` does, such as U+2028, which may stand
    in a JSON text.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")("replace"), translate=True)
    rest = ""
    async for chunk in chunks:
        *lines, rest = (rest + decoder.decode(chunk)).split("\n")
        for line in lines:
            yield line
    if rest := rest + decoder.decode(b"", final=True):
        yield rest


@dataclass
class _PartialCompletion:
    """What has arrived of a completion, and the seed that was sent."""

    seed: int | None
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[TopLogprob]] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    reported: int = 0

    def add(self, event: dict[str, Any]) -> Delta:
        """Add one event of the stream and return its text, which may be empty, with the tokens since the last text.

        Raises:
            RequestRefused: the model refuses to answer.
            UpstreamFailed: the event is an error, or calls a tool.
            AttributeError, KeyError, IndexError, TypeError, ValueError: it is not of OpenAI's format.
        """
        usage, choices = event.get("usage"), event.get("choices")
        if "error" in event:
            raise UpstreamFailed(f"The other server failed in the middle of a completion: {event['error']}")
        self.usage = dict(usage or self.usage)
        if not choices:
            return Delta(text="")
        choice = choices[0]
        if choice.get("finish_reason"):
            self.finish_reason = "length" if choice["finish_reason"] == "length" else "stop"
        for token in _tokens_of(choice.get("logprobs") or {}):
            self.tokens.append(_without_surrogates(token["token"]))
            self.logprobs.append(float(token["logprob"]))
            self.top_logprobs.append([_top_logprob(one) for one in token.get("top_logprobs") or []])
        given = choice.get("delta") or {"content": choice.get("text")}
        if given.get("refusal"):  # recorded, it would be an empty answer
            raise RequestRefused(f"The model of the other server refuses: {given['refusal']!r:.{_QUOTED_CHARACTERS}}")
        if given.get("tool_calls") or given.get("function_call"):
            raise UpstreamFailed(
                "The other server answered with a tool call, which is not supported. Turn its tools off for this model."
            )
        text = _without_surrogates(given.get("content") or "")
        self.text += text
        if not text:
            return Delta(text="")
        first, self.reported = self.reported, len(self.tokens)
        return Delta(
            text=text,
            token_texts=self.tokens[first:],
            token_logprobs=self.logprobs[first:],
            top_logprobs=self.top_logprobs[first:],
        )

    def completion(self) -> Completion:
        """Return the finished completion."""
        return Completion(
            text=self.text,
            token_ids=[],
            token_texts=self.tokens,
            token_logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            finish_reason=self.finish_reason or "stop",
            prompt_tokens=_valid_count(self.usage.get("prompt_tokens"), default=0),
            completion_tokens=_valid_count(self.usage.get("completion_tokens"), default=len(self.tokens)),
            prompt_seconds=0.0,
            generation_seconds=0.0,
            confidence=confidence(self.text, self.tokens, self.logprobs),
            seed=self.seed,
        )


def _tokens_of(logprobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tokens of a delta in the form of chat completions; completions have parallel lists."""
    if "tokens" not in logprobs:
        return list(logprobs.get("content") or [])
    most_probable = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return [
        {
            "token": text,
            "logprob": value,
            "top_logprobs": [{"token": one, "logprob": number} for one, number in (most or {}).items()],
        }
        for text, value, most in zip(logprobs["tokens"], logprobs["token_logprobs"], most_probable, strict=True)
    ]


def _top_logprob(token: dict[str, Any]) -> TopLogprob:
    text = _without_surrogates(token["token"])
    return TopLogprob(text=text, bytes=token.get("bytes") or list(text.encode()), logprob=float(token["logprob"]))


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _valid_count(count: Any, *, default: int) -> int:
    return count if isinstance(count, int) and 0 <= count < 2**31 else default


def _reject_constant(word: str) -> float:
    raise ValueError(f"{word} is not valid JSON")
