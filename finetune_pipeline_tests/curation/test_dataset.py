import json
import random

import pytest

from finetune_pipeline.curation.dataset import (
    CurationError,
    Row,
    curate,
    in_validation,
    invalid_targets,
    overlaps,
    read_replay,
    read_rows,
    write_dataset,
)
from finetune_pipeline.curation.duplicates import NearIndex
from finetune_pipeline.curation.rules import Policy, answer_validator
from finetune_pipeline.records import Example
from finetune_pipeline.settings import CurationSettings
from finetune_pipeline_tests.conftest import uid

POLICY = Policy(CurationSettings(), NearIndex({"q": "the golden question of all"}), answer_validator(None))


def example(number, **fields):
    given = {"prompt": f"prompt number {number}", "target": f"answer {number}", "reward": 0.9, "confidence": 0.9}
    flags = {"confirmed": False, "corrected": False, "sequence": number}
    return Example(interaction_id=uid(str(number)), **{**given, **flags, **fields})


def test_the_order_of_examples_does_not_matter():
    examples = [example(n) for n in range(50)]
    shuffled = random.Random(1).sample(examples, len(examples))
    assert curate(examples, [], POLICY) == curate(shuffled, [], POLICY)


def test_a_prompt_never_changes_sides_when_more_arrive():
    early = curate([example(n) for n in range(50)], [], POLICY)
    late = curate([example(n) for n in range(200)], [], POLICY)
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
    )
    (kept,) = [*curated.train, *curated.validation]
    assert (kept.completion, kept.reward) == ("person's", 0.4)
    assert curated.left_out == {"duplicate of another example": 1, "same prompt, less trusted answer": 1}


def test_near_duplicates_of_the_benchmark_are_named():
    leaked = example(1, prompt="The golden question of  ALL!")
    assert curate([leaked, example(2)], [], POLICY).near_benchmark == (str(leaked.interaction_id),)


def test_replay_is_mixed_into_training_only_and_never_from_the_benchmark():
    replay = [Row(f"old {n}", "old answer", 1.0, "replay", None) for n in range(500)]
    replay.append(Row("the golden question of all", "x", 1.0, "replay", None))
    curated = curate([example(n) for n in range(100)], replay, POLICY)
    mine = [row for row in curated.train if row.source == "feedback"]
    assert curated.replayed == len(mine) == len(curated.train) - len(mine)
    assert all(row.source == "feedback" for row in curated.validation)
    assert not overlaps([vars(row) for row in curated.train], POLICY)


def test_what_is_written_is_what_is_read(tmp_path):
    curated = curate([example(n) for n in range(30)], [], POLICY)
    write_dataset(curated, tmp_path, "Summarise.")
    assert [Row(**row) for row in read_rows(tmp_path, "train")] == list(curated.train)
    lines = (tmp_path / "train.alpaca.jsonl").read_text().splitlines()
    first = curated.train[0]
    assert json.loads(lines[0]) == {"instruction": "Summarise.", "input": first.prompt, "output": first.completion}
    assert len(lines) == len(curated.train)


def test_an_empty_dataset_can_be_written_too(tmp_path):
    write_dataset(curate([], [], POLICY), tmp_path, "")
    assert read_rows(tmp_path, "train") == []


def test_the_checks_find_what_was_put_into_a_dataset_behind_curations_back():
    strict = Policy(CurationSettings(), POLICY.benchmark, answer_validator({"type": "object"}))
    rows = [{"prompt": "the golden question of all", "completion": "{}"}, {"prompt": "fine", "completion": "[]"}]
    assert overlaps(rows, strict) == ["the golden question of all"]
    assert invalid_targets(rows, strict) == ["fine: $: [] is not of type 'object'"]


@pytest.mark.parametrize("text", ["not json\n", '{"prompt": "a"}\n', "[]\n"])
def test_a_replay_file_of_another_form_is_named(tmp_path, text):
    path = tmp_path / "replay.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + text)
    with pytest.raises(CurationError, match=r"replay\.jsonl:2"):
        read_replay(path)


def test_a_missing_replay_file_is_named(tmp_path):
    with pytest.raises(CurationError, match="is not there"):
        read_replay(tmp_path / "none.jsonl")
