"""What is checked before a run starts."""

import json
import re
import shutil

import pytest

from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.database import connect
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.feedback.store import record
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.check_loop import benchmark_note, check_loop, sliding_window_problems
from finetune_pipeline.settings import PROJECT_ROOT, LoopSettings, load_loop
from finetune_pipeline_tests.conftest import feedback, interaction
from finetune_pipeline_tests.training.conftest import STARTER

pytestmark = pytest.mark.usefixtures("kept_base_checks")
MISSING = "/nowhere/at all"
TEACHER = {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NOT_SET_ANYWHERE"}


def test_a_loop_without_problems(loop):
    assert check_loop(loop) == []
    assert check_loop(load_loop("aec_parser")) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {"benchmark": MISSING, "metric": "rouge1"}}, "{} does not exist; write the benchmark, or"),
        ({"output_schema": MISSING}, "{} does not exist; create it, or change output_schema"),
        ({"evaluation": {"compliance": MISSING}}, "{} does not exist; create it, or change evaluation.compliance"),
        ({"curation": {"replay": MISSING}}, "curation.replay: the file {} does not exist"),
        ({"ingest": {"folders": [MISSING]}}, "folder {} does not exist; create it, or correct ingest.folders"),
        ({"sources": [{"kind": "files", "name": "a", "path": MISSING}]}, "sources[0] (a): {} does not exist; create"),
        (
            {"sources": [{"kind": "files", "name": "a", "path": str(PROJECT_ROOT / "docs")}]},
            'docs has no rows; write one on each line of a .jsonl file, such as {{"prompt": "',
        ),
        ({"sources": [{"kind": "vault", "name": "a", "path": MISSING}]}, "sources[0] (a): {} does not exist"),
        ({"sources": [{"kind": "vault", "name": "a", "path": __file__}]}, "is not a folder; correct path"),
        ({"sources": [{"kind": "code", "name": "a", "path": MISSING}]}, "sources[0] (a): {} does not exist"),
        (
            {"sources": [{"kind": "documents", "name": "a", "path": "docs", "templates": MISSING}]},
            "sources[0] (a): {} does not exist; create it, or correct templates",
        ),
        (
            {"sources": [{"kind": "code", "name": "a", "path": "docs", "teacher": TEACHER}]},
            "sources[0] (a): the environment variable NOT_SET_ANYWHERE is not set; export the teacher's key",
        ),
        (
            {
                "sources": [
                    {"kind": "sql", "name": "a", "url_env": "NOT_SET_ANYWHERE", "table": "t", "key": "k", "cursor": "c",
                     "prompt": "p", "response": "r"}
                ]
            },
            "sources[0] (a): the environment variable NOT_SET_ANYWHERE is not set; export the database's URL",
        ),
        ({"feedback": {"reward_function": "no.such"}}, "feedback.reward_function: 'no.such' cannot be imported"),
        ({"base_model": "/nowhere/model"}, "/nowhere/model"),
    ],
)  # fmt: skip
def test_each_missing_thing_is_named_with_its_remedy(make_loop, changes, said):
    loop = with_changes(make_loop(), changes)
    (problem,) = check_loop(loop)
    assert said.format(MISSING) in problem


@pytest.mark.parametrize(
    ("kind", "name", "content", "said"),
    [
        ("files", "rows.jsonl", "broken\n" * 3, "gives no record ('rows.jsonl:1': not JSON"),
        ("files", "rows.jsonl", "broken\n" * 5, "; and 2 more); correct the source or its settings, or remove it"),
        ("files", "rows.jsonl", "broken\n" * 2_000, "gives no record among its first 1,000; the others were not read"),
        ("files", "rows.csv", "text,label\na,b\n", "'rows.csv:2': found the fields 'text, label'"),
        ("files", "rows.jsonl", "\n", "gives no record; correct the source"),
        ("vault", "Note.md", "## Decision\n\n- \n- [ ]\n", "('Note.md#Decision': is selected, but has no text)"),
        ("vault", "Note.md", "Plain text.\n", "gives no record: no note or section with text has one of the tags"),
        ("code", "notes.txt", "no code\n", ""),
        ("files", "rows.jsonl", 'broken\n{"prompt": "p", "completion": "c"}\n', None),  # some rows may be broken
    ],
)
def test_a_source_that_gives_no_record_is_named_with_the_reasons(make_loop, tmp_path, kind, name, content, said):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / name).write_text(content)
    loop = with_changes(make_loop(), {"sources": [{"kind": kind, "name": "a", "path": str(folder)}]})
    problems = check_loop(loop)
    if said is None:
        assert problems == []
    else:
        assert len(problems) == 1 and problems[0].startswith("sources[0] (a): ") and said in problems[0]


@pytest.mark.parametrize("constrain", [None, "schema", "none"])
@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        ({"not": {"required": ["b"]}}, "json_schema: the keyword `not` (at #) is not supported; "),
        ({"properties": {"a": {"pattern": "(?=x)y"}}}, "json_schema at #/properties/a: pattern: "),
    ],
)
def test_a_schema_that_constrained_decoding_cannot_enforce_is_named(make_loop, tmp_path, keyword, said, constrain):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", **keyword}))
    loop = with_changes(make_loop(), {"output_schema": str(path), "serving": {"constrain": constrain}})
    # The benchmark's answers are texts, which is another problem.
    problems = [problem for problem in check_loop(loop) if "benchmark.jsonl" not in problem]
    if constrain == "none":
        assert problems == []
        return
    assert len(problems) == 1 and problems[0].startswith(f"{path} cannot be enforced while decoding: {said}")
    assert problems[0].endswith(". Change the schema, or set serving.constrain: none")


def test_a_benchmark_of_three_questions_says_that_it_can_decide_nothing(make_loop, tmp_path):
    path = tmp_path / "few.jsonl"
    rows = [{"id": f"q{n}", "slice": "a", "prompt": f"Question {n}?", "expected": f"answer {n}"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    loop = with_changes(make_loop(), {"evaluation": {"benchmark": str(path)}})
    assert check_loop(loop) == []  # the rule of 5 % can still decide
    assert benchmark_note(loop) == (
        "evaluation.benchmark: 3 questions can decide nothing: even 3 won and none lost would give p = 0.12; at least "
        "5 are needed, and about 380 to find a gain of 5 points if 15% of the answers differ"
    )
    strict = with_changes(loop, {"gate": {"significance": "required"}})
    assert "at least 8 are needed, and about 730 to find a gain of 5 points" in benchmark_note(strict)
    path.write_text("".join(json.dumps({**row, "cluster": "one document"}) + "\n" for row in rows))
    assert "1 cluster can decide nothing: even 1 won" in benchmark_note(loop)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert benchmark_note(loop).endswith("10 questions find gains from about 30.5 points if 15% of the answers differ")


def test_all_problems_of_the_metrics_are_listed(make_loop, tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text("def tone(question, answer):\n    return answer.no_such\n")
    monkeypatch.syspath_prepend(tmp_path)
    metrics = [
        {"kind": "function", "name": "tone", "function": "my_metrics.tone"},
        "parameters",
        {"kind": "function", "name": "pitch", "function": "my_metrics.pitch"},
    ]
    problems = check_loop(with_changes(make_loop(), {"evaluation": {"metrics": metrics}}))
    assert len(problems) == 3
    assert "the metric tone (my_metrics.tone) raised AttributeError on question" in problems[0]
    assert "the metric parameters counts the values of JSON answers" in problems[1]
    assert "my_metrics.pitch of the metric pitch cannot be imported" in problems[2]


def with_changes(loop, changes):
    """Return a loop with changes; sections are merged."""
    given = loop.model_dump(exclude_unset=True)
    for name, change in changes.items():
        given[name] = {**given.get(name, {}), **change} if isinstance(change, dict) else change
    return LoopSettings.model_validate(given)


def test_all_problems_are_listed_together(make_loop, tmp_path):
    """Each line of a benchmark is a problem of its own."""
    benchmark = tmp_path / "bad.jsonl"
    benchmark.write_text('{"id": "a"}\nbroken\n')
    changes = {
        "evaluation": {"benchmark": str(benchmark)},
        "curation": {"replay": MISSING},
        "training": {
            "per_device_train_batch_size": 24,
            "num_processes": 5,
            "report_to": ["wandb"],
            "backend": "axolotl",
        },
        "ingest": {"folders": [MISSING, "/nowhere/else"]},
        "base_model": "docs",
    }
    problems = check_loop(with_changes(make_loop(), changes))
    expected = [
        f"{benchmark}, line 1: ", f"{benchmark}, line 2: not JSON", "curation.replay: ", MISSING, "/nowhere/else",
        "evenly across 5 processes", "no config.json",
    ]  # fmt: skip
    assert [said for said in expected if not any(said in problem for problem in problems)] == []
    assert len(problems) == len(set(problems)) >= 8


@pytest.mark.parametrize("what", ["folder", "not UTF-8", "deeply nested"])
@pytest.mark.parametrize(
    "setting", ["evaluation.benchmark", "output_schema", "evaluation.compliance", "curation.replay"]
)
def test_a_file_that_cannot_be_read_is_a_sentence(make_loop, tmp_path, setting, what):
    path = tmp_path / "odd"
    if what == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe" if what == "not UTF-8" else b"[" * 100_000)
    section, _, name = setting.rpartition(".")
    changes = {section: {name: str(path)}} if section else {name: str(path)}
    problems = check_loop(with_changes(make_loop(), changes))
    assert len(problems) == 1 and str(path) in problems[0]


ANSWER = {"role": "assistant", "content": "yes"}
LONG, SHORT = range(200, 206), range(1, 7)


def rows_of(lengths, long="prompt"):
    """Return JSON lines of rows with so many words in one of their texts."""
    rows = []
    for number, length in enumerate(lengths):
        row = {"prompt": f"p{number}", "completion": "a"}
        text = f"{number} " + "wall " * length
        rows.append(
            row | ({"history": [{"role": "user", "content": text}, ANSWER]} if long == "history" else {long: text})
        )
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("rows", "max_length", "said"),
    [
        (rows_of(LONG), 64, "6 of 6 examples have more than 64 tokens"),
        (rows_of(LONG, "completion"), 64, "6 of 6 examples have more than 64 tokens"),
        (rows_of(LONG, "history"), 64, "6 of 6 examples have more than 64 tokens"),
        (rows_of([*LONG, *SHORT]), 64, "6 of 12 examples have more than 64 tokens"),  # half of them
        (rows_of([*LONG[:5], *SHORT]), 64, ""),
        (rows_of(SHORT), 16, "6 of 6 examples have more than 16 tokens"),  # with the template
        (rows_of(LONG), 512, ""),
        (rows_of(range(150, 400)), 128, "200 of 200 examples"),  # no more are read
        (rows_of(range(900, 906)), 256, "6 of 6 examples"),
        (rows_of(range(900, 906)), 512, "6 of 6 examples"),
        ("", 16, ""),
    ],
    ids=[
        "prompt", "completion", "history", "half", "fewer", "template", "long enough", "many", "context", "above it",
        "no rows",
    ],
)  # fmt: skip
def test_a_max_length_shorter_than_most_examples_is_named_with_the_one_to_set(
    make_loop, tmp_path, rows, max_length, said
):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    source = {"kind": "files", "name": "a", "path": str(path)}
    changes = {"sources": [source] if rows else [], "training": {"max_length": max_length}}
    problems = check_loop(with_changes(make_loop(), changes))
    if not said:
        assert problems == []
        return
    [problem] = problems
    assert problem.startswith(f"training.max_length: {said}") and "training would leave them out" in problem
    if max_length == 512:  # the starter model's context
        assert problem.endswith("the base model's context has 512 tokens, so shorten them, or choose another one")
        return
    value = int(re.search(r"set training\.max_length to (\d+)", problem)[1])
    if "and shorten" in problem:
        assert value == 512
    else:
        assert check_loop(with_changes(make_loop(), {**changes, "training": {"max_length": value}})) == []


def test_the_lengths_of_stored_examples_count(make_loop):
    loop = with_changes(make_loop(), {"training": {"max_length": 64}})
    events = []
    for number in range(4):
        events.append(interaction(f"{number}", prompt=f"{number} " + "wall " * 200))
        events.append(feedback(f"on {number}", f"{number}", "correction", correction="a wall"))
    with connect().write() as connection:
        record(connection, loop.name, events, reward_function(loop.feedback))
    [problem] = check_loop(loop)
    assert problem.startswith("training.max_length: 4 of 4 examples have more than 64 tokens")


TWICE = '{"id": "a", "slice": "s", "prompt": "p", "expected": "one", "expected": "two"}\n'


@pytest.mark.parametrize(
    ("setting", "content", "name"),
    [
        ("evaluation.benchmark", TWICE, "expected"),
        ("evaluation.benchmark", TWICE.replace('"expected": "one", ', "").replace('"two"', '{"b": 1, "b": 2}'), "b"),
        ("output_schema", '{"type": "object", "type": "array"}', "type"),
        ("output_schema", '{"properties": {"a": {"type": "string"}, "a": {"type": "null"}}}', "a"),
        ("evaluation.compliance", '[{"id": "a", "title": "t", "schema": {}, "id": "b"}]', "id"),
        (
            "evaluation.compliance",
            '[{"id": "a", "title": "t", "schema": {"required": [], "required": []}}]',
            "required",
        ),
        ("curation.replay", '{"prompt": "p", "completion": "a", "completion": "b"}\n', "completion"),
    ],
)
def test_a_key_that_is_twice_in_a_json_file_is_named(make_loop, tmp_path, setting, content, name):
    path = tmp_path / "twice.jsonl"
    path.write_text(content)
    section, _, key = setting.rpartition(".")
    problems = check_loop(with_changes(make_loop(), {section: {key: str(path)}} if section else {key: str(path)}))
    assert len(problems) == 1 and str(path) in problems[0]
    assert f"the key '{name}' is twice in one object, and the last would replace the first; remove one" in problems[0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda base, weights: weights.write_bytes(b""), "model.safetensors (0 bytes) is damaged or incomplete"),
        (lambda base, weights: weights.write_bytes(weights.read_bytes()[:-1]), "is damaged or incomplete"),
        (
            lambda base, weights: weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:]),
            "model.safetensors (",
        ),
        (lambda base, weights: weights.rename(base / "pytorch_model.bin"), "only as pickle (pytorch_model.bin)"),
        (lambda base, weights: weights.unlink(), "has no safetensors weights"),
        (
            lambda base, weights: (base / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-2.safetensors"}}'
            ),
            "lacks model-2.safetensors, which its index names",
        ),
        (
            lambda base, weights: (base / "model.safetensors.index.json").write_text(
                '{"weight_map": {"no.such.tensor": "model.safetensors"}}'
            ),
            "lacks 1 tensor that model.safetensors.index.json says it has, such as no.such.tensor",
        ),
    ],
    ids=["empty", "cut", "header beyond the file", "pickle", "gone", "missing shard", "missing tensor"],
)
def test_a_damaged_base_model_is_found_before_a_run(make_loop, tmp_path, damage, said):
    base = shutil.copytree(STARTER, tmp_path / "base")
    damage(base, base / "model.safetensors")
    [problem] = check_loop(with_changes(make_loop(), {"base_model": str(base)}), download=False)
    assert said in problem and str(base) in problem


def test_weights_are_not_downloaded_for_a_check(loop, tmp_path, monkeypatch):
    for path in [STARTER / "config.json", *STARTER.glob("tokenizer*")]:
        shutil.copyfile(path, tmp_path / path.name)
    wanted = []

    def download(name, allow_patterns):
        wanted.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loop = loop.model_copy(update={"base_model": "some-one/some-model"})
    assert check_loop(loop, download=False) == []
    assert "config.json" in wanted and not [name for name in wanted if "safetensors" in name]
    assert "no safetensors weights" in check_loop(loop)[0]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, None),
        ({"model_type": "mistral", "sliding_window": None}, None),
        (
            {"model_type": "mistral", "sliding_window": 300},
            r"the last 300 tokens .*Set training.max_length \(400\) to at",
        ),
        (
            {"model_type": "phi3", "sliding_window": 200},
            r"for phi3.* Set training.max_length \(400\), evaluation.context",
        ),
        ({"model_type": "qwen2", "sliding_window": 200}, None),
        ({"model_type": "qwen2", "sliding_window": 200, "use_sliding_window": True}, "at most 200"),
        ({"model_type": "gemma2", "sliding_window": 200}, None),  # llama.cpp has it
    ],
)
def test_lengths_beyond_a_sliding_window_that_llama_cpp_lacks_are_named(make_loop, tmp_path, config, said):
    loop = make_loop(training={"max_length": 400}, evaluation={"max_tokens": 24, "context": 256, "metric": "rouge1"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = sliding_window_problems(tmp_path, loop)
    assert found == [] if said is None else len(found) == 1 and re.search(said, found[0]), found


@pytest.mark.slow
def test_the_tokenizer_and_template_of_the_base_model_are_checked(make_loop, tmp_path):
    base = shutil.copytree(STARTER, tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + (config["chat_template"])
    )
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    changes = {"base_model": str(base), "system_prompt": "Answer in JSON."}
    [problem] = check_loop(with_changes(make_loop(), changes))
    assert problem.startswith(f"system_prompt: the chat template of {base} rejects system messages (no)")
    assert check_loop(with_changes(make_loop(), {**changes, "system_prompt": ""})) == []


def test_a_file_that_disappears_later_is_named_too(tmp_path):
    with pytest.raises(CurationError, match=r"replay: .*gone.jsonl cannot be read \(No such file"):
        loop_files.hashes(replay=tmp_path / "gone.jsonl")
