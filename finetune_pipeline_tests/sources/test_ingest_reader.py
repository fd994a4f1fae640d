import json

import pytest

from finetune_pipeline.sources.ingest_reader import HOLE, event_files, open_log, read_lines
from finetune_pipeline.sources.source_record import SourceError
from finetune_pipeline_tests.conftest import interaction


def line(name="a", **changes):
    return json.dumps({**json.loads(interaction(name).model_dump_json()), **changes}).encode() + b"\n"


def read(path, after=None, limit=10_000):
    """Return the lines of a file, or those after a given line."""
    with open_log(path) as log:
        assert after is None or log.skip_if_unchanged(after.end, after.prefix_hash)
        return list(read_lines(log, "notes", lines=after.number if after else 0, max_line_bytes=limit))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"not json\n", "not JSON"),
        (b"[1, 2]\n", "expected a JSON object"),
        (b'"text"\n', "expected a JSON object"),
        (b"{}\n", "expected those of one format"),  # neither an event nor a conversation
        (b'{"event": "other"}\n', "other"),
        (b"\xff\xfe{}\n", "not UTF-8"),
        (line(prompt=7), "prompt"),  # wrong type
        (line(prompt=""), "prompt"),
        (line(id="../../etc/passwd"), "id"),  # an id is never used as a path
        (line(confidence=7), "confidence"),
        (line(surprise=1), "surprise"),  # unknown fields are rejected
        (line(task="notes"), "task: unknown field; renamed to loop"),
        (line(arm="champion"), "arm: unknown field; renamed to variant"),
        (line(loop="another"), "belongs to loop 'another'"),
        (line(prompt="a\x00b"), "NUL"),
        (line(user="a\x00b"), "NUL"),
        (line(prompt_tokens=10**30), "prompt_tokens"),  # larger than an integer of the database
        (line(prompt_tokens=3_000_000_000), "prompt_tokens"),
        (line(created_at="0001-01-01T00:00:00+14:00"), "before the year 1"),
        (line(output="x" * 20_000), "longer than 10000 bytes"),
        (b'{"event": "interaction", "confidence": Infinity}\n', "Infinity"),
        (b"[" * 9_000 + b"\n", "not JSON"),  # nested absurdly deep
    ],
)
def test_a_bad_line_is_rejected_and_the_others_are_read(tmp_path, raw, reason):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a") + raw + line("b"))
    first, bad, last = read(path)
    assert (first.event.prompt, last.event.prompt) == ("prompt a", "prompt b")
    assert bad.event is None and bad.number == 2
    assert reason in bad.reason


def test_reading_resumes_where_it_ended(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a"))
    (first,) = read(path)
    path.write_bytes(path.read_bytes() + line("b"))
    (second,) = read(path, after=first)
    assert (second.number, second.event.prompt) == (2, "prompt b")


def test_an_incomplete_last_line_is_left_for_the_next_read(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a") + line("b")[:40])
    assert [record.number for record in read(path)] == [1]


def test_a_complete_last_line_that_is_not_an_event_is_rejected(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a") + b'{"event": "other"}')
    assert [record.event is None for record in read(path)] == [False, True]


def test_line_numbers_stay_right_after_a_last_line_without_newline(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a").rstrip(b"\n"))
    (first,) = read(path)
    path.write_bytes(path.read_bytes() + b"\nbroken\n")
    (bad,) = read(path, after=first)
    assert bad.number == 2


def test_a_complete_last_line_without_newline_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a").rstrip(b"\n"))
    assert [record.event.prompt for record in read(path)] == ["prompt a"]


def test_blank_lines_and_a_byte_order_mark_are_accepted(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line("a") + b"\n  \n" + line("b"))
    assert [record.number for record in read(path)] == [1, 4]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lf_crlf_and_cr_end_a_line_at_any_place_of_the_buffer(tmp_path, end):
    path = tmp_path / "log.jsonl"
    rows = [line(f"n{number}", output="x" * (number * 7)).rstrip(b"\n") for number in range(100)]
    path.write_bytes(end.join([rows[0], b"broken", *rows[1:], rows[0][:40]]))
    found = read(path)
    assert [(one.number, one.event is None) for one in found] == [(n, n == 2) for n in range(1, 102)]
    path.write_bytes(path.read_bytes() + rows[0][40:] + end)
    (last,) = read(path, after=found[-1])
    assert (last.number, last.event.prompt, last.end) == (102, "prompt n0", path.stat().st_size)


def test_the_line_feed_of_a_line_may_be_written_later(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(line("a").replace(b"\n", b"\r"))
    (first,) = read(path)
    path.write_bytes(path.read_bytes() + b"\n" + line("b"))
    assert [(one.number, one.event.prompt) for one in read(path, after=first)] == [(2, "prompt b")]


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(SourceError, match=r"create it, or correct ingest\.folders"):
        event_files(tmp_path / "nowhere")


NULS = b"\0" * 3_000_000  # more than a block, and than a line may have


@pytest.mark.parametrize(
    ("content", "read_", "holes"),
    [
        (NULS + line("b"), [(1, "prompt b")], [1]),  # a log truncated under a writer that does not append
        (line("a") + NULS + line("b"), [(1, "prompt a"), (2, "prompt b")], [2]),
        (line("a") + line("c")[:40] + NULS + line("b"), [(1, "prompt a"), (2, "prompt b")], [2]),  # within a line
        (line("a") + b"\0\0\0\n" + line("b"), [(1, "prompt a"), (3, "prompt b")], [2]),
        (line("a") + NULS, [(1, "prompt a")], []),  # preallocated space: nothing follows it yet
        (line("a") + line("b")[:40] + NULS, [(1, "prompt a")], []),
        (line("a") + NULS + line("b")[:40], [(1, "prompt a")], []),
    ],
)
def test_lines_after_a_hole_are_read_and_the_hole_is_reported(tmp_path, content, read_, holes):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    found = read(path)
    assert [(one.number, one.event.prompt) for one in found if one.event] == read_
    assert [(one.number, one.reason) for one in found if not one.event] == [(number, HOLE) for number in holes]


@pytest.mark.parametrize("at", [0, 10, 5_000, -1])
def test_a_changed_byte_anywhere_before_the_offset_is_noticed(tmp_path, at):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(line(f"n{number}") for number in range(50)))
    last = read(path)[-1]
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with open_log(path) as log:
        assert not log.skip_if_unchanged(last.end, last.prefix_hash)
        assert log.offset == 0
