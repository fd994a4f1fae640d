"""Looks at the sealed benchmark: recorded with the promotion, and counted from."""

import pytest
import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import sealed_looks
from finetune_pipeline.registry.champion import ChampionChangedError, champion, promote, rollback
from finetune_pipeline.registry.sealed_looks import SealedScores, list_looks, promotions_since_look
from finetune_pipeline_tests.registry.conftest import MakeCandidate, compared, promote_over

SCORES = SealedScores(
    sealed_sha256="s", benchmark_sha256="b", settings_sha256="m",
    sealed_scores={"s1": (1, 1, None), "s2": (0, 1, "a page")}, open_scores={"q1": (1, 1, None)},
)  # fmt: skip


def test_a_look_is_recorded_in_the_transaction_of_the_promotion(db: Database, candidate: MakeCandidate) -> None:
    one, late = candidate("one"), candidate("late")
    id, second = compared(db, one, "c1"), compared(db, late, "c2")
    with db.write() as connection:  # what the promotion would write is there already, so its transaction fails
        row = {**SCORES.model_dump(), "loop": "aec", "model_id": "m", "created_at": sa.func.now()}
        connection.execute(sealed_looks.insert().values(row | {"deployment_id": 1}))
    with pytest.raises(sa.exc.IntegrityError):
        promote(db, one, None, "loop", "gain 6%", id, sealed=SCORES)
    assert champion(db, "aec") is None
    with db.write() as connection:
        connection.execute(sealed_looks.delete())
    model = promote(db, one, None, "loop", "gain 6%", id, sealed=SCORES)
    [look] = list_looks(db, "aec")
    assert look.model_id == model.id and look.sealed_scores == SCORES.sealed_scores
    promote(db, one, None, "loop", "gain 6%", id, sealed=SCORES)  # a retried step
    with pytest.raises(ChampionChangedError):
        promote(db, late, None, "loop", "gain 6%", second, sealed=SCORES)
    assert list_looks(db, "aec") == [look] and list_looks(db, "other") == []


def test_promotions_are_counted_since_the_last_look(db: Database, candidate: MakeCandidate) -> None:
    promote_over(db, candidate("before"))
    assert promotions_since_look(db, "aec") is None
    now = champion(db, "aec")
    one = candidate("one")
    promote(db, one, now.id if now else None, "loop", "gain 6%", compared(db, one, "c1"), sealed=SCORES)
    assert promotions_since_look(db, "aec") == 0
    promote_over(db, candidate("two"))
    rollback(db, "aec", "ann", "worse")
    assert promotions_since_look(db, "aec") == 1
    promote_over(db, candidate("three"))
    assert promotions_since_look(db, "aec") == 2 and promotions_since_look(db, "other") is None
