"""The replay file: every format of conversations, and nothing in it is trained on as another text than it is."""

import json

import pytest

from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.records import Turn
from finetune_pipeline.settings import load_loop

GOOD = {"prompt": "a", "completion": "b"}
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def replay(path, content, **changes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    loop = load_loop("aec_parser")
    curation = loop.curation.model_copy(update={"replay": str(path)})
    return loop_files.replay(loop.model_copy(update={"curation": curation, **changes}))


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "a", "completion": "b"}\n',
        '\ufeff{"prompt": "a", "completion": "b"}\r\n',
        '\n \n{"prompt": "a", "completion": "b"}\n\n\ufeff\n',
        '{"prompt": "a", "completion": "b", "reward": null, "history": []}',
        '{"instruction": "a", "input": "", "output": "b"}\n',
        json.dumps({"messages": [USER, ANSWER]}),
        json.dumps(GOOD | {"weight": 0}) + "\n" + json.dumps(GOOD),
        json.dumps({"messages": [USER, ANSWER | {"tool_calls": [{"id": "1"}]}]}) + "\n" + json.dumps(GOOD),
    ],
)
def test_a_replay_file_gives_its_examples(tmp_path, content):
    (example,), _ = replay(tmp_path / "replay.jsonl", content)
    assert (example.prompt, example.completion, example.source, example.history) == ("a", "b", "replay", ())


def test_a_conversation_keeps_its_history_without_the_system_prompt_of_the_loop(tmp_path):
    turns = [{"role": "system", "content": "Be short."}, USER, ANSWER, USER | {"content": "c"}, ANSWER]
    (example,), _ = replay(tmp_path / "replay.jsonl", json.dumps({"messages": turns}), system_prompt="Be short.")
    assert (example.prompt, example.history) == ("c", (Turn(**USER), Turn(**ANSWER)))


CALLING = json.dumps({"messages": [USER, ANSWER | {"tool_calls": [{"id": "1"}]}]}) + "\n"
NO_CALLS = "replay row: has tool_calls; tool calls are not supported yet"


def test_rows_that_are_left_out_are_counted(tmp_path):
    found = replay(tmp_path / "replay.jsonl", CALLING * 2 + json.dumps(GOOD))
    assert (len(found.examples), found.left_out) == (1, {NO_CALLS: 2})


@pytest.mark.parametrize(("content", "found"), [("", ""), ("\n \n", ""), (CALLING, f" (left out, 1: {NO_CALLS})")])
def test_a_file_without_rows_to_train_on_is_rejected(tmp_path, content, found):
    path = tmp_path / "replay.jsonl"
    with pytest.raises(CurationError) as error:
        replay(path, content)
    assert str(error.value).startswith(f"curation.replay: {path} has no row to train on{found}; add rows, or remove")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "not JSON"),
        ("[]", "found a list, expected a JSON object"),
        ("null", "found null, expected a JSON object"),
        ('{"prompt": "a"}', "found no answer, expected one of completion, response, output"),
        ('{"prompt": "a", "completion": null}', "found no answer"),
        ('{"prompt": null, "completion": "b"}', "expected those of one format"),
        ('{"prompt": "a", "completion": ["b"]}', "answer: found a list, expected a text"),
        ('{"prompt": 7, "completion": "b"}', "prompt: found 7, expected a text"),
        ('{"prompt": "a", "completion": true}', "answer: found true, expected a text"),
        ('{"prompt": "a", "completion": "b", "history": {}}', "history: found an object, expected a list of turns"),
        ('{"prompt": "a", "completion": "b", "history": [["a", 0]]}', "turn 2: found a number, expected a text"),
        ('{"prompt": "a", "completion": "b", "system": 0}', "system: found a number, expected a text"),
        ('{"prompt": "a", "completion": " "}', "is empty"),
        ('{"event": "interaction"}', "expected those of one format"),
    ],
)
def test_a_row_without_texts_is_named_with_its_line(tmp_path, line, reason):
    path = tmp_path / "replay.jsonl"
    with pytest.raises(CurationError) as error:
        replay(path, json.dumps(GOOD) + "\n" + line + "\n")
    assert str(error.value).startswith(f"curation.replay: {path}:2: ") and reason in str(error.value)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({2: "not json", 4: "[]"}, ["2: not JSON", "4: found a list", "correct or delete these 2 rows"]),
        (dict.fromkeys(range(1, 8), "{}"), ["1: ", "2: ", "3: ", "and 4 more; correct or delete these 7 rows"]),
    ],
)
def test_all_rows_without_texts_are_reported_together(tmp_path, bad, said):
    path = tmp_path / "replay.jsonl"
    with pytest.raises(CurationError) as error:
        replay(path, "".join(bad.get(number, json.dumps(GOOD)) + "\n" for number in range(1, 10)))
    assert all(text in str(error.value) for text in said), error.value


def test_a_missing_file_is_named(tmp_path):
    loop = load_loop("aec_parser")
    curation = loop.curation.model_copy(update={"replay": str(tmp_path / "none.jsonl")})
    with pytest.raises(CurationError, match="does not exist"):
        loop_files.replay(loop.model_copy(update={"curation": curation}))
