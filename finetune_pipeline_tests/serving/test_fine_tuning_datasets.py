"""Our own paths for datasets: list, export, and upload with a preview."""

import json
import socket

import pytest

from finetune_pipeline.artifacts import set_latest
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import record
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.settings import home
from finetune_pipeline_tests.conftest import feedback, interaction
from finetune_pipeline_tests.serving.conftest import serving
from finetune_pipeline_tests.serving.test_openai_fine_tuning import NAMES, chat, jsonl, loop_of

PATH = "/v1/fine-tuning/datasets"
SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["wall"]}}, "required": ["kind"]}


@pytest.fixture(scope="module")
def loops(own_home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    schema = folder / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    curation = {"min_examples": 1, "validation_fraction": 0.0}
    walls = folder / "walls.jsonl"
    walls.write_bytes(jsonl({"id": "q", "slice": "s", "prompt": "a wall", "expected": {"kind": "wall"}}))
    evaluation = {"benchmark": str(walls), "metric": "rouge1"}
    return (
        loop_of(folder, curation=curation),
        loop_of(folder, "walls", output_schema=str(schema), evaluation=evaluation),
        loop_of(folder, "broken", evaluation={"benchmark": str(schema), "metric": "rouge1"}),
    )


@pytest.fixture(scope="module")
def http(loops):
    with serving(*loops) as running:
        yield running.http


@pytest.fixture(scope="module")
def version(loops):
    """Build a dataset from the logs of two people."""
    events = []
    for number, name in enumerate(NAMES):
        prompt = f"please note what {name} said about the {name} matter"
        events.append(interaction(name, prompt=prompt, output=f"{name} spoke", user="Ann" if number < 3 else "Ben"))
        events.append(feedback(f"on {name}", name, "thumbs_up"))
    with connect().write() as connection:
        record(connection, "notes", events, default_reward)
    made = build_dataset(loops[0], snapshot(loops[0], connect())[0])
    set_latest(made.manifest, "run")
    return made.manifest.version


def export(http, **fields):
    response = http.post(f"{PATH}/export", json={"loop": "notes", **fields})
    assert response.status_code == 200, response.text
    return response, [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("alpaca", "instruction input output reward"), ("chatml", "text reward"), ("messages", "messages reward"),
        ("sharegpt", "conversations reward"), ("prompt_completion", "prompt completion reward"),
    ],
)  # fmt: skip
def test_examples_are_exported_in_each_format(http, version, form, fields):
    response, rows = export(http, format=form)
    assert len(rows) == len(NAMES) and " ".join(rows[0]) == fields
    assert response.headers["content-type"] == "application/x-ndjson"
    assert f'filename="notes-{version}-train.{form}.jsonl"' in response.headers["content-disposition"]


def test_an_export_has_the_examples_that_pass_the_filters(http, version):
    _, rows = export(http, format="prompt_completion", version=version, filters={"author": ["Ann"], "min_reward": 0.1})
    assert sorted(row["completion"] for row in rows) == [f"{name} spoke" for name in NAMES[:3]]
    assert export(http, format="messages", filters={"since": "2100-01-01T00:00:00Z"})[1] == []


def test_datasets_are_listed_with_what_they_hold(http, version):
    (one,) = http.get(PATH, params={"loop": "notes"}).json()["data"]
    assert (one["version"], one["newest"], one["origin"], one["train"]) == (version, True, "logs", len(NAMES))
    assert one["sources"] == {"logs": len(NAMES)}
    assert http.get(PATH).json()["data"] == [one]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"format": "csv"}, 400, "format"),
        ({"filters": {"min_reward": 2}}, 400, "filters.min_reward"),
        ({"filters": {"since": "monday"}}, 400, "filters.since"),
        ({"filters": {"team": ["a"]}}, 400, "filters.team"),
        ({"version": "../../x"}, 404, "dataset"),
        ({"loop": "walls"}, 404, "dataset"),
    ],
)
def test_an_export_that_is_impossible_names_the_field(http, version, fields, status, param):
    response = http.post(f"{PATH}/export", json={"loop": "notes", "format": "alpaca", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def upload(http, content, status=200, **fields):
    response = http.post(f"{PATH}/upload", files={"file": ("rows.jsonl", content)}, data={"loop": "notes", **fields})
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


def test_an_upload_shows_the_first_rows_as_the_loop_reads_them(http):
    rows = [chat(name) for name in NAMES] * 2
    rows[0]["messages"][0]["content"] += ", mail ann.smith@example.com"
    seen = upload(http, jsonl(*rows))
    assert (seen["examples"], seen["unusable"], seen["errors"], len(seen["rows"])) == (16, 0, [], 10)
    first = seen["rows"][0]
    assert (first["line"], first["completion"], first["left_out"]) == (1, "ash spoke", "")
    assert first["prompt"].endswith("mail [EMAIL]")
    assert http.get(f"/v1/files/{seen['file']}/content").content == jsonl(*rows)


def test_a_file_that_cannot_be_used_is_not_kept_and_its_lines_are_named(http):
    before = sorted(home().glob("files/*"))
    seen = upload(http, jsonl("not JSON", {"prompt": "p"}, chat("ash"), {"messages": [{"role": "user"}]}))
    assert (seen["file"], seen["examples"], seen["unusable"]) == (None, 1, 3)
    assert [error["line"] for error in seen["errors"]] == [1, 2, 4]
    assert "messages: is missing (found prompt)" in seen["errors"][1]["message"]
    assert sorted(home().glob("files/*")) == before


def test_a_file_of_another_loops_schema_is_named(http):
    seen = upload(http, jsonl(chat("ash"), chat("elm", '{"kind": "wall"}')), loop="walls")
    (error,) = seen["errors"]
    assert (error["line"], seen["file"]) == (1, None)
    assert error["message"].startswith("messages: the answer does not pass the output schema of loop walls")


def test_a_loop_whose_benchmark_cannot_be_read_says_so(http):
    assert "schema.json" in upload(http, jsonl(chat("ash")), 409, loop="broken")["message"]


def test_a_file_for_dpo_shows_the_answer_not_to_prefer(http):
    asked, preferred = chat("ash")["messages"]
    row = {"input": {"messages": [asked]}, "preferred_output": [preferred]}
    row["non_preferred_output"] = [{"role": "assistant", "content": "nobody spoke"}]
    assert upload(http, jsonl(row), method="dpo")["rows"][0]["rejected"] == "nobody spoke"
    assert upload(http, jsonl(row), 400, method="kto")["param"] == "method"
    assert upload(http, jsonl(row), 404, loop="nobody")["param"] == "loop"


def test_an_upload_of_5_gb_is_refused_by_its_head(http):
    host, port = http.base_url.host, http.base_url.port
    head = f"POST {PATH}/upload HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with socket.create_connection((host, port)) as connection:
        connection.sendall(f"{head}Content-Length: {5 * 10**9}\r\n\r\n--x".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
