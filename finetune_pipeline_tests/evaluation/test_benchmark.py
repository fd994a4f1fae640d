"""Loading benchmarks, rules and schemas: valid files, and errors that name line, problem and remedy."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_pipeline.evaluation.benchmark import BenchmarkError, load_benchmark
from finetune_pipeline.schemas import SchemaError, compile_schema, load_rules, load_schema
from finetune_pipeline_tests.evaluation.fakes import SCHEMA, WALL, line, write_benchmark


def test_a_benchmark_keeps_order_fields_and_hash(tmp_path: Path) -> None:
    path = write_benchmark(tmp_path / "b.jsonl", [line("w1"), line("w2", wording="firm", origin="hand")])
    benchmark = load_benchmark(path, SCHEMA)
    assert [(q.id, q.wording, q.origin) for q in benchmark.questions] == [("w1", "plain", None), ("w2", "firm", "hand")]
    assert benchmark.questions[0].expected == WALL
    assert benchmark.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_sample_is_fixed_and_keeps_the_order(tmp_path: Path) -> None:
    lines = [line(f"q{number}", slice=f"s{number % 2}") for number in range(120)]
    benchmark = load_benchmark(write_benchmark(tmp_path / "b.jsonl", lines), SCHEMA)
    sample = benchmark.sample
    assert [q for q in benchmark.questions if q in sample.questions] == list(sample.questions)
    assert len(sample.questions) == 50 and sample.sha256 != benchmark.sha256
    assert 15 < sum(question.slice == "s0" for question in sample.questions) < 35  # not by position
    # Reordered, shortened: the same questions, as far as they are there.
    fewer = load_benchmark(write_benchmark(tmp_path / "c.jsonl", lines[60::-1]), SCHEMA)
    assert {q.id for q in sample.questions if q in fewer.questions} <= {q.id for q in fewer.sample.questions}
    short = load_benchmark(write_benchmark(tmp_path / "d.jsonl", lines[:50]), SCHEMA)
    assert short.sample is short


def test_expected_answers_may_be_texts_without_a_schema(tmp_path: Path) -> None:
    path = write_benchmark(tmp_path / "b.jsonl", [line("w1", expected="Use brick.")])
    assert load_benchmark(path, None).questions[0].expected == "Use brick."


def test_a_question_may_have_a_conversation_a_context_and_a_cluster(tmp_path: Path) -> None:
    history = [{"role": "user", "content": "A wall."}, {"role": "assistant", "content": "Which one?"}]
    lines = [
        line("w1", prompt="The brick one"),
        line("w2", prompt="The brick one", history=history, cluster="bricks"),
        line("w3", prompt="The brick one", context="Plan of the ground floor", expected={"element": "door"}),
    ]
    plain, asked_before, with_context = load_benchmark(write_benchmark(tmp_path / "b.jsonl", lines), SCHEMA).questions
    assert asked_before.cluster == "bricks" and plain.cluster is None
    last = {"role": "user", "content": "The brick one"}
    assert plain.messages("Be brief.") == [{"role": "system", "content": "Be brief."}, last]
    assert asked_before.messages("") == [*history, last]
    assert with_context.messages("")[-1]["content"] == "Plan of the ground floor\n\nThe brick one"
    assert [one.as_json() for one in (plain, asked_before, with_context)] == lines
    hashes = {one.asked_hash for one in (plain, asked_before, with_context)}
    assert len(hashes) == 3  # the error budget takes them for three questions
    assert replace(plain, id="x", prompt=" the BRICK  one").asked_hash == plain.asked_hash


def test_a_question_without_an_expected_answer_is_not_scored(tmp_path: Path) -> None:
    lines = [line("w1"), without("expected"), line("w3", expected=None)]
    benchmark = load_benchmark(write_benchmark(tmp_path / "b.jsonl", lines), SCHEMA)
    assert [question.id for question in benchmark.questions] == ["w1"]
    assert [question.id for question in benchmark.all_questions] == ["w1", "w2", "w3"]
    with pytest.raises(BenchmarkError, match=r'none of 2 questions has an "expected" answer'):
        load_benchmark(write_benchmark(tmp_path / "c.jsonl", lines[1:]), SCHEMA)


def without(name: str) -> dict[str, object]:
    return {key: value for key, value in line("w2").items() if key != name}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (without("slice"), ['"slice" is missing', "add it"]),
        (line("w2", context=" "), ['"context" is an empty text']),
        (line("w2", cluster=3), ['"cluster" is a number']),
        (line("w2", history="before"), ["history", "expected a list"]),
        (line("w2", history=[{"role": "robot", "content": "x"}]), ["history", "role", "robot"]),
        (line("w2", history=[{"role": "user", "content": "x"}]), ['"history" ends with a message of the user']),
        (line("w2", prompt=7), ['"prompt" is a number', "a non-empty text"]),
        (line("w2", prompt="  "), ["an empty text"]),
        (line("w2", expected=[1]), ['"expected" is a list', "a non-empty object or text"]),
        (line("w2", id=None), ['"id" is null']),
        (line("w2", wordng="firm"), ['"wordng" is not a field', "remove it"]),
        (line("w1", prompt="another"), ["'w1' is already on line 1", "its own id"]),
        (line("w2", prompt="a WALL,  please: W1"), ["same prompt is already on line 1; remove one of them"]),
        (
            line("w2", prompt="a WALL,\nplease: W1", expected={"element": "door"}),
            ["same prompt is already on line 1 with another expected answer", "correct one of the prompts"],
        ),
        (line("w2", expected={"element": "roof"}), ["'w2' does not pass the output schema", "$.element", "'roof'"]),
        ([1, 2], ["expected an object", "found a list"]),
    ],
)
def test_an_invalid_line_is_named_with_a_remedy(tmp_path: Path, second: object, words: list[str]) -> None:
    path = write_benchmark(tmp_path / "b.jsonl", [line("w1"), second])  # type: ignore[list-item]
    with pytest.raises(BenchmarkError) as error:
        load_benchmark(path, SCHEMA)
    assert [word for word in [f"{path}, line 2: ", *words] if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["has no questions", 'write one on each line, such as {"id": "q1", "slice": ']),
        (b"\n\n", ["has no questions"]),
        (b"{nonsense\n", ["line 1: not JSON"]),
        (b'{"id": NaN}\n', ["line 1: not JSON"]),
        (b"\xff\xfe\x00", ["not UTF-8", "save it as UTF-8"]),
        (b"[" * 100_000 + b"\n", ["line 1: not JSON"]),
    ],
)
def test_an_unusable_file_is_rejected(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(content)
    with pytest.raises(BenchmarkError) as error:
        load_benchmark(path, None)
    assert all(word in str(error.value) for word in [str(path), *words])


def test_a_missing_file_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"evaluation\.benchmark"):
        load_benchmark(tmp_path / "none.jsonl", None)


def test_one_error_reports_up_to_twenty_problems(tmp_path: Path) -> None:
    path = write_benchmark(tmp_path / "b.jsonl", [without("id") for _ in range(25)])
    with pytest.raises(BenchmarkError) as error:
        load_benchmark(path, None)
    assert str(error.value).count("is missing") == 20
    assert "and 5 more" in str(error.value)


RULE = {"id": "fire", "title": "Walls are rated", "schema": {"required": ["fire_rating_hr"]}}


def test_rules_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps([RULE]))
    assert [rule.id for rule in load_rules(path)] == ["fire"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([RULE, RULE], "rule 2.*already used"),
        ([{"id": "fire"}], 'rule 1: expected the fields "id"'),
        ([{**RULE, "schema": {"type": "thing"}}], "rule 1: not a JSON Schema"),
        ({}, "expected a JSON list"),
    ],
    ids=["twice", "missing fields", "no schema", "no list"],
)
def test_invalid_rules_are_rejected(tmp_path: Path, wrong: object, words: str) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(SchemaError, match=words):
        load_rules(path)


def test_a_schema_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    with pytest.raises(SchemaError, match="output_schema"):
        load_schema(path)
    path.write_text('{"type": 3}')
    with pytest.raises(SchemaError, match=r"schema\.json: not a JSON Schema"):
        load_schema(path)
    path.write_text(json.dumps(SCHEMA))
    assert load_schema(path) == SCHEMA


def test_a_remote_reference_is_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    from referencing.exceptions import Unresolvable

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(Unresolvable):
        compile_schema({"$ref": "https://example.org/schema.json"}).is_valid(1)
