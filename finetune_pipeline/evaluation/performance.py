"""What a model costs to run: requests per second at saturation, peak memory, and the price of a million tokens.

`concurrency` requests are decoded together, and a new one starts as soon as one is finished, as in a gateway with more
requests than it can answer. The models are measured one after the other, each in a process of its own. Speed is
measured one prompt at a time instead, with the models in turns (`run.measure_speed`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

import psutil
from pydantic import Field

from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.errors import AnswerRefused
from finetune_pipeline.inference.protocol import Completion, GenerateRequest, ModelSpec
from finetune_pipeline.inference.threads import BackgroundLoad, available_cores
from finetune_pipeline.records import Record

WAVES = 4
"""Requests of a measurement, as a multiple of the concurrency."""


class Performance(Record):
    """Throughput of one model at saturation, and its peak memory."""

    requests_per_second: float = Field(ge=0)
    tokens_per_second: float = Field(ge=0, description="Generated tokens of all requests by the wall time.")
    concurrency: int = Field(ge=1, description="Requests decoded together.")
    requests: int = Field(ge=1, description="Number of completed requests.")
    prompt_tokens: float = Field(ge=0, description="Mean length of the prompts.")
    response_tokens: float = Field(ge=0, description="Mean length of the answers.")
    seconds: float = Field(ge=0, description="Duration of the measurement.")
    peak_memory_bytes: int | None = Field(
        default=None, description="Peak resident memory of the engine's process; None where the system has no number."
    )
    price_per_hour: float | None = Field(default=None, description="evaluation.price_per_hour at that time.")
    background_cores: float = Field(default=0.0, ge=0, description="Cores that other processes used meanwhile.")

    @property
    def cost_per_million_tokens(self) -> float | None:
        """Price of a million generated tokens at saturation, in the currency of price_per_hour."""
        if self.price_per_hour is None or not self.tokens_per_second:
            return None
        return self.price_per_hour / 3600 / self.tokens_per_second * 1e6

    @property
    def conditions(self) -> str:
        """Concurrency, prompt length and duration in words, and what other processes used if it is noticeable."""
        busy = f", while other processes used {self.background_cores:.1f} cores" if self.background_cores > 0.1 else ""
        return (
            f"{self.concurrency} at a time, {self.requests} requests with {self.prompt_tokens:.0f} prompt tokens on "
            f"average, {self.seconds:.1f} s{busy}"
        )


class SaturatedEngine(Protocol):
    """The part of an engine that a measurement needs."""

    def submit(self, request: GenerateRequest) -> "Future[Completion]":
        """Start to generate an answer."""
        ...


def measure_performance(
    specs: Mapping[str, ModelSpec],
    requests: Sequence[GenerateRequest],
    concurrency: int,
    price_per_hour: float | None,
    open_engine: Callable[[ModelSpec], AbstractContextManager[SaturatedEngine]] = Engine,
) -> dict[str, Performance]:
    """Measure models with `WAVES * concurrency` of these requests, repeated if there are fewer.

    Returns:
        The result of each model, by its name in `specs`, without models that refused an answer: the other requests
        would not have been at saturation.
    """
    asked = [requests[index % len(requests)] for index in range(WAVES * concurrency)]
    found = {}
    for name, spec in specs.items():
        conditions = {"parallel": concurrency, "fixed_threads": True}
        with open_engine(spec.model_copy(update=conditions)) as engine, suppress(AnswerRefused):
            _generate(engine, asked[:1])  # warm-up
            others = BackgroundLoad(children=True)
            start = time.perf_counter()
            completions = _generate(engine, asked)
            seconds = time.perf_counter() - start
            found[name] = Performance(
                requests_per_second=len(completions) / seconds,
                tokens_per_second=sum(one.completion_tokens for one in completions) / seconds,
                concurrency=concurrency,
                requests=len(completions),
                prompt_tokens=sum(one.prompt_tokens for one in completions) / len(completions),
                response_tokens=sum(one.completion_tokens for one in completions) / len(completions),
                seconds=seconds,
                peak_memory_bytes=peak_memory(engine.pid) if isinstance(engine, Engine) else None,
                price_per_hour=price_per_hour,
                background_cores=min(others.since_last(), len(available_cores())),
            )
    return found


def _generate(engine: SaturatedEngine, requests: Sequence[GenerateRequest]) -> list[Completion]:
    futures = [engine.submit(request) for request in requests]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def peak_memory(pid: int) -> int | None:
    """Return the peak resident memory of a process in bytes, or what it uses now where only that is known."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        lines = status.read_text(encoding="ascii", errors="replace").split("\n")
        peak = next((line for line in lines if line.startswith("VmHWM")), None)
        if peak is not None:
            return int(peak.split()[1]) * 1024
    with suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return None
