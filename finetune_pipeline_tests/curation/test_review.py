"""Which answers need a review, in which order, and why: the pure rule."""

from datetime import UTC, datetime
from itertools import permutations

import pytest

from finetune_pipeline.curation.acceptance import REJECTED, UNREVIEWED, Policy, accept, is_undesirable
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.curation.review import (
    PRIOR,
    REJECTED_ANSWER,
    ReviewInput,
    Slice,
    Vote,
    WeakSlices,
    disagreement,
    rank,
    review_priority,
)
from finetune_pipeline.schemas import answer_validator
from finetune_pipeline.settings import CurationSettings

from .datasets import example

POLICY = Policy(CurationSettings(), NearIndex({"q": "the golden question of all"}), answer_validator(None))
REQUIRED = Policy(POLICY.settings, POLICY.benchmark, POLICY.problem, review_required=True)
NONE = WeakSlices([])


def case(key="a", **fields):
    given = {"prompt": f"what of {key} and all the rest of it?", "answer": f"{key} it is"}
    given |= {"created_at": datetime(2026, 1, 1, tzinfo=UTC)}
    return ReviewInput(id=key, **{**given, **fields})


def value(one, policy=POLICY, weak=NONE):
    ranked = review_priority(one, policy, weak, 0.85)
    return None if ranked is None else ranked.priority


def reasons(one, policy=POLICY, weak=NONE):
    return review_priority(one, policy, weak, 0.85).reasons


def test_without_a_reason_there_is_no_review():
    assert value(case()) is None
    assert value(case(confidence=0.9)) is None
    assert value(case(would_train=True)) is None


def test_the_less_confident_comes_first():
    found = rank([case("a", confidence=0.6), case("b", confidence=0.1), case("c", confidence=0.8)], POLICY, NONE, 0.85)
    assert [one.id for one in found] == ["b", "a", "c"]
    assert found[0].priority == pytest.approx(1 - (1 - PRIOR) * 0.1)
    assert found[0].reasons == ("confidence 0.10, below 0.85",)


def test_human_feedback_settles_confidence_and_flag():
    assert value(case(confidence=0.1, flag="odd", has_human_feedback=True)) is None
    assert reasons(case(flag="odd")) == ("flagged: odd",)
    assert reasons(case(flag="confidence 0.10 is below 0.85", confidence=0.1)) == ("confidence 0.10, below 0.85",)


def test_signals_add_up_but_never_beyond_certainty():
    both = value(case(confidence=0.5, votes=(Vote("x", True), Vote("x", False))))
    assert both == pytest.approx(1 - (1 - PRIOR) * 0.5 * 0.5)
    assert value(case(confidence=0.5)) < both < 1


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([], 0),
        ([("x", True), ("x", True)], 0),
        ([("x", False)], 0),  # no vote for any answer is no disagreement
        ([("x", True), ("x", False)], 0.5),
        ([("x", True), ("x", True), ("x", False)], 1 / 3),
        ([("x", False), ("y", True)], 0),  # rejecting x and writing y agree
        ([("x", True), ("y", True)], 0.5),  # one vote for x, one correction y
        ([("x", True), ("y", True), ("x", False)], 0.5),  # y leads, because of the vote against x
        ([("y", True), ("z", True), ("z", True)], 1 / 3),
    ],
)
def test_disagreement_is_the_fraction_of_votes_against_the_leading_answer(votes, expected):
    found = [Vote(*vote) for vote in votes]
    assert disagreement(found) == pytest.approx(expected)
    assert disagreement(found) == disagreement(list(reversed(found)))


def test_a_rejected_answer_without_a_correction_is_worth_most():
    bad = case(rejected=True, has_human_feedback=True, votes=(Vote("x", False),))
    assert reasons(bad) == ("a person gave a thumbs-down, and nobody corrected the answer",)
    assert value(bad) == pytest.approx(1 - (1 - PRIOR) * (1 - REJECTED_ANSWER))
    assert value(case(rejected=True, has_human_feedback=True, votes=(Vote("x", False), Vote("y", True)))) is None


WEAK = WeakSlices(
    [
        Slice("doors", 0.2, ("a fire door of 60 minutes in the east wing",)),
        Slice("walls", 0.9, ("a wall of brick, 200 mm thick",)),
        Slice("slabs", 0.95, ("a slab of concrete on the third floor",)),
    ]
)


def test_a_prompt_like_a_weak_slice_is_worth_more():
    like = case(prompt="a fire door of 90 minutes in the west wing", confidence=0.6)
    (first, second) = reasons(like, weak=WEAK)
    assert first.startswith("confidence") and second.startswith(
        "similar to the weak slice doors (20% correct), similarity 0."
    )
    assert value(case(confidence=0.6), weak=WEAK) < value(like, weak=WEAK) < 2 * value(case(confidence=0.6))
    assert value(case(prompt="a fire door of 90 minutes in the west wing"), weak=WEAK) > PRIOR
    assert value(case(prompt="a wall of brick, 100 mm thick"), weak=WEAK) is None  # that slice is not weak


def test_kind_or_domain_may_name_the_slice():
    assert value(case(domain="Doors"), weak=WEAK) == pytest.approx(PRIOR * 1.8)
    assert reasons(case(kind="doors"), weak=WEAK) == ("similar to the weak slice doors (20% correct), similarity 1.00",)


def test_without_a_difference_no_slice_is_weak():
    assert not WeakSlices([Slice("a", 0.5), Slice("b", 0.5)]) and not NONE


def test_an_example_that_can_never_train_is_not_reviewed():
    assert value(case(prompt="The golden question of all!", confidence=0.1)) is None
    assert value(case(prompt="x" * 9_000, confidence=0.1)) is None


def test_the_same_content_is_reviewed_once_and_equal_values_newest_first():
    day = {number: datetime(2026, 1, number, tzinfo=UTC) for number in (1, 5, 9)}
    twins = [case("a", created_at=day[1], confidence=0.2), case("b", created_at=day[9], 
             prompt="What of A and all the rest of it?",
             answer="a it is ", confidence=0.2), case("c", created_at=day[5], confidence=0.2)]  # fmt: skip
    for arrived in permutations(twins):
        assert [one.id for one in rank(arrived, POLICY, NONE, 0.85)] == ["b", "c"]


def test_if_review_is_required_everything_that_would_train_is_reviewed():
    assert reasons(case(would_train=True), REQUIRED) == ("trains only if a reviewer approves it",)
    assert value(case(), REQUIRED) is None


@pytest.mark.parametrize("review", ["approve", "edit"])
@pytest.mark.parametrize("policy", [POLICY, REQUIRED], ids=["optional", "required"])
def test_an_approved_or_edited_example_trains_whatever_its_reward(review, policy):
    assert accept(example(1, reward=-1.0, confidence=0.1, review=review), policy).accepted


def test_a_decision_outranks_the_other_rules():
    good, poor = example(1), example(2, reward=-1.0, confidence=0.1)
    assert accept(good, POLICY).accepted and not accept(good, REQUIRED).accepted
    assert accept(good, REQUIRED).reason == UNREVIEWED
    rejected = good.model_copy(update={"review": "reject", "corrected": True})
    assert accept(rejected, POLICY).reason == REJECTED == "rejected by a reviewer"
    assert is_undesirable(poor, POLICY) and not is_undesirable(poor, REQUIRED)
    assert not is_undesirable(poor.model_copy(update={"review": "reject"}), POLICY)
