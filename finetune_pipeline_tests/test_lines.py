"""Only LF, CRLF and CR end a line. Characters such as U+2028, which end one in `str.splitlines`, are text."""

import ast
import asyncio
import json
from types import SimpleNamespace
from uuid import UUID

import pytest

from finetune_pipeline.evaluation.benchmark import load_benchmark
from finetune_pipeline.inference.protocol import Delta
from finetune_pipeline.inference.remote import event_lines
from finetune_pipeline.serving.api import ChatRequest, CompletionRequest
from finetune_pipeline.serving.completion_format import CompletionChunks
from finetune_pipeline.serving.interactions import PreparedRequest
from finetune_pipeline.settings import PROJECT_ROOT
from finetune_pipeline.sources.ingest_reader import grows, open_log, read_lines, read_whole
from finetune_pipeline.sources.row_readers import read_rows

TEXT_CHARACTERS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
NAMED = pytest.mark.parametrize("character", TEXT_CHARACTERS, ids=lambda character: f"U+{ord(character):04X}")


def test_no_module_splits_text_at_other_characters():
    splitting = {"splitlines", "iter_lines", "aiter_lines"}
    found = [
        f"{path.relative_to(PROJECT_ROOT)}:{node.lineno}"
        for path in (PROJECT_ROOT / "finetune_pipeline").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in splitting
    ]
    assert found == [], 'use split("\\n") on text that was read with universal newlines, or event_lines for a stream'


@NAMED
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_rows_of_files_contain_it(tmp_path, character, suffix):
    # JSON has to escape control characters below U+0020, and may contain the others as they are.
    text = f"a{character}b"
    row = json.dumps({"prompt": text}, ensure_ascii=False)
    content = {".jsonl": f"{row}\n{row}\n", ".json": f"[{row}, {row}]", ".csv": f"prompt\n{text}\n{text}\n"}[suffix]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content.encode())
    assert [row.value for row in read_rows(path, 1_000)] == [{"prompt": text}] * 2


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("suffix", "lines", "values"),
    [
        (".jsonl", ['{"a": "1"}', '{"a": "2"}'], ["1", "2"]),
        (".csv", ["a,b", '1,"x', 'y"', "2,z"], ["1", "2"]),
        (".tsv", ["a\tb", "1\t2", "", "2\t3"], ["1", "2"]),
    ],
)
def test_lf_crlf_and_cr_end_a_row(tmp_path, suffix, lines, values, end):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes("".join(line + end for line in lines).encode())
    rows = list(read_rows(path, 1_000))
    assert [(row.reason, row.value["a"]) for row in rows] == [("", value) for value in values]


TEXTS = ["a\x85b", "c\u2028d"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\ufeff", "\n \n\t\n", "\n\x0c\n"])
def test_lines_of_a_benchmark(tmp_path, end):
    lines = [
        json.dumps({"id": text, "slice": "s", "prompt": text, "expected": "e"}, ensure_ascii=False) for text in TEXTS
    ]
    path = tmp_path / "benchmark.jsonl"
    path.write_bytes(f"\ufeff{end.join(lines)}{end}".encode())
    assert [question.prompt for question in load_benchmark(path, None).questions] == TEXTS


@NAMED
def test_text_between_rows_is_the_same_in_every_reader(tmp_path, character):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"prompt": "p", "completion": "c"}}{character}\n{character}\n', newline="\n")
    whole = [line.event.prompt for line in read_whole(path, "notes", max_line_bytes=1_000)]
    with open_log(path) as log:
        grown = [line.event.prompt for line in read_lines(log, "notes", lines=0, max_line_bytes=1_000)]
    assert whole == grown == [row.value["prompt"] for row in read_rows(path, 1_000)] == ["p"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_file_in_utf_16_is_named_once(tmp_path, encoding, suffix):
    path = tmp_path / f"rows{suffix}"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes(f'{mark}{{"prompt": "p"}}\n{{"prompt": "q"}}\n'.encode(encoding))
    (row,) = read_rows(path, 1_000)
    assert row.breaks_off and row.reason == "the file is UTF-16, expected UTF-8; save it as UTF-8"
    assert not grows(path)  # so it is read whole, with this reason


@NAMED
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 7, 1_000])
def test_a_stream_from_another_server_contains_it(character, end, size):
    lines = [f"data: é{character}x", "", f": {character}", "data: [DONE]"]
    sent = f"\ufeff{end.join(lines)}".encode()  # the mark at the start is no text

    async def chunks():
        for start in range(0, len(sent), size):
            yield sent[start : start + size]

    async def received():
        return [line async for line in event_lines(chunks())]

    assert asyncio.run(received()) == lines


@NAMED
@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_to_a_client_survives_a_client_that_ends_lines_at_it(character, chat):
    asked = {"messages": [{"role": "user", "content": "q"}]} if chat else {"prompt": "q"}
    body = (ChatRequest if chat else CompletionRequest).model_validate({"model": "notes", **asked})
    pending = SimpleNamespace(id=UUID(int=1))
    chunks = CompletionChunks(body, PreparedRequest([pending], 1, None, []), 0, "notes")
    line, *rest = chunks.delta(0, Delta(text=f"a{character}b é")).splitlines()
    assert rest == [""]
    choice = json.loads(line.removeprefix("data: "))["choices"][0]
    assert (choice["delta"]["content"] if chat else choice["text"]) == f"a{character}b é"
