"""The folder of a new loop, from a file of rows or empty."""

import csv
import json
import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from finetune_pipeline.curation.acceptance import Policy, benchmark_overlap
from finetune_pipeline.evaluation.benchmark import load_benchmark
from finetune_pipeline.pipeline.check_loop import check_loop
from finetune_pipeline.pipeline.init_loop import init_loop, row_of
from finetune_pipeline.pipeline.loop_files import output_schema, question_index
from finetune_pipeline.pipeline.loop_template import DEFAULT_BASE
from finetune_pipeline.records import Turn
from finetune_pipeline.schemas import answer_validator
from finetune_pipeline.settings import PROJECT_ROOT, CurationSettings, SettingsError, TrainingSettings, load_loop
from finetune_pipeline.sources.conversations import to_record
from finetune_pipeline.sources.source_record import SourceError, SourceRecord

STARTER = str(PROJECT_ROOT / "data" / "starter_model")
THINGS = {
    "billing": ["invoice", "refund", "charge", "payment"],
    "hardware": ["printer", "screen", "laptop", "mouse"],
    "access": ["password", "login", "account", "badge"],
}
WORDINGS = [
    "My {thing} from {day} does not work, can you look at it?",
    "There is a problem with the {thing} since {day}.",
    "Hello, {name} here. The {thing} is wrong again, {day} it was fine.",
    "{name} asked me about the {thing} on {day}; what shall I say?",
]


def tickets(count):
    """Return prompts with their labels, the same in every run."""
    chance = random.Random(1)
    found = {}
    while len(found) < count:
        kind = chance.choice([*THINGS])
        day, name = (
            chance.choice(["Monday", "May 3", "yesterday", "四月"]),
            chance.choice(["Ana", "Ben", "Žofie", "李雷"]),
        )
        found[chance.choice(WORDINGS).format(thing=chance.choice(THINGS[kind]), day=day, name=name)] = kind
    return [*found.items()]


TICKETS = tickets(160)
JSON_ROWS = [
    {"prompt": prompt, "completion": json.dumps({"kind": kind, "words": len(prompt.split())})}
    for prompt, kind in TICKETS
]
URGENT = {"billing": {"urgent": True}, "access": {"urgent": False}, "hardware": {"urgent": False}}
BOOLEAN_ROWS = [{"prompt": prompt, "completion": URGENT[kind]} for prompt, kind in TICKETS]
LABEL_ROWS = [{"prompt": prompt, "completion": kind} for prompt, kind in TICKETS]
TEXT_ROWS = [{"prompt": prompt, "completion": f"About {kind}: {prompt}"} for prompt, kind in TICKETS]


@pytest.fixture
def init(tmp_path, monkeypatch):
    """Return a function that writes rows to a file, makes a loop of them, and returns the loop and what was said."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Converting the vocabulary takes seconds, and is of the base model alone.
    monkeypatch.setattr("finetune_pipeline.pipeline.check_loop.vocabulary_problems", lambda *_: [])

    def made(rows, base=STARTER, name="tickets"):
        data = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        data.write_text("\n".join(lines), encoding="utf-8")
        return from_file(data, base, name)

    def from_file(data, base=STARTER, name="tickets"):
        written = init_loop(name, tmp_path / "loops", base, data)
        monkeypatch.setenv("FINETUNE_LOOPS_DIR", str(tmp_path / "loops"))
        return load_loop(name), written

    made.from_file = from_file
    return made


def questions_of(loop):
    return load_benchmark(Path(loop.evaluation.benchmark), output_schema(loop)).questions


def rows_of(written):
    return [json.loads(line) for line in (written.folder / "data" / "rows.jsonl").read_text("utf-8").splitlines()]


# --- With data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "metric", "slices"),
    [
        (JSON_ROWS, "parameters", {"access", "billing", "hardware"}),  # of the enumeration
        (BOOLEAN_ROWS, "parameters", {"urgent true", "urgent false"}),  # "true" alone says little
        (LABEL_ROWS, "exact", {"access", "billing", "hardware"}),
        (TEXT_ROWS, "rouge1", {"short answer", "medium answer", "long answer"}),
    ],
    ids=["json", "booleans", "labels", "text"],
)
def test_the_metric_and_the_slices_fit_the_answers(init, rows, metric, slices):
    loop, written = init(rows)
    questions = questions_of(loop)
    assert (loop.evaluation.metric.kind, len(questions)) == (metric, 40)
    assert {question.slice for question in questions} == slices
    assert check_loop(loop) == []
    # Nothing that trains overlaps with a question, and almost nothing is lost.
    curation = CurationSettings()
    index = question_index({q.id: q.prompt for q in questions}, curation.redaction)
    policy = Policy(curation, index, answer_validator(None))
    kept = rows_of(written)
    assert [row for row in kept if benchmark_overlap(row["prompt"], (), policy)] == [] and len(kept) >= 110


def test_the_slices_have_the_fractions_of_the_rows(init):
    loop, _ = init(LABEL_ROWS)
    of_rows, of_questions = Counter(kind for _, kind in TICKETS), Counter(q.slice for q in questions_of(loop))
    assert all(abs(of_questions[kind] - 40 * count / 160) <= 2 for kind, count in of_rows.items())


def test_the_same_rows_give_the_same_files(init):
    first = init(JSON_ROWS)[1].folder
    second = init(JSON_ROWS, name="again")[1].folder
    for name in ("benchmark.jsonl", "data/rows.jsonl", "answer.schema.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_property_that_an_answer_lacks_is_named(init):
    careless = {**JSON_ROWS[0], "completion": json.dumps({"kind": "access"})}
    _, said = init([careless, *JSON_ROWS[1:]])
    assert "optional, because answers without them were found: words" in "\n".join(said.lines)
    assert "optional" not in "\n".join(init(JSON_ROWS, name="others")[1].lines)


def test_every_answer_passes_the_inferred_schema(init):
    loop, written = init(JSON_ROWS)
    problem = answer_validator(output_schema(loop))
    assert [row for row in rows_of(written) if problem(row["completion"])] == []
    assert output_schema(loop)["properties"]["kind"]["enum"] == ["access", "billing", "hardware"]


def test_a_tiny_base_learns_faster_and_has_short_lengths(init):
    loop, _ = init(JSON_ROWS)
    assert (loop.training.learning_rate, loop.training.num_train_epochs) == (3e-3, 16)
    assert loop.evaluation.context == 512 and loop.training.max_length <= 512  # what the model was trained with


def test_another_base_has_the_defaults_and_its_tokens_are_estimated(init):
    loop, written = init(JSON_ROWS, DEFAULT_BASE)
    default = TrainingSettings()
    assert loop.base_model == DEFAULT_BASE
    assert not {"learning_rate", "num_train_epochs"} & loop.training.model_fields_set
    assert loop.training.learning_rate == default.learning_rate
    assert any("estimated, since the tokenizer of the base is not on this machine" in line for line in written.lines)
    longest = max(len((row["prompt"] + row["completion"]).encode()) for row in JSON_ROWS)
    assert longest / 2 < loop.training.max_length < 2_048


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (lambda p, a: {"instruction": "Sort it.", "input": p, "output": a}, "Sort it."),
        (lambda p, a: {"system": "Sort it.", "conversations": [{"from": "human", "value": p},
                                                              {"from": "gpt", "value": a}]}, "Sort it."),
        (lambda p, a: {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]}, ""),
    ],
    ids=["alpaca", "sharegpt", "messages"],
)  # fmt: skip
def test_other_formats_with_an_instruction_that_all_rows_share(init, row, prompt):
    loop, written = init([row(*ticket) for ticket in TICKETS])
    assert loop.system_prompt == prompt
    assert {(one["prompt"], one["completion"]) for one in rows_of(written)} <= {*TICKETS}
    assert {question.prompt for question in questions_of(loop)} <= {text for text, _ in TICKETS}


def test_csv(init, tmp_path):
    with (tmp_path / "tickets.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=";").writerows([("prompt", "response"), *TICKETS])
    loop, _ = init.from_file(tmp_path / "tickets.csv")
    assert loop.evaluation.metric.kind == "exact" and {"四月", "李雷"} & {
        *" ".join(q.prompt for q in questions_of(loop))
    } != {0}


def test_rows_that_are_left_out_are_counted_by_reason(init):
    rows = [
        *JSON_ROWS,
        *({"prompt": f"number {n} of something else", "completion": "no JSON"} for n in range(5)),
        *["broken"] * 3,
        *[{"question": "a", "answer": "b"}] * 2,
        *({"prompt": f"liked by nobody, number {n} of {n}", "completion": JSON_ROWS[0]["completion"], "reward": -1}
          for n in range(4)),
        {"prompt": "list", "completion": ["billing"]},
    ]  # fmt: skip
    loop, written = init(rows)
    said = "\n".join(written.lines)
    expected = [
        "answer is not a JSON object: 5", "not JSON: Expecting value", "(first at rows.jsonl:166): 3",
        "found the fields 'question, answer', expected those of one format", "(first at rows.jsonl:169): 2",
        "write a JSON list as a text", "reward below 0.3: 4",
    ]  # fmt: skip
    assert [part for part in expected if part not in said] == []
    assert sum(row.get("reward") == -1 for row in rows_of(written)) == 4  # KTO may use them
    assert len(questions_of(loop)) == 40


@pytest.mark.parametrize("base", [STARTER, DEFAULT_BASE])  # 512 tokens, counted; 4,096, estimated
def test_rows_that_the_base_cannot_hold_are_no_questions(init, base):
    long = [{"prompt": f"{prompt} {'and so on ' * 1_000}", "completion": kind} for prompt, kind in TICKETS[:50]]
    loop, written = init([*long, *LABEL_ROWS[50:]], base)
    assert max(len(question.prompt) for question in questions_of(loop)) < 200
    assert loop.training.max_length < 512 or base == DEFAULT_BASE
    limit = "512" if base == STARTER else "4,096"
    assert any(f"longer than {limit} tokens with its answer: 50" in line for line in written.lines)


def test_some_json_among_texts_is_text(init):
    loop, written = init([*JSON_ROWS[:60], *TEXT_ROWS[60:]])
    assert (loop.output_schema, loop.evaluation.metric.kind) == (None, "rouge1")
    assert any("60 answers of 160 are JSON, too few for a schema" in line for line in written.lines)


def test_a_prompt_with_two_answers_is_no_question(init):
    loop, _ = init([*LABEL_ROWS, *({**row, "completion": "other"} for row in LABEL_ROWS[:80])])
    assert not {question.prompt for question in questions_of(loop)} & {row["prompt"] for row in LABEL_ROWS[:80]}


def test_conversations_train_and_are_no_questions(init):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    talks = [{"messages": [*said, {"role": "user", "content": p}, {"role": "assistant", "content": a}]}
             for p, a in TICKETS]  # fmt: skip
    loop, written = init([*talks[:100], *LABEL_ROWS[100:]])
    assert len(questions_of(loop)) == 30 and sum("history" in row for row in rows_of(written)) >= 80
    loop, written = init(talks, name="talks")
    too_long = [
        {"messages": [{"role": "user", "content": "hm " * 2_000}, *said, *talk["messages"][2:]]} for talk in talks
    ]
    with pytest.raises(SourceError, match=r"0 rows can be a question"):
        init(too_long, name="long")
    assert written.lines[1].startswith("benchmark.jsonl: empty, as questions cannot have the earlier turns")
    assert "has no questions; write one on each line, such as " in check_loop(loop)[0]


def test_few_rows_say_what_is_missing(init):
    _, written = init(LABEL_ROWS[:16])
    said = "\n".join(written.lines)
    assert "8 questions decide little: add your own, at least 40 are advisable" in said
    assert "8 rows to train on, and a run needs 20" in said


@pytest.mark.parametrize("rows", [LABEL_ROWS[:7], [*LABEL_ROWS[:7], "broken"], [LABEL_ROWS[0]] * 50, []])
def test_too_few_rows_write_nothing(init, tmp_path, rows):
    with pytest.raises(SourceError, match=r"rows.jsonl: \d rows? can be a question .* at least 8 are needed") as error:
        init(rows)
    assert ("not JSON" in str(error.value)) == ("broken" in rows)
    assert ("duplicate of another row: 49 rows" in str(error.value)) == (len(rows) == 50)
    assert not (tmp_path / "loops").exists()


def test_rows_that_are_all_alike_write_nothing(init, tmp_path):
    text = "the printer on this floor is broken and does not print " * 4
    with pytest.raises(
        SourceError, match=r"rows.jsonl: \d+ questions could be split off, and no row to train on is left"
    ):
        init([{"prompt": f"ticket {n}: {text}", "completion": ["a", "b"][n % 2]} for n in range(120)])
    assert not (tmp_path / "loops").exists()


TURNS = (Turn(role="system", content="Be kind."), Turn(role="user", content="hi"), Turn(role="assistant", content="ho"))


@pytest.mark.parametrize(
    "record",
    [
        SourceRecord("x:1", "a", "b"),
        SourceRecord("x:1", "a", "b", TURNS, 0.5, "worse", datetime(2026, 1, 2, tzinfo=UTC), "ana", "mail", "ticket"),
        SourceRecord("x:1", " \n李 ", '{"a": null}', reward=-1.0),
        SourceRecord("x:1", "a", "b", reward=0.0, model_output=None),
    ],
)
def test_a_row_is_read_again_unchanged(record):
    again = to_record(json.loads(json.dumps(row_of(record))), "x:1")
    expected = record if record.model_output is None else SourceRecord(**{**vars(record), "reward": None})
    assert again == expected


# --- Without data -----------------------------------------------------------------------------------------------------


def test_a_fresh_loop_lists_exactly_what_its_user_has_to_write(init):
    loop, written = init.from_file(None)
    assert sorted(path.name for path in written.folder.rglob("*")) == [
        "README.md", "benchmark.jsonl", "data", "defs.yaml", "rows.jsonl",
    ]  # fmt: skip
    questions, rows = check_loop(loop)
    assert questions.startswith(
        f'{written.folder}/benchmark.jsonl has no questions; write one on each line, such as {{"id"'
    )
    assert rows.startswith(
        f"sources[0] (rows): {written.folder}/data has no rows; write one on each line of a .jsonl file"
    )
    # What the messages and the README show can be written as it is.
    shown = [
        line.strip() for line in (written.folder / "README.md").read_text().splitlines() if line.startswith("    {")
    ]
    (written.folder / "data" / "rows.jsonl").write_text(shown[0])
    (written.folder / "benchmark.jsonl").write_text(shown[1])
    assert check_loop(loop) == []


def test_settings_with_defaults_are_comments(init):
    loop, written = init.from_file(None)
    assert loop.model_fields_set == {"name", "description", "base_model", "sources", "evaluation"}
    assert loop.evaluation.model_fields_set == {"benchmark", "metric"}
    text = (written.folder / "defs.yaml").read_text()
    uncommented = "\n".join(
        line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in text.splitlines()
    )
    (written.folder / "defs.yaml").write_text(uncommented)
    (written.folder / "answer.schema.json").write_text('{"type": "object"}')
    every = load_loop("tickets")
    assert (every.training, every.gate, every.trigger) == (loop.training, loop.gate, loop.trigger)
    first = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (written.folder / first).resolve() == PROJECT_ROOT / "finetune_pipeline" / "defs.schema.json"


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("My Tickets", "my_tickets"),
        ("Größe", "grosse"),
        ("日本", "my_loop"),
        ("1st", "loop_1st"),
        ("a-b", "a_b"),
        ("", "my_loop"),
    ],
)
def test_a_name_that_no_loop_can_have(tmp_path, name, suggested):
    with pytest.raises(SettingsError, match=f"; {suggested} would do"):
        init_loop(name, tmp_path, STARTER)
    assert [*tmp_path.iterdir()] == []


def test_nothing_is_overwritten(tmp_path):
    init_loop("mine", tmp_path, STARTER)
    for name, said in (("mine", "mine exists already"), ("aec_parser", "named 'aec_parser' is declared already")):
        with pytest.raises(SettingsError, match=said):
            init_loop(name, tmp_path, STARTER)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="file is not a folder"):
        init_loop("mine", tmp_path / "file", STARTER)
    with pytest.raises(SettingsError, match=r"'./no/model' is neither a folder .* nor a Hugging Face id"):
        init_loop("other", tmp_path, "./no/model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_a_base_beside_the_loops_is_relative_and_another_one_is_absolute(init, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    loop, written = init.from_file(None, "models/mine")
    assert "base_model: ../../models/mine" in (written.folder / "defs.yaml").read_text()
    assert loop.base_model == str(tmp_path / "models" / "mine")
    loop, _ = init.from_file(None, STARTER, "other")
    assert loop.base_model == STARTER


@pytest.mark.parametrize(
    "text", ["yes", "1: 2", "# no", "a\nb: c\n", '"', "李\u2028x\x85", " x ", "{{ a }}", "null", "a #b"]
)
def test_any_system_prompt_is_read_again(init, text):
    rows = [{"messages": [{"role": "system", "content": text}, {"role": "user", "content": p},
                          {"role": "assistant", "content": a}]} for p, a in TICKETS]  # fmt: skip
    assert init(rows)[0].system_prompt == text


def test_a_folder_that_cannot_be_written_is_an_error_and_nothing_is_left(tmp_path, monkeypatch):
    def full(path, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(SettingsError, match=r"mine cannot be written \(No space left on device\)"):
        init_loop("mine", tmp_path / "loops", STARTER)
    assert [*(tmp_path / "loops").iterdir()] == []
