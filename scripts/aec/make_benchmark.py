"""Write the benchmark of the AEC parser: hand-written questions first, then generated ones in separate sentences.

    python scripts/aec/make_benchmark.py

The seed and `hand_written.jsonl` determine the result. Scores on a changed benchmark cannot be compared with earlier
ones. The generators of training text drop every prompt that is a near-duplicate of one in `reserved()`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from wording import SLICES, has_later_words, ordered, request

from finetune_pipeline.curation.decontamination import NearIndex

HERE = Path(__file__).parent
BENCHMARK = HERE.parents[1] / "data" / "benchmarks" / "aec_parser.jsonl"
HAND_WRITTEN = HERE / "hand_written.jsonl"
SEED = 20240601
PER_SLICE_AND_WORDING = 19
# At most this many of a slice's firm prompts may use a word that the firm adopted later.
LATER_PER_SLICE = 1
# Jaccard similarity from which two prompts are near-duplicates, as in the loop's curation.
NEAR = 0.8

# The prompt of `finetune demo`; nothing near it is trained on, so that its answer is never memorized.
DEMO_PROMPT = "150 mm concrete wall fire-rated two hours California seismic D"

Question = dict[str, Any]


def hand_written() -> list[Question]:
    """Return the hand-written questions, in the file's order."""
    return [json.loads(line) | {"origin": "hand"} for line in HAND_WRITTEN.read_text(encoding="utf-8").splitlines()]


def benchmark() -> list[Question]:
    """Return all questions of the benchmark, grouped by slice and numbered within it."""
    by_hand = hand_written()
    seen = [DEMO_PROMPT, *(question["prompt"] for question in by_hand)]
    rng = Random(SEED)
    questions = []
    for slice_name in SLICES:
        chosen = [question for question in by_hand if question["slice"] == slice_name]
        for wording in ("plain", "firm"):
            count = PER_SLICE_AND_WORDING - sum(question["wording"] == wording for question in chosen)
            chosen += _generated(slice_name, wording, count, seen, rng)
        for number, question in enumerate(chosen, start=1):
            fields = {key: question[key] for key in ("slice", "wording", "origin", "prompt")}
            expected = ordered(question["expected"])
            questions.append({"id": f"{slice_name}-{number:03}", **fields, "expected": expected})
    return questions


def _generated(slice_name: str, wording: str, count: int, seen: list[str], rng: Random) -> Iterator[Question]:
    later = 0
    while count > 0:
        prompt, spec = request(slice_name, wording, rng, of_benchmark=True)
        late = wording == "firm" and has_later_words(prompt)
        if near(prompt, index_of(seen)) or (late and later >= LATER_PER_SLICE):
            continue
        seen.append(prompt)
        later += late
        count -= 1
        yield {"slice": slice_name, "wording": wording, "origin": "generator", "prompt": prompt, "expected": spec}


def benchmark_text() -> str:
    """Return the content of the benchmark file."""
    return "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in benchmark())


def index_of(prompts: Sequence[str]) -> NearIndex:
    """Return an index for near-duplicates of the prompts."""
    return NearIndex({str(number): prompt for number, prompt in enumerate(prompts)})


def near(prompt: str, index: NearIndex) -> bool:
    """Return whether the prompt is a near-duplicate of an indexed one."""
    nearest = index.nearest(prompt)
    return nearest is not None and nearest[1] >= NEAR


def reserved() -> NearIndex:
    """Return an index of the prompts that no training text may be near: the benchmark's and the demo's."""
    return index_of([DEMO_PROMPT, *(question["prompt"] for question in benchmark())])


def main() -> None:
    """Write the benchmark."""
    BENCHMARK.parent.mkdir(parents=True, exist_ok=True)
    BENCHMARK.write_text(benchmark_text(), encoding="utf-8")
    print(f"{BENCHMARK}: {len(benchmark())} questions")


if __name__ == "__main__":
    main()
