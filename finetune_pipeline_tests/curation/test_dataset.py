"""What a dataset holds: splits, tie-breaking, replay, redaction; and the checks of what was written."""

import json
import random
from dataclasses import replace
from datetime import timedelta

import pyarrow as pa
import pytest

from finetune_pipeline.curation.acceptance import Policy, Quota, benchmark_overlap
from finetune_pipeline.curation.dataset import in_validation
from finetune_pipeline.curation.dataset_checks import inspect_dataset
from finetune_pipeline.curation.dataset_files import (
    COLUMNS,
    PREFERENCE,
    PROMPT_COMPLETION,
    UNPAIRED_PREFERENCE,
    DatasetWriter,
    read_examples,
    turns_of,
)
from finetune_pipeline.curation.errors import CurationError
from finetune_pipeline.records import Turn
from finetune_pipeline.schemas import answer_validator
from finetune_pipeline.settings import CurationSettings
from finetune_pipeline_tests.conftest import START, dataset_rows, uid

from .datasets import ALL_TRAIN, POLICY, build, example, replay_example, turns


def test_the_order_of_examples_does_not_matter():
    examples = [example(n) for n in range(50)]
    shuffled = random.Random(1).sample(examples, len(examples))
    assert build(examples, POLICY) == build(shuffled, POLICY)


def test_a_prompt_keeps_its_split_when_more_arrive():
    early, late = (build([example(n) for n in range(count)], POLICY) for count in (50, 200))
    assert {row.prompt for row in early.validation} <= {row.prompt for row in late.validation}
    assert early.validation and not {row.prompt for row in early.train} & {row.prompt for row in late.validation}


def test_validation_has_about_the_configured_fraction():
    fraction = sum(in_validation(f"prompt {n}", 0.1) for n in range(5_000)) / 5_000
    assert 0.08 < fraction < 0.12


def test_each_prompt_has_one_example_and_a_person_outranks_a_validator():
    same = {"prompt": "the same prompt"}
    built = build(
        [
            example(1, **same, target="validator's", reward=1.0),
            example(2, **same, target="person's", reward=0.4, corrected=True),
            example(3, prompt="The SAME  prompt", target="person's", reward=0.3, corrected=True),
        ],
        POLICY,
    )
    (kept,) = built.examples
    assert (kept.completion, kept.reward) == ("person's", 0.4)
    assert built.summary.left_out == {"duplicate of another example": 1, "same prompt, less trusted answer": 1}


def test_ties_are_broken_by_reward_and_then_by_age():
    examples = []
    for n in range(0, 40, 4):  # many prompts: for one, the hashes of the answers could give the right order by chance
        asked = {"prompt": f"prompt number {n}"}
        examples += [
            example(n, **asked, target="older", reward=0.6),
            example(n + 1, **asked, target="newest", reward=0.6),
            example(n + 2, **asked, target="still newer, but less rewarded", reward=0.5),
        ]
    assert {row.completion for row in build(examples, POLICY).examples} == {"newest"}


def test_near_duplicates_of_the_benchmark_are_named():
    leaked = example(1, prompt="The golden question of  ALL!")
    assert build([leaked, example(2)], POLICY).summary.near_benchmark == (str(leaked.interaction_id),)


def test_replay_is_trained_on_and_never_overlaps_the_benchmark():
    replay = [replay_example(f"old {n}") for n in range(500)]
    replay.append(replay_example("the golden question of all", "x"))
    built = build([example(n) for n in range(100)], POLICY, replay)
    own = [row for row in built.train if row.source == "logs"]
    assert built.summary.replayed == len(own) == len(built.train) - len(own)
    assert all(row.source == "logs" for row in built.validation)
    assert not any(benchmark_overlap(row.prompt, row.history, POLICY) for row in built.train)


def test_replay_that_overlaps_the_benchmark_is_left_out():
    greedy = replace(ALL_TRAIN, settings=ALL_TRAIN.settings.model_copy(update={"replay_ratio": 10}))
    prompts = ["The golden question of  ALL!", "Listen: the golden question of all, what is it?", "something old"]
    built = build([example(1)], greedy, [replay_example(prompt, "x") for prompt in prompts])
    assert [row.prompt for row in built.replay] == ["something old"]


def test_alpaca_lines_have_the_examples_of_the_dataset(tmp_path):
    built = build([example(n) for n in range(30)], POLICY, folder=tmp_path, system_prompt="Summarize.")
    lines = (tmp_path / "train.alpaca.jsonl").read_text().splitlines()
    first = built.train[0]
    assert (first.source, first.reward, first.completion) == (
        "logs",
        0.9,
        first.prompt.replace("prompt number", "answer"),
    )
    assert json.loads(lines[0]) == {
        "instruction": "Summarize.", "input": first.prompt, "output": first.completion, "reward": first.reward
    }  # fmt: skip
    assert len(lines) == len(built.train) and len(built.examples) == 30


def test_a_conversation_is_written_as_messages_and_for_alpaca_as_pairs(tmp_path):
    history = (*turns("a wall", "How thick?"), Turn(role="user", content="hm"), *turns("thick"))
    own = (Turn(role="system", content="Be short."), *turns("a door", "Which?"))
    build([example(1, history=history), example(2, history=own)], folder=tmp_path, system_prompt="Answer.")
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


def test_the_same_prompt_in_another_conversation_is_another_prompt():
    same = {"prompt": "150 mm"}
    built = build(
        [example(1, **same), example(2, **same, history=turns("a wall", "?")), example(3, history=turns("x"), **same)],
        POLICY,
    )
    assert len(built.examples) == 3
    assert {row.conversation for row in built.examples} == {
        "150 mm",
        "user: a wall\nassistant: ?\n150 mm",
        "user: x\n150 mm",
    }


def test_the_split_depends_on_the_whole_conversation():
    half = replace(POLICY, settings=CurationSettings(validation_fraction=0.5))
    examples = [example(n, prompt="150 mm", history=turns(f"wall {n}", "How thick?")) for n in range(20)]
    built = build(examples, half)
    assert built.train and built.validation
    assert all(in_validation(row.conversation, 0.5) for row in built.validation)
    assert not any(in_validation(row.conversation, 0.5) for row in built.train)


def test_secrets_are_replaced_before_anything_is_compared_and_counted_where_kept():
    built = build(
        [
            example(1, prompt="write to ann@example.com", target="to ann@example.com"),
            example(2, prompt="write to bob@example.com", target="to bob@example.com"),  # the same without the name
            example(3, prompt="ring +49 30 901820", reward=0.1),
            example(4, prompt="what now?", history=turns("my mail is ann@example.com")),
        ],
        ALL_TRAIN,
        [replay_example("old ann@example.com")],
    )
    assert {row.conversation: row.completion for row in built.examples} == {
        "write to [EMAIL]": "to [EMAIL]",
        "user: my mail is [EMAIL]\nwhat now?": "answer 4",
        "old [EMAIL]": "old answer",
    }
    assert built.summary.redacted == {"email": 4}
    assert built.summary.left_out == {"duplicate of another example": 1, "reward below 0.3": 1}


def test_the_content_hash_is_of_the_text_before_redaction():
    built = build([example(1, prompt="write to ann@example.com")], POLICY)
    assert [row.content_hash for row in built.examples] == ["content of write to ann@example.com"]


def test_an_empty_dataset_is_written_too(tmp_path):
    build([], POLICY, folder=tmp_path)
    assert dataset_rows(tmp_path, "train") == []


def test_inspecting_a_dataset_finds_what_curation_did_not_write(tmp_path):
    strict = Policy(CurationSettings(), POLICY.benchmark, answer_validator({"type": "object"}))
    build([], POLICY, folder=tmp_path / "empty")
    leak = {"prompt": "the golden question of all", "history": [], "interaction_id": "leaking"}
    fine = {"prompt": "fine", "history": [], "interaction_id": "invalid"}
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
    assert content.near_benchmark == ("leaking",)
    assert content.invalid_targets == ("invalid", "invalid")
    assert (content.examples, content.undesirable) == (2, 1)
    empty = inspect_dataset(tmp_path / "empty", strict)
    assert (empty.examples, empty.undesirable, empty.near_benchmark, empty.invalid_targets) == (0, 0, (), ())


@pytest.mark.parametrize(
    "read",
    [lambda folder: list(read_examples(folder, "train")), lambda folder: inspect_dataset(folder, POLICY)],
    ids=["read_examples", "inspect_dataset"],
)
def test_a_dataset_of_an_earlier_version_is_named(tmp_path, read):
    (tmp_path / "dataset" / "train").mkdir(parents=True)
    with pytest.raises(CurationError, match=r"has no folder prompt_completion/.*`finetune run` builds"):
        read(tmp_path)


# The time and the place of arrival of four equally trusted examples; the newest are kept, whatever arrived last.
@pytest.mark.parametrize("arrival", [(1, 2, 3, 4), (4, 3, 2, 1), (2, 4, 1, 3)])
def test_a_quota_leaves_out_the_oldest_by_time(arrival):
    rows = [
        example(n, ingest_offset=offset, created_at=START + timedelta(days=n), source="notes")
        for n, offset in enumerate(arrival)
    ]
    policy = replace(ALL_TRAIN, quotas={"notes": Quota(max_examples=2)})
    assert {row.completion for row in build(rows, policy).examples} == {"answer 2", "answer 3"}
    again = [
        example(9, ingest_offset=o, created_at=START + timedelta(days=n), target=f"{n}") for n, o in enumerate(arrival)
    ]
    same_prompt = [row.model_copy(update={"interaction_id": uid(row.target)}) for row in again]
    assert {row.completion for row in build(same_prompt, ALL_TRAIN).examples} == {"3"}
    disliked_ones = [row.model_copy(update={"reward": -0.9}) for row in same_prompt]
    assert set(build(disliked_ones, ALL_TRAIN).undesirable.values()) == {"3"}
