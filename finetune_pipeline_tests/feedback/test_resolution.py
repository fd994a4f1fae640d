from itertools import pairwise, permutations, product

import pytest

from finetune_pipeline.feedback.resolution import answers_meant, resolve
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.records import text_hash
from finetune_pipeline_tests.conftest import feedback, interaction

ANSWER = interaction("a", output="old answer")
NEW = text_hash("new answer")


def example_of(*given):
    return resolve(ANSWER, list(given), 1, default_reward)


def test_without_feedback_nothing_is_assumed():
    assert example_of() is None


def test_a_person_outranks_a_validator_and_later_outranks_earlier():
    up = feedback("1", "a", "thumbs_up", minutes=1)
    down = feedback("2", "a", "thumbs_down", minutes=2)
    failure = feedback("3", "a", "validation_failure", minutes=3, score=10)
    assert example_of(up, failure).reward == 1.0
    assert example_of(up, down, failure).reward == -1.0
    assert example_of(failure).reward < -0.3


# Each feedback: user, kind and its value, minute. Then the reward of the example; None: there is no example.
CASES = {
    "the last rating of a user": ([("u", 5, 1), ("u", 1, 2)], -1.0),
    "the majority": ([("u", "up", 1), ("v", "up", 2), ("w", "down", 9)], 1.0),
    "the majority after one changed sides": ([("u", "up", 1), ("v", "up", 2), ("w", "down", 2), ("v", 2, 5)], -0.95),
    "the mean reward of its side": ([("u", 5, 1), ("v", 4, 2), ("w", 1, 9)], 0.8),
    "a tie": ([("u", "up", 1), ("v", "down", 9)], None),
    "a tie of four": ([("u", "up", 1), ("v", "down", 9), ("w", 5, 1), ("x", 1, 1)], None),
    "a user against oneself at the same time": ([("u", "up", 1), ("u", "down", 1)], None),
    "that user and another": ([("u", "up", 1), ("u", "down", 1), ("v", "down", 1)], -1.0),
    "an earlier rating of that user": ([("u", "up", 0), ("u", "up", 1), ("u", "down", 1)], None),
    "two ratings at the same time": ([("u", 5, 1), ("u", 4, 1)], 0.8),
    "a neutral rating": ([("u", 3, 1)], 0.0),
    "neutral ratings are on no side": ([("u", 3, 1), ("v", 3, 1), ("w", "down", 0)], -1.0),
    "without users, the last": ([(None, "up", 1), (None, "down", 2)], -1.0),
    "without users, at the same time": ([(None, "up", 1), (None, "down", 1)], None),
    "without a user and with one": ([(None, "up", 1), ("u", "down", 1)], None),
    "validators: the last": ([(None, 90.0, 1), (None, 10.0, 2)], -1.0 + 0.7 / 6),
    "validators at the same time": ([(None, 90.0, 1), (None, 10.0, 1)], None),
    "a tie of people, whatever a validator says": ([("u", "up", 1), ("v", "down", 1), (None, 90.0, 9)], None),
}  # fmt: skip


def events(given, names):
    for (user, value, minute), name in zip(given, names, strict=True):
        if isinstance(value, str):
            yield feedback(name, "a", f"thumbs_{value}", minute, user=user)
        elif isinstance(value, int):
            yield feedback(name, "a", "rating", minute, user=user, rating=value)
        else:
            yield feedback(name, "a", "success" if value > 60 else "validation_failure", minute, user=user, score=value)


@pytest.mark.parametrize(("given", "expected"), CASES.values(), ids=CASES)
def test_users_are_counted_whatever_the_ids_and_the_order_of_arrival(given, expected):
    names = [str(number) for number in range(len(given))]
    found = [
        example_of(*order) for given_names in permutations(names) for order in permutations(events(given, given_names))
    ]
    assert all(one == other for one, other in pairwise(found))
    assert found[0] is None if expected is None else found[0].reward == pytest.approx(expected)


# Feedback at the same minute, on the old answer and on its correction.
TOGETHER = [
    ("correction", {"correction": "new answer", "user": "u"}),
    ("correction", {"correction": "another answer", "user": "v"}),
    ("thumbs_up", {"user": "w"}),
    ("thumbs_down", {"output_hash": NEW}),
    ("rating", {"rating": "5", "output_hash": NEW, "user": "x"}),
]


@pytest.mark.parametrize("count", range(1, len(TOGETHER) + 1))
def test_ids_and_arrival_decide_nothing_about_corrections(count):
    found = {
        example_of(*(feedback(name, "a", kind, **more) for name, (kind, more) in zip(names, order, strict=True)))
        for names, order in product(permutations("12345"[:count]), permutations(TOGETHER[:count]))
    }
    assert len(found) == 1


def test_the_order_of_arrival_does_not_matter():
    given = [
        feedback("1", "a", "thumbs_up", minutes=1),
        feedback("2", "a", "correction", minutes=5, correction="new answer"),
        feedback("3", "a", "thumbs_down", minutes=7),
        feedback("4", "a", "success", minutes=9, score=90),
    ]
    assert len({example_of(*order) for order in permutations(given)}) == 1


def test_a_thumbs_down_on_the_old_answer_does_not_undo_a_correction():
    correction = feedback("1", "a", "correction", minutes=1, correction="new answer")
    example = example_of(correction, feedback("2", "a", "thumbs_down", minutes=9))
    assert (example.target, example.corrected) == ("new answer", True)


# Users who give thumbs on the correction, and whether it stays.
@pytest.mark.parametrize(
    ("thumbs", "stays"),
    [([("u", "down")], False), ([("u", "up"), ("u", "down")], False), ([("u", "down"), ("u", "up")], True),
     ([("u", "down"), ("v", "up")], True), ([("u", "down"), ("v", "up"), ("w", "down")], False)],
)  # fmt: skip
def test_most_users_have_to_be_against_a_correction_to_undo_it(thumbs, stays):
    correction = feedback("c", "a", "correction", minutes=1, correction="new answer")
    given = [
        feedback(f"{number}", "a", f"thumbs_{thumb}", minutes=2 + number, user=user, output_hash=NEW)
        for number, (user, thumb) in enumerate(thumbs)
    ]
    example = example_of(correction, *given)
    assert (example.target, example.corrected, example.confirmed) == ("new answer", stays, stays)
    assert (example.reward == -1.0) is not stays


def test_the_latest_correction_is_the_target():
    first = feedback("1", "a", "correction", minutes=1, correction="first")
    second = feedback("2", "a", "correction", minutes=2, correction="second")
    assert example_of(second, first).target == "second"


def test_a_thumb_on_an_output_that_was_never_logged_has_no_effect():
    assert example_of(feedback("1", "a", "thumbs_up", output_hash=text_hash("another answer"))) is None


JSON_ANSWER = interaction("a", output='{"wall": {"mm": 150}, "name": "\u00e9"}')


LATER = {
    "alone": [],
    "then disliked": [feedback("3", "a", "thumbs_down", minutes=9)],
    "then corrected": [feedback("4", "a", "correction", minutes=9, correction="another answer")],
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize(
    ("logged", "same"),
    [
        (ANSWER, "old answer"),
        (ANSWER, " old answer\n"),
        (JSON_ANSWER, JSON_ANSWER.output),
        (JSON_ANSWER, '{"wall":{"mm":150},"name":"\u00e9"}'),  # other white space
        (JSON_ANSWER, '{\n  "name": "\\u00e9",\n  "wall": {"mm": 150}\n}'),  # other order and escapes
    ],
)
def test_a_correction_that_changes_nothing_is_a_thumbs_up(logged, same, later):
    confirming = feedback("2", "a", "correction", minutes=5, correction=same)
    up = feedback("2", "a", "thumbs_up", minutes=5)
    found = resolve(logged, [confirming, *LATER[later]], 1, default_reward)
    assert found == resolve(logged, [up, *LATER[later]], 1, default_reward)


def test_a_correction_back_to_the_output_replaces_an_earlier_correction():
    earlier = feedback("1", "a", "correction", minutes=1, correction="another answer")
    example = example_of(earlier, feedback("2", "a", "correction", minutes=5, correction="old answer"))
    assert (example.target, example.corrected, example.confirmed) == ("old answer", False, True)


@pytest.mark.parametrize("earlier", ["another answer", "Old answer", "old answer, nearly"])
@pytest.mark.parametrize("later", [("thumbs_up", {}), ("thumbs_down", {}), ("rating", {"rating": "4"})], ids=str)
def test_an_earlier_correction_is_no_vote_for_the_output_that_a_later_one_confirmed(earlier, later):
    """It is about its own text, whoever gave it, so only what was said about the output decides."""
    replaced = feedback("1", "a", "correction", minutes=1, correction=earlier, user="ann")
    confirming = feedback("2", "a", "correction", minutes=5, correction="old answer", user="bob")
    kind, fields = later
    own = [confirming, feedback("3", "a", kind, minutes=6, user="cid", **fields)]
    with_replaced, without = resolve(ANSWER, [replaced, *own], 1, default_reward), example_of(*own)
    assert with_replaced == without


@pytest.mark.parametrize("user", [None, "ann"])
def test_a_hash_that_two_answers_share_is_about_both(user):
    """Hashes ignore case; without one, a thumb is about the output alone."""
    other = feedback("1", "a", "correction", minutes=1, correction="Old answer", user="bob")
    down = feedback("2", "a", "thumbs_down", minutes=2, output_hash=text_hash("old answer"), user=user)
    assert example_of(other, down).reward < 0 < example_of(other, feedback("2", "a", "thumbs_down", minutes=2)).reward
    assert answers_meant(ANSWER, [other, down]) == [{"Old answer"}, {"old answer", "Old answer"}]


def test_a_correction_of_the_value_or_the_case_is_a_correction():
    assert example_of(feedback("1", "a", "correction", correction="Old answer")).corrected
    other = feedback("1", "a", "correction", correction='{"wall": {"mm": 151}, "name": "\u00e9"}')
    assert resolve(JSON_ANSWER, [other], 1, default_reward).corrected


def test_a_thumb_on_the_same_json_in_another_notation_counts_for_it():
    correction = feedback("1", "a", "correction", minutes=1, correction='{"mm": 151}')
    same = feedback("2", "a", "correction", minutes=2, correction='{"mm":151}')
    down = feedback("3", "a", "thumbs_down", minutes=9, output_hash=text_hash('{"mm": 151}'))
    assert resolve(JSON_ANSWER, [correction, same, down], 1, default_reward).reward == -1.0
