"""Writes the benchmark of the AEC parser: hand-written prompts first, then generated ones in held-out sentences.

    python scripts/aec/make_benchmark.py

The result is fixed by the seed and by `hand_written.jsonl`; a changed benchmark is another benchmark, whose figures do
not compare with earlier ones. The generators of training text ask `reserved()` and drop whatever comes near it.
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
# At most this many of a slice's firm prompts may need a word that the firm took up later.
LATER_PER_SLICE = 1
# Jaccard similarity from which two prompts are near-duplicates, as in the loop's curation.
NEAR = 0.8

# Asked in the demonstration, so that its answer is never a memory.
DEMO_PROMPT = "150 mm concrete wall fire-rated two hours California seismic D"

Item = dict[str, Any]


def hand_written() -> list[Item]:
    """The prompts written by people, in the file's order."""
    return [json.loads(line) | {"origin": "hand"} for line in HAND_WRITTEN.read_text(encoding="utf-8").splitlines()]


def benchmark() -> list[Item]:
    """Every item of the benchmark, grouped by slice and numbered within it."""
    by_hand = hand_written()
    seen = [DEMO_PROMPT, *(item["prompt"] for item in by_hand)]
    rng = Random(SEED)
    items = []
    for slice_name in SLICES:
        chosen = [item for item in by_hand if item["slice"] == slice_name]
        for wording in ("plain", "firm"):
            wanted = PER_SLICE_AND_WORDING - sum(item["wording"] == wording for item in chosen)
            chosen += _generated(slice_name, wording, wanted, seen, rng)
        items += [_item(f"{slice_name}-{number:03}", item) for number, item in enumerate(chosen, start=1)]
    return items


def _generated(slice_name: str, wording: str, wanted: int, seen: list[str], rng: Random) -> Iterator[Item]:
    later = 0
    while wanted > 0:
        prompt, spec = request(slice_name, wording, rng, held_out=True)
        late = wording == "firm" and has_later_words(prompt)
        if near(prompt, index_of(seen)) or (late and later >= LATER_PER_SLICE):
            continue
        seen.append(prompt)
        later += late
        wanted -= 1
        yield {"slice": slice_name, "wording": wording, "origin": "generator", "prompt": prompt, "expected": spec}


def _item(name: str, item: Item) -> Item:
    expected = ordered(item["expected"])
    return {"id": name} | {key: item[key] for key in ("slice", "wording", "origin", "prompt")} | {"expected": expected}


def benchmark_text() -> str:
    """The file's content."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in benchmark())


def index_of(prompts: Sequence[str]) -> NearIndex:
    """An index that finds what is nearly the same as one of the prompts."""
    return NearIndex({str(number): prompt for number, prompt in enumerate(prompts)})


def near(prompt: str, index: NearIndex) -> bool:
    """Whether the prompt is a near-duplicate of an indexed one."""
    nearest = index.nearest(prompt)
    return nearest is not None and nearest[1] >= NEAR


def reserved() -> NearIndex:
    """What no training text may come near: the benchmark's prompts and the demonstration's."""
    return index_of([DEMO_PROMPT, *(item["prompt"] for item in benchmark())])


def main() -> None:
    """Write the benchmark."""
    BENCHMARK.parent.mkdir(parents=True, exist_ok=True)
    BENCHMARK.write_text(benchmark_text(), encoding="utf-8")
    print(f"{BENCHMARK}: {len(benchmark())} items")


if __name__ == "__main__":
    main()
