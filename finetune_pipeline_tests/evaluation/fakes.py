"""A fake engine that answers from a dictionary, and small benchmarks."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from finetune_pipeline.evaluation.benchmark import BenchmarkQuestion
from finetune_pipeline.evaluation.scoring import Scorer, Scores
from finetune_pipeline.inference.errors import AnswerRefused, EngineCrashed, RequestRefused
from finetune_pipeline.inference.protocol import Completion, GenerateRequest, ModelSpec

CONSTRAINED = "constrained"
WALL = {"element": "wall", "material": "brick", "thickness_mm": 230, "fire_rating_hr": 2}
SCHEMA = {
    "type": "object",
    "properties": {
        "element": {"enum": ["wall", "door"]},
        "material": {"type": "string"},
        "thickness_mm": {"type": "number"},
        "fire_rating_hr": {"type": "number"},
        "width_mm": {"type": "number"},
    },
    "required": ["element"],
    "additionalProperties": False,
}


def line(name: str, **changes: object) -> dict[str, object]:
    question = {"id": name, "slice": "walls", "wording": "plain", "prompt": f"A wall, please: {name}", "expected": WALL}
    return {**question, **changes}


def question(expected: Any, **fields: Any) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        **{"id": "q1", "slice": "walls", "prompt": "A wall, please", "expected": expected, **fields}
    )


def score(scorer: Scorer, expected: Any, answer: str) -> Scores:
    return scorer.score(question(expected), answer)


def write_benchmark(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in lines), encoding="utf-8")
    return path


class FakeEngines:
    """Opens fake engines, whose GGUF is JSON of prompt -> answer, and records the prompts of each file.

    Under a schema, the answer to a prompt in `CONSTRAINED` is the one there; None there is a refused answer.
    """

    def __init__(self, crash_after: int | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.opened: list[ModelSpec] = []
        self.schemas: list[dict[str, Any] | None] = []
        self.crash_after = crash_after

    def __call__(self, spec: ModelSpec) -> "FakeEngine":
        self.opened.append(spec)
        return FakeEngine(self, spec)


class FakeEngine:
    def __init__(self, engines: FakeEngines, spec: ModelSpec) -> None:
        self.engines, self.spec = engines, spec
        self.answers = json.loads(spec.gguf.read_text())

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def submit(self, request: GenerateRequest) -> "Future[Completion]":
        prompt = (request.messages or [])[-1]["content"]
        future: Future[Completion] = Future()
        if len(prompt) > self.spec.context:
            future.set_exception(RequestRefused(f"the prompt has {len(prompt)} tokens; raise context"))
            return future
        crash_after = self.engines.crash_after
        if crash_after is not None and len(self.engines.asked) >= crash_after:
            future.set_exception(EngineCrashed("the process was ended by SIGSEGV", "SIGSEGV"))
            return future
        self.engines.asked.append((self.spec.gguf.name, prompt))
        self.engines.schemas.append(request.json_schema)
        text = self.answers.get(prompt, "I do not know")
        if request.json_schema is not None:
            text = self.answers.get(CONSTRAINED, {}).get(prompt, text)
        if text is None:
            future.set_exception(AnswerRefused("The model's answer violates uniqueItems of json_schema"))
            return future
        future.set_result(completion(text, confidence=0.9 if prompt in self.answers else 0.2))
        return future


def completion(text: str, confidence: float | None = None) -> Completion:
    return Completion(
        text=text,
        token_ids=[1, 2],
        token_texts=[text, ""],
        token_logprobs=[-0.1, -0.1],
        finish_reason="stop",
        prompt_tokens=9,
        completion_tokens=2,
        prompt_seconds=0.01,
        generation_seconds=0.02,
        confidence=confidence,
    )
