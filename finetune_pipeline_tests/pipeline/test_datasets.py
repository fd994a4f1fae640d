"""Uploaded files become dataset versions of a loop, by the loop's own curation and checks."""

import json
import os
from datetime import UTC, datetime, timedelta

import pytest

from finetune_pipeline.artifacts import find_alteration, get_latest
from finetune_pipeline.curation.dataset_files import PREFERENCE, read_split
from finetune_pipeline.database import connect
from finetune_pipeline.manifests import DatasetManifest
from finetune_pipeline.pipeline.dataset_export import ExampleFilter, examples_of, list_datasets
from finetune_pipeline.pipeline.datasets import UploadError, dataset_from_file
from finetune_pipeline.pipeline.required_checks import check_passed
from finetune_pipeline_tests.conftest import dataset_rows
from finetune_pipeline_tests.orchestration.conftest import BENCHMARK

UPLOADED = datetime(2026, 3, 4, tzinfo=UTC)
NAMES = ["ash", "birch", "cedar", "dune", "elm", "fir", "gorse", "hazel"]


def chat(name, answer=None, **fields):
    prompt = f"please note what {name} said about the {name} matter"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer or f"{name} spoke"}]
    return {"messages": turns, **fields}


def pair(name, rejected="nobody spoke"):
    asked, preferred = chat(name)["messages"]
    return {
        "input": {"messages": [asked]},
        "preferred_output": [preferred],
        "non_preferred_output": [{"role": "assistant", "content": rejected}],
    }


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="training"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


def test_chat_lines_become_a_checked_dataset_without_secrets_and_benchmark_questions(loop, write):
    rows = [chat(name) for name in NAMES]
    rows[0]["messages"][0]["content"] += ", mail ann.smith@example.com"
    leaked = chat("gold")
    leaked["messages"][0]["content"] = BENCHMARK[0]["prompt"]
    tools = chat("tools", tools=[{"type": "function", "function": {"name": "f"}}])
    dataset = dataset_from_file(loop, connect(), write(*rows, leaked, tools), "supervised")
    manifest = dataset.manifest
    assert (manifest.train + manifest.validation, manifest.sources) == (len(NAMES), {"upload": len(NAMES)})
    assert manifest.redacted == {"email": 1} and len(manifest.near_benchmark) == 1
    assert sum(manifest.left_out.values()) == 2
    check_passed(loop.name, DatasetManifest, manifest.version, dataset.sha256)
    assert find_alteration(dataset) is None
    found = {row["provenance"]: row for split in ("train", "validation") for row in dataset_rows(dataset.path, split)}
    assert found["line 1"]["prompt"].endswith("mail [EMAIL]") and found["line 8"]["completion"] == "hazel spoke"
    assert not list(dataset.path.rglob("*.parquet")), "the unredacted rows are gone"
    # The asset lora_adapter has an input, also in a loop that never curated a dataset.
    assert get_latest(DatasetManifest, loop.name).manifest.version == manifest.version
    assert dataset_from_file(loop, connect(), write(*rows, leaked, tools), "supervised").sha256 == dataset.sha256


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_a_line_has_its_own_time_and_author_or_the_time_of_the_upload(make_loop, write, method):
    loop = make_loop(curation={"min_examples": 1, "validation_fraction": 0.0})
    line = chat if method == "supervised" else pair
    own = {"created_at": "2026-01-02T12:00:00Z", "user": "Ann", "domain": "walls", "kind": "create"}
    path = write(line("ash") | own, *map(line, NAMES[1:]))
    os.utime(path, (UPLOADED.timestamp(), UPLOADED.timestamp()))
    made = dataset_from_file(loop, connect(), path, method)

    def lines(**filters):
        return [example.provenance for example in examples_of(made, "train", ExampleFilter(**filters))]

    assert sorted(lines(since=UPLOADED)) == [f"line {number}" for number in range(2, 9)]
    assert lines(until=UPLOADED) == ["line 1"] == lines(author=["Ann"], domain=["walls"], kind=["create"])
    os.utime(path)  # the same file, uploaded again now
    assert dataset_from_file(loop, connect(), path, method).sha256 == made.sha256
    assert len(list_datasets(loop)) == 1 and sorted(lines(until=UPLOADED + timedelta(seconds=1))) == sorted(lines())


def test_of_equal_prompts_without_a_time_the_later_line_is_kept(loop, write):
    rows = [chat("ash", "ash whispered"), *map(chat, NAMES)]
    made = dataset_from_file(loop, connect(), write(*rows), "supervised")
    said = [row["completion"] for split in ("train", "validation") for row in dataset_rows(made.path, split)]
    assert sorted(said) == [f"{name} spoke" for name in NAMES]


def test_preference_lines_become_pairs(loop, write):
    dataset = dataset_from_file(loop, connect(), write(*map(pair, NAMES)), "dpo")
    rows = [row for split in ("train", "validation") for row in read_split(dataset.path, PREFERENCE, split)]
    assert {(row["chosen"], row["rejected"]) for row in rows} == {(f"{name} spoke", "nobody spoke") for name in NAMES}


def test_a_validation_file_is_the_validation_set(loop, write):
    training = write(*(chat(name) for name in NAMES[:6]))
    held_out = write(*(chat(name) for name in NAMES[6:]), name="validation")
    dataset = dataset_from_file(loop, connect(), training, "supervised", held_out)
    assert {row["completion"] for row in dataset_rows(dataset.path, "validation")} == {"gorse spoke", "hazel spoke"}
    assert dataset.manifest.train == 6
    with pytest.raises(UploadError, match="line 1: messages: is missing") as raised:
        dataset_from_file(loop, connect(), training, "supervised", write(pair("ash"), name="validation"))
    assert raised.value.validation


@pytest.mark.parametrize(
    ("line", "method", "said"),
    [
        ("not json", "supervised", "line 2: "),
        ("[1]", "supervised", "line 2: found a list, expected a JSON object"),
        (pair("x"), "supervised", "line 2: messages: is missing"),
        (chat("x"), "dpo", "line 2: input: is missing"),
        ({"messages": [{"role": "user", "content": "a"}]}, "supervised", "line 2: there is no turn of the assistant"),
        ({"messages": [{"role": "bat", "content": "a"}]}, "supervised", "line 2: messages, turn 1: the role is 'bat'"),
        ({**pair("x"), "preferred_output": []}, "dpo", "line 2: preferred_output: expected a list of one message"),
        (pair("x", rejected="x spoke"), "dpo", "line 2: non_preferred_output: is the same answer"),
    ],
)
def test_an_unusable_line_is_named(loop, write, line, method, said):
    good = [pair(name) if method == "dpo" else chat(name) for name in NAMES]
    with pytest.raises(UploadError) as raised:
        dataset_from_file(loop, connect(), write(good[0], line, *good[1:]), method)
    assert said in str(raised.value)
    assert get_latest(DatasetManifest, loop.name) is None


def test_answers_of_another_loops_schema_are_refused_by_line(make_loop, write, tmp_path):
    schema = {"type": "object", "properties": {"material": {"enum": ["brick"]}}, "required": ["material"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    questions = [{**row, "expected": {"material": "brick"}} for row in BENCHMARK]
    (tmp_path / "benchmark.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    loop = make_loop(output_schema=str(tmp_path / "schema.json"))
    rows = [chat(name, '{"material": "brick"}') for name in NAMES]
    rows[3] = chat("dune", '{"wood": "oak"}')
    with pytest.raises(UploadError, match="line 4: messages: the answer does not pass the output schema of loop notes"):
        dataset_from_file(loop, connect(), write(*rows), "supervised")


def test_too_few_examples_are_refused_with_the_numbers(loop, write):
    with pytest.raises(UploadError, match="enough_examples: 1 example, at least 5 needed"):
        dataset_from_file(loop, connect(), write(chat("ash")), "supervised")
