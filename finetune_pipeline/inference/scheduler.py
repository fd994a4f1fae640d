"""Continuous batching: decode all running requests together, and start the next one as soon as a slot is free.

Every decode takes one token of each running completion and fills the rest of the batch with prompts. The beginning that
several prompts share, such as a system prompt, is decoded once: a finished request leaves its tokens in the KV cache,
and a prompt that begins like another one continues from these tokens, or from a copy of them. Nothing here knows of
processes or pipes.
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
from finetune_pipeline.inference.errors import ContextExceeded, RequestRefused
from finetune_pipeline.inference.grammar import Matcher
from finetune_pipeline.inference.native import Batch, NativeAdapter, NativeModel
from finetune_pipeline.inference.protocol import Completion, Delta, GenerateRequest, PromptTokens, TopLogprob
from finetune_pipeline.inference.sampling import TokenSampler

SCORED = 64
"""Tokens of a scored prompt in one decode; each has a row of logits, of up to a megabyte."""

MIN_SHARED = 16
"""Fewest tokens for which a beginning is copied from another sequence, or a sequence is preferred to others. A copy
costs as much as decoding 3 to 15 tokens, since llama.cpp copies a sequence's whole KV cache."""


@dataclass(frozen=True)
class QueuedRequest:
    """A request that waits for a free slot and, if it has a schema, until the schema is compiled."""

    id: int
    request: GenerateRequest
    prompt: list[int]
    matcher: "Future[Matcher] | None" = None
    stream: bool = True


@dataclass(frozen=True)
class AdapterSwap:
    """A change to another adapter that is already in memory, or to None; it waits until all slots are free."""

    id: int
    adapter: NativeAdapter | None


Output = Delta | Completion | AdapterSwap | RequestRefused
"""A text delta, a finished completion, a finished swap, or why there is no completion."""


@dataclass
class Slot:
    """A running request and its sequence in the KV cache.

    Attributes:
        id: of the request.
        seq_id: number of the sequence in the KV cache.
        stream: text deltas are reported.
        with_tokens: deltas carry their tokens.
        top: number of most probable tokens to report at each position.
        score: the prompt's tokens are scored.
        cached: tokens of the prompt that were in the KV cache before it started.
        decoded: tokens of prompt and completion that are in the KV cache.
        reported: tokens of the completion that were in deltas.
        first_token: time at which the first token was sampled; 0 before.
        scores: log-probabilities of the prompt's tokens after the first.
        top_scores: the most probable tokens at these positions.
    """

    id: int
    seq_id: int
    prompt: list[int]
    max_tokens: int
    sampler: TokenSampler
    text: CompletionText
    started: float
    stream: bool
    with_tokens: bool
    top: int
    score: bool
    cached: int = 0
    decoded: int = 0
    reported: int = 0
    first_token: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[TopLogprob]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    top_scores: list[list[TopLogprob]] = field(default_factory=list)

    @property
    def fresh(self) -> bool:
        """Return whether nothing has been decoded for this request."""
        return self.decoded == self.cached

    def next_tokens(self, limit: int) -> list[int]:
        """Return the tokens for the next batch, at most `limit`."""
        if self.decoded < len(self.prompt):
            return self.prompt[self.decoded : self.decoded + min(limit, SCORED if self.score else limit)]
        return self.tokens[-1:][:limit]


def context_exceeded(context: int, found: str) -> ContextExceeded:
    """Return the error for a prompt that is too long, in the words that clients of OpenAI's API look for."""
    return ContextExceeded(
        f"This model's maximum context length is {context} tokens. However, the prompt has {found}, and the answer "
        "needs at least one token. Shorten the prompt, or raise serving.context (evaluation.context in an "
        "evaluation), at most to the context length of the model."
    )


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
        self._held: list[list[int]] = [[] for _ in range(parallel)]  # tokens in the KV cache of each free sequence
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
        self,
        id: int,
        request: GenerateRequest,
        prompt: list[int],
        matcher: "Future[Matcher] | None" = None,
        *,
        stream: bool = True,
    ) -> None:
        """Queue a request with its tokenized prompt; it takes no slot before its schema is compiled.

        Args:
            stream: report text deltas; a completion without them takes less of Python's time.
        """
        if not prompt:
            self._report(id, RequestRefused("The prompt has no tokens; give at least one character."))
        elif len(prompt) >= self._model.context:
            self._report(id, context_exceeded(self._model.context, f"{len(prompt)} tokens"))
        else:
            self._queue.append(QueuedRequest(id, request, prompt, matcher, stream))

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
                self._model.set_adapter(item.adapter)  # which clears the KV cache
                self._held = [[] for _ in self._held]
                self._report(item.id, item)
            else:
                self._start(item)
        waiting = {slot.id for slot in self._running.values() if slot.fresh and self._waits_for_prefix(slot)}
        parts: list[tuple[Slot, list[int], int]] = []
        self._batch.clear()
        free = self._batch.size
        # Completions before prompts: they add one token each, and somebody is reading them.
        for slot in sorted(self._running.values(), key=lambda slot: slot.decoded < len(slot.prompt)):
            tokens = slot.next_tokens(free)
            if not tokens or slot.id in waiting:
                continue
            free -= len(tokens)
            scored = slot.score and slot.decoded < len(slot.prompt)
            rows = len(tokens) if scored else int(slot.decoded + len(tokens) >= len(slot.prompt))
            parts.append((slot, tokens, rows))
        # In the order of the sequences: llama.cpp computes only neighbors with ascending numbers together.
        outputs = []
        for slot, tokens, rows in sorted(parts, key=lambda part: part[0].seq_id):
            self._batch.add(slot.seq_id, slot.decoded, tokens, rows)
            slot.decoded += len(tokens)
            if rows:
                outputs.append((slot, rows))
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
            matcher = item.matcher.result() if item.matcher else None
            sampler = TokenSampler(request, item.prompt, matcher, self._model)
        except RequestRefused as refused:
            self._report(item.id, refused)
            return
        # A continued answer keeps the space between prefill and completion.
        strip_space = request.messages is not None and not request.prefill and self._model.strips_space
        # The free sequence with the longest common beginning, otherwise the one that was used longest ago.
        common = {seq_id: _common_prefix(self._held[seq_id], item.prompt) for seq_id in self._free}
        seq_id = max(self._free, key=lambda seq_id: max(common[seq_id], MIN_SHARED))
        self._free.remove(seq_id)
        self._held[seq_id] = []
        # A scored prompt needs the logits of all its tokens.
        cached = self._model.keep_beginning(seq_id, 0 if request.score_prompt else common[seq_id])
        self._running[seq_id] = Slot(
            id=item.id,
            seq_id=seq_id,
            prompt=item.prompt,
            max_tokens=min(request.max_tokens, self._model.context - len(item.prompt)),
            sampler=sampler,
            text=CompletionText(request.stop, strip_space=strip_space),
            started=time.perf_counter(),
            stream=item.stream,
            with_tokens=request.logprobs,
            top=request.top_logprobs,
            score=request.score_prompt,
            cached=cached,
            decoded=cached,
        )

    def _waits_for_prefix(self, slot: Slot) -> bool:
        """Copy the beginning of a prompt if another sequence has it; return whether one is decoding it now."""
        enough = slot.decoded + MIN_SHARED
        if slot.score or len(slot.prompt) <= enough or not self._model.shares_beginnings:
            return False
        found = {seq_id: _common_prefix(self._held[seq_id], slot.prompt) for seq_id in self._free}
        coming, before = 0, True
        for other in self._running.values():
            before = before and other is not slot
            if other is slot:
                continue
            common = _common_prefix(other.prompt, slot.prompt)
            found[other.seq_id] = min(common, other.decoded)
            if before:
                coming = max(coming, common)
        source = max(found, key=lambda seq_id: found[seq_id], default=None)
        length = found[source] if source is not None else 0
        if coming >= enough and coming > length:
            return True
        if source is not None and length >= enough:
            slot.cached = slot.decoded = self._model.copy_beginning(source, slot.seq_id, length)
        return False

    def _sample(self, outputs: list[tuple[Slot, int]], logits: NDArray[np.float32]) -> None:
        """Sample the next token of each slot from the last of its rows of logits; the others score its prompt."""
        best = logits.argmax(axis=1)
        highest = logits.max(axis=1, keepdims=True)
        # log-sum-exp of each row, so that logit - log_sum is the log-probability
        log_sum = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1, dtype=np.float64))
        row = -1
        for slot, rows in outputs:
            if slot.score and not slot.tokens:
                self._score(slot, logits[row + 1 :][:rows], log_sum[row + 1 :][:rows])
            row += rows
            if slot.decoded < len(slot.prompt):
                continue
            if not slot.max_tokens:
                self._finish(slot, "length")
                continue
            self.sampling_for = slot.id
            try:
                token = int(best[row]) if slot.sampler.is_argmax else slot.sampler.sample(logits[row])
                top = self._most_probable(logits[row], log_sum[row], slot.top) if slot.top else []
                self._append(slot, token, float(logits[row, token] - log_sum[row]), top)
            except RequestRefused as refused:
                self._release(slot)
                self._report(slot.id, refused)
        self.sampling_for = 0

    def _score(self, slot: Slot, logits: NDArray[np.float32], log_sum: NDArray[np.float64]) -> None:
        """Keep the log-probabilities of the prompt's tokens that follow these rows."""
        following = slot.prompt[slot.decoded - len(logits) + 1 : slot.decoded + 1]
        for token, row, total in zip(following, logits, log_sum, strict=False):  # the last row is the answer's
            slot.scores.append(float(row[token] - total))
            slot.top_scores.append(self._most_probable(row, total, slot.top) if slot.top else [])

    def _scored(self, slot: Slot) -> PromptTokens:
        added = int(self._model.adds_bos and slot.prompt[0] == self._model.bos)
        text = CompletionText(strip_space=self._model.strips_space)
        for token in slot.prompt[added:]:
            text.add(self._model.token_bytes(token))
        text.finish()
        without: list[None] = [None] * (1 - added)
        return PromptTokens(
            token_texts=text.token_texts,
            token_logprobs=[*without, *slot.scores],
            top_logprobs=[*([] for _ in without), *slot.top_scores],
        )

    def _most_probable(self, logits: NDArray[np.float32], log_sum: float, count: int) -> list[TopLogprob]:
        count = min(count, len(logits))
        ids = np.argpartition(logits, -count)[-count:]
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        texts = [self._model.token_bytes(int(id)) for id in ids]
        return [
            TopLogprob(text=text.decode("utf-8", "replace"), bytes=list(text), logprob=float(logits[id] - log_sum))
            for id, text in zip(ids, texts, strict=True)
        ]

    def _append(self, slot: Slot, token: int, logprob: float, top: list[TopLogprob]) -> None:
        slot.first_token = slot.first_token or time.perf_counter()
        if self._model.is_end_of_generation(token):
            slot.sampler.check(slot.text.text)
            self._finish(slot, "stop")
            return
        slot.sampler.accept(token)
        slot.tokens.append(token)
        slot.logprobs.append(logprob)
        if slot.top:
            slot.top_logprobs.append(top)
        self._report_delta(slot, slot.text.add(self._model.token_bytes(token)))
        if slot.text.stopped:
            self._finish(slot, "stop")
        elif len(slot.tokens) >= slot.max_tokens:
            self._finish(slot, "length")

    def _finish(self, slot: Slot, reason: Literal["stop", "length"]) -> None:
        self._release(slot)
        self._report_delta(slot, slot.text.finish())
        now = time.perf_counter()
        completion = Completion(
            text=slot.text.text,
            token_ids=slot.tokens,
            token_texts=slot.text.token_texts,
            token_logprobs=slot.logprobs,
            top_logprobs=slot.top_logprobs,
            finish_reason="stop" if slot.text.stopped else reason,
            prompt_tokens=len(slot.prompt),
            completion_tokens=len(slot.tokens),
            cached_tokens=slot.cached,
            prompt_seconds=(slot.first_token or now) - slot.started,
            generation_seconds=now - (slot.first_token or now),
            confidence=None if slot.score else confidence(slot.text.text, slot.text.token_texts, slot.logprobs),
            seed=slot.sampler.seed,
            scored=self._scored(slot) if slot.score else None,
        )
        self._report(slot.id, completion)

    def _report_delta(self, slot: Slot, text: str) -> None:
        if not text or not slot.stream:
            return
        if not slot.with_tokens:
            self._report(slot.id, Delta(text=text))
            return
        first, slot.reported = slot.reported, len(slot.tokens)
        delta = Delta(
            text=text,
            token_texts=slot.text.token_texts[first:],
            token_logprobs=slot.logprobs[first:],
            top_logprobs=slot.top_logprobs[first:],
        )
        self._report(slot.id, delta)

    def _release(self, slot: Slot) -> None:
        self._held[slot.seq_id] = (slot.prompt + slot.tokens)[: slot.decoded]
        slot.sampler.close()
        del self._running[slot.seq_id]
        self._free.append(slot.seq_id)


def _common_prefix(held: list[int], prompt: list[int]) -> int:
    """Return how many tokens both begin with, without the prompt's last token, whose logits are needed."""
    most = min(len(held), len(prompt) - 1)
    return next((index for index in range(most) if held[index] != prompt[index]), most)
