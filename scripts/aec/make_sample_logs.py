"""Writes sample logs: what a practice asked the base model in its own wording, what came back, what people thought.

    python scripts/aec/make_sample_logs.py

The answers are the base model's own: it is exported to the GGUF that would serve and asked one prompt at a time, as a
gateway would. Only the people are simulated: who corrects, who shows a thumb and who says nothing is drawn from a seed.
A correction is the answer that the request was made from. A validation score compares the answer with the element as it
was drawn afterwards. Run it again after every change of the starter model; then only `latency_ms` differs between runs.
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
BROKEN_RULE_COSTS = 10

Event = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """One lot of logs."""

    name: str
    seed: int
    count: int
    firm_share: float
    later_share: float
    begins: datetime


# Seed 36 draws the spoken fire ratings about equally often; some seeds give one of them half of all.
FIRST = Batch("aec_parser", 36, 320, 0.8, 0.0, datetime(2026, 3, 2, 8, tzinfo=UTC))
MORE = Batch("aec_parser_more", 32, 72, 0.9, 0.65, datetime(2026, 5, 18, 8, tzinfo=UTC))


@dataclass(frozen=True)
class Asked:
    """One request of the logs and the spec it was made from."""

    id: str
    at: datetime
    user: str
    prompt: str
    spec: Spec


def asked(batch: Batch, kept_away: NearIndex, taken: set[str]) -> Iterator[Asked]:
    """The batch's requests in time order: none near the benchmark, none that was asked before."""
    rng, at = Random(batch.seed), batch.begins
    for number, slice_name in enumerate(rotation(SLICES, batch.count)):
        wording = "firm" if rng.random() < batch.firm_share else "plain"
        later = rng.random() < batch.later_share
        prompt, spec = _new_request(slice_name, wording, later and wording == "firm", kept_away, taken, rng)
        taken.add(prompt)
        at = _next_moment(at, rng)
        identity = str(uuid5(NAMESPACE_URL, f"{batch.name}/{number}"))
        yield Asked(identity, at, f"u{rng.randint(1, 9):02}", prompt, spec)


def _new_request(
    slice_name: str, wording: str, later: bool, kept_away: NearIndex, taken: set[str], rng: Random
) -> tuple[str, Spec]:
    tries = 0
    while True:
        tries += 1
        # Not every slice has words of the second batch; after a while another slice's will do.
        prompt, spec = request(slice_name if tries < 40 else rng.choice(SLICES), wording, rng)
        if prompt in taken or near(prompt, kept_away) or (wording == "firm" and has_later_words(prompt) != later):
            continue
        return prompt, spec


def _next_moment(at: datetime, rng: Random) -> datetime:
    """Some minutes later, within working hours of a working day."""
    at += timedelta(seconds=rng.randint(200, 6500))
    if at.hour >= 17:
        at = at.replace(hour=8) + timedelta(days=1)
    while at.weekday() >= 5:
        at += timedelta(days=1)
    return at


def answers(requests: list[Asked]) -> list[tuple[Completion, int]]:
    """The base model's answers with their milliseconds, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        model = export(STARTER_MODEL, None, Path(folder), "Q4_K_M")
        with Engine(ModelSpec(gguf=model.gguf, context=512, parallel=1)) as engine:
            return [_answer(engine, item.prompt) for item in requests]


def _answer(engine: Engine, prompt: str) -> tuple[Completion, int]:
    messages = [{"role": "user", "content": prompt}]
    (completion,) = engine.generate([GenerateRequest(messages=messages, max_tokens=128)])
    return completion, round(1000 * (completion.prompt_seconds + completion.generation_seconds))


def validation_score(output: str, spec: Spec) -> int:
    """0 to 100: right parameters over all that were asked for or given, less 10 for each broken compliance rule."""
    try:
        got = json.loads(output)
    except ValueError:
        return 0
    if not Draft202012Validator(OUTPUT_SCHEMA).is_valid(got):
        return 0
    given, wanted = set(got.items()), set(spec.items())
    broken = sum(not Draft202012Validator(rule["schema"]).is_valid(got) for rule in COMPLIANCE)
    return max(0, round(100 * len(given & wanted) / len(given | wanted)) - BROKEN_RULE_COSTS * broken)


def interaction(item: Asked, completion: Completion, milliseconds: int) -> Event:
    """The line that a gateway logs."""
    return {
        "event": "interaction", "id": item.id, "loop": LOOP, "created_at": _stamp(item.at), "prompt": item.prompt,
        "output": completion.text, "model": f"{LOOP}@base",
        "confidence": None if completion.confidence is None else round(completion.confidence, 4), "user": item.user,
        "latency_ms": milliseconds, "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
    }  # fmt: skip


def feedback(item: Asked, output: str, rng: Random) -> Iterator[Event]:
    """What a validator and a person thought of the answer; often nothing."""
    score = validation_score(output, item.spec)
    right = score == 100
    if rng.random() < (0.65 if right else 0.3) and not 60 <= score < 80:
        kind = "success" if score >= 80 else "validation_failure"
        yield _feedback(item, kind, timedelta(seconds=rng.randint(2, 20)), score=score)
    said = _person(right, rng)
    delay = timedelta(minutes=rng.randint(1, 90))
    if said == "correction":
        yield _feedback(item, "correction", delay, correction=answer_text(item.spec), user=item.user)
    elif said:
        yield _feedback(item, said, delay, user=item.user)
    if said and rng.random() < 0.05:  # somebody looks at the old answer days later, and shows a thumb too
        late = timedelta(days=rng.randint(1, 4), minutes=rng.randint(1, 200))
        yield _feedback(item, "thumbs_up" if right else "thumbs_down", late, user=f"u{rng.randint(1, 9):02}", again=1)


def _person(right: bool, rng: Random) -> str | None:
    draw = rng.random()
    if right:
        return "thumbs_up" if draw < 0.5 else None
    return "correction" if draw < 0.87 else "thumbs_down" if draw < 0.94 else None


def _feedback(item: Asked, kind: str, delay: timedelta, again: int = 0, **more: Any) -> Event:
    return {
        "event": "feedback", "id": str(uuid5(NAMESPACE_URL, f"{item.id}/{kind}/{again}")), "loop": LOOP,
        "interaction_id": item.id, "created_at": _stamp(item.at + delay), "kind": kind, **more,
    }  # fmt: skip


def _stamp(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def events(batch: Batch, requests: list[Asked], answered: list[tuple[Completion, int]]) -> list[Event]:
    """All lines of the batch, in time order."""
    rng, lines = Random(batch.seed + 1000), []
    for item, (completion, milliseconds) in zip(requests, answered, strict=True):
        lines += [interaction(item, completion, milliseconds), *feedback(item, completion.text, rng)]
    # A thumb that an impatient client sent twice: the same id, so the store must count it once.
    lines += [line for line in lines if line.get("kind") == "thumbs_up"][3:80:25]
    return sorted(lines, key=lambda line: (str(line["created_at"]), str(line["event"] != "interaction")))


def write(folder: Path, lines: list[Event], by_month: bool) -> None:
    """One file for each month of the first batch, one file in all for the second."""
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
    """How many lines of each kind."""
    kinds = [str(line.get("kind", line["event"])) for line in lines]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))


def main() -> None:
    """Write both batches."""
    kept_away, taken = reserved(), set[str]()
    for batch in (FIRST, MORE):
        requests = list(asked(batch, kept_away, taken))
        lines = events(batch, requests, answers(requests))
        write(SAMPLES / batch.name, lines, by_month=batch is FIRST)
        print(f"{SAMPLES / batch.name}: {summary(lines)}")


if __name__ == "__main__":
    main()
