"""The model card: Hugging Face's front matter, and sections for known values only."""

from datetime import UTC, datetime
from typing import Any

import yaml

from finetune_pipeline.registry.model_card import ModelCard, render_model_card

FULL: dict[str, Any] = {
    "name": "aec@v1.2.0",
    "loop": "aec",
    "description": "Parses requests.",
    "created_at": datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    "mode": "incremental",
    "mode_reason": "on top of aec@v1.1.0: 40 new examples, 40 older ones as replay",
    "base_model": "data/starter_model",
    "base_hash": "b" * 64,
    "files": {"model.gguf": "a" * 64},
    "adapter": "ad01",
    "dataset": "da01",
    "data": {"train": 1200, "left out": 7},
    "events": "1..480",
    "watermark": 480,
    "training": {"examples": 1200, "validation loss": "1.500 before, 0.250 after"},
    "scores": {"accuracy": 0.8125, "latency_p50_ms": 21.0},
    "metrics": (("parameter | accuracy", "70.0%", "81.3%"),),
    "benchmark_sha256": "c" * 64,
    "verdict": "gain 16.1%, 5% needed",
}
NEEDED = ("name", "loop", "description", "created_at", "mode", "base_model", "base_hash", "files")


def front_matter(text: str) -> dict[str, Any]:
    empty, matter, _body = text.split("---\n", 2)
    assert empty == ""
    return dict(yaml.safe_load(matter))


def test_the_front_matter_names_base_tags_and_metrics() -> None:
    matter = front_matter(render_model_card(ModelCard(**FULL)))
    assert matter["base_model"] == "data/starter_model"
    assert {"gguf", "lora", "aec"} <= set(matter["tags"])
    assert matter["metrics"] == ["accuracy", "latency_p50_ms"]
    (entry,) = matter["model-index"]
    assert entry["name"] == "aec@v1.2.0"
    (result,) = entry["results"]
    assert result["metrics"][0] == {"type": "accuracy", "value": 0.8125}
    assert result["dataset"]["type"] == "c" * 64


def test_the_card_has_all_known_values() -> None:
    text = render_model_card(ModelCard(**FULL))
    expected = [
        "# aec@v1.2.0", "Parses requests.", "data/starter_model (bbbbbbbbbbbbbbbb)", "ad01", "da01", "1..480",
        "| train | 1,200 |", "1.500 before, 0.250 after", "gain 16.1%, 5% needed", f"SHA-256 `{'a' * 64}`",
        "| parameter \\| accuracy | 70.0% | 81.3% |", "2026-01-02 03:04 UTC", "## Limits",
        "| training | incremental, on top of aec@v1.1.0: 40 new examples, 40 older ones as replay |",
    ]  # fmt: skip
    assert [text_part for text_part in expected if text_part not in text] == []


def test_unknown_values_are_left_out() -> None:
    text = render_model_card(ModelCard(**{name: FULL[name] for name in NEEDED}))
    assert "None" not in text and "Evaluation" not in text and "Training data" not in text and "## Training" not in text
    assert "metrics" not in front_matter(text) and "| training | incremental |" in text
    only_watermark = render_model_card(ModelCard(**{**{name: FULL[name] for name in NEEDED}, "watermark": 90}))
    assert "| events | up to ingest offset 90 |" in only_watermark


def test_a_text_cannot_break_the_front_matter_or_a_table() -> None:
    nasty = 'x: "y"\n---\n# | heading'
    changed = {"base_model": nasty, "verdict": nasty, "description": nasty, "data": {nasty: nasty}}
    text = render_model_card(ModelCard(**{**FULL, **changed}))
    matter = yaml.safe_load(text[4 : text.index("\n---\n\n")])
    assert matter["base_model"] == nasty
    assert "\n# | heading" not in text.split("\n---\n\n", 1)[1]
