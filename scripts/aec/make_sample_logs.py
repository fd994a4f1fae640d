"""Write sample logs: prompts of an architecture firm in its own wording, the base model's answers, and feedback.

    python scripts/aec/make_sample_logs.py

The answers come from the base model: it is exported to a GGUF and generates one answer at a time, as the gateway does.
Only the feedback is simulated, from a seed: corrections, thumbs and missing feedback. A correction is the spec that the
request was generated from. A validation score compares the answer with that spec. Run the script again after every
change of the starter model. Runs with the same model differ only in `latency_ms`.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from jsonschema import Draft202012Validator
from make_benchmark import near, reserved
from make_rules import COMPLIANCE, OUTPUT_SCHEMA
from wording import SLICES, Spec, answer_text, has_later_words, request, rotation

from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.export.model import export
from finetune_pipeline.inference.engine import Engine
from finetune_pipeline.inference.protocol import Completion, GenerateRequest, ModelSpec

DATA = Path(__file__).parents[2] / "data"
STARTER_MODEL = DATA / "starter_model"
SAMPLES = DATA / "samples"
LOOP = "aec_parser"
RULE_PENALTY = 10

Event = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """A batch of logs with its parameters."""

    name: str
    seed: int
    count: int
    firm_fraction: float
    later_fraction: float
    begins: datetime


# Seed 36 draws the dictated fire ratings about equally often; with some seeds, half of them are the same.
FIRST = Batch("aec_parser", 36, 320, 0.8, 0.0, datetime(2026, 3, 2, 8, tzinfo=UTC))
MORE = Batch("aec_parser_more", 32, 72, 0.9, 0.65, datetime(2026, 5, 18, 8, tzinfo=UTC))


@dataclass(frozen=True)
class LoggedRequest:
    """One request of the logs and the spec that it was generated from."""

    id: str
    at: datetime
    user: str
    prompt: str
    spec: Spec


def requests_of(batch: Batch, reserved_prompts: NearIndex, seen: set[str]) -> Iterator[LoggedRequest]:
    """Yield the batch's requests in time order, without near-duplicates of the benchmark and repeated prompts."""
    rng, at = Random(batch.seed), batch.begins
    for number, slice_name in enumerate(rotation(SLICES, batch.count)):
        wording = "firm" if rng.random() < batch.firm_fraction else "plain"
        later = rng.random() < batch.later_fraction
        prompt, spec = _new_request(slice_name, wording, later and wording == "firm", reserved_prompts, seen, rng)
        seen.add(prompt)
        at = _next_time(at, rng)
        identity = str(uuid5(NAMESPACE_URL, f"{batch.name}/{number}"))
        yield LoggedRequest(identity, at, f"u{rng.randint(1, 9):02}", prompt, spec)


def _new_request(
    slice_name: str, wording: str, later: bool, reserved_prompts: NearIndex, seen: set[str], rng: Random
) -> tuple[str, Spec]:
    tries = 0
    while True:
        tries += 1
        # Not every slice has words of the second batch; after 40 attempts any slice is accepted.
        prompt, spec = request(slice_name if tries < 40 else rng.choice(SLICES), wording, rng)
        if prompt in seen or near(prompt, reserved_prompts) or (wording == "firm" and has_later_words(prompt) != later):
            continue
        return prompt, spec


def _next_time(at: datetime, rng: Random) -> datetime:
    """Return a time some minutes later, within the working hours of a weekday."""
    at += timedelta(seconds=rng.randint(200, 6500))
    if at.hour >= 17:
        at = at.replace(hour=8) + timedelta(days=1)
    while at.weekday() >= 5:
        at += timedelta(days=1)
    return at


def generate(requests: list[LoggedRequest]) -> list[tuple[Completion, int]]:
    """Generate the base model's answers one after the other; return each with its milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        model = export(STARTER_MODEL, None, Path(folder), "Q4_K_M")
        with Engine(ModelSpec(gguf=model.gguf, context=512, parallel=1)) as engine:
            answers = []
            for logged in requests:
                messages = [{"role": "user", "content": logged.prompt}]
                (completion,) = engine.generate([GenerateRequest(messages=messages, max_tokens=128)])
                milliseconds = round(1000 * (completion.prompt_seconds + completion.generation_seconds))
                answers.append((completion, milliseconds))
            return answers


def validation_score(output: str, spec: Spec) -> int:
    """Return 0 to 100: the Jaccard similarity of the parameters, less 10 for each compliance rule that fails."""
    try:
        answer = json.loads(output)
    except ValueError:
        return 0
    if not Draft202012Validator(OUTPUT_SCHEMA).is_valid(answer):
        return 0
    given, expected = set(answer.items()), set(spec.items())
    failed = sum(not Draft202012Validator(rule["schema"]).is_valid(answer) for rule in COMPLIANCE)
    return max(0, round(100 * len(given & expected) / len(given | expected)) - RULE_PENALTY * failed)


def interaction(logged: LoggedRequest, completion: Completion, milliseconds: int) -> Event:
    """Return the line that the gateway logs."""
    return {
        "event": "interaction", "id": logged.id, "loop": LOOP, "created_at": _stamp(logged.at), "prompt": logged.prompt,
        "output": completion.text, "model": f"{LOOP}@base",
        "confidence": None if completion.confidence is None else round(completion.confidence, 4), "user": logged.user,
        "latency_ms": milliseconds, "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
    }  # fmt: skip


def feedback(logged: LoggedRequest, output: str, rng: Random) -> Iterator[Event]:
    """Yield the feedback of a validator and a person on the answer; often there is none."""
    score = validation_score(output, logged.spec)
    correct = score == 100
    if rng.random() < (0.65 if correct else 0.3) and not 60 <= score < 80:
        kind = "success" if score >= 80 else "validation_failure"
        yield _feedback(logged, kind, timedelta(seconds=rng.randint(2, 20)), score=score)
    draw = rng.random()
    if correct:
        said = "thumbs_up" if draw < 0.5 else None
    else:
        said = "correction" if draw < 0.87 else "thumbs_down" if draw < 0.94 else None
    delay = timedelta(minutes=rng.randint(1, 90))
    if said == "correction":
        yield _feedback(logged, "correction", delay, correction=answer_text(logged.spec), user=logged.user)
    elif said:
        yield _feedback(logged, said, delay, user=logged.user)
    if said and rng.random() < 0.05:  # another person rates the same answer days later
        late = timedelta(days=rng.randint(1, 4), minutes=rng.randint(1, 200))
        yield _feedback(
            logged, "thumbs_up" if correct else "thumbs_down", late, user=f"u{rng.randint(1, 9):02}", again=1
        )


def _feedback(logged: LoggedRequest, kind: str, delay: timedelta, again: int = 0, **more: Any) -> Event:
    return {
        "event": "feedback", "id": str(uuid5(NAMESPACE_URL, f"{logged.id}/{kind}/{again}")), "loop": LOOP,
        "interaction_id": logged.id, "created_at": _stamp(logged.at + delay), "kind": kind, **more,
    }  # fmt: skip


def _stamp(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def events(batch: Batch, requests: list[LoggedRequest], answers: list[tuple[Completion, int]]) -> list[Event]:
    """Return all lines of the batch in time order."""
    rng, lines = Random(batch.seed + 1000), []
    for logged, (completion, milliseconds) in zip(requests, answers, strict=True):
        lines += [interaction(logged, completion, milliseconds), *feedback(logged, completion.text, rng)]
    # Some thumbs are sent twice with the same id; the store must count them once.
    lines += [line for line in lines if line.get("kind") == "thumbs_up"][3:80:25]
    return sorted(lines, key=lambda line: (str(line["created_at"]), str(line["event"] != "interaction")))


def write(folder: Path, lines: list[Event], by_month: bool) -> None:
    """Write one file per month for the first batch, and a single file for the second."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jsonl"):
        old.unlink()
    files: dict[str, list[Event]] = {}
    for line in lines:
        files.setdefault(str(line["created_at"])[:7] if by_month else "more", []).append(line)
    for name, content in files.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def summary(lines: list[Event]) -> str:
    """Return the number of lines of each kind."""
    kinds = [str(line.get("kind", line["event"])) for line in lines]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))


def main() -> None:
    """Write both batches."""
    reserved_prompts, seen = reserved(), set[str]()
    for batch in (FIRST, MORE):
        requests = list(requests_of(batch, reserved_prompts, seen))
        lines = events(batch, requests, generate(requests))
        write(SAMPLES / batch.name, lines, by_month=batch is FIRST)
        print(f"{SAMPLES / batch.name}: {summary(lines)}")


if __name__ == "__main__":
    main()
