"""Conversations with tool calls or refusals become no example, wherever they are read."""

import json

import pytest

from finetune_pipeline.feedback.formats import InvalidLine, read_events
from finetune_pipeline.settings import FilesSource, load_loop
from finetune_pipeline.sources.feedback_exports import export_events
from finetune_pipeline.sources.files import read
from finetune_pipeline.sources.ingest_reader import read_whole
from finetune_pipeline.sources.row_readers import read_rows
from finetune_pipeline.sources.source_record import SkippedRecord, SourceRecord
from finetune_pipeline_tests.conftest import interaction
from finetune_pipeline_tests.pipeline.test_feedback_exports import RATED, TRACE, changed

USER, ANSWER = {"role": "user", "content": "weather in Bern?"}, {"role": "assistant", "content": "It rains."}
CALL = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
EVENT = json.loads(interaction("a").model_dump_json(exclude_none=True))
NOT_YET = "tool calls are not supported yet"
ONLY_TEXT = "only text is supported"


def sharegpt(*turns, **fields):
    return {"conversations": [{"from": side, "value": text} for side, text in turns], **fields}


UNSUPPORTED = [
    ({"messages": [USER, ANSWER | {"tool_calls": CALL}]}, f"has tool_calls; {NOT_YET}"),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALL}]}, f"has tool_calls; {NOT_YET}"),
    ({"messages": [USER, ANSWER | {"function_call": CALL[0]["function"]}]}, f"has function_call; {NOT_YET}"),
    ({"messages": [USER, ANSWER, USER, ANSWER | {"tool_calls": CALL}, USER, ANSWER]}, f"has tool_calls; {NOT_YET}"),
    ({"messages": [USER, {"role": "tool", "content": "rain"}, ANSWER]}, f"has a turn of the role 'tool'; {NOT_YET}"),
    ({"messages": [USER, {"type": "function_call", "name": "weather"}, ANSWER]}, f"type function_call; {NOT_YET}"),
    ({"messages": [USER, ANSWER | {"content": [{"type": "text", "text": "a"}, {"type": "tool_use", "input": {}}]}]},
     f"has a content part of the type tool_use; {NOT_YET}"),
    ({"messages": [USER, ANSWER], "tools": CALL}, f"has tools; {NOT_YET}"),
    ({"messages": [USER, ANSWER], "functions": [{"name": "weather"}]}, f"has functions; {NOT_YET}"),
    (sharegpt(("human", "weather?"), ("function_call", "{}"), ("observation", "rain"), ("gpt", "It rains.")),
     f"has a turn of the role 'function_call'; {NOT_YET}"),
    (sharegpt(("human", "weather?"), ("gpt", "It rains."), tools='[{"name": "weather"}]'), f"has tools; {NOT_YET}"),
    ({"instruction": "weather?", "output": "It rains.", "tools": '[{"name": "weather"}]'}, f"has tools; {NOT_YET}"),
    ({"prompt": "weather?", "completion": "It rains.", "tool_calls": CALL}, f"has tool_calls; {NOT_YET}"),
    ({"prompt": [USER], "completion": [ANSWER | {"tool_calls": CALL}]}, f"has tool_calls; {NOT_YET}"),
    ({"prompt": "p", "output": "o", "history": [USER, ANSWER | {"tool_calls": CALL}]}, f"has tool_calls; {NOT_YET}"),
    ({"messages": [USER, {"role": "assistant", "content": "", "refusal": "I cannot."}]}, "has a refusal"),
    ({"messages": [USER, ANSWER | {"content": [{"type": "refusal", "refusal": "No."}]}]}, "has a refusal"),
    ({"prompt": "p", "completion": "o", "refusal": True}, "has a refusal"),
    ({"messages": [USER, ANSWER | {"refusal": "No"}]}, "has a refusal"),
    ({"messages": [USER, ANSWER | {"toolCalls": CALL}]}, f"has toolCalls; {NOT_YET}"),
    ({"messages": [USER, ANSWER | {"toolInvocations": CALL}]}, f"has toolInvocations; {NOT_YET}"),
    ({"messages": [USER, ANSWER | {"tool_plan": "I will look it up."}]}, f"has tool_plan; {NOT_YET}"),
    ({"messages": [USER, ANSWER | {"parts": [{"functionCall": {"name": "weather"}}]}]}, f"has functionCall; {NOT_YET}"),
    ({"messages": [USER, ANSWER | {"parts": [{"type": "tool-weather"}]}]}, f"of the type tool-weather; {NOT_YET}"),
    ({"messages": [USER, ANSWER | {"additional_kwargs": {"tool_calls": CALL}}]}, f"has tool_calls; {NOT_YET}"),
    ({"messages": [USER, ANSWER | {"additional_kwargs": {"refusal": "No."}}]}, "has a refusal"),
    ({"messages": [USER, ANSWER | {"invalid_tool_calls": CALL}]}, f"has invalid_tool_calls; {NOT_YET}"),
    ({"messages": [USER | {"parts": [{"functionResponse": {"name": "weather"}}]}, ANSWER]},
     f"has functionResponse; {NOT_YET}"),
    ({"messages": [USER, ANSWER], "available_tools": CALL}, f"has available_tools; {NOT_YET}"),
    ({"messages": [USER, {"role": "toolResult", "content": "rain"}, ANSWER]}, f"the role 'toolResult'; {NOT_YET}"),
    ({"messages": [USER, {"role": "assistant", "content": "", "audio": {"id": "a"}}]}, f"has audio; {ONLY_TEXT}"),
    ({"messages": [USER | {"images": ["aGk="]}, ANSWER]}, f"has images; {ONLY_TEXT}"),
    ({"messages": [USER | {"files": [{"type": "image"}]}, ANSWER]}, f"has files; {ONLY_TEXT}"),
    ({"prompt": "p", "completion": "o", "images": ["a.png"]}, f"has images; {ONLY_TEXT}"),
    (EVENT | {"tool_calls": CALL}, f"has tool_calls; {NOT_YET}"),
    (EVENT | {"history": [USER, ANSWER | {"tool_calls": CALL}]}, f"has tool_calls; {NOT_YET}"),
]  # fmt: skip
"""Rows and events, and a part of the reason."""


@pytest.mark.parametrize(("row", "reason"), UNSUPPORTED)
def test_no_reader_gives_an_example_without_the_tool_calls_of_its_row(tmp_path, row, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    if "event" not in row:
        (skipped,) = read(FilesSource(kind="files", name="chats", path=str(path)), None)
        assert isinstance(skipped, SkippedRecord) and reason in skipped.reason
    (line,) = read_whole(path, "notes", max_line_bytes=10_000)
    assert line.event is None and reason in line.reason
    (invalid,) = read_events(path, read_rows(path, 10_000), load_loop("aec_parser"))
    assert isinstance(invalid, InvalidLine) and reason in invalid.reason


def test_a_turn_of_a_tool_in_chatml_is_named(tmp_path):
    turns = (("user", "weather?"), ("tool", "rain"), ("assistant", "It rains."))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in turns)}))
    (skipped,) = read(FilesSource(kind="files", name="chats", path=str(path)), None)
    assert skipped.reason == f"has a turn of the role 'tool'; {NOT_YET}"


@pytest.mark.parametrize("absent", [None, [], {}, "", False, " null "])
@pytest.mark.parametrize("name", ["tool_calls", "functionCall", "refusal", "tools", "functions", "audio"])
def test_an_empty_field_counts_as_absent(tmp_path, name, absent):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER | {name: absent}], name: absent}) + "\n")
    (record,) = read(FilesSource(kind="files", name="chats", path=str(path)), None)
    assert isinstance(record, SourceRecord) and record.answer == "It rains."


REASONING = (
    '<details type="reasoning" done="true" duration="3">\n<summary>Thought for 3 seconds</summary>\n> A wall.\n'
    "</details>\n"
)
CALLING = {"tool_calls": CALL}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("m4.tool_calls", CALL),
        ("m2.tool_calls", CALL),  # earlier in the chat
        ("m4.content", '<details type="tool_calls" done="true">weather</details>\nIt rains.'),
        ("m4.content", '<details type="code_interpreter" done="true">2 + 2</details>\n4'),
        ("m2.role", "tool"),
        ("m3.files", [{"type": "image", "url": "data:image/png;base64,aGk="}]),
        ("m4.sources", [{"source": {"name": "weather.pdf"}, "document": ["It rains."]}]),
        ("m4.content", REASONING),  # and nothing after it
    ],
)
def test_a_rating_of_open_webui_on_an_answer_with_more_than_text_is_rejected(path, value):
    row = changed(RATED, f"snapshot.chat.chat.history.messages.{path}", value)
    with pytest.raises(ValueError, match=rf"{NOT_YET}|{ONLY_TEXT}|retrieved texts|no text but its reasoning"):
        export_events(row, "notes", "open_webui")


def test_an_answer_of_open_webui_has_no_reasoning():
    messages = "snapshot.chat.chat.history.messages"
    row = changed(changed(RATED, f"{messages}.m4.content", REASONING + "clay brick"), f"{messages}.m2.content",
                  REASONING + "hi")  # fmt: skip
    asked, rated = export_events(row, "notes", "open_webui")
    assert (asked.output, asked.history[1].content, rated.kind) == ("clay brick", "hi", "thumbs_up")
    row = changed(row, f"{messages}.m4.originalContent", REASONING + "brick")
    asked, _, corrected = export_events(row, "notes", "open_webui")
    assert (asked.output, corrected.correction) == ("brick", "clay brick")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output", {"role": "assistant", "content": "It rains."} | CALLING),
        ("output", {"choices": [{"message": ANSWER | CALLING}]}),
        ("output", json.dumps(ANSWER | CALLING)),  # a cell of CSV
        ("input", {"messages": [USER], "tools": CALL}),
        ("input", [USER, ANSWER | CALLING, USER]),
    ],
)
def test_a_trace_of_langfuse_with_tool_calls_is_rejected(name, value):
    with pytest.raises(ValueError, match=NOT_YET):
        export_events(changed(TRACE, name, value), "notes", "langfuse")


def test_a_json_answer_may_have_a_field_named_tools():
    (found,) = export_events(changed(TRACE, "output", {"tools": ["saw"]}), "notes", "langfuse")
    assert found.output == '{"tools": ["saw"]}'
