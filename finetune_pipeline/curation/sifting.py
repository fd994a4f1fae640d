"""The first pass over a snapshot: what the rules say of each example alone, and what of it is compared with others.

Its result has a row for each row of the snapshot, and no text: hashes, sketches and what the choice needs. So it is
small enough to be held of millions, can be kept from cycle to cycle, and nobody's words are in it. Loads numpy.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic_core import from_json

from finetune_pipeline.curation.acceptance import OF_BENCHMARK, Policy, accept, at_a_glance, found_bad, near_benchmark
from finetune_pipeline.curation.near_duplicates import BANDS, BITS, Numbers, sketch
from finetune_pipeline.curation.preferences import shows_a_fault
from finetune_pipeline.curation.redaction import redact_example
from finetune_pipeline.records import Example, conversation_text, normalize

if TYPE_CHECKING:
    import pyarrow as pa

_canonical = json.JSONEncoder(sort_keys=True).encode
FORM = 8  # of the result and of how it is made: what was found by an earlier one, and datasets of it, are made anew
EXAMPLE = tuple(Example.model_fields)

Identity = Callable[[Example], str]
"""The content hash of an example: by it the store knows the example again after it was judged."""

COLUMNS = {
    "accepted": "bool", "bad": "bool", "overlap": "bool", "reason": "string",
    # How far it is trusted, and as what.
    "reviewed": "bool", "person": "bool", "corrected": "bool", "fault": "bool", "reward": "float64",
    "ingest_offset": "int64", "tie": "uint64",
    # Hashes: of the question, for its place in a split, of the answer to learn and of the model's own.
    "question": "uint64", "side": "uint32", "target": "uint64", "output": "uint64",
    "source": "string", "redacted": "string", "content": "string",
    "bands": "bytes", "bits": "bytes", "size": "uint32",
    "length": "uint32",  # of all its texts, in bytes
}  # fmt: skip
"""What is known of a row. The columns after `reason` mean something only where it is accepted or bad."""


def schema() -> "pa.Schema":
    """The columns' types. Loads pyarrow."""
    import pyarrow as pa

    widths = {"bands": BANDS * 4, "bits": BITS // 8}
    kinds = {name: pa.binary(widths[name]) if name in widths else pa.type_for_alias(COLUMNS[name]) for name in COLUMNS}
    return pa.schema(kinds)


def sift(batch: "pa.RecordBatch", policy: Policy, identity: Identity) -> "pa.RecordBatch":
    """Look at every row of a snapshot by itself.

    Args:
        batch: with the columns of an Example; a row whose target is null has nothing to teach.
    """
    import pyarrow as pa

    given = batch.select(EXAMPLE).to_pylist()
    rows = [_sifted(row, policy, identity) for row in given]
    sketched = [row for row in rows if row.get("accepted")]
    answers = np.array([row["target"] for row in sketched], np.uint64)
    made = sketch([row["normalised"] for row in sketched], answers)
    for row, bands, bits, size in zip(sketched, made.bands, made.bits, made.sizes.tolist(), strict=True):
        row |= {"bands": bands.tobytes(), "bits": bits.tobytes(), "size": size}
    empty = {"string": None, "bytes": b"", "bool": False}
    columns: dict[str, Any] = {
        name: [row.get(name, empty.get(kind, 0)) for row in rows] for name, kind in COLUMNS.items()
    }
    for name, width in (("bands", BANDS * 4), ("bits", BITS // 8)):
        columns[name] = [value or bytes(width) for value in columns[name]]
    columns["length"] = _lengths(batch, [row["history"] or () for row in given])
    return pa.RecordBatch.from_pydict(columns, schema())


def _lengths(batch: "pa.RecordBatch", histories: Sequence[Sequence[Mapping[str, str]]]) -> Numbers:
    """How many bytes the texts of each row have."""
    import pyarrow.compute as pc

    total = np.zeros(batch.num_rows, np.uint32)
    for name in ("prompt", "output", "target", "provenance"):
        total += pc.fill_null(pc.binary_length(batch.column(name)), 0).to_numpy(zero_copy_only=False).astype(np.uint32)
    for row, turns in enumerate(histories):
        total[row] += sum(len(turn["content"].encode()) for turn in turns)
    return total


def _sifted(row: dict[str, Any], policy: Policy, identity: Identity) -> dict[str, Any]:
    """What is known of one row: nothing of one that teaches nothing."""
    if row["target"] is None:
        return {}
    original = example_of_row(row)
    decision = at_a_glance(original, policy)
    if decision.accepted:
        redacted = redact_example(original)
        decision = accept(redacted.example, policy)
        if decision.accepted:
            longest = policy.settings.max_answer_chars
            known: dict[str, Any] = {"accepted": True, "fault": shows_a_fault(redacted.example, longest)}
            return known | _described(redacted.example, redacted.counts) | {"content": identity(original)}
    overlap = decision.reason in OF_BENCHMARK
    refused: dict[str, Any] = {"reason": decision.reason}
    if found_bad(original, policy):
        redacted = redact_example(original)
        overlap = near_benchmark(redacted.example.prompt, redacted.example.history, policy)
        if not overlap:
            return refused | {"bad": True} | _described(redacted.example, redacted.counts)
    return refused | {"overlap": overlap}


def example_of_row(row: Mapping[str, Any]) -> Example:
    """The example of a snapshot's row."""
    return Example.model_validate({**row, "history": row["history"] or ()})


def _described(example: Example, counts: Mapping[str, int]) -> dict[str, Any]:
    question = normalize(conversation_text(example.prompt, example.history))
    target = answer_key(example.target)
    return {
        "reviewed": example.review is not None,
        "person": example.corrected or example.confirmed,
        "corrected": example.corrected,
        "reward": example.reward,
        "ingest_offset": example.ingest_offset,
        "tie": number_of(str(example.interaction_id)),
        "normalised": question,
        "question": number_of(question),
        "side": side(question),
        "target": target,
        "output": target if example.output == example.target else answer_key(example.output),
        "source": example.source,
        "redacted": json.dumps(counts) if counts else None,
    }


def number_of(text: str) -> int:
    """The first 64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def side(question: str) -> int:
    """A number of 32 bits that says, for good, on which side of the split a normalised question is."""
    return number_of(f"split:{question}") >> 32


def answer_key(answer: str) -> int:
    """By what answers are told apart: two that are the same JSON are the same, however it is written."""
    text = answer.strip()
    if text[:1] in {"{", "["}:
        with suppress(ValueError, RecursionError):
            text = _canonical(from_json(text))
    return number_of(text)
