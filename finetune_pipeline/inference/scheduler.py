"""Continuous batching: the sequences of many requests go through the model together, each at its own pace.

Every decode takes one token of each running answer and fills the rest with prompts; a sequence that ends makes room for
the next request at once. Nothing here knows of processes or pipes.
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
from finetune_pipeline.inference.native import Adapter, Batch, NativeModel
from finetune_pipeline.inference.protocol import Completion, GenerateRequest
from finetune_pipeline.inference.sampling import TokenChooser


@dataclass(frozen=True)
class Question:
    """A request that waits for a free sequence and, if it has a schema, until the schema is compiled."""

    id: int
    request: GenerateRequest
    prompt: list[int]
    matcher: "Future[Matcher] | None" = None

    @property
    def ready(self) -> bool:
        """Whether it can start as soon as a sequence is free."""
        return self.matcher is None or self.matcher.done()


@dataclass(frozen=True)
class Swap:
    """A change to an adapter that is in memory already, or to none; it waits until the answers before it are done."""

    id: int
    adapter: Adapter | None


Outcome = str | Completion | Swap | RequestRefused
"""A piece of an answer, a whole answer, a swap that is done, or why there is no answer."""


@dataclass
class Sequence:
    """One answer in the making."""

    id: int
    slot: int
    prompt: list[int]
    limit: int
    chooser: TokenChooser
    text: CompletionText
    started: float
    done: int = 0
    """Tokens that the model has seen; the prompt first, then the answer."""
    first_token: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def next_tokens(self, room: int) -> list[int]:
        """What it would put into the next batch, at most `room` tokens."""
        if self.done < len(self.prompt):
            return self.prompt[self.done : self.done + room]
        return self.tokens[-1:][:room]

    def completion(self, finish_reason: Literal["stop", "length"]) -> Completion:
        """The answer, at its end."""
        now = time.perf_counter()
        first = self.first_token or now
        return Completion(
            text=self.text.text,
            token_ids=self.tokens,
            token_texts=self.text.token_texts,
            token_logprobs=self.logprobs,
            finish_reason=finish_reason,
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.tokens),
            prompt_seconds=first - self.started,
            generation_seconds=now - first,
            confidence=confidence(self.text.text, self.text.token_texts, self.logprobs),
            seed=self.chooser.seed,
        )


class Scheduler:
    """Takes requests, and hands their outcomes to `report(id, outcome)`; a piece goes out as soon as it is known.

    Attributes:
        choosing_for: id of the request whose next token is being chosen, 0 at other times; other threads may read it.
    """

    def __init__(self, model: NativeModel, parallel: int, report: Callable[[int, Outcome], None]) -> None:
        self._model = model
        self._report = report
        self.choosing_for = 0
        self._batch = Batch()
        self._free = deque(range(parallel))
        self._running: dict[int, Sequence] = {}
        self._waiting: deque[Question | Swap] = deque()

    @property
    def busy(self) -> bool:
        """Whether there is something to do now."""
        return bool(self._running) or self._next() is not None

    @property
    def empty(self) -> bool:
        """Whether there is neither work nor a request that waits."""
        return not self._running and not self._waiting

    def add(
        self, id: int, request: GenerateRequest, prompt: list[int], matcher: "Future[Matcher] | None" = None
    ) -> None:
        """Queue a request whose prompt is tokenized; it takes no sequence until its schema is compiled."""
        if not prompt:
            self._report(id, RequestRefused("the prompt has no tokens; give at least one character"))
        elif len(prompt) >= self._model.context:
            self._report(id, self._too_long(len(prompt)))
        else:
            self._waiting.append(Question(id, request, prompt, matcher))

    def swap(self, id: int, adapter: Path | None) -> None:
        """Queue a change of adapter: what came before it is answered with the old one, what comes after with this.

        The file is read now, so that nobody waits for an adapter that cannot be used.

        Raises:
            ModelNotLoaded: it cannot be used; nothing changes.
        """
        self._waiting.append(Swap(id, self._model.load_adapter(adapter) if adapter else None))

    def _too_long(self, length: int) -> RequestRefused:
        return RequestRefused(
            f"the prompt has {length} tokens, more than the context of {self._model.context} tokens can hold with an "
            "answer; shorten it, or open the engine with a larger context (up to what the model was trained for)"
        )

    def cancel(self, id: int) -> None:
        """Forget a request; one that is not known, or is over, is none."""
        for item in [item for item in self._waiting if item.id == id]:
            self._waiting.remove(item)
            if isinstance(item, Question) and item.matcher:
                item.matcher.cancel()
            if isinstance(item, Swap) and item.adapter:
                item.adapter.close()
        for sequence in [sequence for sequence in self._running.values() if sequence.id == id]:
            self._leave(sequence)

    def step(self) -> None:
        """One decode: every running answer grows by a token, prompts by as much as there is room for."""
        self._admit()
        self._batch.clear()
        outputs = []
        # Answers before prompts: their sequences have few tokens to add, and somebody is reading them.
        for sequence in sorted(self._running.values(), key=lambda each: each.done < len(each.prompt)):
            tokens = sequence.next_tokens(self._batch.free)
            if not tokens:
                continue
            output = sequence.done + len(tokens) >= len(sequence.prompt)
            self._batch.add(sequence.slot, sequence.done, tokens, output=output)
            sequence.done += len(tokens)
            if output:
                outputs.append(sequence)
        if self._batch.used:
            self._choose(outputs, self._model.decode(self._batch))

    def _next(self) -> Question | Swap | None:
        """Return what may start now: a request may overtake one whose schema is being compiled; a swap may not."""
        for item in self._waiting:
            if isinstance(item, Swap):
                # Requests after it wait too: one adapter generates all of an answer.
                return item if item is self._waiting[0] and not self._running else None
            if item.ready:
                return item
        return None

    def _admit(self) -> None:
        while self._free and (item := self._next()) is not None:
            self._waiting.remove(item)
            if isinstance(item, Swap):
                self._model.use(item.adapter)
                self._report(item.id, item)
            else:
                self._start(item)

    def _start(self, item: Question) -> None:
        request, prompt = item.request, item.prompt
        try:
            chooser = TokenChooser(request, item.matcher.result() if item.matcher else None)
        except RequestRefused as refused:
            self._report(item.id, refused)
            return
        slot = self._free.popleft()
        self._running[slot] = Sequence(
            id=item.id,
            slot=slot,
            prompt=prompt,
            limit=min(request.max_tokens, self._model.context - len(prompt)),
            chooser=chooser,
            text=CompletionText(request.stop, strip_space=request.messages is not None and self._model.strips_space),
            started=time.perf_counter(),
        )

    def _choose(self, sequences: list[Sequence], logits: NDArray[np.float32]) -> None:
        best = logits.argmax(axis=1)
        highest = logits.max(axis=1, keepdims=True)
        totals = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1, dtype=np.float64))
        for row, sequence in enumerate(sequences):
            self.choosing_for = sequence.id
            try:
                token = int(best[row]) if sequence.chooser.is_greedy else sequence.chooser.choose(logits[row])
                self._take(sequence, token, float(logits[row, token] - totals[row]))
            except RequestRefused as refused:
                self._leave(sequence)
                self._report(sequence.id, refused)
        self.choosing_for = 0

    def _take(self, sequence: Sequence, token: int, logprob: float) -> None:
        sequence.first_token = sequence.first_token or time.perf_counter()
        if self._model.ends(token):
            sequence.chooser.check(sequence.text.text)
            self._finish(sequence, "stop")
            return
        sequence.chooser.accept(token)
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        self._tell(sequence, sequence.text.add(self._model.piece(token)))
        if sequence.text.stopped:
            self._finish(sequence, "stop")
        elif len(sequence.tokens) >= sequence.limit:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: Literal["stop", "length"]) -> None:
        self._leave(sequence)
        self._tell(sequence, sequence.text.finish())
        self._report(sequence.id, sequence.completion("stop" if sequence.text.stopped else reason))

    def _tell(self, sequence: Sequence, piece: str) -> None:
        if piece:
            self._report(sequence.id, piece)

    def _leave(self, sequence: Sequence) -> None:
        self._model.forget(sequence.slot)
        sequence.chooser.close()
        del self._running[sequence.slot]
        self._free.append(sequence.slot)
