"""One loop with all kinds of source, through Dagster: every example has its provenance."""

import csv
import json

import dagster as dg
import pytest
import sqlalchemy as sa

from finetune_pipeline.artifacts import get_latest
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.conftest import dataset_rows
from finetune_pipeline_tests.orchestration.conftest import corrected, definitions, write_events

EXAMPLES = PROJECT_ROOT / "examples" / "documents"


@pytest.fixture
def declared(tmp_path, monkeypatch):
    """A vault, a repository, documents, a database and a file, each with a few records."""
    vault = tmp_path / "vault"
    vault.mkdir()
    (vault / "Saw.md").write_text("---\ntags: [decision]\n---\nWe buy the mill's saw, since renting costs more.\n")
    (vault / "Mill.md").write_text("---\ntags: [learning]\n---\nThe mill opens at six and closes at noon.\n")
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "walls.py").write_text(
        'def thickness(layers: list[int]) -> int:\n    """Add up the thickness of a wall\'s layers in mm."""\n'
        "    total = 0\n    for layer in layers:\n        total += layer\n    return total\n"
    )
    url = f"sqlite:///{tmp_path / 'ratings.db'}"
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE answers (id INTEGER, asked TEXT, said TEXT, stars TEXT, author TEXT)"))
        rows = [(1, "How high is a door?", "2.10 m", "5", "ann"), (2, "How wide is a door?", "no idea", "1", "ann")]
        for row in rows:
            values = dict(zip("abcde", row, strict=True))
            connection.execute(sa.text("INSERT INTO answers VALUES (:a, :b, :c, :d, :e)"), values)
    engine.dispose()
    monkeypatch.setenv("RATINGS_URL", url)
    (tmp_path / "imported.jsonl").write_text('{"instruction": "Name a wall.", "input": "", "output": "Brick wall."}\n')
    sql = {"table": "answers", "key": "id", "cursor": "id", "prompt": "asked", "response": "said"}
    rated = {"rating": "stars", "ratings": {"5": 0.9, "1": -1.0}, "author": "author"}
    return [
        {"kind": "logs", "max_fraction": 0.5},
        {"kind": "files", "name": "imported", "path": str(tmp_path / "imported.jsonl")},
        {"kind": "vault", "name": "journal", "path": str(vault)},
        {"kind": "code", "name": "repository", "path": str(repository)},
        {
            "kind": "documents",
            "name": "meetings",
            "path": str(EXAMPLES / "notes"),
            "templates": str(EXAMPLES / "templates"),
        },
        {"kind": "sql", "name": "ratings", "url_env": "RATINGS_URL", **sql, **rated},
    ]


def test_examples_of_all_kinds_of_source_have_their_provenance(make_loop, declared, instance):
    loop = make_loop(sources=declared, curation={"min_examples": 5, "validation_fraction": 0.0})
    write_events(loop.drop_folder / "log.jsonl", *corrected([f"voice {n}" for n in range(40)]))
    keys = [dg.AssetKey([*loop.prefix, name]) for name in ("raw_logs", "curated_dataset")]
    run = (
        definitions(loop)
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(instance=instance, asset_selection=keys)
    )
    assert run.success
    checks = {e.check_name: e.passed for e in run.get_asset_check_evaluations()}
    assert checks["sources_read"]

    dataset = get_latest(DatasetManifest, loop.name)
    rows = [row for row in dataset_rows(dataset.path, "train") if row["source"] != "replay"]
    provenances = {
        source: sorted(r["provenance"] or "" for r in rows if r["source"] == source)
        for source in dataset.manifest.sources
    }
    assert set(provenances) == {"logs", "imported", "journal", "repository", "meetings", "ratings"}
    assert provenances["imported"] == ["imported.jsonl:1"]
    assert provenances["journal"] == ["Mill.md", "Saw.md"]
    assert provenances["repository"] == ["walls.py::thickness"]
    assert provenances["ratings"] == ["answers:1"]  # the other answer has one star
    assert len(provenances["logs"]) <= len(rows) / 2 + 1

    raw, curated = (run.asset_materializations_for_node("__".join(key.path))[0].metadata for key in keys)
    card = (dataset.path / "card.md").read_text()
    shown = [json.loads(line) for line in card.split("```json\n")[1].split("\n```")[0].splitlines()]
    with (dataset.path / "provenance.csv").open(encoding="utf-8", newline="") as file:
        in_file = [(row["source"], row["provenance"], row["interaction_id"]) for row in csv.DictReader(file)]
    assert sorted(in_file) == sorted((r["source"], r["provenance"] or "", r["interaction_id"]) for r in rows)
    assert "`provenance.csv` says" in card and card.startswith(curated["card"].value)
    for source, known in provenances.items():
        assert f"| {source} |" in curated["sources"].value
        assert {row["provenance"] or "" for row in shown if row["source"] == source} <= set(known)
        assert source in {row["source"] for row in shown}
        if source != "logs":  # logged interactions are identified by their id
            assert f"| {source} |" in raw["sources"].value
            assert not any(provenance in str(curated) for provenance in known)  # they may be titles of notes
