"""Files of feedback, read and written, on a real database."""

import json
import os
from datetime import UTC, datetime, timedelta

import pytest

from finetune_pipeline.alpaca import alpaca_row
from finetune_pipeline.database import connect
from finetune_pipeline.feedback import FeedbackClient, FeedbackError, formats, store
from finetune_pipeline.feedback.formats import InvalidLine, export_alpaca, export_events
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.records import Feedback, Interaction, Turn
from finetune_pipeline.sources import row_readers
from finetune_pipeline.sources.ingest_reader import open_log, read_lines
from finetune_pipeline_tests.conftest import START, feedback, interaction, uid
from finetune_pipeline_tests.memory import count_and_peak


def rows_of(path, loop):
    return row_readers.read_rows(path, loop.ingest.max_line_bytes)


def read_events(path, loop):
    return formats.read_events(path, rows_of(path, loop), loop)


def import_file(path, loop, db):
    return formats.import_rows(path, rows_of(path, loop), loop, db)


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def write_array(path, *items, indent=None):
    path.write_text(json.dumps(items, indent=indent))
    return path


def held(db):
    """What the store holds: prompt, output, kinds of feedback, and the example's target and reward."""
    with db.read() as connection:
        ids = [
            row.interaction_id for rows in store.interactions_with_examples(connection, "notes", 10**9) for row in rows
        ]
        found = [store.find_interaction(connection, id) for id in ids]
    return [
        (
            one.interaction.prompt,
            one.interaction.output,
            sorted(item.kind for item in one.feedback),
            one.example and (one.example.target, round(one.example.reward, 3)),
        )
        for one in found
    ]


def events(path, loop):
    (found,) = read_events(path, loop)
    assert not isinstance(found, InvalidLine), found.reason
    return found


ALPACA = [
    {"instruction": "Parse.", "input": "a wall", "output": "{}", "reward": 0.9},
    {"instruction": "Shorten this:", "input": "a long text", "output": "text"},
    {"instruction": "Say hello", "input": "", "output": "hello", "reward": -0.5, "id": str(uid("hello"))},
    {"instruction": "Say bye", "output": "bye", "id": 17, "text": "### Instruction: Say bye"},
]
ALPACA_HELD = [
    ("a wall", "{}", ["reward"], ("{}", 0.9)),  # the loop's system prompt is no part of the prompt
    ("Shorten this:\n\na long text", "text", [], None),
    ("Say hello", "hello", ["reward"], ("hello", -0.5)),
    ("Say bye", "bye", [], None),
]


@pytest.mark.parametrize("form", ["array", "indented", "lines"])
def test_alpaca_is_read_as_an_array_and_as_lines_and_adds_nothing_twice(tmp_path, loop, db, form):
    path = tmp_path / "alpaca.json"
    if form == "lines":
        write(path, *ALPACA)
    else:
        write_array(path, *ALPACA, indent=2 if form == "indented" else None)
    done = import_file(path, loop, db)
    assert (done.lines, done.rejected, done.invalid) == (4, 0, [])
    assert done.recorded == store.RecordResult(interactions=4, feedback=2)
    assert held(db) == ALPACA_HELD
    # The same again, and the same from a file of the other form.
    assert import_file(path, loop, db).recorded == store.RecordResult(duplicates=6)
    other = write(tmp_path / "again.jsonl", *ALPACA)
    assert import_file(other, loop, db).recorded == store.RecordResult(duplicates=6)


def test_a_known_id_with_other_content_is_a_conflict_and_the_first_stays(tmp_path, loop, db):
    first = {"prompt": "p", "output": "o", "id": str(uid("a")), "reward": 0.5}
    import_file(write(tmp_path / "a.jsonl", first), loop, db)
    other = {**first, "output": "another"}
    done = import_file(write(tmp_path / "b.jsonl", first, other), loop, db)
    assert [event.output for event in done.conflicts] == ["another"]
    assert held(db)[0][1] == "o"


def test_exported_events_cause_no_conflicts(tmp_path, loop, db):
    events = [interaction("a"), feedback("f", "a", "thumbs_up"), feedback("g", "a", "rating", rating="2")]
    with db.write() as connection:
        store.record(connection, loop.name, events, default_reward)
    export_events(tmp_path / "out.jsonl", loop, db)
    done = import_file(tmp_path / "out.jsonl", loop, db)
    assert (done.recorded, done.conflicts) == (store.RecordResult(duplicates=3), [])


@pytest.mark.parametrize(
    "row",
    [
        {"event": "feedback", "interaction_id": str(uid("a")), "kind": "thumbs_up"},
        {"event": "interaction", "prompt": "p", "output": "o"},
        {"prompt": "p", "output": "o", "reward": 1.0},
        ALPACA[0],
    ],
)
def test_a_time_in_the_future_is_rejected_in_every_form(tmp_path, loop, db, row):
    later = datetime.now(UTC) + timedelta(days=1)
    done = import_file(write(tmp_path / "a.jsonl", {**row, "created_at": later.isoformat()}), loop, db)
    assert (done.rejected, done.recorded) == (1, store.RecordResult())
    assert "is in the future" in done.invalid[0].reason
    path = write(tmp_path / "b.jsonl", row)
    os.utime(path, (later.timestamp(),) * 2)  # the file's time is used for a missing one, but never rejected
    assert import_file(path, loop, db).rejected == 0


def test_forms_may_be_mixed_line_by_line(tmp_path, loop, db):
    path = write(
        tmp_path / "mixed.jsonl",
        interaction("a").model_dump_json() + "\n",
        feedback("f", "a", "rating", rating="5").model_dump_json() + "\n",
        {
            "prompt": "p",
            "output": "o",
            "reward": 0.5,
            "user": "u1",
            "confidence": 0.8,
            "created_at": "2026-01-02T00:00Z",
        },
        {"prompt": "q", "response": "wrong", "correction": "right", "reward": -0.4, "user": "u1"},
        "\n",
        ALPACA[0],
    )
    assert import_file(path, loop, db).recorded == store.RecordResult(interactions=4, feedback=5)
    assert held(db) == [
        ("prompt a", "answer a", ["rating"], ("answer a", 0.9)),
        ("p", "o", ["reward"], ("o", 0.5)),
        ("q", "wrong", ["correction", "reward"], ("right", 0.2)),  # the reward was of the wrong answer
        ALPACA_HELD[0],
    ]


FIELDS = (
    *Interaction.model_fields, *Feedback.model_fields, "instruction", "input", "response", "text", "weight", "train",
    "trainable", "loss",
)  # fmt: skip


@pytest.mark.parametrize("null", [None, float("nan")])
@pytest.mark.parametrize(
    "row",
    [
        interaction("a", history=[{"role": "user", "content": "h"}]).model_dump(mode="json", exclude_none=True),
        *(
            feedback("f", "a", kind, **more).model_dump(mode="json", exclude_none=True)
            for kind, more in [("rating", {"rating": "5"}), ("success", {"score": 90}), ("thumbs_up", {})]
        ),
        {"prompt": "p", "output": "o", "reward": 0.5},
        {"prompt": "p", "response": "o", "correction": "c", "history": [{"role": "user", "content": "h"}]},
        *ALPACA,
    ],
    ids=lambda row: "+".join(row)[:40],
)
def test_null_and_nan_count_as_absent_fields(tmp_path, loop, row, null):
    turns = {"history": [{**turn, "name": null} for turn in row["history"]]} if "history" in row else {}
    path = write(tmp_path / "a.jsonl", row)
    filled = write(tmp_path / "b.jsonl", {**dict.fromkeys(FIELDS, null), **row, **turns})
    os.utime(filled, ns=(path.stat().st_mtime_ns,) * 2)  # the time of a row without one
    assert events(filled, loop) == events(path, loop)
    if "event" in row:
        with open_log(filled) as log:
            (line,) = read_lines(log, "notes", lines=0, max_line_bytes=10_000)
        assert [line.event] == events(path, loop)


@pytest.mark.parametrize("marked", [{"weight": 0}, {"train": False}, {"trainable": "false"}, {"loss": 0.0}])
@pytest.mark.parametrize("row", [{"prompt": "p", "output": "o", "reward": 1}, ALPACA[0]])
def test_a_line_excluded_from_training_is_rejected_with_its_reason(tmp_path, loop, db, row, marked):
    path = write(tmp_path / "a.jsonl", row, {**row, **marked}, {**row, **dict.fromkeys(marked, 1)})
    done = import_file(path, loop, db)
    ((name, value),) = marked.items()
    assert [line.reason for line in done.invalid] == [f"the row is excluded from training ({name}: {value})"]
    assert done.recorded == store.RecordResult(interactions=1, feedback=1, duplicates=2)


def test_the_fields_of_a_flat_line_are_kept(tmp_path, loop):
    given = {"prompt": "p", "output": "o", "user": "u", "confidence": 0.5, "id": str(uid("x")), "correction": "c",
             "created_at": START.isoformat(), "model": "m", "history": [{"role": "user", "content": "h"}]}  # fmt: skip
    logged, correction = events(write(tmp_path / "f.jsonl", given), loop)
    assert (logged.id, logged.user, logged.confidence, logged.model) == (uid("x"), "u", 0.5, "m")
    assert logged.history[0].content == "h"
    assert logged.created_at == correction.created_at == START
    assert (correction.interaction_id, correction.correction, correction.user) == (uid("x"), "c", "u")


def test_a_missing_id_is_derived_from_the_content_alone(tmp_path, loop):
    def id_of(name, **given):
        return events(write(tmp_path / name, {"prompt": "p", "output": "o", **given}), loop)[0].id

    assert id_of("a.jsonl") == id_of("b.jsonl") == id_of("c.jsonl", reward=0.5)
    different = [
        id_of("d.jsonl", **given) for given in ({}, {"user": "u"}, {"id": 1}, {"id": "two"}, {"created_at": 1})
    ]
    assert len(set(different)) == 5


def test_a_later_reward_adds_only_one_feedback(tmp_path, loop, db):
    import_file(write(tmp_path / "a.jsonl", {"prompt": "p", "output": "o"}), loop, db)
    later = import_file(write(tmp_path / "b.jsonl", {"prompt": "p", "output": "o", "reward": 1}), loop, db)
    assert later.recorded == store.RecordResult(feedback=1, duplicates=1)


GOOD = {"prompt": "p", "output": "o"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json\n", "not JSON"),
        ('{"prompt": "p", "output": "o", "reward": Infinity}\n', "Infinity"),
        ('{"prompt": "p", "output": "\\ud800"}\n', "surrogate"),
        ("7\n", "expected a JSON object"),
        ({}, "none of the keys event, prompt, instruction"),
        ({**GOOD, "reward": 7}, "reward: found 7, expected less than or equal to 1"),
        ({**GOOD, "reward": "much"}, "reward: found 'much'"),
        ({**GOOD, "confidence": 7}, "confidence: found 7"),
        ({**GOOD, "correction": " "}, "correction"),
        ({**GOOD, "source": "imported"}, "source, provenance: set only"),
        ({**GOOD, "event": "interaction", "provenance": "a.md"}, "source, provenance: set only"),
        ({**GOOD, "surprise": 1}, "'surprise': unknown field"),
        ({**GOOD, "loop": "other"}, "belongs to loop 'other'"),
        ({**GOOD, "loop": ["notes"]}, "belongs to loop"),
        ({**GOOD, "response": "o"}, "`output` or as `response`"),
        ({"prompt": "p"}, "`output` or as `response`"),
        ({"prompt": "", "output": "o"}, "prompt"),
        ({"prompt": ["p"], "output": "o"}, "prompt"),
        ({"instruction": "Parse.", "input": "", "output": "o"}, "prompt"),  # nothing was asked
        ({"instruction": 7, "input": "", "output": "o"}, "instruction: found a number, expected a text"),
        ({"instruction": "i", "prompt": "p", "output": "o"}, "no prompt in addition"),
        ({"instruction": "i", "input": "p"}, "output"),
        ({"event": "other"}, "expected one of interaction, feedback"),
        ({"event": ["feedback"]}, "expected one of interaction, feedback"),
        ({"event": "feedback", "kind": "reward", "interaction_id": "../x"}, "interaction_id"),
        ({"event": "interaction", **GOOD, "id": "../../etc/passwd"}, "id: found '../../etc/passwd'"),
        ({**GOOD, "output": "x" * 1_100_000}, "longer than 1000000 bytes"),
        ("[" * 9_000 + "\n", "not JSON"),
    ],
)
def test_an_invalid_line_is_reported_and_the_others_are_imported(tmp_path, loop, db, line, reason):
    path = write(tmp_path / "log.jsonl", GOOD, line, {**GOOD, "prompt": "q"})
    done = import_file(path, loop, db)
    assert (done.lines, done.rejected, done.recorded.interactions) == (3, 1, 2)
    (invalid,) = done.invalid
    assert (invalid.path, invalid.line) == (path, 2)
    assert reason in invalid.reason
    assert len(invalid.reason) < 300


def test_a_line_that_is_not_utf_8_is_reported(tmp_path, loop):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\xff\xfe{}\n")
    good, invalid = read_events(path, loop)
    assert good[0].prompt == "p" and "not UTF-8" in invalid.reason


def test_a_line_without_its_end_is_read(tmp_path, loop):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(GOOD))
    assert len(events(path, loop)) == 1


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a", " [ ] \n")])
def test_an_empty_file_has_no_events(tmp_path, loop, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert list(read_events(path, loop)) == []


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_json_file_without_an_array_counts_as_unfinished(tmp_path, loop, text):
    path = tmp_path / "emptied.json"
    path.write_text(text)
    (invalid,) = read_events(path, loop)
    assert invalid.reason == "found 'the end of the file', expected '['; nothing after it was read"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[%s,\n{"prompt": oops}]', 2, "not JSON"),
        ("[%s,\n", 2, "not JSON"),  # cut off
        ('[%s\n{"prompt"', 2, "expected ','"),
        ("[%s\n] tail", 2, "after the end of the array"),
        ("[%s,\n" + "[" * 9_000, 2, "not JSON"),
        ("[%s,\n7]", 2, "expected a JSON object"),
        ('[%s,\n{"prompt": "' + "x" * 1_200_000, 2, "longer than 1000000 bytes"),
    ],
)
def test_a_broken_array_is_read_up_to_the_error(tmp_path, loop, text, line, reason):
    path = tmp_path / "log.json"
    path.write_text(text.replace("%s", json.dumps(GOOD)))
    good, invalid = read_events(path, loop)
    assert good[0].prompt == "p"
    assert (invalid.line, reason in invalid.reason) == (line, True), invalid.reason


def test_an_element_longer_than_the_buffer_is_read_whole(tmp_path, loop):
    long = {**GOOD, "output": 'a "quoted" \\ text 🚧 ' * 30_000}
    path = write_array(tmp_path / "log.json", long, GOOD, long)
    assert [len(found[0].output) for found in read_events(path, loop)] == [len(long["output"]), 1, len(long["output"])]


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_the_elements_do_not_depend_on_the_buffer_size(tmp_path, loop, monkeypatch, block):
    items = [{**GOOD, "output": '\ud83d\udea7 \\ "\n', "reward": -0.25}, {**GOOD, "prompt": "q", "confidence": 1e-3}]
    path = write_array(tmp_path / "log.json", *items, indent=1)
    monkeypatch.setattr(row_readers, "_BLOCK", block)
    first, second = read_events(path, loop)
    assert (first[0].output, first[1].reward, second[0].confidence) == ('🚧 \\ "\n', -0.25, 0.001)


@pytest.mark.parametrize("name", ["log.jsonl", "log.json"])
def test_a_long_file_takes_little_memory(tmp_path, loop, name):
    line = json.dumps({**GOOD, "output": "x" * 20_000})
    path = tmp_path / name
    with path.open("w") as file:
        file.write("[" if name == "log.json" else "")
        for number in range(3_000):
            file.write((",\n" if name == "log.json" else "\n") if number else "")
            file.write(line)
        file.write("]" if name == "log.json" else "")
    counts, peak = count_and_peak(read_events(path, loop))
    assert counts.total() == 3_000
    assert peak < 20e6  # of 60 MB


@pytest.fixture
def filled(loop, db):
    """A store with an example of each sort, an interaction without feedback, and a feedback alone."""
    client = FeedbackClient(loop, database=db)
    turns = [{"role": "user", "content": "hi"}]
    client.log_many(
        [
            interaction("good"), feedback("f1", "good", "thumbs_up"), feedback("f2", "good", "success", score=90),
            interaction("fixed", output="wrong", history=turns),
            feedback("f3", "fixed", "correction", correction="right"),
            interaction("bad"), feedback("f4", "bad", "thumbs_down"),
            interaction("silent"), feedback("f5", "never logged", "rating", rating="1"),
        ]
    )  # fmt: skip
    return client


def test_exported_events_are_imported_as_duplicates(tmp_path, loop, db, filled):
    path = tmp_path / "out.jsonl"
    assert export_events(path, loop, db) == (9, 0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"][0] for line in lines] == list("iffififi" + "f")
    rewards = {line["id"]: line.get("reward") for line in lines if line["event"] == "feedback"}
    assert rewards[str(uid("f1"))] == 1.0
    assert rewards[str(uid("f2"))] == pytest.approx(0.9)
    assert rewards[str(uid("f3"))] == pytest.approx(0.2)
    assert rewards[str(uid("f5"))] is None  # its interaction never arrived
    before = held(db)
    assert import_file(path, loop, db).recorded == store.RecordResult(duplicates=9)
    assert held(db) == before


def test_exported_events_recreate_the_store(tmp_path, loop, filled, db):
    path = tmp_path / "out.jsonl"
    export_events(path, loop, db)
    other = store_at(tmp_path / "other.db")
    import_file(path, loop, other)
    assert held(other) == held(db)
    again = tmp_path / "again.jsonl"
    export_events(again, loop, other)
    assert again.read_text() == path.read_text()


def store_at(path):
    return connect(f"sqlite:///{path}")


def test_alpaca_contains_the_targets(tmp_path, loop, db, filled):
    path = tmp_path / "out.json"
    assert export_alpaca(path, loop, db, list, min_reward=0.3) == (2, 0)
    good, fixed = json.loads(path.read_text())
    assert good == {"instruction": "Parse.", "input": "prompt good", "output": "answer good", "reward": 1.0}
    # A correction is worth less than 0.3 here, and qualifies all the same.
    assert (fixed["output"], fixed["history"]) == ("right", [["hi", ""]])
    lines = tmp_path / "out.jsonl"
    assert export_alpaca(lines, loop, db, list) == (3, 0)
    assert [json.loads(line)["reward"] for line in lines.read_text().splitlines()] == [1.0, pytest.approx(0.2), -1.0]
    plain = loop.model_copy(update={"system_prompt": ""})
    assert export_alpaca(tmp_path / "plain.json", plain, db, list, min_reward=1) == (2, 0)
    assert json.loads((tmp_path / "plain.json").read_text())[0]["instruction"] == "prompt good"


def test_alpaca_is_redacted_in_prompt_history_and_answer_and_events_are_not(tmp_path, loop, db):
    said = (Turn(role="user", content="I am secret"),)
    asked = interaction("a", prompt="a secret prompt", history=said, output="a secret answer")
    with db.write() as connection:
        store.record(connection, "notes", [asked, feedback("f", "a", "thumbs_up")], default_reward)
    alpaca, events = tmp_path / "a.jsonl", tmp_path / "e.jsonl"
    export_alpaca(alpaca, loop, db, lambda texts: [text.replace("secret", "[X]") for text in texts])
    assert json.loads(alpaca.read_text()) == {
        "instruction": "Parse.", "input": "a [X] prompt", "history": [["I am [X]", ""]],
        "output": "a [X] answer", "reward": 1.0,
    }  # fmt: skip
    export_events(events, loop, db)
    assert events.read_text().count("secret") == 3


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_exported_alpaca_can_be_read_again(tmp_path, loop, db, filled, name):
    path = tmp_path / name
    export_alpaca(path, loop, db, list)
    other = store_at(tmp_path / "other.db")
    assert import_file(path, loop, other).recorded == store.RecordResult(interactions=3, feedback=3)
    expected = [example for *_, example in held(db) if example]
    assert [example for *_, example in held(other)] == expected


def test_an_empty_store_exports_empty_files(tmp_path, loop, db):
    assert export_alpaca(tmp_path / "a.json", loop, db, list) == (0, 0)
    assert json.loads((tmp_path / "a.json").read_text()) == []
    assert export_events(tmp_path / "e.jsonl", loop, db) == (0, 0)


def test_an_export_overwrites_only_with_force(tmp_path, loop, db, filled):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(FeedbackError, match="--force"):
        export_events(path, loop, db)
    assert path.read_text() == "precious"
    export_events(path, loop, db, force=True)
    assert len(path.read_text().splitlines()) == 9


def test_an_export_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, db, filled, loop, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    folder = sorted(tmp_path.iterdir())
    broken = loop.model_copy(
        update={"feedback": loop.feedback.model_copy(update={"reward_function": f"{__name__}.broken_reward"})}
    )
    with pytest.raises(ZeroDivisionError):
        export_events(path, broken, db, force=True)
    assert path.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == folder


def broken_reward(feedback, interaction):
    return 1 / 0


def test_an_export_to_a_missing_folder_says_what_to_do(tmp_path, loop, db):
    with pytest.raises(FeedbackError, match="existing folder"):
        export_events(tmp_path / "nowhere" / "out.jsonl", loop, db)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path, loop, db):
    with pytest.raises(FeedbackError, match="cannot be read"):
        import_file(tmp_path, loop, db)


def test_only_the_first_invalid_lines_are_listed(tmp_path, loop, db):
    done = import_file(write(tmp_path / "bad.jsonl", *["oops\n"] * 1_000), loop, db)
    assert (done.rejected, len(done.invalid)) == (1_000, 20)


def test_alpaca_keeps_a_conversation_with_a_system_message_of_its_own(tmp_path, loop, db):
    roles = ("system", "user", "assistant", "user", "user")
    history = tuple(Turn(role=role, content=f"{role} {n}") for n, role in enumerate(roles))
    with db.write() as connection:
        logged = interaction("a", prompt="and now?", history=history[:3], output="done")
        store.record(connection, "notes", [logged, feedback("f", "a", "thumbs_up")], default_reward)
    path = tmp_path / "a.jsonl"
    export_alpaca(path, loop, db, list)
    assert json.loads(path.read_text()) == {
        "instruction": "system 0", "input": "and now?", "output": "done", "system": "system 0",
        "history": [["user 1", "assistant 2"]], "reward": 1.0,
    }  # fmt: skip
    other = store_at(tmp_path / "other.db")
    import_file(path, loop, other)
    assert held(other)[0][-1] == held(db)[0][-1]
    with other.read() as connection:
        ((row,),) = store.interactions_with_examples(connection, "notes", 10**9)
    assert [Turn(**turn) for turn in row.history] == list(history[:3])
    assert alpaca_row("p", history[1:], "a", "")["history"] == [["user 1", "assistant 2"], ["user 3\nuser 4", ""]]
