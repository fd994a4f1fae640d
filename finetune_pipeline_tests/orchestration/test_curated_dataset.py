"""The asset curated_dataset: its blocking checks read what was written."""

import json

import dagster as dg

from finetune_pipeline.curation import filter
from finetune_pipeline.curation.acceptance import Decision
from finetune_pipeline_tests.conftest import feedback, interaction, uid

from .conftest import definitions, write_events

SCHEMA = {"type": "object", "properties": {"said": {"type": "string"}}}
QUESTION = {"id": "q1", "slice": "notes", "prompt": "golden question amber", "expected": {"said": "no"}}
SOUND = [(f"please note what {name} said", '{"said": "yes"}') for name in ("ash", "birch", "cedar", "elm", "fir")]
LEAKED = ("Golden question  AMBER", '{"said": "yes"}')
BROKEN = ("what is broken?", '{"said": 5}')


def test_blocking_checks_stop_the_run_before_training(make_loop, instance, tmp_path, monkeypatch):
    (tmp_path / "benchmark.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    loop = make_loop(output_schema=str(tmp_path / "schema.json"))
    for n, (prompt, answer) in enumerate([*SOUND, LEAKED]):
        said = feedback(f"on {n}", f"{n}", "correction", correction=answer)
        write_events(loop.drop_folder / "log.jsonl", interaction(f"{n}", prompt=prompt), said)
    # Ingestion rejects a correction that the schema refuses, so the broken answer is one that somebody liked.
    liked = feedback("liked", "broken", "thumbs_up")
    write_events(loop.drop_folder / "log.jsonl", interaction("broken", prompt=BROKEN[0], output=BROKEN[1]), liked)
    monkeypatch.setattr(filter, "accept", lambda example, policy: Decision(True))

    job = definitions(loop).resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey(["notes", stage]) for stage in ("raw_logs", "curated_dataset", "lora_adapter")]
    run = job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False)

    checks = {check.check_name: check for check in run.get_asset_check_evaluations()}
    overlap, broken = checks["no_benchmark_overlap"], checks["targets_parse"]
    assert not overlap.passed and overlap.metadata["first"].value == [str(uid(f"{len(SOUND)}"))]
    assert not broken.passed and str(uid("broken")) in broken.metadata["first"].value[0]
    assert checks["enough_examples"].passed  # so the other two checks stop the run
    assert not run.success
    [failed] = [event for event in run.all_events if event.is_step_failure]
    assert failed.step_key == "notes__curated_dataset_checks"
    started = {event.step_key for event in run.all_events if event.event_type_value == "STEP_START"}
    assert started == {"notes__raw_logs", "notes__curated_dataset", "notes__curated_dataset_checks"}
