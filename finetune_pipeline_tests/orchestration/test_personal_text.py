"""No personal text enters Dagster's run storage, event log, compute logs and tags, whatever goes wrong in a run."""

import json
import re
import sqlite3

import pytest

from finetune_pipeline.database import connect
from finetune_pipeline.feedback.store import newest_offset
from finetune_pipeline.registry.champion import champion
from finetune_pipeline_tests.conftest import feedback, interaction
from finetune_pipeline_tests.orchestration.whole_loop.example_loop import EXAMPLE, Loop

pytestmark = pytest.mark.slow

CANARY = re.compile(rb"canary[a-z]+", re.IGNORECASE)
IMPOSSIBLE = {"gate": {"min_gain": 1.0, "mode": "points"}}


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    made = Loop(tmp_path_factory.mktemp("loop"))
    logs = made.folder / "logs"
    logs.mkdir()
    own = [
        event
        for n in range(12)
        for event in (
            interaction(f"{n}", prompt=f"canaryprompt {n} of the team", output=f"canaryoutput {n}", user="canaryuser"),
            feedback(f"on {n}", f"{n}", "correction", correction=f"canarycompletion {n}", user="canaryreviewer"),
        )
    ]
    lines = [event.model_copy(update={"loop": "meeting_notes"}).model_dump_json() for event in own]
    bad = [
        {"event": "interaction", "prompt": "canaryrejected", "output": 5, "user": "canaryuser"},
        {"event": "canaryevent"},
        {"event": "feedback", "loop": "canaryloop", "kind": "canarykind"},
        {"messages": [{"role": "canaryrole", "content": "canarycontent"}]},
        {"canaryfield": 1},
        {**json.loads(own[0].model_dump_json()), "canaryfield of a person": 1},
        {"event": "interaction", "confidence": "canarylong word " * 10, "validation_score": "canaryscore"},
        {"prompt": "canaryprompt", "output": "canaryanswer", "weight": "canaryweight"},
        {"user_id": "canaryuser", "data": {"rating": "canaryrating"}, "meta": {}},
    ]
    lines += [json.dumps(row) for row in bad] + ['{"prompt": "canarybroken', "canaryplain"]
    (logs / "log.jsonl").write_text((EXAMPLE.parent / "logs" / "sample.jsonl").read_text() + "\n".join(lines) + "\n")
    vault = made.folder / "vault"
    vault.mkdir()
    (vault / "canarytitle good.md").write_text(
        "---\ntags: [decision]\n---\n# canaryheading\n\nWe take canarytext.\n" * 1
    )
    (vault / "canarytitle bytes.md").write_bytes(b"\xff\xfe canarybytes")
    (vault / "canarytitle yaml.md").write_text("---\ntags: [decision\n: canaryyaml\n---\ncanarytext\n")
    (vault / "canarytitle link.md").symlink_to("/nonexistent/canarytarget.md")
    (made.folder / "rows.jsonl").write_text(
        json.dumps({"prompt": "canaryrow", "completion": ""}) + "\n" + json.dumps({"prompt": "canaryrow"}) + "\n"
    )
    orders = sqlite3.connect(made.folder / "orders.db")
    orders.executescript(
        "CREATE TABLE orders (id INTEGER, prompt TEXT, response TEXT, rating TEXT);"
        "INSERT INTO orders VALUES (1, 'canaryorder', 'canaryanswer', 'canaryrating'), (2, 'canaryorder', '', 'good')"
    )
    made.env["ORDERS"] = f"sqlite:///{made.folder / 'orders.db'}"
    made.changes = {
        "ingest": {"folders": [str(logs)]},
        "sources": [
            {"kind": "vault", "name": "notes", "path": str(vault)},
            {"kind": "files", "name": "rows", "path": str(made.folder / "rows.jsonl")},
            {"kind": "sql", "name": "orders", "url_env": "ORDERS", "table": "orders", "key": "id", "cursor": "id",
             "prompt": "prompt", "response": "response", "rating": "rating", "ratings": {"good": 1.0}},
        ],
    }  # fmt: skip
    return made


@pytest.fixture(autouse=True)
def in_its_home(loop, own_home, monkeypatch):
    monkeypatch.setenv("FINETUNE_HOME", str(loop.home))


def found(loop):
    """The canaries in all files of the Dagster home, and in the logs of runs, and where each was found."""
    said = {}
    folders = (loop.dagster, loop.home / "logs")
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for match in CANARY.finditer(content):
            around = content[max(0, match.start() - 150) : match.end() + 50]
            said.setdefault(match[0], f"{path.relative_to(loop.folder)}: {around!r}")
    return said


def test_a_blocked_check_of_the_dataset(loop):
    code, log = loop.run("*meeting_notes/lora_adapter", **loop.changes, curation={"min_examples": 100_000})
    assert code != 0 and "enough_examples" in log
    with connect().read() as connection:
        assert newest_offset(connection) > 24  # the canaries were ingested
    assert found(loop) == {}


def test_a_rejected_challenger(loop):
    code, log = loop.run(**loop.changes, **IMPOSSIBLE)
    assert code != 0 and "needed" in log, log[-3000:]
    assert any(
        b"canaryprompt" in path.read_bytes() for path in loop.stage("curated_dataset").rglob("train.alpaca.jsonl")
    )
    assert found(loop) == {}


def test_a_promoted_challenger(loop):
    code, log = loop.run(**loop.changes, gate={"min_gain": 0.0, "mode": "points"})
    assert code == 0 and champion(connect(), "meeting_notes") is not None, log[-3000:]
    assert found(loop) == {}


def test_a_failed_step(tmp_path):
    """A log in which no line is usable."""
    small = Loop(tmp_path)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "log.jsonl").write_text(json.dumps({"event": "interaction", "prompt": ["canaryprompt"]}) + "\n")
    code, log = small.run("meeting_notes/raw_logs", ingest={"folders": [str(logs)]})
    assert code != 0 and "has no interactions" in log
    assert found(small) == {}
