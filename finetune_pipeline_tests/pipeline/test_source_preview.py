"""`finetune source preview`: what a source of each kind gives, without a store."""

import json
import sqlite3

import pytest
from click.testing import CliRunner

from finetune_pipeline.cli.source import source as command
from finetune_pipeline.pipeline.source_preview import preview_source
from finetune_pipeline.settings import SettingsError, home

from ..sources.endpoint import said, teaching


def of_files(folder):
    rows = [
        {"prompt": "mail?", "completion": "ann.miller@example.org", "user": "bob"},
        {"prompt": "mail?", "completion": "another"},
        {"prompt": "a", "completion": "b", "reward": -1},
        {"prompt": "a", "completion": "b", "tool_calls": [{"id": "1"}]},
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "files"}


def of_vault(folder):
    (folder / "Saw.md").write_text("## Decision\n\nBuy it.\n\n## Learning\n\n-\n")
    return {"kind": "vault"}


def of_code(folder):
    (folder / "a.py").write_text(
        'def area(w):\n    """Return the area."""\n    return w\n\n\ndef f(x):\n    y = x\n    return y\n'
    )
    return {"kind": "code"}


def of_documents(folder):
    (folder / "forms").mkdir()
    (folder / "forms" / "t.md").write_text("---\nname: list\ninstruction: List it.\n---\n{points}\n")
    (folder / "a.txt").write_text("Meeting about the mill, in May\n\n- saw\n- roof\n")
    (folder / "b.txt").write_text("Meeting about the mill, without any list of points\n")
    return {"kind": "documents", "templates": str(folder / "forms")}


def of_sql(folder):
    with sqlite3.connect(folder / "r.db") as database:
        database.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, q TEXT, a TEXT)")
        database.executemany("INSERT INTO t VALUES (?, ?, ?)", [(1, "what?", "that"), (2, None, "x")])
    return {"kind": "sql", "url_env": "RATINGS_URL", "table": "t", "key": "k", "cursor": "k", "prompt": "q",
            "response": "a"}  # fmt: skip


@pytest.fixture
def previewed(make_loop, tmp_path, monkeypatch):
    """Declare a source of a kind, and preview it."""
    folder = tmp_path / "there"
    folder.mkdir()
    monkeypatch.setenv("RATINGS_URL", f"sqlite:///{folder}/r.db")

    def preview(make, limit=10, ask_teacher=False, **changes):
        settings = {"name": "mine", **make(folder), **changes}
        loop = make_loop(sources=[settings if settings["kind"] == "sql" else {"path": str(folder), **settings}])
        return preview_source(loop, "mine", limit, ask_teacher=ask_teacher)

    return preview


@pytest.mark.parametrize(
    ("make", "provenance", "texts", "counts", "skipped"),
    [
        (of_files, "a.jsonl:1", ("mail?", "[EMAIL]"), (3, 1, 1), "has tool_calls; tool calls are not supported yet"),
        (of_vault, "Saw.md#Decision", ("What did I decide about Saw?", "Buy it."), (1, 1, 1), "but has no text"),
        (of_code, "a.py::area",
         ("Write the Python function `area(w)`: Return the area.",
          'def area(w):\n    """Return the area."""\n    return w'),
         (1, 1, 1), "1 definition without"),
        (of_documents, "a.txt::list", ("List it.\n\nMeeting about the mill, in May\n\n- saw\n- roof", "- saw\n- roof"),
         (1, 1, 1), "names no points"),
        (of_sql, "t:1", ("what?", "that"), (1, 0, 1), "q is NULL"),
    ],
)  # fmt: skip
def test_each_kind_of_source_is_previewed(previewed, make, provenance, texts, counts, skipped):
    found = previewed(make)
    first = found.shown[0]
    assert (first.provenance, (first.prompt, first.completion), first.left_out) == (provenance, texts, "")
    assert (found.records, found.files, found.examples) == counts
    (reason,) = found.skipped
    assert skipped in reason and not found.error
    assert not (home() / "finetune.db").exists() and not (home() / "cache").exists()


def test_what_a_dataset_would_leave_out_is_counted(previewed):
    found = previewed(of_files, limit=2)
    assert found.left_out == {"same prompt as a record before it": 1, "reward below 0.3": 1}
    assert [record.left_out for record in found.shown] == ["", "same prompt as a record before it"]
    limited = previewed(of_files, max_chunks=1)
    assert (limited.records, dict(limited.skipped)) == (1, {"more than 1 record (max_chunks): not read": 1})


def test_a_teacher_is_asked_only_on_request(previewed):
    def of_untagged(folder):
        (folder / "Mill.md").write_text("The mill was louder than we thought, so we sleep at the back.\n")
        return of_vault(folder)

    with teaching(lambda body, number: said("learning")) as (server, teacher):
        without = previewed(of_untagged, teacher=teacher.model_dump())
        assert (without.teacher_not_asked, without.records, len(server.asked)) == (True, 1, 0)
        asked = previewed(of_untagged, teacher=teacher.model_dump(), ask_teacher=True)
    assert (asked.teacher_not_asked, asked.records, len(server.asked)) == (False, 2, 1)
    assert asked.shown[1].prompt == "What did I learn about Mill?"


def test_the_command_shows_texts_counts_and_errors(make_loop, tmp_path):
    of_vault(tmp_path)
    vault = {"kind": "vault", "name": "mine", "path": str(tmp_path)}
    loop = make_loop(sources=[vault, {**vault, "name": "none", "tags": {}, "headings": {"Plan": "decision"}}])

    def run(*arguments):
        return CliRunner().invoke(command.commands["preview"], arguments, default_map={"loop": loop.name})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "defs"))
        shown, as_json, failed = run("mine"), run("mine", "--json", "--limit", "0"), run("none")
    assert "1  Saw.md#Decision  (decision, reward 0.8)\n    prompt      What did I decide about Saw?" in shown.output
    assert "mine (vault): 1 record from 1 file\n1 example for a dataset" in shown.output
    assert "1 skipped in the source:\n  1: is selected, but has no text (in Saw.md#Learning)\n" in shown.output
    assert json.loads(as_json.output) | {"shown": []} == {
        "source": "mine", "kind": "vault", "records": 1, "files": 1, "examples": 1, "left_out": {}, "shown": [],
        "skipped": {"is selected, but has no text": 1},
        "first_skipped": {"is selected, but has no text": "Saw.md#Learning"}, "teacher_not_asked": False, "error": "",
    }  # fmt: skip
    assert failed.exit_code == 1 and "the headings 'Decision' (1), 'Learning' (1)" in failed.output


def test_an_unknown_source_is_named(make_loop, tmp_path):
    with pytest.raises(SettingsError, match="no source 'mine'; it declares none under `sources`"):
        preview_source(make_loop(), "mine", 10)
    sources = [{"kind": "logs", "max_examples": 5}, {"kind": "files", "name": "chats", "path": str(tmp_path)}]
    with pytest.raises(SettingsError, match="no source 'logs'; its sources are chats"):
        preview_source(make_loop(sources=sources), "logs", 10)
