"""The error budget: what it allows, what spends it, what renews it, and which benchmarks share it."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.tables import budget_tests, deployment_history
from finetune_pipeline.registry.error_budget import (
    BudgetChangedError,
    BudgetedBenchmark,
    BudgetTest,
    budget_test,
    spend_in,
)

NOW = datetime.now(UTC)
FIRST = BudgetedBenchmark("a" * 64, frozenset(f"q{number}" for number in range(10)))


def ask(
    db: Database, trial: str, benchmark: BudgetedBenchmark = FIRST, after_days: float = 0, loop: str = "aec"
) -> BudgetTest:
    now = datetime.now(UTC) + timedelta(days=after_days)
    return budget_test(db, loop, trial, benchmark, tests=3, confirm_days=7, now=now)


def spend(db: Database, test: BudgetTest, loop: str = "aec") -> None:
    with db.write() as connection:
        spend_in(connection, loop, test, f"report-{test.trial}")


def deploy(db: Database, action: str, days_ago: float, loop: str = "aec") -> None:
    row = {"loop": loop, "action": action, "actor": "loop", "reason": "gain", "created_at": NOW - timedelta(days_ago)}
    with db.write() as connection:
        connection.execute(sa.insert(deployment_history).values(row))


def spent(db: Database) -> int:
    with db.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(budget_tests)).scalar_one()


def test_a_budget_allows_so_many_tests_and_then_none(db: Database) -> None:
    for number in range(3):
        test = ask(db, f"trial {number}")
        assert (test.number, test.left, test.spent_already) == (number + 1, 2 - number, False)
        spend(db, test)
    refused = ask(db, "trial 3")
    assert (refused.number, refused.left) == (None, 0)
    spend(db, refused)  # spends nothing
    assert spent(db) == 3
    assert ask(db, "trial 3", loop="notes").number == 1  # another loop has its own


def test_asking_spends_nothing_and_the_same_trial_is_spent_once(db: Database) -> None:
    assert [ask(db, "trial").number for _ in range(3)] == [1, 1, 1]
    spend(db, ask(db, "trial"))
    for _ in range(3):  # evaluated again: the check, the promotion, a retried run
        again = ask(db, "trial")
        assert (again.number, again.left, again.spent_already) == (1, 2, True)
        spend(db, again)
    assert (spent(db), ask(db, "another").number) == (1, 2)


def test_a_trial_that_was_tested_stays_so_after_the_budget_is_spent(db: Database) -> None:
    for trial in ("a", "b", "c"):
        spend(db, ask(db, trial))
    assert (ask(db, "d").number, ask(db, "a").number) == (None, 1)


def test_two_comparisons_at_once_do_not_share_a_test(db: Database) -> None:
    one, other = ask(db, "one"), ask(db, "other")
    spend(db, one)
    with pytest.raises(BudgetChangedError, match="Materialize eval_report again"):
        spend(db, other)
    assert spent(db) == 1
    spend(db, ask(db, "other"))
    assert spent(db) == 2


def test_what_a_failed_transaction_spent_is_not_spent(db: Database) -> None:
    with pytest.raises(RuntimeError), db.write() as connection:
        spend_in(connection, "aec", ask(db, "trial"), "report")
        raise RuntimeError("the comparison could not be recorded")
    assert (spent(db), ask(db, "trial").number) == (0, 1)


@pytest.mark.parametrize(
    ("deployments", "renewed"),
    [
        ([("promote", 8)], True),
        ([("promote", 6)], False),  # not confirmed yet
        ([("promote", 9), ("rollback", 8)], False),
        ([("promote", 9), ("switch", 8)], False),
        ([("promote", 9), ("rollback", 1)], True),  # confirmed before
        ([("promote", 20), ("promote", 9), ("rollback", 8)], True),  # the first was confirmed
        ([("force", 9)], False),  # no comparison justified it
        ([("promote", 9), ("promote", 8)], True),  # replaced, and not rolled back
    ],
)
def test_a_confirmed_promotion_renews_the_budget(
    db: Database, deployments: list[tuple[str, float]], renewed: bool
) -> None:
    for trial in ("a", "b", "c"):
        spend(db, ask(db, trial))
    with db.write() as connection:  # tested before everything else
        connection.execute(sa.update(budget_tests).values(created_at=NOW - timedelta(days=30)))
    assert ask(db, "d").number is None
    for action, days_ago in deployments:
        deploy(db, action, days_ago)
    test = ask(db, "d")
    assert (test.number, test.left) == ((4, 2) if renewed else (None, 0))


def test_a_test_between_a_promotion_and_its_confirmation_belongs_to_the_old_budget(db: Database) -> None:
    deploy(db, "promote", 3)
    for trial in ("a", "b", "c"):
        spend(db, ask(db, trial))
    assert ask(db, "d").number is None
    assert (ask(db, "d", after_days=5).number, ask(db, "d", after_days=5).left) == (4, 2)


def benchmark(name: str, shared: int, new: int) -> BudgetedBenchmark:
    questions = [f"q{number}" for number in range(shared)] + [f"{name}{number}" for number in range(new)]
    return BudgetedBenchmark(name * 64, frozenset(questions))


@pytest.mark.parametrize(
    ("edited", "continued"),
    [
        (benchmark("b", shared=9, new=1), True),
        (benchmark("b", shared=6, new=4), True),
        (benchmark("b", shared=5, new=5), False),  # half of them is not more than half
        (benchmark("b", shared=3, new=0), True),  # a part of the old one
        (benchmark("b", shared=10, new=9), True),
        (benchmark("b", shared=10, new=10), False),
        (benchmark("b", shared=0, new=10), False),
    ],
)
def test_a_benchmark_with_mostly_old_questions_continues_the_budget(
    db: Database, edited: BudgetedBenchmark, continued: bool
) -> None:
    for trial in ("a", "b"):
        spend(db, ask(db, trial))
    test = ask(db, "c", edited)
    assert (test.number, test.left) == ((3, 0) if continued else (1, 2))


def test_editing_in_small_steps_does_not_renew_the_budget(db: Database) -> None:
    spend(db, ask(db, "a"))
    spend(db, ask(db, "b", benchmark("b", shared=6, new=4)))
    step = BudgetedBenchmark("c" * 64, frozenset(["q0", "q1", "b0", "b1", "b2", "b3", "c0", "c1", "c2"]))
    test = ask(db, "c", step)  # more than half of the second benchmark's, few of the first one's
    assert (test.budget, test.number) == (FIRST.sha256, 3)


def test_of_several_continued_budgets_the_emptiest_counts(db: Database) -> None:
    other = benchmark("z", shared=0, new=10)
    spend(db, ask(db, "a"))
    for trial in ("b", "c"):
        spend(db, ask(db, trial, other))
    both = BudgetedBenchmark("m" * 64, FIRST.questions | other.questions | {"m0"})
    assert ask(db, "d", both).budget == both.sha256  # shares less than half with each
    mixed = BudgetedBenchmark("n" * 64, frozenset(["q0", "q1", "q2", "z0", "z1"]))
    assert ask(db, "d", mixed).budget == FIRST.sha256
