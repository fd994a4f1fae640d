from itertools import permutations

from finetune_pipeline.feedback.resolution import resolve
from finetune_pipeline.feedback.rewards import default_reward
from finetune_pipeline.records import text_hash
from finetune_pipeline_tests.conftest import feedback, interaction

ANSWER = interaction("a", output="old answer")


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


def test_a_thumbs_down_on_the_correction_itself_undoes_it():
    correction = feedback("1", "a", "correction", minutes=1, correction="new answer")
    rejected = feedback("2", "a", "thumbs_down", minutes=9, output_hash=text_hash("new answer"))
    example = example_of(correction, rejected)
    assert (example.corrected, example.confirmed, example.reward) == (False, False, -1.0)


def test_the_latest_correction_is_the_target():
    first = feedback("1", "a", "correction", minutes=1, correction="first")
    second = feedback("2", "a", "correction", minutes=2, correction="second")
    assert example_of(second, first).target == "second"


def test_a_thumb_on_an_output_that_was_never_logged_has_no_effect():
    assert example_of(feedback("1", "a", "thumbs_up", output_hash=text_hash("another answer"))) is None
