"""A declared source whose records a test gives, and what became of them."""

import dagster as dg

from finetune_pipeline.database import connect
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_sync import sync_source
from finetune_pipeline.sources.source_record import SourceRecord
from finetune_pipeline_tests.conftest import snapshot_examples
from finetune_pipeline_tests.orchestration.conftest import definitions

SOURCE = {"kind": "files", "name": "imported", "path": "somewhere"}


def records(*names, **changes):
    return [
        SourceRecord(f"{name}.md", f"what did {name} say about it all?", f"{name} spoke", **changes) for name in names
    ]


def take(loop, *found):
    (source,) = loop.sources
    return sync_source(loop, source, connect(), lambda settings, cursor: iter(found))


def targets(loop):
    artifact, _ = snapshot(loop, connect())
    return sorted(example.target for example in snapshot_examples(artifact))


def materialized(loop, instance, *names):
    """Materialize these assets and return their metadata."""
    job = definitions(loop).resolve_job_def("notes_loop")
    run = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(["notes", name]) for name in names])
    made = (event.materialization for event in run.get_asset_materialization_events())
    return {one.asset_key.path[-1]: one.metadata for one in made}
