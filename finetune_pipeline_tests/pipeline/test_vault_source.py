"""A vault source: the dataset follows the notes, with their provenance."""

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.pipeline.source_sync import sync_sources
from finetune_pipeline_tests.conftest import dataset_rows


@pytest.fixture
def vault(tmp_path):
    folder = tmp_path / "vault"
    folder.mkdir()
    (folder / "Saw.md").write_text("---\ntags: [decision]\n---\nWe buy the [[Mill|mill's]] saw.\n")
    (folder / "2024-05-03.md").write_text("## Reflection\n\nToo quick.\n\n## Private #private\n\n#decision hidden\n")
    (folder / "Broken.md").write_text("---\ntags: [decision\n---\nNever read.\n")
    return folder


def rows(loop):
    sync_sources(loop, connect(), print)
    artifact, _ = snapshot(loop, connect())
    found = dataset_rows(build_dataset(loop, artifact).path, "train")
    return {row["provenance"]: (row["source"], row["completion"]) for row in found}


def test_a_dataset_follows_the_notes_of_a_vault(make_loop, vault, capsys):
    source = {"kind": "vault", "name": "journal", "path": str(vault)}
    loop = make_loop(sources=[source], curation={"min_examples": 1, "validation_fraction": 0.0})
    day = {"2024-05-03.md#Reflection": ("journal", "Too quick.")}
    assert rows(loop) == {"Saw.md": ("journal", "We buy the mill's saw."), **day}
    assert "journal: 2 records from 2 files, 2 new, 0 retracted, 1 skipped" in capsys.readouterr().out

    (vault / "Saw.md").write_text("---\ntags: [decision]\n---\nWe rent a saw.\n")
    assert rows(loop) == {"Saw.md": ("journal", "We rent a saw."), **day}
    assert "1 new, 1 retracted" in capsys.readouterr().out

    (vault / "Saw.md").unlink()
    assert rows(loop) == day


def test_a_source_is_limited_and_its_report_counts_files(make_loop, vault):
    (vault / "Two.md").write_text("## Decision\n\nOne.\n\n## Learning\n\nTwo.\n")
    source = {"kind": "vault", "name": "journal", "path": str(vault)}
    (full,) = sync_sources(make_loop(sources=[source]), connect(), print)
    (limited,) = sync_sources(make_loop(sources=[{**source, "max_chunks": 3}]), connect(), print)
    assert (full.records, full.files, full.skipped) == (4, 3, 1)
    assert (limited.records, limited.files, limited.new, limited.retracted) == (3, 3, 0, 1)
    assert limited.reasons["more than 3 records (max_chunks): not read"] == 1


def test_an_empty_vault_changes_nothing_and_says_what_it_has(make_loop, vault):
    loop = make_loop(sources=[{"kind": "vault", "name": "journal", "path": str(vault)}])
    sync_sources(loop, connect(), print)
    for path in vault.iterdir():
        path.write_text("---\nmood: good\n---\n- [ ] #todo call\n")
    (report,) = sync_sources(loop, connect(), print)
    assert "the tags '#todo' (3); the headings none; the properties 'mood' (3: 'good')" in report.error
    assert (report.records, report.retracted) == (0, 0)
