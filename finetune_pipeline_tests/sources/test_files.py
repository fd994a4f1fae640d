"""File sources: every format in every kind of file, malformed rows, and reading an export back."""

import csv
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune_pipeline.curation.dataset_files import DatasetExample
from finetune_pipeline.curation.export_formats import WRITERS, export_examples
from finetune_pipeline.records import Turn, without_system_prompt
from finetune_pipeline.settings import FilesSource
from finetune_pipeline.sources.files import read, read_file
from finetune_pipeline.sources.ingest_reader import read_whole
from finetune_pipeline.sources.row_readers import files_of
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord
from finetune_pipeline_tests.conftest import SHARED
from finetune_pipeline_tests.curation.default_redaction import redact
from finetune_pipeline_tests.memory import count_and_peak

SNIPS = SHARED / "snips" / "raw"
SYSTEM = Turn(role="system", content="Be short.")
EARLIER = (Turn(role="user", content="a wall"), Turn(role="assistant", content="How thick?"))
SAID = [{"role": turn.role, "content": turn.content} for turn in (SYSTEM, *EARLIER)]
ASKED = [{"role": "user", "content": "150 mm"}, {"role": "assistant", "content": "done"}]

FORMS = [
    ({"instruction": "Shorten:", "input": "a text", "output": "text", "text": "### all"}, "Shorten:\n\na text", ()),
    ({"instruction": "Say text", "output": "text"}, "Say text", ()),
    ({"instruction": "150 mm", "output": "text", "system": "Be short.", "history": [["a wall", "How thick?"]]},
     "150 mm", (SYSTEM, *EARLIER)),
    ({"instruction": "Be short.", "input": "150 mm", "output": "text", "system": "Be short."}, "150 mm", (SYSTEM,)),
    ({"prompt": "150 mm", "completion": "text", "history": SAID}, "150 mm", (SYSTEM, *EARLIER)),
    ({"prompt": [*SAID, ASKED[0]], "completion": [{"role": "assistant", "content": "text"}]},
     "150 mm", (SYSTEM, *EARLIER)),
    ({"prompt": "150 mm", "response": "text"}, "150 mm", ()),
    ({"conversations": [{"from": "human", "value": "a wall"}, {"from": "gpt", "value": "How thick?"},
                        {"from": "human", "value": "150 mm"}, {"from": "gpt", "value": "text"},
                        {"from": "human", "value": "nobody answered"}]}, "150 mm", EARLIER),
    ({"system": "Be short.", "conversations": [{"from": "human", "value": "150 mm"}, {"from": "gpt", "value": "text"}]},
     "150 mm", (SYSTEM,)),
    ({"messages": [*SAID, ASKED[0], {"role": "assistant", "content": "text"}]}, "150 mm", (SYSTEM, *EARLIER)),
    ({"messages": [{"role": "developer", "content": "Be short."},
                   {"role": "user", "content": [{"type": "text", "text": "150 "}, {"type": "text", "text": "mm"}]},
                   {"role": "assistant", "content": "text"}]}, "150 mm", (SYSTEM,)),
    ({"text": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n150 mm<|im_end|>\n"
              "<|im_start|>assistant\ntext<|im_end|>\n<|im_start|>assistant\n"}, "150 mm", (SYSTEM,)),
]  # fmt: skip


def source(path, **more):
    return FilesSource.model_validate({"kind": "files", "name": "imported", "path": str(path), **more})


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def write_as(path, rows):
    """The same rows in the kind of file that its name says."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, columns, delimiter=";")
            table.writeheader()
            nested = {"messages", "history"}
            table.writerows({k: json.dumps(v) if k in nested else v for k, v in row.items()} for row in rows)
    else:
        write(path, *rows)
    return path


def found(path, **more):
    return list(read(source(path, **more), None))


@pytest.mark.parametrize(("row", "prompt", "history"), FORMS)
def test_each_format_is_recognized_by_its_fields(tmp_path, row, prompt, history):
    path = write(tmp_path / "a.jsonl", row)
    assert found(path) == [SourceRecord("a.jsonl:1", prompt, "text", history)]


FIELDS = (
    "event", "messages", "conversations", "conversation", "instruction", "input", "output", "prompt", "completion",
    "response", "text", "system", "history", "reward", "correction", "user", "domain", "kind", "created_at", "weight",
    "train", "trainable", "loss", "something else",
)  # fmt: skip
TURN_FIELDS = ("role", "content", "from", "value", "name", "tool_calls", "weight", "train", "trainable", "loss")


def with_nulls(value, null=None):
    """Return a row with a null for every field that it lacks, and its turns likewise."""
    fields = TURN_FIELDS if {"role", "from"} & value.keys() else FIELDS
    parts = {
        name: [with_nulls(part, null) if isinstance(part, dict) and "type" not in part else part for part in field]
        if isinstance(field, list)
        else field
        for name, field in value.items()
    }
    return {**dict.fromkeys(fields, null), **parts}


@pytest.mark.parametrize("null", [None, float("nan")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize(("row", "prompt", "history"), FORMS)
def test_null_and_nan_count_as_absent_fields(tmp_path, row, prompt, history, name, null):
    if name == "a.parquet" and any(isinstance(turn["content"], list) for turn in row.get("messages", ())):
        row = {
            "messages": [
                turn | {"content": text}
                for turn, text in zip(row["messages"], ["Be short.", prompt, "text"], strict=True)
            ]
        }
    filled = with_nulls(row, None if name == "a.parquet" else null)
    assert found(write_as(tmp_path / name, [filled])) == [SourceRecord(f"{name}:1", prompt, "text", history)]
    assert [line.event for line in read_whole(tmp_path / name, "notes", max_line_bytes=10_000)] == [
        SourceRecord(f"{name}:1", prompt, "text", history)
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "nan.json"])
def test_a_mixed_table_of_pandas_is_read_row_by_row(tmp_path, name):
    rows = [
        {"instruction": "Say text", "output": "text"},
        {"prompt": "p", "completion": "c", "reward": 0.5},
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c", "weight": 1.0}]},
        {"messages": ASKED},
        {"prompt": "p", "response": "bad", "train": False},
    ]
    if name == "a.csv":  # where pandas does not write JSON
        rows = [row for row in rows if not {"conversations", "messages"} & row.keys()]
    table, path = pd.DataFrame(rows), tmp_path / name
    if name == "a.parquet":
        table.to_parquet(path)
    elif name == "a.csv":
        table.to_csv(path, index=False)
    elif name == "nan.json":
        path.write_text(json.dumps(table.to_dict("records")))
    else:
        table.to_json(path, orient="records", lines=name == "a.jsonl")
    *taken, skipped = found(path)
    assert [record.answer for record in taken] == ["text", "c", "c", "done"][: len(rows) - 1]
    assert taken[1].reward == 0.5 and "the row is excluded from training (train: " in skipped.reason


def test_an_empty_text_and_infinity_are_not_null(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": "", "prompt": "p", "completion": "c"}, '{"reward": Infinity}\n')
    assert ["outside of the turns" in found(path)[0].reason, "Infinity" in found(path)[1].reason] == [True, True]


USER, TOLD = {"role": "user", "content": "150 mm"}, {"role": "assistant", "content": "text"}
SAYS_NO = [
    (name, value)
    for name in ("weight", "train", "trainable", "loss")
    for value in (False, 0, 0.0, "false", "False", "0", "0.0", "no")
]
SAYS_YES = [
    (name, value) for name in ("weight", "train", "trainable", "loss") for value in (True, 1, 0.5, "true", "1.0", None)
]
LATER = [USER | {"content": "again"}, TOLD | {"content": "bad"}, USER | {"content": "thanks"}]


def as_sharegpt(turns):
    sides = {"user": "human", "assistant": "gpt", "system": "system"}
    renamed = [{"from": sides[turn["role"]], "value": turn["content"]} for turn in turns]
    return [turn | new for turn, new in zip(({k: v for k, v in t.items() if k not in {"role", "content"}}
                                             for t in turns), renamed, strict=True)]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SAYS_NO)
@pytest.mark.parametrize("form", ["messages", "sharegpt", "prompt_completion"])
def test_an_answer_that_is_not_to_be_trained_on_is_context_only(tmp_path, form, name, value):
    marked = {name: value}
    last = [*SAID, USER, TOLD, LATER[0], LATER[1] | marked, LATER[2]]
    middle = [*SAID[:2], SAID[2] | marked, USER, TOLD]
    path = tmp_path / "a.jsonl"
    if form == "prompt_completion":  # messages in prompt are always context
        write(path, {"prompt": [*SAID, USER], "completion": [TOLD, LATER[0], LATER[1] | marked]},
              {"prompt": middle[:-1], "completion": middle[-1:]},
              {"prompt": [*SAID, USER], "completion": [TOLD | marked]})  # fmt: skip
    else:
        rows = [last, middle, [USER, TOLD | marked]]
        key, shape = ("messages", list) if form == "messages" else ("conversations", as_sharegpt)
        write(path, *({key: shape(turns)} for turns in rows))
    first, second, skipped = found(path)
    assert first == SourceRecord("a.jsonl:1", "150 mm", "text", (SYSTEM, *EARLIER))  # and nothing of what came later
    assert second == SourceRecord("a.jsonl:2", "150 mm", "text", (SYSTEM, *EARLIER))
    assert skipped == SkippedRecord("a.jsonl:3", f"every answer is excluded from training ({name}: {value})")


@pytest.mark.parametrize(("name", "value"), SAYS_NO)
@pytest.mark.parametrize("file", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_row_that_is_not_to_be_trained_on_is_skipped(tmp_path, name, value, file):
    (skipped,) = found(write_as(tmp_path / file, [{"prompt": "p", "output": "o", name: value}]))
    assert skipped.reason == f"the row is excluded from training ({name}: {value})"


@pytest.mark.parametrize("row", [row for row, *_ in FORMS], ids=lambda row: "+".join(row))
def test_a_row_of_any_format_that_is_not_to_be_trained_on_is_skipped(tmp_path, row):
    (skipped,) = found(write(tmp_path / "a.jsonl", row | {"weight": 0}))
    assert skipped.reason == "the row is excluded from training (weight: 0)"


@pytest.mark.parametrize(("name", "value"), SAYS_YES)
@pytest.mark.parametrize(("row", "prompt", "history"), FORMS)
def test_an_answer_marked_as_trained_on_is_the_target(tmp_path, row, prompt, history, name, value):
    turns = {key: [turn | {name: value} for turn in row[key]] for key in ("messages", "conversations") if key in row}
    path = write(tmp_path / "a.jsonl", row | {name: value} | turns)
    assert found(path) == [SourceRecord("a.jsonl:1", prompt, "text", history)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completion": "c", "weight": "heavy"}, "weight: found 'heavy', expected true or 1"),
        ({"prompt": "p", "completion": "c", "train": [0]}, "train: found [0]"),
        ({"messages": [USER, TOLD | {"loss": "some"}]}, "loss: found 'some'"),
        ({"messages": [USER, TOLD, *LATER[:1], LATER[1] | {"weight": 0}], "correction": "good"},
         "correction: it corrects the last answer, which is excluded from training (weight: 0)"),
        ({"messages": [USER, TOLD | {"weight": 0}, TOLD]}, "no turn of the user precedes the last answer"),
    ],
)  # fmt: skip
def test_a_contradictory_or_unreadable_mark_is_skipped_with_its_reason(tmp_path, row, reason):
    (skipped,) = found(write(tmp_path / "a.jsonl", row))
    assert reason in skipped.reason


def test_marks_on_user_turns_are_ignored(tmp_path):
    (record,) = found(write(tmp_path / "a.jsonl", {"messages": [USER | {"train": False}, TOLD]}))
    assert record.answer == "text"


@pytest.mark.parametrize("form", list(WRITERS))
def test_an_export_that_was_marked_later_is_not_trained_on(tmp_path, form):
    history = (SYSTEM, *EARLIER)
    export_examples(tmp_path / "out.jsonl", [DatasetExample("150 mm", "text", 0.5, "logs", history=history)], form, "")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert "excluded from training" in found(write(tmp_path / "a.jsonl", row | {"train": False}))[0].reason
    for turns in (row.get("messages"), row.get("conversations")):
        if turns:
            turns[-1]["weight"] = 0
            (record,) = found(write(tmp_path / "a.jsonl", row))
            assert (record.prompt, record.answer, record.history) == ("a wall", "How thick?", (SYSTEM,))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_every_kind_of_file_gives_the_same(tmp_path, name):
    rows = [
        {"prompt": "one;two", "completion": 'a "quoted"\ntext, 🚧', "reward": 0.5, "user": "u1"},
        {"prompt": "150 mm", "completion": "done", "history": SAID, "created_at": "2026-01-02T03:04:05Z"},
        {"messages": [*SAID, *ASKED], "reward": -1},
    ]
    first, second, third = found(write_as(tmp_path / name, rows))
    assert (first.prompt, first.answer, first.reward, first.user) == ("one;two", 'a "quoted"\ntext, 🚧', 0.5, "u1")
    assert (second.history, second.created_at.isoformat()) == ((SYSTEM, *EARLIER), "2026-01-02T03:04:05+00:00")
    assert (third.prompt, third.answer, third.reward) == ("150 mm", "done", -1)
    lines = {"a.jsonl": [1, 2, 3], "a.json": [1, 2, 3], "a.csv": [2, 4, 5], "a.parquet": [1, 2, 3]}[name]
    assert [record.provenance for record in (first, second, third)] == [f"{name}:{line}" for line in lines]


def test_a_correction_keeps_the_models_answer(tmp_path):
    (record,) = found(write(tmp_path / "a.jsonl", {"prompt": "p", "output": "no", "correction": "yes", "reward": -1}))
    assert (record.answer, record.model_output, record.reward) == ("yes", "no", None)  # the reward was of the wrong one


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
@pytest.mark.parametrize("field", ["completion", "response", "output"])
def test_an_answer_that_is_a_json_object_is_taken_as_its_text(tmp_path, name, field):
    """Nulls in it are values, unlike the null fields of a row."""
    answer = {"wall": {"height": None, "Größe": [1.0, None, {}]}, "kind": None}
    rows = [{"prompt": "p", field: answer}, {"prompt": "p", field: "no", "correction": answer, "user": None}]
    path = tmp_path / name
    path.write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    told, corrected = found(path)
    text = '{"wall": {"height": null, "Größe": [1.0, null, {}]}, "kind": null}'
    assert (told.answer, corrected.answer, corrected.model_output) == (text, text, "no")


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "completion": ""}, "answer: found '', is empty"),
        ({**GOOD, "completion": " \n"}, "is empty"),
        ({**GOOD, "prompt": ""}, "prompt: found '', is empty"),
        ({**GOOD, "completion": 7}, "answer: found 7, expected a text"),
        (
            {**GOOD, "completion": ["a"]},
            "answer: found a list, expected a text or an object; write a JSON list as a text",
        ),
        ({**GOOD, "correction": ["a"]}, "answer: found a list"),
        ({**GOOD, "prompt": {"wall": 1}}, "prompt: found"),
        ({"prompt": "p"}, "found no answer, expected one of completion, response, output"),
        ({**GOOD, "output": "two"}, "found completion, output, expected one of"),
        ({**GOOD, "reward": 7}, "reward: found 7"),
        ({**GOOD, "reward": "much"}, "reward: found 'much'"),
        ({**GOOD, "completion": "a\x00b"}, "NUL"),
        ({**GOOD, "correction": " "}, "correction"),
        ({"instruction": "i"}, "output: is missing"),
        ({"instruction": 7, "output": "o"}, "instruction: found a number, expected a text"),
        ({"instruction": "", "output": "o"}, "prompt: found '', is empty"),
        ({"messages": "p"}, "outside of the turns"),
        ({"messages": {"role": "user"}}, "messages: found an object, expected a list of turns"),
        ({"messages": []}, "there is no turn of the assistant"),
        ({"messages": [ASKED[1]]}, "no turn of the user"),
        ({"messages": [ASKED[0], ASKED[1], ASKED[1]]}, "no turn of the user precedes the last answer"),
        ({"messages": [ASKED[0], {"role": "critic", "content": "4"}]}, "turn 2: the role is 'critic'"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": None}]}, "turn 2: found null, expected a text"),
        ({"messages": ["hi"]}, "turn 1: found a text, expected an object"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 1: the role is ['human']"),
        (
            {"messages": [ASKED[0], {"role": "assistant", "content": [{"type": "image_url"}]}]},
            "turn 2: found a part of the type 'image_url', expected parts of the type 'text'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}, ASKED[1]]},
            "turn 1: found a part without text",
        ),
        ({"messages": [{"role": "user", "content": ["hi"]}, ASKED[1]]}, "turn 1: found a part without text"),
        ({**GOOD, "system": {}}, "system: found an object, expected a text"),
        ({**GOOD, "history": 0}, "history: found a number, expected a list of turns"),
        ({**GOOD, "history": [["a", {}]]}, "history, turn 2: found an object, expected a text"),
        ({"instruction": "i", "input": 0, "output": "o"}, "input: found a number, expected a text"),
        ({"instruction": "i", "input": [], "output": "o"}, "input: found a list, expected a text"),
        ({"text": "<|im_start|>user\nhi<|im_end|> beside"}, "found 'beside' outside of the turns"),
        ({"question": "p", "answer": "c"}, "found the fields 'question, answer', expected those of one format"),
        ({"text": "p", "label": "c"}, "; rename the fields or columns to prompt and completion"),
        ({"event": "interaction"}, "is an event of a log; put its file into the drop folder"),
        ([1], "found a list, expected a JSON object"),
        ("broken\n", "not JSON"),
        ('{"prompt": "p", "completion": "a", "completion": "b"}\n', "the key 'completion' is twice in one object"),
        ('{"prompt": "p", "completion": {"a": {"b": 1, "b": 2}}}\n', "the key 'b' is twice in one object"),
        ('{"prompt": NaN, "completion": "c"}\n', "expected those of one format"),
        ('{"prompt": "p", "completion": "c", "reward": -Infinity}\n', "not JSON"),
        ("[" * 9_000 + "\n", "not JSON"),
        ({**GOOD, "completion": "x" * 20_000}, "longer than 10000 bytes"),
    ],
)
def test_a_bad_row_is_skipped_and_the_others_are_read(tmp_path, row, reason):
    path = write(tmp_path / "log.jsonl", GOOD, row, GOOD)
    first, bad, last = found(path, max_line_bytes=10_000)
    assert (first.provenance, last.provenance) == ("log.jsonl:1", "log.jsonl:3")
    assert isinstance(bad, SkippedRecord) and bad.provenance == "log.jsonl:2"
    assert reason in bad.reason and len(bad.reason) < 300


def test_a_given_format_is_not_guessed(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "i", "output": "o", "messages": ASKED, "event": "fair"})
    assert found(path, format="alpaca")[0].prompt == "i"
    assert found(path, format="messages")[0].prompt == "150 mm"
    assert "conversations: is missing" in found(path, format="sharegpt")[0].reason


def test_bad_rows_of_a_csv_are_skipped_with_reasons(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"prompt,completion\r\np,c\r\n\r\np\xfc,c\r\nonly one\r\np,\r\n" + b"p," + b"x" * 20_000 + b'\r\np,c\r\np,"open'
    )
    said = {
        x.provenance: x.reason if isinstance(x, SkippedRecord) else x.answer for x in found(path, max_line_bytes=10_000)
    }
    assert (said["a.csv:2"], said["a.csv:4"], said["a.csv:8"]) == ("c", "not UTF-8; save the file as UTF-8", "c")
    assert said["a.csv:5"] == "has 1 cells, but the header has 2"
    assert said["a.csv:6"].startswith("found no answer") and "longer than 10000 bytes" in said["a.csv:7"]
    assert said["a.csv:9"].startswith("not CSV") and len(said) == 7


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"\xff\xfep\x00,\x00", "UTF-16"),
        ("a.csv", b"prompt,prompt\np,c\n", "'prompt' twice"),
        ("a.parquet", b"PAR1 broken", "not Parquet"),
        ("a.json", b'{\n "rows": []}', "is one JSON object; expected an array of rows"),
        ("a.json", b'{"rows": [\n {}]}', "is one JSON object"),
        ("a.json", b"[" + json.dumps(GOOD).encode()[:9], "nothing after it was read"),
    ],
)
def test_an_unreadable_file_is_reported_once_and_the_others_are_read(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    write(tmp_path / "b.jsonl", GOOD)
    bad, good = found(tmp_path)
    assert good.provenance == "b.jsonl:1" and reason in bad.reason
    assert (bad.provenance, bad.unreadable) == (name, True)  # the rest of the file is unknown


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_a_damaged_file_is_reported_as_unreadable(tmp_path, name):
    path = tmp_path / name
    if name == "a.json":
        write_as(path, [GOOD] * 1_000)
    else:
        texts = [f"asked {number}" for number in range(1_000)]
        pq.write_table(pa.table({"prompt": texts, "completion": texts}), path, row_group_size=250)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 100] = b"}" * 100
    path.write_bytes(content)
    *good, bad = found(path)
    assert 0 < len(good) < 1_000 and (bad.provenance, bad.unreadable) == (name, True)
    assert "nothing after it was read" in bad.reason


@pytest.mark.parametrize("spaces", [1, (1 << 16) - 21])  # the second ends the buffer in the middle of it
def test_text_after_an_array_is_shown_without_half_a_secret(tmp_path, spaces):
    path = tmp_path / "a.json"
    path.write_text("[]" + " " * spaces + "password hf_" + "aB1" * 12 + " " + "more " * 40)
    (bad,) = found(path)
    assert "found 'password" in bad.reason and "hf_" not in redact(bad.reason).text
    assert "after the end of the array" in bad.reason


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"prompt,completion\np\xfc,c\n"),
        ("a.tsv", b"prompt\tcompletion\np\xfc\tc\n"),
        ("a.json", b'[{"prompt": "p\xfc", "completion": "c"}]'),
        ("a.jsonl", b'{"prompt": "p\xfc", "completion": "c"}\n'),
    ],
)
def test_text_that_is_not_utf_8_says_what_to_do(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    reasons = [one.reason for one in found(tmp_path) if isinstance(one, SkippedRecord)]
    assert len(reasons) == 1 and "not UTF-8" in reasons[0] and "save the file as UTF-8" in reasons[0]


def test_parquet_text_that_is_not_utf_8_is_reported_by_row(tmp_path):
    texts = pa.array([b"p", b"p\xfc", b"q"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"prompt": texts, "completion": ["a", "b", "c"]}), tmp_path / "a.parquet")
    first, bad, last = found(tmp_path)
    assert (first.prompt, last.prompt, bad.provenance) == ("p", "q", "a.parquet:2") and "not UTF-8" in bad.reason


def test_only_visible_files_inside_the_folder_are_read(tmp_path):
    outside = write(tmp_path / "outside.jsonl", {**GOOD, "prompt": "outside"})
    folder = tmp_path / "folder"
    (folder / "below" / ".hidden").mkdir(parents=True)
    (folder / "link.jsonl").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "itself.jsonl").symlink_to(folder / "itself.jsonl")
    (folder / "folder.jsonl").symlink_to(folder / "below")
    write(folder / ".hidden.jsonl", GOOD)
    write(folder / "below" / ".hidden" / "a.jsonl", GOOD)
    write(folder / "notes.txt", GOOD)
    write(folder / "below" / "a.jsonl", GOOD)
    (folder / "to a hidden file.jsonl").symlink_to(".hidden.jsonl")
    (folder / "below" / "to a hidden folder.jsonl").symlink_to(".hidden/a.jsonl")
    (folder / "inside.jsonl").symlink_to("below/a.jsonl")
    assert [record.provenance for record in found(folder)] == ["inside.jsonl:1", "below/a.jsonl:1"]
    assert [path.name for path in files_of(folder)] == ["inside.jsonl"]


def test_a_missing_source_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(SourceError, match="does not exist; create it, or correct its path"):
        found(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"found no .* file in .*; put one there"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("a.jsonl", 6_000), ("a.json", 6_000), ("a.csv", 6_000), ("a.parquet", 12_000)],  # Arrow holds 14 MB for any size
)
def test_a_long_file_takes_little_memory(tmp_path, name, rows):
    path = write_as(tmp_path / name, [{"prompt": f"p{n}", "completion": f"{n:05}" * 1_000} for n in range(rows)])
    counts, peak = count_and_peak(read(source(path), None))
    assert counts[SourceRecord] == rows
    assert peak < rows * 5_000 / 2


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20).filter(
    str.strip
)
PAIRS = st.lists(st.tuples(TEXT, TEXT), max_size=2)
REWARD = st.floats(-1, 1, allow_nan=False)


@pytest.mark.parametrize("form", list(WRITERS))
@settings(max_examples=25, deadline=None)
@given(pairs=PAIRS, own=st.none() | TEXT, prompt=TEXT, answer=TEXT, reward=REWARD, system=st.just("") | TEXT)
def test_an_export_is_read_back_as_the_same_example(tmp_path_factory, form, pairs, own, prompt, answer, reward, system):
    assume(not system or not prompt.startswith(system))  # a prompt that begins with the system prompt is ambiguous
    said = [Turn(role=role, content=text) for pair in pairs for role, text in zip(("user", "assistant"), pair)]  # noqa: B905
    history = (*([Turn(role="system", content=own)] if own else []), *said)
    path = tmp_path_factory.mktemp("export") / "out.jsonl"
    export_examples(path, [DatasetExample(prompt, answer, reward, "logs", history=history)], form, system)
    (record,) = read_file(path, "out", "auto", 10**6)
    expected = without_system_prompt(prompt, history, system)
    assert without_system_prompt(record.prompt, record.history, system) == expected
    assert (record.answer, record.reward) == (answer, reward)


@pytest.mark.skipif(not SNIPS.is_dir(), reason="shared/data/snips is not there")
def test_real_utterances_with_one_that_is_not_utf_8(tmp_path):
    # As published, each file is one JSON object, which is rejected. The CSV has the utterances byte by byte.
    refused = found(SNIPS)
    assert len(refused) == 21 and all(isinstance(one, SkippedRecord) for one in refused)
    raw = (SNIPS / "PlayMusic" / "train_PlayMusic_full.json").read_bytes().decode("utf-8", "surrogateescape")
    path = tmp_path / "music.csv"
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "completion"])
        for row in json.loads(raw)["PlayMusic"]:
            slots = {part["entity"]: part["text"] for part in row["data"] if "entity" in part}
            table.writerow(["".join(part["text"] for part in row["data"]), json.dumps(slots, ensure_ascii=False)])
    taken = found(path)
    assert len(taken) == 2_000
    assert [one.reason for one in taken if isinstance(one, SkippedRecord)] == ["not UTF-8; save the file as UTF-8"]
    assert len({record.prompt for record in taken if isinstance(record, SourceRecord)}) == 1_985
