import json
import random
from dataclasses import replace

import pyarrow as pa
import pytest

from finetune_pipeline.curation.acceptance import Policy, answer_validator, near_benchmark
from finetune_pipeline.curation.dataset import (
    curate,
    in_validation,
    inspect_dataset,
    read_replay,
    write_dataset,
)
from finetune_pipeline.curation.dataset_files import (
    COLUMNS,
    PREFERENCE,
    PROMPT_COMPLETION,
    UNPAIRED_PREFERENCE,
    DatasetExample,
    DatasetWriter,
    read_examples,
    turns_of,
)
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.records import Example, Turn
from finetune_pipeline.settings import CurationSettings
from finetune_pipeline_tests.conftest import dataset_rows, uid

POLICY = Policy(CurationSettings(), NearIndex({"q": "the golden question of all"}), answer_validator(None))

EVERYTHING = Policy(CurationSettings(validation_fraction=0), POLICY.benchmark, answer_validator(None))  # trains


def example(number, **fields):
    given = {"prompt": f"prompt number {number}", "target": f"answer {number}", "reward": 0.9, "confidence": 0.9}
    flags = {"confirmed": False, "corrected": False, "ingest_offset": number}
    values = {**given, **flags, **fields}
    return Example(interaction_id=uid(str(number)), **{"output": values["target"], **values})


def identity(example):
    return f"content of {example.prompt}"


def rows_of(curated):
    return [*curated.train, *curated.validation]


def said(*texts):
    return tuple(Turn(role="assistant" if n % 2 else "user", content=text) for n, text in enumerate(texts))


def test_the_order_of_examples_does_not_matter():
    examples = [example(n) for n in range(50)]
    shuffled = random.Random(1).sample(examples, len(examples))
    assert curate(examples, [], POLICY, identity) == curate(shuffled, [], POLICY, identity)


def test_a_prompt_never_changes_sides_when_more_arrive():
    early = curate([example(n) for n in range(50)], [], POLICY, identity)
    late = curate([example(n) for n in range(200)], [], POLICY, identity)
    assert {row.prompt for row in early.validation} <= {row.prompt for row in late.validation}
    assert early.validation and not {row.prompt for row in early.train} & {row.prompt for row in late.validation}


def test_the_share_of_validation_is_about_what_was_asked_for():
    share = sum(in_validation(f"prompt {n}", 0.1) for n in range(5_000)) / 5_000
    assert 0.08 < share < 0.12


def test_one_example_a_prompt_a_persons_answer_first():
    same = {"prompt": "the same prompt"}
    curated = curate(
        [
            example(1, **same, target="validator's", reward=1.0),
            example(2, **same, target="person's", reward=0.4, corrected=True),
            example(3, prompt="The SAME  prompt", target="person's", reward=0.3, corrected=True),
        ],
        [],
        POLICY,
        identity,
    )
    (kept,) = [*curated.train, *curated.validation]
    assert (kept.completion, kept.reward) == ("person's", 0.4)
    assert curated.left_out == {"duplicate of another example": 1, "same prompt, less trusted answer": 1}


def test_of_answers_trusted_alike_the_best_rewarded_one_stays_then_the_newest():
    examples = []
    for n in range(0, 40, 4):  # of many prompts: by the answers' hashes alone some would come out right
        asked = {"prompt": f"prompt number {n}"}
        examples += [
            example(n, **asked, target="older", reward=0.6),
            example(n + 1, **asked, target="newest", reward=0.6),
            example(n + 2, **asked, target="still newer, but less rewarded", reward=0.5),
        ]
    assert {row.completion for row in rows_of(curate(examples, [], POLICY, identity))} == {"newest"}


def test_near_duplicates_of_the_benchmark_are_named():
    leaked = example(1, prompt="The golden question of  ALL!")
    assert curate([leaked, example(2)], [], POLICY, identity).near_benchmark == (str(leaked.interaction_id),)


def test_replay_is_mixed_into_training_only_and_never_from_the_benchmark():
    replay = [DatasetExample(f"old {n}", "old answer", 1.0, "replay") for n in range(500)]
    replay.append(DatasetExample("the golden question of all", "x", 1.0, "replay"))
    curated = curate([example(n) for n in range(100)], replay, POLICY, identity)
    mine = [row for row in curated.train if row.source == "logs"]
    assert curated.replayed == len(mine) == len(curated.train) - len(mine)
    assert all(row.source == "logs" for row in curated.validation)
    assert not any(near_benchmark(row.prompt, row.history, POLICY) for row in curated.train)


def test_a_replayed_row_of_the_benchmark_is_left_out_though_there_are_too_few():
    greedy = replace(EVERYTHING, settings=EVERYTHING.settings.model_copy(update={"replay_ratio": 10}))
    asked = ["The golden question of  ALL!", "Listen: the golden question of all, what is it?", "something old"]
    replay = [DatasetExample(prompt, "x", 1.0, "replay") for prompt in asked]
    curated = curate([example(1)], replay, greedy, identity)
    assert [row.prompt for row in curated.replay] == ["something old"]


def test_what_is_written_is_what_is_read(tmp_path):
    curated = curate([example(n) for n in range(30)], [], POLICY, identity)
    write_dataset(curated, tmp_path, "Summarise.")
    rows = dataset_rows(tmp_path, "train")
    assert [DatasetExample(**{**row, "history": turns_of(row)}) for row in rows] == list(curated.train)
    lines = (tmp_path / "train.alpaca.jsonl").read_text().splitlines()
    first = curated.train[0]
    assert json.loads(lines[0]) == {
        "instruction": "Summarise.", "input": first.prompt, "output": first.completion, "reward": first.reward
    }  # fmt: skip
    assert len(lines) == len(curated.train)


def test_a_conversation_is_written_as_messages_and_for_alpaca_as_pairs(tmp_path):
    history = (*said("a wall", "How thick?"), Turn(role="user", content="hm"), *said("thick"))
    own = (Turn(role="system", content="Be short."), *said("a door", "Which?"))
    curated = curate([example(1, history=history), example(2, history=own)], [], EVERYTHING, identity)
    write_dataset(curated, tmp_path, "Answer.")
    assert {turns_of(row) for row in dataset_rows(tmp_path, "train")} == {history, own}
    lines = [json.loads(line) for line in (tmp_path / "train.alpaca.jsonl").read_text().splitlines()]
    by_input = {line.pop("input"): line for line in lines}
    assert by_input["prompt number 1"] == {
        "instruction": "Answer.", "output": "answer 1", "reward": 0.9,
        "history": [["a wall", "How thick?"], ["hm\nthick", ""]]
    }  # fmt: skip
    assert by_input["prompt number 2"] == {
        "instruction": "Be short.", "system": "Be short.", "output": "answer 2", "reward": 0.9,
        "history": [["a door", "Which?"]]
    }  # fmt: skip


def test_the_same_prompt_in_another_conversation_is_another_question():
    same = {"prompt": "150 mm"}
    curated = curate(
        [example(1, **same), example(2, **same, history=said("a wall", "?")), example(3, history=said("x"), **same)],
        [],
        POLICY,
        identity,
    )
    assert len(rows_of(curated)) == 3
    assert {row.conversation for row in rows_of(curated)} == {
        "150 mm",
        "user: a wall\nassistant: ?\n150 mm",
        "user: x\n150 mm",
    }


def test_the_side_of_a_question_follows_from_all_that_was_said_before_it():
    half = replace(POLICY, settings=CurationSettings(validation_fraction=0.5))
    examples = [example(n, prompt="150 mm", history=said(f"wall {n}", "How thick?")) for n in range(20)]
    curated = curate(examples, [], half, identity)
    assert curated.train and curated.validation
    assert all(in_validation(row.conversation, 0.5) for row in curated.validation)
    assert not any(in_validation(row.conversation, 0.5) for row in curated.train)


def test_secrets_are_replaced_before_anything_is_decided_and_counted_where_they_were_kept():
    curated = curate(
        [
            example(1, prompt="write to ann@example.com", target="to ann@example.com"),
            example(2, prompt="write to bob@example.com", target="to bob@example.com"),  # the same without the name
            example(3, prompt="ring +49 30 901820", reward=0.1),
            example(4, prompt="what now?", history=said("my mail is ann@example.com")),
        ],
        [DatasetExample("old ann@example.com", "old answer", 1.0, "replay")],
        EVERYTHING,
        identity,
    )
    assert {row.conversation: row.completion for row in rows_of(curated)} == {
        "write to [EMAIL]": "to [EMAIL]",
        "user: my mail is [EMAIL]\nwhat now?": "answer 4",
        "old [EMAIL]": "old answer",
    }
    assert curated.redacted == {"email": 4}
    assert curated.left_out == {"duplicate of another example": 1, "reward below 0.3": 1}


def test_a_row_is_known_by_the_content_that_it_had_before_its_redaction():
    curated = curate([example(1, prompt="write to ann@example.com")], [], POLICY, identity)
    assert [row.content_hash for row in rows_of(curated)] == ["content of write to ann@example.com"]


def test_an_empty_dataset_can_be_written_too(tmp_path):
    write_dataset(curate([], [], POLICY, identity), tmp_path, "")
    assert dataset_rows(tmp_path, "train") == []


def test_inspecting_a_dataset_finds_what_curation_did_not_write(tmp_path):
    strict = Policy(CurationSettings(), POLICY.benchmark, answer_validator({"type": "object"}))
    write_dataset(curate([], [], POLICY, identity), tmp_path / "empty", "")
    leak, fine = {"prompt": "the golden question of all", "history": []}, {"prompt": "fine", "history": []}
    rows = {
        PROMPT_COMPLETION: [
            {**leak, "completion": "{}", "source": "logs"},
            {**leak, "completion": "{}", "source": "replay"},
            {**fine, "completion": "[]", "source": "notes"},
        ],
        PREFERENCE: [{**fine, "chosen": "{", "rejected": "also no JSON"}],
        UNPAIRED_PREFERENCE: [
            {**fine, "completion": "[]", "label": True},
            {**fine, "completion": "no JSON", "label": False},
        ],
    }
    for dataset_type, columns in COLUMNS.items():
        with DatasetWriter(tmp_path / dataset_type, columns) as writer:
            writer.write("train", pa.Table.from_pylist(rows[dataset_type], writer.schema))
    content = inspect_dataset(tmp_path, strict)
    assert content.near_benchmark == ("the golden question of all",)
    assert content.invalid_targets[0] == "fine: $: [] is not of type 'object'"
    assert len(content.invalid_targets) == 2 and content.invalid_targets[1].startswith("fine: ")
    assert (content.examples, content.undesirable) == (2, 1)
    empty = inspect_dataset(tmp_path / "empty", strict)
    assert (empty.examples, empty.undesirable, empty.near_benchmark, empty.invalid_targets) == (0, 0, (), ())


def test_a_dataset_of_an_earlier_version_is_named(tmp_path):
    (tmp_path / "dataset" / "train").mkdir(parents=True)
    for read in (lambda: list(read_examples(tmp_path, "train")), lambda: inspect_dataset(tmp_path, POLICY)):
        with pytest.raises(CurationError, match=r"has no folder prompt_completion/.*`finetune run` builds"):
            read()


def test_a_replayed_row_that_is_not_to_be_trained_on_is_left_out(tmp_path):
    path = tmp_path / "replay.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "weight": 0}\n{"prompt": "c", "completion": "d", "train": 1}\n')
    assert [row.prompt for row in read_replay(path)] == ["c"]


@pytest.mark.parametrize("text", ["not json\n", '{"prompt": "a"}\n', '{"prompt": "a", "completion": null}\n', "[]\n"])
def test_a_replay_file_of_another_form_is_named(tmp_path, text):
    path = tmp_path / "replay.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + text)
    with pytest.raises(CurationError, match=r"replay\.jsonl:2"):
        read_replay(path)


def test_a_missing_replay_file_is_named(tmp_path):
    with pytest.raises(CurationError, match="is not there"):
        read_replay(tmp_path / "none.jsonl")
