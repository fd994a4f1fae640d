"""OpenAI's paths for files and fine-tuning jobs, by the official client."""

import json
import socket
from pathlib import Path

import openai
import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline.pipeline import uploaded_files
from finetune_pipeline.registry.training_jobs import TrainingJob, create_job, new_job_id
from finetune_pipeline.settings import home
from finetune_pipeline_tests.conftest import START
from finetune_pipeline_tests.serving.conftest import make_loop, serving

NAMES = ["ash", "birch", "cedar", "dune", "elm", "fir", "gorse", "hazel"]
BENCHMARK = [
    {"id": f"q{n}", "slice": "notes", "prompt": f"golden question {name}", "expected": f"golden answer {name}"}
    for n, name in enumerate(["amber", "birch", "cedar", "dunes"])
]


def chat(name, answer=None):
    prompt = f"please note what {name} said about the {name} matter"
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer or f"{name} spoke"}]
    }


def jsonl(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def loop_of(folder: Path, name="notes", **changes):
    benchmark = folder / "benchmark.jsonl"
    benchmark.write_bytes(jsonl(*BENCHMARK))
    evaluation = {"benchmark": str(benchmark), "metric": "rouge1", "max_tokens": 24, "context": 192}
    return make_loop(name, **{"curation": {"min_examples": 5}, "evaluation": evaluation, **changes})


@pytest.fixture(scope="module")
def running(own_home, tmp_path_factory):
    """Run a gateway with two loops of one base, whose Dagster does not run."""
    folder = tmp_path_factory.mktemp("loops")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_DAGSTER_URL", "http://127.0.0.1:9")
        with serving(loop_of(folder), loop_of(folder, "mail", base_model="other")) as made:
            yield made


@pytest.fixture
def client(running):
    return running.openai()


@pytest.fixture
def uploaded(client):
    def upload(*rows):
        return client.files.create(file=("rows.jsonl", jsonl(*rows)), purpose="fine-tune")

    return upload


def refused(call, kind=openai.BadRequestError):
    with pytest.raises(kind) as raised:
        call()
    return raised.value


def test_a_file_is_uploaded_listed_read_and_deleted(client, uploaded):
    content = jsonl(chat("ash"))
    file = uploaded(chat("ash"))
    assert (file.filename, file.bytes, file.purpose, file.status) == (
        "rows.jsonl",
        len(content),
        "fine-tune",
        "processed",
    )
    second = uploaded(chat("birch"))
    newest_first = [one.id for one in client.files.list()]
    assert newest_first[:2] == [second.id, file.id]
    assert [one.id for one in client.files.list(limit=1)] == newest_first, "the client follows the pages"
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert client.files.delete(file.id).deleted
    refused(lambda: client.files.retrieve(file.id), openai.NotFoundError)
    assert not [path for path in (home() / "files").iterdir() if path.name.startswith(".")]


def test_large_files_are_stored_in_pieces(client):
    content = b"\r\n--" * 2_000_000  # what a boundary begins with
    file = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    assert client.files.content(file.id).read() == content


def test_a_file_above_the_limit_leaves_nothing(client, running, monkeypatch):
    before = sorted((home() / "files").glob("*")) if (home() / "files").exists() else []
    monkeypatch.setattr(uploaded_files, "MAX_FILE_BYTES", 100_000)
    error = refused(
        lambda: client.files.create(file=("x.jsonl", bytes(100_001)), purpose="fine-tune"), openai.APIStatusError
    )
    assert (error.status_code, error.param) == (413, "file") and "100,000 bytes" in str(error)
    assert sorted((home() / "files").glob("*")) == before


def test_a_file_of_5_gb_is_refused_by_its_head(running):
    host, port = running.http.base_url.host, running.http.base_url.port
    head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with socket.create_connection((host, port)) as connection:
        connection.sendall(f"{head}Content-Length: {5 * 10**9}\r\n\r\n--x".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("content_type", "body", "status", "said"),
    [
        ("application/json", b"{}", 415, "send the file as multipart/form-data"),
        ("multipart/form-data; boundary=x", b"--x\r\n", 400, "breaks off"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n\r\n--x--", 400, "has no name"),
        ("multipart/form-data; boundary=x", b"--x--", 400, "file: is missing"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n{}\r\n--x--',
            400,
            "purpose: found nothing",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n{}\r\n'
            b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--',
            400,
            "purpose: found 'batch', expected 'fine-tune'",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n3600\r\n--x--',
            400,
            "expires_after[seconds]: is not supported",
        ),
    ],
)
def test_an_upload_with_another_form_is_refused(running, content_type, body, status, said):
    response = running.http.post("/v1/files", content=body, headers={"Content-Type": content_type})
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"model": "gpt-4o-mini"}, "model", "name one of the loops: notes, mail"),
        ({"model": "notes@v1.0.0"}, "model", "is neither a loop"),
        ({"method": {"type": "reinforcement"}}, "method", "expected one of supervised, dpo"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}}, None, "beta"),
        ({"hyperparameters": {"n_epochs": 0}}, None, "n_epochs"),
        ({"hyperparameters": {}, "method": {"type": "supervised"}}, "hyperparameters", "not in both"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "a"}}]}, "integrations", "integrations"),
        ({"seed": -1}, "seed", "seed"),
        ({"suffix": "two words"}, "suffix", "suffix"),
        ({"extra_body": {"prompt_loss_weight": 0.1}}, "prompt_loss_weight", "prompt_loss_weight"),
    ],
)
def test_what_cannot_be_honored_is_rejected_by_its_name(client, uploaded, fields, param, said):
    file = uploaded(*map(chat, NAMES))
    error = refused(lambda: client.fine_tuning.jobs.create(**{"model": "notes", "training_file": file.id, **fields}))
    assert said in str(error)
    assert param is None or error.param == param


def test_a_missing_file_is_named(client, uploaded):
    file = uploaded(*map(chat, NAMES))
    for fields in ({"training_file": "file-none"}, {"training_file": file.id, "validation_file": "file-none"}):
        error = refused(
            lambda fields=fields: client.fine_tuning.jobs.create(model="notes", **fields), openai.NotFoundError
        )
        assert error.param == list(fields)[-1]


def test_without_dagster_a_job_is_not_created_and_the_message_starts_it(client, uploaded):
    file = uploaded(*map(chat, NAMES))
    error = refused(
        lambda: client.fine_tuning.jobs.create(model="data/starter_model", training_file=file.id),
        openai.InternalServerError,
    )
    assert error.status_code == 503 and "`finetune ui`" in str(error)
    assert client.fine_tuning.jobs.list().data == []


def test_a_base_of_several_loops_names_them(tmp_path):
    with serving(loop_of(tmp_path), loop_of(tmp_path, "mail")) as made:
        jobs = made.openai().fine_tuning.jobs
        error = refused(lambda: jobs.create(model="data/starter_model", training_file="file-none"))
    assert "is the base of several loops; name one of the loops: notes, mail" in str(error)


def test_unknown_jobs_are_not_found(client):
    calls = client.fine_tuning.jobs
    for call in (calls.retrieve, calls.cancel, calls.pause, calls.resume, calls.list_events, calls.checkpoints.list):
        refused(lambda call=call: call("ftjob-000000000000000000000000"), openai.NotFoundError)


@pytest.mark.parametrize(
    ("loop", "origin", "said"),
    [
        ("letters", "openai", "is of the loop letters, which this gateway does not serve"),
        ("notes", "cli", "was not created here, but by cli; `finetune train show ftjob-"),
    ],
)
def test_a_job_that_these_paths_do_not_have_is_explained(client, loop, origin, said):
    job = TrainingJob(id=new_job_id(), loop=loop, origin=origin, created_by="ann", created_at=START, status="completed")
    create_job(connect(), job)
    error = refused(lambda: client.fine_tuning.jobs.retrieve(job.id), openai.NotFoundError)
    assert said in str(error)


def test_files_need_the_scope_admin_and_jobs_can_be_read_with_infer(tmp_path_factory, own_home):
    key = create_key(connect(), "reader", ["infer"])
    with serving(loop_of(tmp_path_factory.mktemp("keyed"))) as running:
        reader = running.openai(api_key=key)
        assert reader.fine_tuning.jobs.list().data == []
        for call in (
            lambda: reader.files.list(),
            lambda: reader.files.create(file=b"{}", purpose="fine-tune"),
            lambda: reader.fine_tuning.jobs.create(model="notes", training_file="file-none"),
        ):
            assert "this needs admin" in str(refused(call, openai.PermissionDeniedError))
