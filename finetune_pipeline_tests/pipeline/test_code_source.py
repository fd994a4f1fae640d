"""Code and document sources: their records reach the dataset with source and provenance."""

import json

from finetune_pipeline.database import connect
from finetune_pipeline.feedback.source_state import skipped_records
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_sync import sync_sources
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.conftest import dataset_rows
from finetune_pipeline_tests.sources.endpoint import said, teaching

CODE = {"kind": "code", "name": "own_code", "path": "finetune_pipeline/sources"}
NOTES = {
    "kind": "documents", "name": "meetings", "path": "examples/documents/notes",
    "templates": "examples/documents/templates",
}  # fmt: skip
CURATION = {"min_examples": 1, "validation_fraction": 0.0}


def test_code_and_documents_reach_the_dataset_with_provenance(make_loop):
    loop = make_loop(sources=[CODE, NOTES], curation=CURATION)
    told = []
    reports = sync_sources(loop, connect(), told.append)
    assert [report.error for report in reports] == ["", ""]
    assert all(report.new == report.records > 5 for report in reports), told
    artifact, _ = snapshot(loop, connect())
    rows = dataset_rows(build_dataset(loop, artifact).path, "train")
    assert {row["source"] for row in rows} == {"own_code", "meetings"}
    provenances = {row["provenance"] for row in rows}
    assert {"teacher_validation.py::copied_fraction", "source_record.py::SourceRecord", "orders.md::api"} <= provenances
    assert all(report.new == 0 for report in sync_sources(loop, connect(), told.append))
    with connect().read() as connection:
        assert ("meetings", "kickoff.txt::api") in {
            (row.source, row.provenance) for row in skipped_records(connection, loop, 99)
        }


def test_requests_to_a_teacher_are_redacted(make_loop, tmp_path):
    secret = "sk-proj-" + "a1B2c3D4e5F6g7H8i9J0k1L2"
    (tmp_path / "code").mkdir()
    code = f'def connect(host):\n    token = "{secret}"\n    return dial(host, token)\n'
    (tmp_path / "code" / "a.py").write_text(code)

    def script(body, number):
        return said(json.dumps({"instructions": ["Write connect(host), which dials a host with a token."]}))

    with teaching(script) as (server, settings):
        source = {**CODE, "path": str(tmp_path / "code"), "teacher": settings.model_dump()}
        (report,) = sync_sources(make_loop(sources=[source], curation=CURATION), connect(), print)
        assert (report.records, report.error, len(server.asked)) == (1, "", 1)
        assert secret not in json.dumps(server.asked)


def test_a_missing_teacher_key_fails_only_that_source(make_loop):
    teacher = {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}
    loop = make_loop(sources=[{**CODE, "teacher": teacher}, NOTES], curation=CURATION)
    code, notes = sync_sources(loop, connect(), print)
    assert "NO_SUCH_KEY is not set" in code.error
    assert notes.records == 6
    assert (PROJECT_ROOT / NOTES["path"]).is_dir()
