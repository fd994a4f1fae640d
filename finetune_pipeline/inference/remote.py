"""A model behind another OpenAI-compatible server: vLLM, llama-server, Ollama, or a cloud service."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune_pipeline.inference.confidence import confidence
from finetune_pipeline.inference.errors import RequestRefused, UpstreamFailed
from finetune_pipeline.inference.protocol import Completion, GenerateRequest
from finetune_pipeline.settings import UpstreamSettings

VIA_HEADER = "X-Finetune-Via"
"""Header with the id of the gateway that sends the request, so that a gateway detects requests to itself."""

_QUOTED_CHARACTERS = 300
"""How much of a server's message is quoted in errors."""


class RemoteModel:
    """Client for one model of one server, for use in an event loop.

    Args:
        via: the id of the gateway that sends the requests.
    """

    def __init__(self, settings: UpstreamSettings, via: str = "") -> None:
        import httpx

        self.settings = settings
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
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def generate(self, request: GenerateRequest, on_delta: Callable[[str], None] | None = None) -> Completion:
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
        try:
            async with self._client.stream("POST", "chat/completions", json=self._body(request, seed)) as response:
                if response.status_code >= 400:
                    reply = (await response.aread())[:_QUOTED_CHARACTERS].decode("utf-8", "replace")
                    message = f"{self.settings.url} returned status {response.status_code}: {reply}"
                    if response.status_code in {400, 413, 422}:
                        raise RequestRefused(message)
                    raise UpstreamFailed(f"{message} Check the server, its model name and its key (serving.upstream).")
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        break
                    delta = partial.add(json.loads(data, parse_constant=_reject_constant))
                    if delta and on_delta:
                        on_delta(delta)
        except httpx.HTTPError as error:
            raise UpstreamFailed(
                f"{self.settings.url} does not answer ({type(error).__name__}: {error}). Start the server, or correct "
                "serving.upstream in the loop's YAML."
            ) from error
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            raise UpstreamFailed(
                f"{self.settings.url} sent something that is not an OpenAI-compatible stream ({type(error).__name__}: "
                f"{str(error)[:_QUOTED_CHARACTERS]}). Check serving.upstream.url; it usually ends in /v1."
            ) from error
        if partial.finish_reason is None:
            raise UpstreamFailed(f"{self.settings.url} ended the stream in the middle of a completion; see its log.")
        return partial.completion()

    def _body(self, request: GenerateRequest, seed: int | None) -> dict[str, Any]:
        if request.messages is None:
            raise RequestRefused("A raw prompt cannot be sent to another server; send messages.")
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


@dataclass
class _PartialCompletion:
    """What has arrived of a completion, and the seed that was sent."""

    seed: int | None
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def add(self, event: dict[str, Any]) -> str:
        """Add one event of the stream and return its text delta.

        Raises:
            UpstreamFailed: the event is an error.
            AttributeError, KeyError, IndexError, TypeError, ValueError: it is not of OpenAI's format.
        """
        usage, choices = event.get("usage"), event.get("choices")
        if "error" in event:
            raise UpstreamFailed(f"The other server failed in the middle of a completion: {event['error']}")
        self.usage = dict(usage or self.usage)
        if not choices:
            return ""
        choice = choices[0]
        if choice.get("finish_reason"):
            self.finish_reason = "length" if choice["finish_reason"] == "length" else "stop"
        for token in (choice.get("logprobs") or {}).get("content") or []:
            self.tokens.append(_without_surrogates(token["token"]))
            self.logprobs.append(float(token["logprob"]))
        delta = _without_surrogates((choice.get("delta") or {}).get("content") or "")
        self.text += delta
        return delta

    def completion(self) -> Completion:
        """Return the finished completion."""
        return Completion(
            text=self.text,
            token_ids=[],
            token_texts=self.tokens,
            token_logprobs=self.logprobs,
            finish_reason=self.finish_reason or "stop",
            prompt_tokens=_valid_count(self.usage.get("prompt_tokens"), default=0),
            completion_tokens=_valid_count(self.usage.get("completion_tokens"), default=len(self.tokens)),
            prompt_seconds=0.0,
            generation_seconds=0.0,
            confidence=confidence(self.text, self.tokens, self.logprobs),
            seed=self.seed,
        )


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _valid_count(count: Any, *, default: int) -> int:
    return count if isinstance(count, int) and 0 <= count < 2**31 else default


def _reject_constant(word: str) -> float:
    raise ValueError(f"{word} is not valid JSON")
