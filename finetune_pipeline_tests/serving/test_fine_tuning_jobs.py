"""Our own paths for training jobs: a real gateway over a recording of Dagster, which a test moves on.

`test_fine_tuning_by_curl.py` has the tests with Dagster itself.
"""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline.orchestrator import OrchestratorDown, OrchestratorError
from finetune_pipeline.pipeline import jobs
from finetune_pipeline.registry.training_jobs import add_event, find_job, runs_of
from finetune_pipeline.serving import fine_tuning_jobs, gateway
from finetune_pipeline_tests.pipeline.test_job_status import RecordedDagster
from finetune_pipeline_tests.serving.conftest import serving
from finetune_pipeline_tests.serving.test_openai_fine_tuning import NAMES, chat, jsonl, loop_of
from finetune_pipeline_tests.waiting import wait_until

PATH = "/v1/fine-tuning/jobs"
PROGRESS = {
    "step": 30, "steps": 120, "epoch": 2.5, "loss": 1.5, "validation_loss": 1.25, "learning_rate": 1e-4,
    "tokens_per_second": 900.0, "seconds_left": 90.0, "micro_batch": None, "elapsed_seconds": 30.0,
    "memory_bytes": 2**30,
}  # fmt: skip


@pytest.fixture(scope="module")
def dagster():
    return RecordedDagster()


@pytest.fixture(scope="module")
def running(own_home, tmp_path_factory, dagster):
    """Run a gateway with two loops, which asks the recorded Dagster."""
    folder = tmp_path_factory.mktemp("loops")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway.Gateway, "orchestrator", lambda _: dagster)
        patch.setattr(gateway, "SYNC_SECONDS", 0.2)
        patch.setattr(fine_tuning_jobs, "POLL_SECONDS", 0.05)
        with serving(loop_of(folder), loop_of(folder, "mail")) as made:
            yield made


@pytest.fixture
def http(running, dagster):
    """Return a client; the jobs that a test leaves behind are canceled."""
    yield running.http
    dagster.down, dagster.fault = False, None
    for job in running.http.get(PATH, params={"status": ["pending", "running", "paused"]}).json()["data"]:
        running.http.post(f"{PATH}/{job['id']}/cancel")
        for run in job["runs"]:
            dagster.move(run, "CANCELED")
        assert running.http.get(f"{PATH}/{job['id']}").json()["status"] == "canceled"


@pytest.fixture
def created(http):
    def create(headers=None, **fields):
        response = http.post(PATH, json={"loop": "notes", **fields}, headers=headers or {})
        assert response.status_code == 200, response.text
        return response.json()

    return create


def refused(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


def uploaded(http, *rows):
    response = http.post("/v1/files", files={"file": ("rows.jsonl", jsonl(*rows))}, data={"purpose": "fine-tune"})
    return response.json()["id"]


def test_a_job_without_a_dataset_builds_one_first(http, dagster, created):
    job = created(training={"num_train_epochs": 2, "seed": 3}, suffix="short", metadata={"team": "a"})
    assert (job["status"], job["origin"], job["created_by"], job["dataset"]) == ("pending", "api", "local", None)
    assert job["training"] == {"num_train_epochs": 2, "seed": 3} and job["metadata"] == {"team": "a"}
    (run,) = job["runs"]
    assert dagster.launched[run] == ["raw_logs", "curated_dataset", "lora_adapter", "gguf_model", "eval_report"]
    assert job == http.get(f"{PATH}/{job['id']}").json()
    assert [one["id"] for one in http.get(PATH, params={"loop": "notes", "limit": 1}).json()["data"]] == [job["id"]]
    assert http.get(PATH, params={"loop": "mail"}).json() == {"data": [], "has_more": False}


def test_the_progress_says_how_far_the_training_is(http, dagster, created):
    job = created()
    jobs.note_started(connect(), job["id"])
    jobs.note_progress(connect(), job["id"], PROGRESS, "training 25%")
    dagster.move(job["runs"][0], "STARTED")
    progress = http.get(f"{PATH}/{job['id']}").json()["progress"]
    assert (progress["percent"], progress["seconds_left"], progress["memory_bytes"]) == (25.0, 90.0, 2**30)
    assert (progress["epoch"], progress["step"], progress["loss"], progress["validation_loss"]) == (2.5, 30, 1.5, 1.25)
    assert progress["learning_rate"] == 1e-4 and progress["ends_at"]


def test_a_job_is_paused_resumed_and_completed(http, dagster, created):
    job = created(suffix="short")
    path = f"{PATH}/{job['id']}"
    dagster.move(job["runs"][0], "STARTED")
    assert http.post(f"{path}/pause").json()["waits_for"] == "pause"
    dagster.move(job["runs"][0], "CANCELED")
    paused = http.get(path).json()
    assert (paused["status"], paused["waits_for"], paused["model"]) == ("paused", None, None)
    resumed = http.post(f"{path}/resume").json()
    assert (resumed["status"], len(resumed["runs"])) == ("pending", 2)
    jobs.note_made(connect(), job["id"], "exported", model_sha256="ab" * 32)
    dagster.move(resumed["runs"][1], "SUCCESS")
    done = http.get(path).json()
    assert (done["status"], done["model"]) == ("completed", "notes@abababababababab:short")
    assert "is completed; it cannot be canceled now" in refused(http.post(f"{path}/cancel"), 409)["message"]
    assert [one["status"] for one in http.get(PATH, params={"status": "completed"}).json()["data"]] == ["completed"]


def test_a_run_that_is_terminated_in_dagsters_ui_cancels_its_job_though_nobody_reads_it(dagster, created):
    job = created()
    dagster.move(job["runs"][0], "CANCELED")
    wait_until(lambda: find_job(connect(), job["id"]).status == "canceled")


def test_a_busy_loop_names_the_job_in_progress(http, created):
    job = created()
    assert job["id"] in refused(http.post(PATH, json={"loop": "notes"}), 409)["message"]


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"training": {"lora_r": 0}}, 400, "training.lora_r", "lora_r"),
        ({"training": {"learning_rat": 1}}, 400, "training.learning_rat", "learning_rat"),
        ({"training": {"loss_weights": [1.0]}}, 400, "training", "method: dpo"),
        ({"train": {}}, 400, "train", "train"),
        ({"suffix": "a/b"}, 400, "suffix", "suffix"),
        ({"base_model": "/etc"}, 400, "base_model", "out of the project"),
        ({"base_model": "data/../../x"}, 400, "base_model", "out of the project"),
        ({"base_model": "data/none"}, 400, "base_model", "does not exist"),
        ({"base_model": "data"}, 400, "base_model", "no config.json"),
        ({"dataset": "0123456789abcdef"}, 404, "dataset", "its datasets are"),
        ({"dataset": "../raw_logs"}, 404, "dataset", "its datasets are"),
        ({"dataset": "a", "training_file": "b"}, 400, "training_file", "not both"),
        ({"validation_file": "b"}, 400, "validation_file", "training_file too"),
        ({"training_file": "file-none"}, 404, "training_file", "there is no file"),
        ({"loop": "nobody"}, 404, "loop", "there are: notes, mail"),
        ({"loop": None}, 400, "loop", "Several loops"),
    ],
)
def test_what_cannot_be_honored_is_rejected_with_the_field_named(http, fields, status, param, said):
    error = refused(http.post(PATH, json={"loop": "notes", **fields}), status)
    assert (error["param"], said in error["message"]) == (param, True), error
    assert http.get(PATH, params={"status": "pending"}).json()["data"] == []


def test_a_file_becomes_the_dataset_and_two_requests_with_one_key_are_one_job(http, dagster):
    file = uploaded(http, *map(chat, NAMES))
    body = {"loop": "notes", "training_file": file, "base_model": "data/starter_model", "training": {"seed": 5}}
    before = len(dagster.launched)
    barrier = threading.Barrier(4)

    def send(_):
        barrier.wait()
        return http.post(PATH, json=body, headers={"Idempotency-Key": "one"})

    with ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(send, range(4)))
    assert [response.status_code for response in responses] == [200] * 4, [one.text for one in responses]
    (id,) = {response.json()["id"] for response in responses}
    job = http.get(f"{PATH}/{id}").json()
    assert len(dagster.launched) == before + 1 and len(job["runs"]) == 1
    assert dagster.launched[job["runs"][0]] == ["lora_adapter", "gguf_model", "eval_report"], "the dataset is there"
    assert (job["dataset"] is not None, job["base_model"]) == (True, "data/starter_model")
    listed = http.get("/v1/fine-tuning/datasets", params={"loop": "notes"}).json()["data"]
    assert [one["origin"] for one in listed if one["version"] == job["dataset"]] == ["upload"]
    other = http.post(PATH, json={**body, "training": {"seed": 6}}, headers={"Idempotency-Key": "one"})
    assert f"which created {id}" in refused(other, 409)["message"]


def test_without_dagster_no_job_is_created_and_the_message_starts_it(http, dagster):
    dagster.down = True
    response = http.post(PATH, json={"loop": "notes"})
    assert "Dagster does not answer" in refused(response, 503)["message"] and response.headers["Retry-After"]
    dagster.down = False
    assert http.get(PATH, params={"status": "pending"}).json()["data"] == []


def test_while_dagster_is_down_a_job_says_so_and_is_paused_later(http, dagster, created):
    job = created()
    path = f"{PATH}/{job['id']}"
    assert job["orchestrator_error"] is None
    jobs.note_started(connect(), job["id"])
    dagster.down = True
    now = http.get(path).json()
    assert (now["status"], now["orchestrator_error"]) == ("running", "Dagster does not answer.")
    refused(http.post(f"{path}/pause"), 503)
    assert http.get(path).json()["waits_for"] == "pause"
    dagster.down = False
    wait_until(lambda: job["runs"][0] in dagster.terminated, what=lambda: http.get(path).text)
    dagster.move(job["runs"][0], "CANCELED")
    wait_until(lambda: find_job(connect(), job["id"]).status == "paused")


def test_a_code_server_that_is_gone_keeps_the_job_waiting(http, dagster, created, monkeypatch):
    dagster.fault = OrchestratorDown("Dagster answers, but its code server does not")
    job = created()
    assert (job["status"], job["waits_for"], job["runs"]) == ("pending", "launch", [])
    events = read_events(http, job["id"], stop=lambda event: "code server" in event["data"]["message"])
    assert events[-1]["data"]["level"] == "warn"
    dagster.fault = None
    monkeypatch.setattr(jobs, "LAUNCH_AGAIN", jobs.LAUNCH_AGAIN * 0)
    wait_until(lambda: runs_of(connect(), job["id"]) != [], what=lambda: http.get(f"{PATH}/{job['id']}").text)
    assert find_job(connect(), job["id"]).wanted is None


def test_a_rejected_launch_is_an_error_and_the_job_has_failed(http, dagster):
    dagster.fault = OrchestratorError("Dagster did not launch notes_loop: unknown job")
    assert "unknown job" in refused(http.post(PATH, json={"loop": "notes"}), 503)["message"]
    assert http.get(PATH, params={"limit": 1}).json()["data"][0]["status"] == "failed"


def read_events(http, id, after=None, stop=lambda event: False):
    """Return the events of a job up to its end, or to one at which the client disconnects."""
    events, headers = [], {} if after is None else {"Last-Event-ID": str(after)}
    with http.stream("GET", f"{PATH}/{id}/events", headers=headers) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        event = {}
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name in ("id", "event", "data"):
                event[name] = json.loads(value) if name != "event" else value
            elif not line and event:
                events.append(event)
                if stop(event):
                    return events
                event = {}
    return events


def test_an_events_client_that_reconnects_gets_what_it_missed_once(http, dagster, created):
    job = created()
    first = read_events(http, job["id"], stop=lambda event: event["id"] == 2)
    add_event(connect(), job["id"], "while it was away")
    jobs.note_progress(connect(), job["id"], PROGRESS, "training 25%")
    second = []
    reader = threading.Thread(target=lambda: second.extend(read_events(http, job["id"], after=first[-1]["id"])))
    reader.start()
    time.sleep(0.3)  # it follows by now
    add_event(connect(), job["id"], "while it reads")
    dagster.move(job["runs"][0], "SUCCESS")
    reader.join(30)
    assert not reader.is_alive()
    assert [event.get("id") for event in first + second] == [1, 2, 3, 4, 5, 6, None]
    messages = [event["data"].get("message") for event in second]
    assert messages == ["while it was away", "training 25%", "while it reads", "completed", None]
    assert second[1]["event"] == "metrics" and second[1]["data"]["data"]["step"] == 30
    assert (second[-1]["event"], second[-1]["data"]) == ("end", {"status": "completed"})
    again = http.get(f"{PATH}/{job['id']}/events", headers={"Last-Event-ID": "6"})
    assert (again.status_code, again.content) == (204, b""), "an EventSource does not connect again"
    assert read_events(http, job["id"])[:-1] == first + second[:-1]
    wrong = refused(http.get(f"{PATH}/{job['id']}/events", headers={"Last-Event-ID": "x"}), 400)
    assert (wrong["param"], "found 'x'" in wrong["message"]) == ("Last-Event-ID", True)


def test_unknown_jobs_are_not_found(http):
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/pause"), ("POST", "/resume")):
        assert refused(http.request(method, f"{PATH}/ftjob-{'0' * 24}{path}"), 404)["param"] == "job_id"


def test_reading_needs_the_scope_infer_and_changing_admin(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    key = create_key(connect(), "reader", ["infer"])
    with serving(loop_of(tmp_path)) as keyed:
        keyed.http.headers["Authorization"] = f"Bearer {key}"
        assert keyed.http.get(PATH).json()["data"] == []
        assert keyed.http.get("/v1/fine-tuning/datasets").json() == {"data": []}
        for path, body in ((PATH, {}), (f"{PATH}/x/cancel", None), ("/v1/fine-tuning/datasets/export", {})):
            assert "this needs admin" in refused(keyed.http.post(path, json=body), 403)["message"]
