"""Continuous batching: decode all running requests together, and start the next one as soon as a slot is free.

Every decode takes one token of each running completion and fills the rest of the batch with prompts. Nothing here
knows of processes or pipes.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finetune_pipeline.inference.completion_text import CompletionText
from finetune_pipeline.inference.confidence import confidence
from finetune_pipeline.inference.errors import RequestRefused
from finetune_pipeline.inference.grammar import Matcher
from finetune_pipeline.inference.native import Batch, NativeAdapter, NativeModel
from finetune_pipeline.inference.protocol import Completion, GenerateRequest
from finetune_pipeline.inference.sampling import TokenSampler


@dataclass(frozen=True)
class QueuedRequest:
    """A request that waits for a free slot and, if it has a schema, until the schema is compiled."""

    id: int
    request: GenerateRequest
    prompt: list[int]
    matcher: "Future[Matcher] | None" = None


@dataclass(frozen=True)
class AdapterSwap:
    """A change to another adapter that is already in memory, or to None; it waits until all slots are free."""

    id: int
    adapter: NativeAdapter | None


Output = str | Completion | AdapterSwap | RequestRefused
"""A text delta, a finished completion, a finished swap, or why there is no completion."""


@dataclass
class Slot:
    """A running request and its sequence in the KV cache.

    Attributes:
        id: of the request.
        seq_id: number of the sequence in the KV cache.
        decoded: tokens of prompt and completion that the model has seen.
        first_token: time at which the first token was sampled; 0 before.
    """

    id: int
    seq_id: int
    prompt: list[int]
    max_tokens: int
    sampler: TokenSampler
    text: CompletionText
    started: float
    decoded: int = 0
    first_token: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def next_tokens(self, limit: int) -> list[int]:
        """Return the tokens for the next batch, at most `limit`."""
        if self.decoded < len(self.prompt):
            return self.prompt[self.decoded : self.decoded + limit]
        return self.tokens[-1:][:limit]


class Scheduler:
    """Runs requests and calls `report(id, output)` with each text delta and with the result.

    Attributes:
        sampling_for: id of the request whose next token is being sampled, 0 otherwise; other threads may read it.
    """

    def __init__(self, model: NativeModel, parallel: int, report: Callable[[int, Output], None]) -> None:
        self._model = model
        self._report = report
        self.sampling_for = 0
        self._batch = Batch()
        self._free = deque(range(parallel))
        self._running: dict[int, Slot] = {}
        self._queue: deque[QueuedRequest | AdapterSwap] = deque()

    @property
    def busy(self) -> bool:
        """Return whether there is something to do now."""
        return bool(self._running) or self._next() is not None

    @property
    def empty(self) -> bool:
        """Return whether no request is running or queued."""
        return not self._running and not self._queue

    def add(
        self, id: int, request: GenerateRequest, prompt: list[int], matcher: "Future[Matcher] | None" = None
    ) -> None:
        """Queue a request with its tokenized prompt; it takes no slot before its schema is compiled."""
        if not prompt:
            self._report(id, RequestRefused("The prompt has no tokens; give at least one character."))
        elif len(prompt) >= self._model.context:
            message = (
                f"The prompt has {len(prompt)} tokens, more than the context of {self._model.context} tokens can hold "
                "together with a completion. Shorten it, or raise "
                "serving.context or evaluation.context (at most the context length of the model)."
            )
            self._report(id, RequestRefused(message))
        else:
            self._queue.append(QueuedRequest(id, request, prompt, matcher))

    def swap(self, id: int, adapter: Path | None) -> None:
        """Queue a change of adapter: requests before it use the old adapter, requests after it the new one.

        The file is read now, so that no request waits for an adapter that cannot be used.

        Raises:
            ModelNotLoaded: it cannot be used; nothing changes.
        """
        self._queue.append(AdapterSwap(id, self._model.load_adapter(adapter) if adapter else None))

    def cancel(self, id: int) -> None:
        """Drop a request or swap; do nothing if the id is unknown or finished."""
        for item in [item for item in self._queue if item.id == id]:
            self._queue.remove(item)
            if isinstance(item, QueuedRequest) and item.matcher:
                item.matcher.cancel()
            if isinstance(item, AdapterSwap) and item.adapter:
                item.adapter.close()
        for slot in [slot for slot in self._running.values() if slot.id == id]:
            self._release(slot)

    def step(self) -> None:
        """Decode one batch: one token of every running completion, and as many prompt tokens as fit."""
        while self._free and (item := self._next()) is not None:
            self._queue.remove(item)
            if isinstance(item, AdapterSwap):
                self._model.set_adapter(item.adapter)
                self._report(item.id, item)
            else:
                self._start(item)
        self._batch.clear()
        outputs = []
        # Completions before prompts: they add one token each, and somebody is reading them.
        for slot in sorted(self._running.values(), key=lambda slot: slot.decoded < len(slot.prompt)):
            tokens = slot.next_tokens(self._batch.free)
            if not tokens:
                continue
            output = slot.decoded + len(tokens) >= len(slot.prompt)
            self._batch.add(slot.seq_id, slot.decoded, tokens, output=output)
            slot.decoded += len(tokens)
            if output:
                outputs.append(slot)
        if self._batch.used:
            self._sample(outputs, self._model.decode(self._batch))

    def _next(self) -> QueuedRequest | AdapterSwap | None:
        """Return what may start now: a request may overtake one whose schema is being compiled; a swap may not."""
        for item in self._queue:
            if isinstance(item, AdapterSwap):
                # Requests after it wait too: a completion is generated with one adapter.
                return item if item is self._queue[0] and not self._running else None
            if item.matcher is None or item.matcher.done():
                return item
        return None

    def _start(self, item: QueuedRequest) -> None:
        request = item.request
        try:
            sampler = TokenSampler(request, item.matcher.result() if item.matcher else None)
        except RequestRefused as refused:
            self._report(item.id, refused)
            return
        seq_id = self._free.popleft()
        self._running[seq_id] = Slot(
            id=item.id,
            seq_id=seq_id,
            prompt=item.prompt,
            max_tokens=min(request.max_tokens, self._model.context - len(item.prompt)),
            sampler=sampler,
            text=CompletionText(request.stop, strip_space=request.messages is not None and self._model.strips_space),
            started=time.perf_counter(),
        )

    def _sample(self, slots: list[Slot], logits: NDArray[np.float32]) -> None:
        """Sample the next token of each slot from its row of logits."""
        best = logits.argmax(axis=1)
        highest = logits.max(axis=1, keepdims=True)
        # log-sum-exp of each row, so that logit - log_sum is the log-probability
        log_sum = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1, dtype=np.float64))
        for row, slot in enumerate(slots):
            self.sampling_for = slot.id
            try:
                token = int(best[row]) if slot.sampler.is_argmax else slot.sampler.sample(logits[row])
                self._append(slot, token, float(logits[row, token] - log_sum[row]))
            except RequestRefused as refused:
                self._release(slot)
                self._report(slot.id, refused)
        self.sampling_for = 0

    def _append(self, slot: Slot, token: int, logprob: float) -> None:
        slot.first_token = slot.first_token or time.perf_counter()
        if self._model.is_end_of_generation(token):
            slot.sampler.check(slot.text.text)
            self._finish(slot, "stop")
            return
        slot.sampler.accept(token)
        slot.tokens.append(token)
        slot.logprobs.append(logprob)
        delta = slot.text.add(self._model.token_bytes(token))
        if delta:
            self._report(slot.id, delta)
        if slot.text.stopped:
            self._finish(slot, "stop")
        elif len(slot.tokens) >= slot.max_tokens:
            self._finish(slot, "length")

    def _finish(self, slot: Slot, reason: Literal["stop", "length"]) -> None:
        self._release(slot)
        rest = slot.text.finish()
        if rest:
            self._report(slot.id, rest)
        now = time.perf_counter()
        completion = Completion(
            text=slot.text.text,
            token_ids=slot.tokens,
            token_texts=slot.text.token_texts,
            token_logprobs=slot.logprobs,
            finish_reason="stop" if slot.text.stopped else reason,
            prompt_tokens=len(slot.prompt),
            completion_tokens=len(slot.tokens),
            prompt_seconds=slot.first_token - slot.started,
            generation_seconds=now - slot.first_token,
            confidence=confidence(slot.text.text, slot.text.token_texts, slot.logprobs),
            seed=slot.sampler.seed,
        )
        self._report(slot.id, completion)

    def _release(self, slot: Slot) -> None:
        self._model.clear_sequence(slot.seq_id)
        slot.sampler.close()
        del self._running[slot.seq_id]
        self._free.append(slot.seq_id)
