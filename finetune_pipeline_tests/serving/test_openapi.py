"""Schemathesis tests the gateway against its OpenAPI document and finds no error."""

import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from finetune_pipeline.artifacts import set_latest
from finetune_pipeline.database import connect
from finetune_pipeline.database.api_keys import create_key
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.feedback.store import record
from finetune_pipeline.pipeline.build_dataset import build_dataset
from finetune_pipeline.pipeline.snapshot import snapshot
from finetune_pipeline.registry.requested_comparisons import (
    ComparedPair,
    RequestedComparison,
    claim_comparison,
    create_comparison,
    new_comparison_id,
)
from finetune_pipeline.registry.training_jobs import TrainingJob, create_job, events_of, list_jobs
from finetune_pipeline.serving.gateway import Gateway
from finetune_pipeline_tests.orchestration.conftest import corrected
from finetune_pipeline_tests.pipeline.test_job_status import RecordedDagster
from finetune_pipeline_tests.serving.conftest import serving
from finetune_pipeline_tests.serving.test_openai_fine_tuning import NAMES, chat, jsonl, loop_of

OPERATIONS = [
    "DELETE /v1/files/{file_id}",
    "GET /healthz",
    "GET /metrics",
    "GET /v1/feedback/stats",
    "GET /v1/files",
    "GET /v1/files/{file_id}",
    "GET /v1/files/{file_id}/content",
    "GET /v1/fine-tuning/comparisons",
    "GET /v1/fine-tuning/comparisons/{comparison_id}",
    "GET /v1/fine-tuning/comparisons/{comparison_id}/pairs",
    "GET /v1/fine-tuning/datasets",
    "GET /v1/fine-tuning/deployments",
    "GET /v1/fine-tuning/jobs",
    "GET /v1/fine-tuning/jobs/{job_id}",
    "GET /v1/fine-tuning/jobs/{job_id}/events",
    "GET /v1/fine-tuning/models",
    "GET /v1/fine-tuning/models/{model_id}",
    "GET /v1/fine_tuning/jobs",
    "GET /v1/fine_tuning/jobs/{job_id}",
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints",
    "GET /v1/fine_tuning/jobs/{job_id}/events",
    "GET /v1/interactions/{id}",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /v1/responses/{id}",
    "POST /admin/approve",
    "POST /admin/reload-model",
    "POST /admin/rollback",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/feedback",
    "POST /v1/files",
    "POST /v1/fine-tuning/comparisons",
    "POST /v1/fine-tuning/comparisons/{comparison_id}/cancel",
    "POST /v1/fine-tuning/comparisons/{comparison_id}/votes",
    "POST /v1/fine-tuning/datasets/export",
    "POST /v1/fine-tuning/datasets/upload",
    "POST /v1/fine-tuning/jobs",
    "POST /v1/fine-tuning/jobs/{job_id}/cancel",
    "POST /v1/fine-tuning/jobs/{job_id}/pause",
    "POST /v1/fine-tuning/jobs/{job_id}/resume",
    "POST /v1/fine-tuning/models/{model_id}/approve",
    "POST /v1/fine-tuning/models/{model_id}/archive",
    "POST /v1/fine-tuning/models/{model_id}/deploy",
    "POST /v1/fine-tuning/models/{model_id}/reject",
    "POST /v1/fine-tuning/models/{model_id}/rollback",
    "POST /v1/fine-tuning/models/{model_id}/unarchive",
    "POST /v1/fine_tuning/jobs",
    "POST /v1/fine_tuning/jobs/{job_id}/cancel",
    "POST /v1/fine_tuning/jobs/{job_id}/pause",
    "POST /v1/fine_tuning/jobs/{job_id}/resume",
    "POST /v1/interactions",
    "POST /v1/responses",
]


JOB = "ftjob-0123456789abcdef01234567"


class ObedientDagster(RecordedDagster):
    """Starts each run at once, and ends it as soon as it is terminated."""

    def launch(self, *args):
        id = super().launch(*args)
        self.move(id, "STARTED")
        return id

    def terminate(self, id):
        super().terminate(id)
        self.move(id, "CANCELED")


@pytest.fixture(scope="module")
def keyed(own_home, tmp_path_factory):
    """Run a gateway over a recording of Dagster; there is a key with all scopes, a dataset, and a job that ended."""
    key = create_key(connect(), "tests", ["infer", "feedback", "admin"])
    loop = loop_of(tmp_path_factory.mktemp("loops"), curation={"min_examples": 1})
    with connect().write() as connection:
        record(connection, "notes", corrected(NAMES), default_reward)
    set_latest(build_dataset(loop, snapshot(loop, connect())[0]).manifest, "run")
    create_job(connect(), TrainingJob(
        id=JOB, loop="notes", origin="openai", created_by="tests", status="completed", model_sha256="ab" * 32,
        request={"model": "notes", "training_file": "file-none"}, created_at=datetime.now(UTC),
    ))  # fmt: skip
    dagster = ObedientDagster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gateway, "orchestrator", lambda _: dagster)
        with serving(loop) as running:
            yield running, key


def test_every_operation_is_described(keyed):
    running, _ = keyed
    paths = running.http.get("/openapi.json").json()["paths"]
    found = sorted(f"{method.upper()} {path}" for path, methods in paths.items() for method in methods)
    assert found == OPERATIONS


HOOKS = """
import os
import re

import jsonschema
import schemathesis

from finetune_pipeline.settings import TrainingSettings

TRAINING = jsonschema.Draft202012Validator(TrainingSettings.model_json_schema())
EXISTING, FILE = os.environ["INTERACTION"], os.environ.get("TRAINING_FILE")
SCHEMAS = ("response_format", "guided_json", "json_schema", "structured_outputs", "text", "tools")


def is_number(value, low, high):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def use_existing(body):
    # Most made-up names and ids get no further than a 404.
    for name in ("model", "loop"):
        if isinstance(body.get(name), str) and 0 < len(body[name]) <= 60:
            body[name] = "notes"
    if isinstance(body.get("interaction_id"), str) and re.fullmatch("[0-9a-f-]{36}", body["interaction_id"]):
        body["interaction_id"] = EXISTING
    if isinstance(body.get("previous_response_id"), str) and len(body["previous_response_id"]) <= 200:
        body["previous_response_id"] = EXISTING
    if "deployment_config" in body:  # the loop has no deployment target
        body["deployment_config"] = None
    if body.get("force") is True and body.get("reason") is None:  # it is needed then
        body["reason"] = "needed"
    for name in ("tuned", "base"):
        if isinstance(body.get(name), str) and re.fullmatch("[A-Za-z0-9][A-Za-z0-9._:/@-]{0,199}", body[name]):
            body[name] = "notes@v1.0.0" if name == "tuned" else "notes@base"
    if "training_file" in body and isinstance(body.get("model"), str) and 0 < len(body["model"]) <= 500:
        body["model"] = "notes"  # an unknown one is 400 here
    if isinstance(body.get("method"), dict):
        body.pop("hyperparameters", None)  # they are refused together
    for item in body["input"] if isinstance(body.get("input"), list) else ():
        if isinstance(item, dict) and item.get("type") == "item_reference" and isinstance(item.get("id"), str):
            item["id"] = f"msg_{EXISTING}" if len(item["id"]) <= 200 else item["id"]


def is_text(value, longest):
    return isinstance(value, str) and 0 < len(value) <= longest and chr(0) not in value


def use_existing_job_fields(body):
    # Settings that are valid each are refused together, such as loss_weights without method: dpo.
    if isinstance(body.get("training"), dict) and TRAINING.is_valid(body["training"]):
        body["training"] = {}
    if is_text(body.get("base_model"), 500):
        body["base_model"] = "data/starter_model"
    for name, longest in (("dataset", 64), ("training_file", 200), ("validation_file", 200)):
        if is_text(body.get(name), longest):
            body[name] = None  # they are refused together


def end_with_a_prompt(messages):
    last = messages[-1] if messages else None
    if isinstance(last, dict) and last.get("role") in {"system", "developer", "assistant"}:
        last["role"] = "user"
    if isinstance(last, dict) and last.get("type") == "item_reference":  # to an answer
        messages.append({"role": "user", "content": "a wall"})
    for message in messages:
        if isinstance(message, dict) and message.get("role") != "assistant" and message.get("content") is None:
            message["content"] = "a wall"


def agree(body):
    # Values of fields that are valid, and refused only together with other fields or this model.
    if is_number(body.get("best_of"), 1, 64):
        body["best_of"] = body.get("n") or 1
    if is_number(body.get("repeat_penalty"), 1e-9, 10) and is_number(body.get("repetition_penalty"), 1e-9, 10):
        body["repetition_penalty"] = body["repeat_penalty"]
    if body.get("ignore_eos") is True and any(body.get(name) for name in SCHEMAS):
        body["ignore_eos"] = False
    bias = body.get("logit_bias")
    if isinstance(bias, dict) and all(re.fullmatch("[0-9]{1,9}", key) for key in bias):
        if all(value is None or is_number(value, -100, 100) for value in bias.values()):
            body["logit_bias"] = {str(int(key) % 200): value for key, value in bias.items()}
    choice, tools = body.get("tool_choice"), body.get("tools")
    if (isinstance(choice, dict) and is_named(choice)) or choice == "required" or (tools and choice in ("auto", None)):
        body["tool_choice"] = "none"
    if isinstance(body.get("chat_template_kwargs"), dict):  # their meaning is the template's
        body["chat_template_kwargs"] = {}
    # A NUL in a name within metadata is refused, which a schema cannot say of any depth.
    if isinstance(body.get("metadata"), dict) and any(chr(0) in name for name in names(body["metadata"])):
        body["metadata"] = {}


def is_named(choice):
    function = choice.get("function", choice)  # in chat completions and in responses
    return choice.get("type") == "function" and isinstance(function, dict) and isinstance(function.get("name"), str)


def names(value):
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield name
        yield from names(inner)
    for inner in value if isinstance(value, list) else ():
        yield from names(inner)


def stay_small(body):
    # There are many requests.
    if is_number(body.get("n"), 2, 64):
        body["n"] = 2
    if isinstance(body.get("prompt"), list):
        body["prompt"] = body["prompt"][:2]
    for name in ("max_tokens", "max_completion_tokens", "n_predict", "max_output_tokens"):
        if is_number(body.get(name), 5, 2**31):
            body[name] = 4
    body.setdefault("max_output_tokens" if "input" in body else "max_tokens", 4)


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict):
        return body
    use_existing(body)
    if "messages" in body or "input" in body or ("prompt" in body and "output" not in body):
        messages = body["input"] if isinstance(body.get("input"), list) else body.get("messages")
        end_with_a_prompt(messages if isinstance(messages, list) else [])
        stay_small(body)
    agree(body)
    if "prompt" in body and "output" not in body:
        scores = body.get("echo") is True and is_number(body.get("logprobs"), 0, 20)
        if scores and isinstance(body.get("stream"), bool):
            body["stream"] = False
        if is_number(body.get("max_tokens"), -1, 4):
            body["max_tokens"] = min(max(body["max_tokens"], 0), 1) if scores else body["max_tokens"] or 4
    return body


@schemathesis.hook
def before_call(context, case, kwargs):
    # Also in the phase Coverage, whose bodies `map_body` does not see.
    if not isinstance(case.body, dict):
        return
    if case.operation.path == "/v1/fine-tuning/jobs":
        use_existing_job_fields(case.body)
    if case.operation.path == "/v1/fine_tuning/jobs" and is_text(case.body.get("model"), 500):
        case.body["model"] = "notes"
        if FILE and is_text(case.body.get("training_file"), 200):
            case.body["training_file"] = FILE
            if is_text(case.body.get("validation_file"), 200):
                case.body["validation_file"] = None
            if isinstance(case.body.get("method"), dict) and case.body["method"].get("type") == "dpo":
                case.body["method"] = None  # the file is not of pairs
    if case.operation.path == "/v1/fine-tuning/datasets/export" and is_text(case.body.get("version"), 64):
        case.body["version"] = None
"""


CONFIG = """
warnings.fail-on = ["missing_test_data"]

[parameters]
"path.id" = "{id}"
"path.model" = "notes"
"path.job_id" = "{job}"
"query.loop" = "notes"
"path.model_id" = "notes@base"
"path.comparison_id" = "{comparison}"

[[operations]]
include-path = "/admin/rollback"  # there is no earlier deployment, which is 404
warnings = false

[[operations]]
include-path = "/admin/approve"  # nothing waits, which is 409, and made-up names are 404
warnings = false

[[operations]]
include-path-regex = "/v1/fine.tuning/"  # made-up files and ids, and jobs that cannot be changed
warnings = false

[[operations]]
include-path-regex = "/v1/files/"  # made-up ids
warnings = false
"""


def completed_comparison():
    """Record a comparison with a pair to vote on, and return its id."""
    db, id = connect(), new_comparison_id()
    made = {"id": id, "loop": "notes", "base": "notes@base", "base_id": None, "tuned": "notes@v1.0.0", "tuned_id": "1"}
    create_comparison(db, RequestedComparison(**made, created_by="tests", created_at=datetime.now(UTC)))
    pair = {"comparison_id": id, "number": 1, "prompt": "p", "base_answer": "b", "tuned_answer": "t", "swapped": False}
    claim_comparison(db, id).finish([ComparedPair(**pair)], base_wins=0, tuned_wins=1, ties=0, p_value=0.5)
    return id


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_schemathesis_finds_no_error(keyed, tmp_path):
    running, key = keyed
    (tmp_path / "hooks.py").write_text(HOOKS)
    # Objects that exist, because most made-up ids and names get no further than a 404.
    existing = running.openai(api_key=key).responses.create(model="notes", input="a wall", max_output_tokens=16).id
    comparison = completed_comparison()
    config = CONFIG.format(id=existing, job=JOB, comparison=comparison)
    (tmp_path / "schemathesis.toml").write_text(config)
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path), "INTERACTION": existing}
    program = [sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json"]
    options = ["--header", f"Authorization: Bearer {key}", "--max-examples", "15", "--seed", "1", "--no-color"]
    options += ["--output-sanitize", "false"]
    ended = subprocess.run(
        [*program, *options, "--continue-on-failure"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=3500,  # it takes two minutes on an idle machine
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [phase for phase in ("Coverage", "Fuzzing", "Stateful") if f"✅ {phase}" not in ended.stdout] == []
    assert running.health()["status"] == "ok"


JOBS_CONFIG = """
[parameters]
"query.loop" = "notes"
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_schemathesis_finds_no_error_in_sequences_over_the_jobs_that_it_creates(keyed, tmp_path):
    running, key = keyed
    (tmp_path / "hooks.py").write_text(HOOKS)
    (tmp_path / "schemathesis.toml").write_text(JOBS_CONFIG)  # its ids are those of responses
    file = running.openai(api_key=key).files.create(file=("rows.jsonl", jsonl(*map(chat, NAMES))), purpose="fine-tune")
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path), "INTERACTION": ""}
    program = [sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json", "--phases", "stateful"]
    options = ["--header", f"Authorization: Bearer {key}", "--max-examples", "80", "--seed", "1", "--no-color"]
    options += ["--include-path-regex", "^/v1/fine.tuning/jobs", "--continue-on-failure", "--mode", "positive"]
    ended = subprocess.run(
        [*program, *options], env=environment | {"TRAINING_FILE": file.id}, capture_output=True, text=True,
        cwd=tmp_path, timeout=3500,
    )  # fmt: skip
    assert ended.returncode == 0 and "✅ Stateful" in ended.stdout, ended.stdout + ended.stderr
    made = [job for job in list_jobs(connect()) if job.id != JOB]
    said = {event.message for job in made for event in events_of(connect(), job.id)}
    assert {job.origin for job in made} == {"api", "openai"} and {"paused", "canceled"} <= said, ended.stdout
