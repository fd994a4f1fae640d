"""Pairs and labelled answers: the same care as for the training set, and nothing that it contradicts."""

from dataclasses import replace

from finetune_pipeline.curation.dataset import curate, write_dataset
from finetune_pipeline.curation.dataset_files import (
    PREFERENCE,
    PROMPT_COMPLETION,
    UNPAIRED_PREFERENCE,
    DatasetExample,
    read_all,
    read_split,
)
from finetune_pipeline.curation.quotas import Quota
from finetune_pipeline.settings import CurationSettings
from finetune_pipeline_tests.conftest import uid

from .test_dataset import EVERYTHING, POLICY, example, identity


def corrected(number, **fields):
    return example(number, **{"output": f"wrong {number}", "reward": 0.4, "corrected": True, **fields})


def disliked(number, **fields):
    return example(number, **{"reward": -0.9, "confidence": None, **fields})


def pairs_of(curated):
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in curated.pairs["train"]]


def bad_of(curated):
    return {row.prompt: row.completion for row in curated.undesirable["train"]}


def test_a_correction_makes_a_pair_and_its_old_answer_is_a_bad_one():
    curated = curate([corrected(1), example(2)], [], EVERYTHING, identity)
    assert pairs_of(curated) == [("prompt number 1", "answer 1", "wrong 1")]
    assert bad_of(curated) == {"prompt number 1": "wrong 1"}


def test_a_correction_that_changed_nothing_or_corrects_nothing_makes_none():
    same, empty = corrected(1, output=" answer 1\n"), corrected(2, output="  ")
    long = corrected(3, output="x" * 20_000)
    curated = curate([same, empty, long], [], EVERYTHING, identity)
    assert (len(curated.train), pairs_of(curated), bad_of(curated)) == (3, [], {})


def test_what_counts_as_found_bad():
    policy = EVERYTHING
    examples = [
        disliked(1),  # without confidence: a bad answer needs none
        disliked(2, reward=-0.3),
        disliked(3, reward=-0.29),
        disliked(4, output="another answer"),  # a correction that somebody refused, not what the model said
        disliked(5, prompt="the golden question of all"),
        disliked(6, prompt="x" * 9_000),
        disliked(7, target=" ", output=" "),
    ]
    curated = curate(examples, [], policy, identity)
    assert bad_of(curated) == {"prompt number 1": "answer 1", "prompt number 2": "answer 2"}
    assert curated.near_benchmark == (str(uid("5")),)
    assert sum(curated.left_out.values()) == 7  # none of them is an answer to learn


def test_answers_found_bad_count_within_the_quota_of_their_source():
    notes = {"source": "notes"}
    bad = [disliked(n, **notes, ingest_offset=n) for n in range(50)]
    good = [example(100 + n, **notes) for n in range(9)]
    own = [disliked(200 + n) for n in range(20)]  # of the logs, which have no quota
    few = replace(EVERYTHING, quotas={"notes": Quota(examples=2)})
    assert set(bad_of(curate([*bad, *own], [], few, identity))) == {
        "prompt number 48",
        "prompt number 49",  # the newest
        *(f"prompt number {200 + n}" for n in range(20)),
    }
    curated = curate([*bad, *good, *own], [], few, identity)
    assert len(curated.train) == 2 and len(bad_of(curated)) == 20  # what is learnt comes first
    mended = curate([corrected(n, **notes) for n in range(5)], [], few, identity)
    assert len(mended.train) == len(pairs_of(mended)) == len(bad_of(mended)) == 2  # with what was corrected, it is one
    half = replace(EVERYTHING, quotas={"notes": Quota(share=0.5)})
    assert len(bad_of(curate([*bad, *own], [], half, identity))) == 40


def test_no_answer_is_good_and_bad_at_once():
    same = {"prompt": "the same prompt"}
    good = example(1, **same, target="right", reward=1.0, confirmed=True)
    curated = curate(
        [
            good,
            disliked(2, **same, target="right"),  # somebody else did not like it
            disliked(3, prompt="The  SAME prompt", target="wrong", reward=-0.5),
            disliked(4, **same, target="very wrong", reward=-1.0),
            corrected(5, **same, target="other", output="right"),  # less trusted than the confirmed answer
        ],
        [],
        EVERYTHING,
        identity,
    )
    assert [row.completion for row in curated.train] == ["right"]
    assert pairs_of(curated) == []
    assert bad_of(curated) == {"the same prompt": "very wrong"}


def test_one_pair_a_question_even_where_its_answer_was_confirmed_later():
    same = {"prompt": "the same prompt", "target": "right"}
    curated = curate(
        [
            corrected(1, **same, output="first"),
            corrected(2, **same, output="second", reward=0.5),
            example(3, **same, reward=1.0, confirmed=True),
        ],
        [],
        EVERYTHING,
        identity,
    )
    assert pairs_of(curated) == [("the same prompt", "right", "second")]


def test_a_question_is_on_the_same_side_in_all_three_datasets(tmp_path):
    examples = [corrected(n) for n in range(60)] + [disliked(n) for n in range(60, 120)]
    policy = POLICY.__class__(CurationSettings(validation_fraction=0.3), POLICY.benchmark, POLICY.problem)
    write_dataset(curate(examples, [], policy, identity), tmp_path, "")
    asked = {
        split: {
            row["prompt"]
            for name in (PROMPT_COMPLETION, PREFERENCE, UNPAIRED_PREFERENCE)
            for row in read_split(tmp_path, name, split)
        }
        for split in ("train", "validation")
    }
    assert not asked["train"] & asked["validation"]
    assert len(asked["train"] | asked["validation"]) == 120
    assert len(asked["validation"]) > 20


def test_what_is_written_is_redacted_readable_when_empty_and_names_its_interactions(tmp_path):
    secret = corrected(1, output="mail bob@example.com", target="mail bob@example.com now")
    bad = disliked(2, prompt="ring +49 30 901820")
    curated = curate([secret, bad], [DatasetExample("old prompt", "old answer", 1.0, "replay")], EVERYTHING, identity)
    write_dataset(curated, tmp_path, "")
    (pair,) = read_split(tmp_path, PREFERENCE, "train")
    assert (pair["chosen"], pair["rejected"]) == ("mail [EMAIL] now", "mail [EMAIL]")
    labelled = {
        (row["prompt"], row["completion"]): row["label"] for row in read_split(tmp_path, UNPAIRED_PREFERENCE, "train")
    }
    assert labelled == {
        ("prompt number 1", "mail [EMAIL] now"): True,
        ("prompt number 1", "mail [EMAIL]"): False,
        ("ring [PHONE]", "answer 2"): False,
        ("old prompt", "old answer"): True,  # what is replayed is a good answer, and no pair
    }
    for name in (PREFERENCE, UNPAIRED_PREFERENCE):
        assert list(read_split(tmp_path, name, "validation")) == []
    assert {row["interaction_id"] for row in read_all(tmp_path)} == {str(uid("1")), str(uid("2")), None}
