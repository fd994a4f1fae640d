"""preference/ and unpaired_preference/: filtered like the examples, and never contradicting them."""

from dataclasses import replace

from finetune_pipeline.curation.acceptance import Quota
from finetune_pipeline.curation.dataset_files import (
    PREFERENCE,
    PROMPT_COMPLETION,
    UNPAIRED_PREFERENCE,
    read_all,
    read_split,
)
from finetune_pipeline.settings import CurationSettings
from finetune_pipeline_tests.conftest import uid

from .datasets import ALL_TRAIN, POLICY, build, corrected, disliked, example, replay_example


def test_a_correction_makes_a_preference_pair_and_an_undesirable_answer():
    built = build([corrected(1), example(2)])
    assert built.pairs == [("prompt number 1", "answer 1", "wrong 1")]
    assert built.undesirable == {"prompt number 1": "wrong 1"}


def test_a_correction_without_another_usable_output_makes_no_pair():
    same, empty = corrected(1, output=" answer 1\n"), corrected(2, output="  ")
    long = corrected(3, output="x" * 20_000)
    same_json = corrected(4, target='{"a": 1, "b": [2]}', output='{\n  "b":[2],"a":1}')
    built = build([same, empty, long, same_json])
    assert (len(built.train), built.pairs, built.undesirable) == (4, [], {})


def test_which_outputs_are_undesirable():
    examples = [
        disliked(1),  # without confidence: an undesirable answer needs none
        disliked(2, reward=-0.3),
        disliked(3, reward=-0.29),
        disliked(4, output="another answer"),  # a refused correction, not the model's own answer
        disliked(5, prompt="the golden question of all"),
        disliked(6, prompt="x" * 9_000),
        disliked(7, target=" ", output=" "),
    ]
    built = build(examples)
    assert built.undesirable == {"prompt number 1": "answer 1", "prompt number 2": "answer 2"}
    assert built.summary.near_benchmark == (str(uid("5")),)
    assert sum(built.summary.left_out.values()) == 7  # none of them is an example to train on


def test_undesirable_answers_count_towards_the_quota_of_their_source():
    notes = {"source": "notes"}
    bad = [disliked(n, **notes, ingest_offset=n) for n in range(50)]
    good = [example(100 + n, **notes) for n in range(9)]
    own = [disliked(200 + n) for n in range(20)]  # of the logs, which have no quota
    few = replace(ALL_TRAIN, quotas={"notes": Quota(max_examples=2)})
    assert set(build([*bad, *own], few).undesirable) == {
        "prompt number 48",
        "prompt number 49",  # the newest
        *(f"prompt number {200 + n}" for n in range(20)),
    }
    built = build([*bad, *good, *own], few)
    assert len(built.train) == 2 and len(built.undesirable) == 20  # examples come first
    corrections = build([corrected(n, **notes) for n in range(5)], few)
    assert len(corrections.train) == len(corrections.pairs) == len(corrections.undesirable) == 2  # both count as one
    half = replace(ALL_TRAIN, quotas={"notes": Quota(max_fraction=0.5)})
    assert len(build([*bad, *own], half).undesirable) == 40


def test_no_answer_is_desirable_and_undesirable():
    same = {"prompt": "the same prompt"}
    good = example(1, **same, target="right", reward=1.0, confirmed=True)
    built = build(
        [
            good,
            disliked(2, **same, target="right"),  # another person disliked it
            disliked(3, prompt="The  SAME prompt", target="wrong", reward=-0.5),
            disliked(4, **same, target="very wrong", reward=-1.0),
            corrected(5, **same, target="other", output="right"),  # less trusted than the confirmed answer
        ]
    )
    assert [row.completion for row in built.train] == ["right"]
    assert built.pairs == []
    assert built.undesirable == {"the same prompt": "very wrong"}


def test_a_prompt_has_one_pair_even_if_its_answer_was_confirmed_later():
    same = {"prompt": "the same prompt", "target": "right"}
    built = build(
        [
            corrected(1, **same, output="first"),
            corrected(2, **same, output="second", reward=0.5),
            example(3, **same, reward=1.0, confirmed=True),
        ]
    )
    assert built.pairs == [("the same prompt", "right", "second")]


def test_a_prompt_has_the_same_split_in_all_three_datasets(tmp_path):
    examples = [corrected(n) for n in range(60)] + [disliked(n) for n in range(60, 120)]
    build(examples, replace(POLICY, settings=CurationSettings(validation_fraction=0.3)), folder=tmp_path)
    types = (PROMPT_COMPLETION, PREFERENCE, UNPAIRED_PREFERENCE)
    prompts = {
        split: {row["prompt"] for dataset_type in types for row in read_split(tmp_path, dataset_type, split)}
        for split in ("train", "validation")
    }
    assert not prompts["train"] & prompts["validation"]
    assert len(prompts["train"] | prompts["validation"]) == 120
    assert len(prompts["validation"]) > 20


def test_preference_datasets_are_redacted_and_name_their_interactions(tmp_path):
    secret = corrected(1, output="mail bob@example.com", target="mail bob@example.com now")
    bad = disliked(2, prompt="ring +49 30 901820")
    build([secret, bad], ALL_TRAIN, [replay_example("old prompt")], tmp_path)
    (pair,) = read_split(tmp_path, PREFERENCE, "train")
    assert (pair["chosen"], pair["rejected"]) == ("mail [EMAIL] now", "mail [EMAIL]")
    rows = read_split(tmp_path, UNPAIRED_PREFERENCE, "train")
    assert {(row["prompt"], row["completion"]): row["label"] for row in rows} == {
        ("prompt number 1", "mail [EMAIL] now"): True,
        ("prompt number 1", "mail [EMAIL]"): False,
        ("ring [PHONE]", "answer 2"): False,
        ("old prompt", "old answer"): True,  # replay is desirable, and has no pair
    }
    for dataset_type in (PREFERENCE, UNPAIRED_PREFERENCE):
        assert list(read_split(tmp_path, dataset_type, "validation")) == []
    assert {row["interaction_id"] for row in read_all(tmp_path)} == {str(uid("1")), str(uid("2")), None}
