"""`finetune model`: list, show, card and garbage collection."""

import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest
import yaml
from click.testing import CliRunner

from finetune_pipeline.artifacts import draft, hash_file, publish, stage_folder
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.database import connect
from finetune_pipeline.manifests import GgufManifest
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.model_versions import CandidateModel
from finetune_pipeline.registry.trainings import Training, record_training
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline_tests.registry.conftest import promote_over

LOOP = "aec_parser"


def run(*arguments, code=0, **options):
    result = CliRunner().invoke(finetune, ["model", *arguments], **options)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def run_error(*arguments):
    result = CliRunner().invoke(finetune, ["model", *arguments])
    assert result.exit_code == 1, result.output
    return str(result.exception) if not result.output else f"{result.output} {result.exception}"


def lines(*arguments):
    return [" ".join(line.split()) for line in run(*arguments).splitlines()]


def version(number, **files):
    """Promote a model with an artifact of gguf_model."""
    name = f"gguf{number}"
    fields = {
        "loop": LOOP, "version": name, "inputs": {}, "settings": {}, "packages": {}, "gguf": "model.gguf",
        "quantization": "F16", "base_model": "b", "base_hash": "b", "adapter_version": f"lora{number}",
        "mode": "full", "watermark": number,
    }  # fmt: skip
    with draft(LOOP, "gguf_model", name) as folder:
        (folder / "model.gguf").write_bytes(bytes([number]) * 1_500_000)
        path = publish(folder, GgufManifest, fields).path / "model.gguf"
    candidate = CandidateModel(
        loop=LOOP, **{"gguf_path": path, "gguf_sha256": hash_file(path), **files}, base_hash="b", mode="full",
        lineage={"base_model": "data/starter_model", "lora_adapter": f"lora{number}", "watermark": number},
        scores={"accuracy": 0.5 + number / 100, "latency_p50_ms": 20.0 + number}, report_path=path,
    )  # fmt: skip
    return promote_over(connect(), candidate, f"gain {number}", "test")


@pytest.fixture
def seven(own_home):
    """Seven promoted models; the last one serves."""
    return [version(number) for number in range(1, 8)]


def test_the_list_shows_metrics_champion_previous_and_deleted_versions(seven):
    run("gc", "--keep", "1", "--yes")
    heading, *rows = lines("list")
    assert heading == "model accuracy latency size deployed (UTC)"
    now = f"{datetime.now(UTC):%Y-%m-%d}"
    assert rows[0].startswith(f"* aec_parser@v1.6.0 57.0% 27 ms 1.5 MB {now}") and rows[0].endswith("champion")
    assert rows[1].startswith(f"aec_parser@v1.5.0 56.0% 26 ms 1.5 MB {now}") and rows[1].endswith("previous")
    assert rows[2] == "aec_parser@base"
    rows = lines("list", "--all")[1:]
    assert all(row.endswith("archived deleted") for row in rows[2:7])
    assert rows[7] == "aec_parser@base"
    run("switch", "base")
    rows = lines("list")[1:]
    assert rows[0].endswith("previous") and rows[2] == "* aec_parser@base champion"


def test_garbage_collection_writes_the_history(seven):
    run("gc", "--keep", "1", "--yes")
    archived = [row for row in json.loads(run("history", "--json")) if row["action"] == "archive"]
    assert [row["model"] for row in archived] == [f"aec_parser@v1.{n}.0" for n in (4, 3, 2, 1, 0)]
    assert archived[0]["reason"].startswith("its files were deleted by garbage collection: v1.4.0: not champion, ")
    error = run_error("unarchive", "v1.0.0", "--reason", "back")
    assert "its files were deleted on" in error


@pytest.mark.parametrize(
    ("version_of_it", "words"),
    [
        ("v1.6.0", "serves as champion; switch to another version"),
        ("v1.5.0", "is what a rollback would restore"),
        ("v9.0.0", "has no version 'v9.0.0'"),
    ],
)
def test_what_serves_or_may_serve_again_cannot_be_archived(seven, version_of_it, words):
    assert words in run_error("archive", version_of_it, "--reason", "old")
    assert len(lines("history")) == 1 + len(seven)


def test_an_archived_version_is_hidden_until_it_serves_again(seven):
    assert run("archive", "v1.2.0", "--reason", "curt") == "aec_parser@v1.2.0 is archived\n"
    assert "archived already" in run_error("archive", "v1.2.0", "--reason", "curt")
    assert "v1.2.0" not in run("list") and "v1.2.0" in run("list", "--all")
    assert "  archived  20" in run("show", "v1.2.0")
    assert run("rollback") == "aec_parser@v1.5.0 is the champion again\n"  # the history of the champion is as before
    run("switch", "v1.2.0")
    assert "v1.2.0" in run("list") and "  archived  20" not in run("show", "v1.2.0")
    assert "is not archived" in run_error("unarchive", "v1.2.0", "--reason", "good")


def test_show_prints_all_known_details(seven, own_home):
    record_training(
        connect(),
        Training(
            id="lora1", loop=LOOP, run_id="run-17", dataset="d1", method="lora", mode="full", device="cpu",
            examples=120, steps=40, loss_before=1.5, loss_after=0.25, tokens_per_second=4000, wall_seconds=12,
            peak_memory_bytes=10**9, watermark=1, created_at=datetime(2026, 1, 1, tzinfo=UTC),
        ),
    )  # fmt: skip
    run("gc", "--keep", "1", "--yes")
    shown = run("show", "v1.0.0")
    expected = [
        "aec_parser@v1.0.0", "gguf1/model.gguf", seven[0].gguf_sha256, "deployed", "retired", "deleted", "1.5 MB",
        "accuracy: 51.0%", "lora_adapter: lora1", "run_id: run-17", "loss_after: 0.25",
    ]  # fmt: skip
    assert [text for text in expected if text not in shown] == []
    assert "latency_p50_ms: 21\n" in shown
    assert "retired" not in run("show") and "deleted" not in run("show")
    adapter = own_home / "adapter.gguf"
    adapter.write_bytes(b"GGUF")
    version(8, adapter_path=adapter, adapter_sha256=hash_file(adapter))
    shown = run("show")
    assert f"adapter   {adapter}" in shown and hash_file(adapter) in shown


def test_the_card_is_printed_as_markdown_with_front_matter(seven):
    text = run("show", "v1.2.0", "--card")
    _, matter, body = text.split("---\n", 2)
    assert yaml.safe_load(matter)["base_model"] == "data/starter_model"
    assert "# aec_parser@v1.2.0" in body and "Parses requests of architects" in body and "gain 3" in body
    assert run("show", "base", "--card") == "aec_parser@base: the base model data/starter_model\n"


def test_a_dry_run_deletes_nothing(seven):
    output = run("gc", "--dry-run").splitlines()
    assert output[0].split(None, 4)[:4] == ["delete", "1.5", "MB", "gguf_model/gguf1"]
    assert "v1.0.0: not champion, not previous, not in the last deployments" in output[0]
    assert [line.split()[0] for line in output[1:7]] == ["keep"] * 6
    assert output[-1] == "would delete 1 of 7 folders, 1.5 MB"
    assert (stage_folder(LOOP, "gguf_model") / "gguf1" / "model.gguf").exists()
    assert "deleted" not in run("list")


def test_gc_asks_before_it_deletes(seven):
    gone = stage_folder(LOOP, "gguf_model") / "gguf1"
    assert "delete 1 of 7 folders, 1.5 MB? [y/N]" in run("gc", input="n\n", code=1)
    assert gone.exists()
    assert "deleted 1 of 7 folders, 1.5 MB" in run("gc", input="y\n")
    assert not gone.exists()
    assert run("gc", "--yes").endswith("nothing to delete\n")
    assert "deleted 4 of 6 folders, 6.0 MB" in run("gc", "--keep", "1", "--yes")


def test_a_switch_to_a_deleted_version_prints_a_remedy(seven):
    run("gc", "--yes")
    command = [sys.executable, "-m", "finetune_pipeline.cli.main", "model", "switch", "v1.0.0"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert result.returncode == 1
    assert "aec_parser@v1.0.0 cannot serve: its files were deleted on" in result.stderr
    assert "finetune model list" in result.stderr and "Traceback" not in result.stderr
    assert champion(connect(), LOOP).version == "v1.6.0"


def test_a_switch_to_the_champion_changes_nothing(seven):
    assert run("switch", "v1.6.0") == "aec_parser@v1.6.0 is already the champion\n"
    assert len(lines("history")) == 1 + len(seven)
    assert run("switch", "base") == "aec_parser@base is the champion now\n"
    assert run("switch", "base") == "aec_parser@base is already the champion\n"


def test_an_empty_history_is_a_sentence(own_home):
    assert run("history") == "loop aec_parser has no deployments yet; the base model serves\n"
