"""The whole loop on a foreign base model and data: stories260k learns the intents of SNIPS.

The base never saw `{`, `}` and the end of an answer, so their embeddings are untrained and equal: an adapter of the
linear layers alone learns no JSON, and the gate has to reject it. With trained embeddings it learns.
"""

import json
import shutil
from datetime import UTC, datetime
from uuid import uuid5

import dagster as dg
import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.records import Feedback, Interaction, normalize
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.comparisons import list_comparisons
from finetune_pipeline_tests.conftest import NAMESPACE, SHARED
from finetune_pipeline_tests.export.conftest import CHAT_TEMPLATE
from finetune_pipeline_tests.orchestration.conftest import definitions, write_events

SNIPS, STORIES = SHARED / "snips" / "raw", SHARED / "stories260k"
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
TRAINING = {
    "per_device_train_batch_size": 32,
    "learning_rate": 0.01,
    "num_train_epochs": 3,
    "max_length": 128,
    "lora_r": 16,
    "save_steps": 0.5,
}


def utterances(kind, count):
    """(question, intent) pairs, as many of each intent; different ones even when case and spaces are ignored."""
    if not SNIPS.is_dir() or not STORIES.is_dir():
        pytest.skip(f"{SNIPS} and {STORIES} are missing: they are not part of the project")
    pairs, seen = [], set()
    for folder in sorted(path for path in SNIPS.iterdir() if path.is_dir()):
        name = f"{kind}_{folder.name}.json" if kind == "validate" else f"train_{folder.name}_full.json"
        items = json.loads((folder / name).read_bytes().decode("utf-8", "replace"))[folder.name]
        texts = ["".join(piece["text"] for piece in item["data"]).strip() for item in items]
        fresh = [text for text in dict.fromkeys(texts) if normalize(text) not in seen and "\ufffd" not in text]
        seen.update(map(normalize, fresh[:count]))
        pairs += [(text, json.dumps({"intent": folder.name}, separators=(",", ":"))) for text in fresh[:count]]
    return pairs


def confirmed(text, answer):
    asked = Interaction(
        id=uuid5(NAMESPACE, text), loop="notes", created_at=MOMENT, prompt=text, output=answer, confidence=0.99
    )
    said = Feedback(
        id=uuid5(NAMESPACE, f"on {text}"), loop="notes", interaction_id=asked.id, created_at=MOMENT, kind="thumbs_up"
    )
    return [asked, said]


@pytest.fixture
def files(tmp_path):
    """The base with a chat template, the benchmark, and the schema of its answers."""
    questions = utterances("validate", 15)
    shutil.copytree(STORIES, tmp_path / "stories", copy_function=shutil.copyfile)
    (tmp_path / "stories" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    rows = [
        {"id": f"q{n}", "slice": json.loads(answer)["intent"], "prompt": text, "expected": json.loads(answer)}
        for n, (text, answer) in enumerate(questions)
    ]
    (tmp_path / "benchmark.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    intents = sorted({row["slice"] for row in rows})
    schema = {"type": "object", "properties": {"intent": {"enum": intents}}, "required": ["intent"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    return tmp_path


def run(loop, instance, *stages):
    job = definitions(loop).resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey(["notes", one]) for one in stages]
    return job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False)


@pytest.mark.slow
def test_the_gate_rejects_a_model_that_learned_nothing(files, make_loop, instance):
    def make(**training):
        return make_loop(
            base_model=str(files / "stories"),
            output_schema=str(files / "schema.json"),
            evaluation={"metric": "parameters", "max_tokens": 24, "context": 192},
            export={"quantization": "F16"},
            training={**TRAINING, **training},
        )

    linear = make()
    write_events(
        linear.drop_folder / "snips.jsonl", *(e for pair in utterances("train", 250) for e in confirmed(*pair))
    )
    assert run(linear, instance, "raw_logs", "curated_dataset").success
    rest = ("lora_adapter", "gguf_model", "eval_report", "promoted_model")

    assert not run(linear, instance, *rest).success
    assert champion(connect(), "notes") is None
    [rejected] = list_comparisons(connect(), "notes")
    assert not rejected.promote

    assert run(make(trainable_token_indices="all"), instance, *rest).success
    serving = champion(connect(), "notes")
    assert serving.version == "v1.0.0" and serving.accuracy > 0.5
