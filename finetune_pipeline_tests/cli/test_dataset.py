"""`finetune dataset` and `finetune ingest FILE`, as people type them."""

import json

import pytest
from click.testing import CliRunner

from finetune_pipeline import settings
from finetune_pipeline.artifacts import set_latest
from finetune_pipeline.cli.main import finetune
from finetune_pipeline.curation.dataset_files import SPLITS, read_examples
from finetune_pipeline.curation.export_formats import WRITERS
from finetune_pipeline.database import connect
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline_tests.orchestration.conftest import make_loop  # noqa: F401
from finetune_pipeline_tests.sources.test_files import write_as

SAID = [{"role": "system", "content": "Be loud."}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "HI"}]  # fmt: skip
ROWS = [
    *({"prompt": f"what did number {n} say?", "completion": f"{n} spoke", "reward": 0.5} for n in range(30)),
    {"prompt": "and then?", "completion": "AND THEN!", "history": SAID},
]


def run(*arguments, code=0):
    result = CliRunner().invoke(finetune, list(map(str, arguments)))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def loop(make_loop, monkeypatch):  # noqa: F811
    made = make_loop(system_prompt="Answer.", curation={"min_examples": 1, "validation_fraction": 0.3})
    monkeypatch.setattr(settings, "load_loops", lambda: {made.name: made})
    return made


def make_dataset(loop):
    artifact, _ = snapshot(loop, connect())
    made = build_dataset(loop, artifact)
    set_latest(made.manifest, "run")
    return made


@pytest.fixture
def made(loop, tmp_path):
    assert "31 interactions and 31 feedback events added" in run("ingest", write_as(tmp_path / "in.parquet", ROWS))
    return make_dataset(loop)


def examples(made):
    rows = [row for split in SPLITS for row in read_examples(made.path, split)]
    return sorted((row.prompt, row.history, row.completion, row.reward) for row in rows)


@pytest.mark.parametrize("form", list(WRITERS))
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_an_export_gives_the_same_examples_in_another_home(loop, made, tmp_path, monkeypatch, form, suffix):
    files = [tmp_path / f"{split}{suffix}" for split in SPLITS]
    for split, file in zip(SPLITS, files, strict=True):
        said = run("dataset", "export", "--format", form, "--split", split, "--out", file)
        assert f"{getattr(made.manifest, split)} examples of notes {made.manifest.version} ({split})" in said
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "other"))
    run("ingest", *files)
    again = make_dataset(loop)
    assert examples(again) == examples(made)
    assert (again.manifest.train, again.manifest.validation) == (made.manifest.train, made.manifest.validation)


def test_an_export_overwrites_only_with_force(made, tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    assert "--force" in run("dataset", "export", "--format", "messages", "--out", path, code=1)
    assert path.read_text() == "precious"
    run("dataset", "export", "--format", "messages", "--out", path, "--force")
    assert json.loads(path.read_text().splitlines()[0])["messages"][-1]["role"] == "assistant"
    assert "an existing folder" in run("dataset", "export", "--format", "alpaca", "--out", tmp_path / "no/o", code=1)


def test_a_version_is_never_a_path(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    version = made.manifest.version
    assert f"notes-{version}-train.alpaca.jsonl" in run("dataset", "export", "--format", "alpaca", "--version", version)
    assert (tmp_path / f"notes-{version}-train.alpaca.jsonl").is_file()
    card = run("dataset", "card")
    assert card == run("dataset", "card", "--version", version) == (made.path / "card.md").read_text()
    assert "| ingested | 31 | 100.0% |" in card and "in.parquet:" in card
    for wrong in ("../curated_dataset", str(made.path), "nobody"):
        result = CliRunner().invoke(finetune, ["dataset", "card", "--version", wrong])
        assert f"its datasets are: {version}" in str(result.exception)


def test_the_card_is_shown_as_markdown_or_json(made):
    assert run("dataset", "card").startswith(f"# Dataset {made.manifest.version} of ")
    shown = json.loads(run("dataset", "card", "--json"))
    assert (shown["version"], shown["train"], shown["folder"]) == (
        made.manifest.version, made.manifest.train, str(made.path)
    )  # fmt: skip


def test_without_a_dataset_the_error_says_how_to_build_one(loop):
    result = CliRunner().invoke(finetune, ["dataset", "card"])
    assert "`finetune run` builds one" in str(result.exception)


def test_the_format_option_outranks_detection(loop, tmp_path):
    path = write_as(tmp_path / "a.jsonl", [{"instruction": "i", "output": "o", "messages": "not those"}])
    refused = run("ingest", path, code=1)
    assert f"{path}:1: found 'not those' outside of the turns" in refused and "--format" in refused
    assert "1 interaction and" in run("ingest", path, "--format", "alpaca")
    assert "needs FILES" in run("ingest", "--format", "alpaca", code=2)
