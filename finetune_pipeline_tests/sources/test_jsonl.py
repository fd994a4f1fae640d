import json

import pytest

from finetune_pipeline.sources.item import SourceError
from finetune_pipeline.sources.jsonl import event_files, read_lines
from finetune_pipeline_tests.conftest import interaction


def line(name="a", **changes):
    return json.dumps({**json.loads(interaction(name).model_dump_json()), **changes}).encode() + b"\n"


def read(path, offset=0, lines=0, limit=10_000):
    return list(read_lines(path, "notes", offset=offset, lines=lines, max_line_bytes=limit))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"not json\n", "not JSON"),
        (b"[1, 2]\n", "valid dictionary"),
        (b'"text"\n', "valid dictionary"),
        (b"{}\n", "expected those of one form"),  # neither an event nor a conversation
        (b'{"event": "other"}\n', "other"),
        (b"\xff\xfe{}\n", "not UTF-8"),
        (line(prompt=7), "prompt"),  # wrong type
        (line(prompt=""), "prompt"),
        (line(id="../../etc/passwd"), "id"),  # an id is an id and never a path
        (line(confidence=7), "confidence"),
        (line(surprise=1), "surprise"),  # unknown fields are refused
        (line(task="another"), "is of task 'another'"),
        (line(prompt="a\x00b"), "NUL"),
        (line(user="a\x00b"), "NUL"),
        (line(prompt_tokens=10**30), "prompt_tokens"),  # no database has such an integer
        (line(prompt_tokens=3_000_000_000), "prompt_tokens"),
        (line(created_at="0001-01-01T00:00:00+14:00"), "before the year 1"),
        (line(output="x" * 20_000), "longer than 10000 bytes"),
        (b'{"event": "interaction", "confidence": Infinity}\n', "Infinity"),
        (b"[" * 9_000 + b"\n", "not JSON"),  # nested absurdly deep
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, raw, reason):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a") + raw + line("b"))
    first, bad, last = read(path)
    assert (first.event.prompt, last.event.prompt) == ("prompt a", "prompt b")
    assert bad.event is None and bad.number == 2
    assert reason in bad.reason


def test_reading_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a"))
    (first,) = read(path)
    path.write_bytes(path.read_bytes() + line("b"))
    (second,) = read(path, offset=first.end, lines=first.number)
    assert (second.number, second.event.prompt) == (2, "prompt b")


def test_a_line_that_is_still_being_written_is_left_for_the_next_time(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a") + line("b")[:40])
    assert [item.number for item in read(path)] == [1]


def test_a_last_line_that_can_never_become_an_event_is_refused_at_once(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a") + b'{"event": "other"}')
    assert [item.event is None for item in read(path)] == [False, True]


def test_line_numbers_stay_right_after_a_last_line_without_newline(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a").rstrip(b"\n"))
    (first,) = read(path)
    path.write_bytes(path.read_bytes() + b"\nbroken\n")
    (bad,) = read(path, offset=first.end, lines=first.number)
    assert bad.number == 2


def test_a_last_line_without_newline_is_read_if_it_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a").rstrip(b"\n"))
    assert [item.event.prompt for item in read(path)] == ["prompt a"]


def test_blank_lines_and_a_byte_order_mark_are_no_errors(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line("a") + b"\n  \n" + line("b"))
    assert [item.number for item in read(path)] == [1, 4]


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(SourceError, match=r"create it, or correct sources\.folders"):
        event_files(tmp_path / "nowhere")
