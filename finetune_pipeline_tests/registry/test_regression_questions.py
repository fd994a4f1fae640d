"""Questions of the regression suite: recorded with the promotion, and asked while their example stands."""

import pytest
import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import regression_questions
from finetune_pipeline.feedback.erasure import erase_user
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.feedback.store import record, restore, retract
from finetune_pipeline.registry.champion import ChampionChangedError, promote
from finetune_pipeline.registry.regression_questions import (
    RegressionQuestion,
    other_corrections,
    questions_of_model,
    standing_questions,
)
from finetune_pipeline.settings import FeedbackSettings
from finetune_pipeline_tests.conftest import feedback, interaction, uid
from finetune_pipeline_tests.registry.conftest import MakeCandidate, compared

REWARD = reward_function(FeedbackSettings())


@pytest.fixture
def corrected(db: Database) -> list[RegressionQuestion]:
    """Store three interactions with a correction, and one with a thumbs-up; return the corrections."""
    events = [interaction(name, user=f"author of {name}") for name in "abcd"]
    events += [feedback(f"on {name}", name, "correction", correction=f"right {name}", user="eve") for name in "abc"]
    with db.write() as connection:
        record(connection, "notes", [*events, feedback("on d", "d", "thumbs_up")], REWARD)
    found = other_corrections(db, "notes")
    assert found.keys() == {str(uid(name)) for name in "abc"}
    return [
        RegressionQuestion(
            interaction_id=str(uid(name)),
            content_hash=found[str(uid(name))][1],
            prompt=f"prompt {name}",
            expected=f"right {name}",
        )
        for name in "abc"
    ]


def standing(db: Database) -> set[str]:
    return {one.expected.removeprefix("right ") for one in standing_questions(db, "notes")}


def stored(db: Database) -> int:
    with db.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(regression_questions)).scalar_one())


def test_they_are_recorded_in_the_transaction_of_the_promotion(
    db: Database, candidate: MakeCandidate, corrected: list[RegressionQuestion]
) -> None:
    one, late = candidate("one", loop="notes"), candidate("late", loop="notes")
    id, second = compared(db, one, "c1"), compared(db, late, "c2")
    model = promote(db, one, None, "loop", "gain 6%", id, fixed=corrected[:2])
    assert standing(db) == {"a", "b"} and other_corrections(db, "notes").keys() == {str(uid("c"))}
    assert standing_questions(db, "notes")[0] in corrected and questions_of_model(db, "notes", model.id) == 2
    promote(db, one, None, "loop", "gain 6%", id, fixed=corrected)  # a retried step completes them
    assert standing(db) == {"a", "b", "c"}
    with pytest.raises(ChampionChangedError):
        promote(db, late, None, "loop", "gain 6%", second, fixed=[corrected[0]])
    assert questions_of_model(db, "notes", model.id) == stored(db) == 3


def test_a_question_stands_as_long_as_its_example(
    db: Database, candidate: MakeCandidate, corrected: list[RegressionQuestion]
) -> None:
    one = candidate("one", loop="notes")
    promote(db, one, None, "loop", "gain 6%", compared(db, one, "c1"), fixed=corrected)
    with db.write() as connection:
        retract(connection, "notes", [str(uid("a"))])
        again = feedback("again", "b", "correction", 5, correction="better b", user="eve")
        record(connection, "notes", [again], REWARD)
    assert standing(db) == {"c"} and other_corrections(db, "notes").keys() == {str(uid("b"))}
    with db.write() as connection:
        restore(connection, "notes", {str(uid("a")): "where it was"}, REWARD)
    assert standing(db) == {"a", "c"}


def test_an_erased_persons_questions_are_deleted(
    db: Database, candidate: MakeCandidate, corrected: list[RegressionQuestion]
) -> None:
    one = candidate("one", loop="notes")
    promote(db, one, None, "loop", "gain 6%", compared(db, one, "c1"), fixed=corrected)
    with db.write() as connection:
        erase_user(connection, "notes", "author of a", REWARD)
    assert standing(db) == {"b", "c"} and stored(db) == 2
    with db.write() as connection:  # who wrote the corrections of others' answers
        erase_user(connection, "notes", "eve", REWARD)
    assert stored(db) == 0
