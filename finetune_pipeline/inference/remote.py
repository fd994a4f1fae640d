"""A model behind another OpenAI-compatible server: vLLM, llama-server, Ollama, a service."""

import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from finetune_pipeline.inference.confidence import confidence
from finetune_pipeline.inference.errors import EngineError, RequestRefused
from finetune_pipeline.inference.protocol import Completion, GenerateRequest
from finetune_pipeline.settings import UpstreamSettings

if TYPE_CHECKING:
    import httpx

VIA_HEADER = "X-Finetune-Via"
"""The header that says which gateway asks: one that is asked by itself would wait for itself."""

_SAID = 300


class UpstreamFailed(EngineError):
    """The other server cannot be reached, is busy, or answers with an error or what is no answer."""


class RemoteModel:
    """Asks one model of one server; for use in an event loop. `close` ends its connections.

    Args:
        via: the id of the gateway that asks.
    """

    def __init__(self, settings: UpstreamSettings, via: str = "") -> None:
        import httpx

        self.settings = settings
        self._client = httpx.AsyncClient(
            base_url=settings.url.rstrip("/") + "/",
            headers={VIA_HEADER: via, **_authorisation(settings)},
            timeout=httpx.Timeout(settings.timeout_seconds, connect=min(5.0, settings.timeout_seconds)),
        )

    async def generate(self, request: GenerateRequest, on_delta: Callable[[str], None] | None = None) -> Completion:
        """Answer one request.

        Confidence comes from the token probabilities, where the server gives them.

        Args:
            on_delta: called with each piece of text as it comes.

        Raises:
            RequestRefused: the server refuses this request.
            UpstreamFailed: it cannot be reached, fails, or breaks off.
        """
        import httpx

        answer = _Answer(seed=request.pick_seed())
        try:
            async with self._client.stream(
                "POST", "chat/completions", json=self._body(request, answer.seed)
            ) as response:
                await self._check(response)
                async for event in _events(response):
                    piece = answer.add(event)
                    if piece and on_delta:
                        on_delta(piece)
        except httpx.HTTPError as error:
            raise UpstreamFailed(
                f"{self.settings.url} does not answer ({type(error).__name__}: {error}); start it, or correct "
                "serving.upstream in the loop's YAML"
            ) from error
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise self._not_understood(error) from error
        if answer.finish_reason is None:
            raise UpstreamFailed(f"{self.settings.url} broke off in the middle of an answer; look at its log")
        return answer.completion()

    def _not_understood(self, error: Exception) -> UpstreamFailed:
        return UpstreamFailed(
            f"{self.settings.url} sent what is no part of an OpenAI-compatible answer ({type(error).__name__}: "
            f"{str(error)[:_SAID]}); check that serving.upstream.url is such a server's, as a rule ending in /v1"
        )

    async def close(self) -> None:
        """End the connections."""
        await self._client.aclose()

    def _body(self, request: GenerateRequest, seed: int | None) -> dict[str, Any]:
        if request.messages is None:
            raise RequestRefused("a raw prompt cannot be passed on to another server; ask with messages")
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": request.messages,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
        }
        if seed is not None:
            body["seed"] = seed
        if request.stop:
            body["stop"] = list(request.stop)
        if request.json_schema is not None:
            schema = {"name": "answer", "schema": request.json_schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def _check(self, response: "httpx.Response") -> None:
        if response.status_code < 400:
            return
        said = (await response.aread())[:_SAID].decode("utf-8", "replace")
        message = f"{self.settings.url} answered {response.status_code}: {said}"
        if response.status_code in {400, 413, 422}:
            raise RequestRefused(message)
        raise UpstreamFailed(f"{message}; check the server, its model name and its key (serving.upstream)")


@dataclass
class _Answer:
    """What has arrived of an answer, and the seed of its request."""

    seed: int | None
    pieces: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def add(self, event: dict[str, Any]) -> str:
        """Take one event of the stream; returns its text."""
        if "error" in event:
            raise UpstreamFailed(f"the other server failed in the middle of an answer: {event['error']}")
        self.usage = dict(event.get("usage") or self.usage)
        if not event.get("choices"):
            return ""
        choice = event["choices"][0]
        if choice.get("finish_reason"):
            self.finish_reason = "length" if choice["finish_reason"] == "length" else "stop"
        for token in (choice.get("logprobs") or {}).get("content") or []:
            self.tokens.append(_text(token["token"]))
            self.logprobs.append(float(token["logprob"]))
        piece = _text((choice.get("delta") or {}).get("content") or "")
        self.pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        """The whole answer."""
        text = "".join(self.pieces)
        return Completion(
            text=text,
            token_ids=[],
            token_texts=self.tokens,
            token_logprobs=self.logprobs,
            finish_reason=self.finish_reason or "stop",
            prompt_tokens=_count(self.usage.get("prompt_tokens"), 0),
            completion_tokens=_count(self.usage.get("completion_tokens"), len(self.tokens)),
            prompt_seconds=0.0,
            generation_seconds=0.0,
            confidence=_confidence(text, self.tokens, self.logprobs),
            seed=self.seed,
        )


def _text(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no character


def _count(given: Any, otherwise: int) -> int:
    return given if isinstance(given, int) and 0 <= given < 2**31 else otherwise


def _confidence(text: str, tokens: Sequence[str], logprobs: Sequence[float]) -> float | None:
    return confidence(text, tokens, logprobs) if tokens else None


def _authorisation(settings: UpstreamSettings) -> dict[str, str]:
    if settings.api_key_env is None:
        return {}
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise UpstreamFailed(f"{settings.api_key_env} is not set; it should hold the key for {settings.url}")
    return {"Authorization": f"Bearer {key}"}


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


async def _events(response: "httpx.Response") -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data, parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise UpstreamFailed(f"the other server sent what is no JSON: {data[:_SAID]!r}") from None
        if not isinstance(event, dict):
            raise UpstreamFailed(f"the other server sent what is no event: {data[:_SAID]!r}")
        yield event
