"""A small free-text loop on the starter model, with its files in the test's folder."""

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from finetune_pipeline.orchestration.component import FineTuneLoop
from finetune_pipeline.settings import COMPONENT_TYPE, LoopSettings, read_loop
from finetune_pipeline_tests.conftest import feedback, interaction

BENCHMARK = [
    {"id": f"q{n}", "slice": "notes", "prompt": f"golden question {name}", "expected": f"golden answer {name}"}
    for n, name in enumerate(["amber", "birch", "cedar", "dunes"])
]
ATTRIBUTES = {
    "name": "notes",
    "base_model": "data/starter_model",
    "curation": {"min_examples": 5, "validation_fraction": 0.2},
    "training": {"num_train_epochs": 1, "max_length": 128},
    "evaluation": {"benchmark": "BENCHMARK", "metric": "rouge1", "max_tokens": 24, "context": 192},
    "trigger": {"new_examples": 10},
}


def write_events(path: Path, *events: Any) -> None:
    """Append events to a JSONL file, as an application does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(event.model_dump_json() + "\n" for event in events)


def corrected(names: Any, answer: str | None = None) -> list[Any]:
    """Return interactions with a correction, one for each name; to one answer if it is given."""
    events: list[Any] = []
    for name in names:
        events.append(interaction(f"{name}", prompt=f"please note what {name} said about the {name} matter"))
        events.append(feedback(f"on {name}", f"{name}", "correction", correction=answer or f"{name} spoke"))
    return events


@pytest.fixture
def make_loop(tmp_path):
    """Write the loop's YAML with changes to its attributes, and load it."""

    def make(**changes: Any) -> LoopSettings:
        benchmark = tmp_path / "benchmark.jsonl"
        if not benchmark.exists():
            benchmark.write_text("".join(json.dumps(row) + "\n" for row in BENCHMARK))
        attributes = {**ATTRIBUTES, **changes}
        attributes["evaluation"] = {**attributes["evaluation"], "benchmark": str(benchmark)}
        path = tmp_path / "defs" / "notes" / "defs.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"type": COMPONENT_TYPE, "attributes": attributes}))
        return read_loop(path)

    return make


@pytest.fixture
def loop(make_loop):
    return make_loop()


def definitions(loop: LoopSettings) -> dg.Definitions:
    """Return the loop's definitions, built as Dagster builds them."""
    return FineTuneLoop(loop).build_defs(dg.ComponentTree.for_test().load_context)


@pytest.fixture
def instance(tmp_path):
    """Return a real Dagster instance in the test's folder."""
    folder = tmp_path / "dagster"
    folder.mkdir()
    with dg.DagsterInstance.local_temp(str(folder)) as made:
        yield made
    # Such a context opens the instance again, and then a storage whose instance is gone stays the current one:
    # every later test of this process that loads definitions fails.
    assert dg.UPathDefsStateStorage.get() is None, "the test left a sensor's or schedule's context open; use `with`"
