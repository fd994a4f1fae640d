"""The error budget of `gate.significance: required`: how many comparisons may still be tested on a benchmark.

Every test on one benchmark may promote by chance, so a loop and benchmark have a fixed number of tests, each at an
equal part of the significance level. A confirmed promotion renews the budget: one that nobody rolled back or switched
away from for some days. A benchmark that shares more than half of its questions with an earlier one continues the
budget of that one, so that editing a few questions does not renew it.

A test is spent in the transaction that records its comparison. The same trial (models, benchmark and settings, by hash)
is one test, however often it is evaluated.
"""

from collections.abc import Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from finetune_pipeline.database import Database
from finetune_pipeline.database.statements import insert_if_absent
from finetune_pipeline.database.tables import budget_benchmarks, budget_tests
from finetune_pipeline.registry.deployment_history import Deployment, deployments_in
from finetune_pipeline.registry.model_versions import RegistryError


class BudgetChangedError(RegistryError):
    """Another comparison spent from the budget at the same time; nothing was recorded."""


@dataclass(frozen=True)
class BudgetedBenchmark:
    """A benchmark as the budget knows it: its hash, and the hashes of its questions."""

    sha256: str
    questions: Set[str]


@dataclass(frozen=True)
class BudgetTest:
    """What the budget allows one trial.

    Attributes:
        trial: hash of the models, benchmark and settings.
        benchmark: the benchmark that both models answered.
        budget: the budget, named by the hash of the first benchmark that spent from it.
        number: running number of the test in the budget; None if the budget is spent.
        left: further tests until the budget is renewed.
        spent_already: the same trial was tested before.
    """

    trial: str
    benchmark: BudgetedBenchmark
    budget: str
    number: int | None
    left: int
    spent_already: bool


def budget_test(
    db: Database,
    loop: str,
    trial: str,
    benchmark: BudgetedBenchmark,
    *,
    tests: int,
    confirm_days: float,
    now: datetime | None = None,
) -> BudgetTest:
    """Return what the budget allows a trial; `spend_in` spends it.

    Args:
        trial: hash of the models, benchmark and settings.
        tests: tests of a full budget.
        confirm_days: days without a rollback after which a promotion is confirmed.
        now: default: the current time.
    """
    with db.read() as connection:
        return _budget_test_in(connection, loop, trial, benchmark, tests, confirm_days, now or datetime.now(UTC))


def spend_in(connection: sa.Connection, loop: str, test: BudgetTest, comparison_id: str) -> None:
    """Spend a test in the transaction that records its comparison; nothing if it was spent before, or none is left.

    Raises:
        BudgetChangedError: another comparison took this test meanwhile.
    """
    if test.number is None or test.spent_already:
        return
    t, now = budget_tests.c, datetime.now(UTC)
    here = (t.loop == loop, t.budget == test.budget, t.number >= test.number)
    if connection.execute(sa.select(t.trial).where(*here)).first():
        raise BudgetChangedError(
            f"another comparison of loop {loop} was recorded while this one was made, and spent the same part of the "
            "error budget; nothing was recorded. Materialize eval_report again"
        )
    row: dict[str, Any] = {"loop": loop, "trial": test.trial, "budget": test.budget, "number": test.number}
    row |= {"comparison_id": comparison_id, "created_at": now}
    connection.execute(sa.insert(budget_tests).values(row))
    known: dict[str, Any] = {"loop": loop, "benchmark_sha256": test.benchmark.sha256, "budget": test.budget}
    known |= {"questions": sorted(test.benchmark.questions), "created_at": now}
    insert_if_absent(connection, budget_benchmarks, known)


def _budget_test_in(
    connection: sa.Connection,
    loop: str,
    trial: str,
    benchmark: BudgetedBenchmark,
    tests: int,
    confirm_days: float,
    now: datetime,
) -> BudgetTest:
    t = budget_tests.c
    renewed = _renewed_at(deployments_in(connection, loop), timedelta(days=confirm_days), now)

    def used(budget: str) -> int:
        since = (t.created_at > renewed,) if renewed else ()
        query = sa.select(sa.func.count()).where(t.loop == loop, t.budget == budget, *since)
        return int(connection.execute(query).scalar_one())

    query = sa.select(t.budget, t.number).where(t.loop == loop, t.trial == trial)
    if same := connection.execute(query).first():
        left = max(tests - used(same.budget), 0)
        return BudgetTest(trial, benchmark, same.budget, same.number, left, spent_already=True)
    # Of several budgets that it continues, the one with the fewest tests left.
    budget = max(_continued(connection, loop, benchmark), key=used, default=benchmark.sha256)
    left = tests - used(budget)
    if left <= 0:
        return BudgetTest(trial, benchmark, budget, None, 0, spent_already=False)
    newest = sa.select(sa.func.max(t.number)).where(t.loop == loop, t.budget == budget)
    number = (connection.execute(newest).scalar() or 0) + 1
    return BudgetTest(trial, benchmark, budget, number, left - 1, spent_already=False)


def _continued(connection: sa.Connection, loop: str, benchmark: BudgetedBenchmark) -> list[str]:
    """Return the budgets of this benchmark and of those with which it shares more than half of its questions."""
    rows = connection.execute(sa.select(budget_benchmarks).where(budget_benchmarks.c.loop == loop))
    return sorted(
        {
            row.budget
            for row in rows
            if row.benchmark_sha256 == benchmark.sha256
            or 2 * len(benchmark.questions & set(row.questions)) > len(benchmark.questions)
        }
    )


def _renewed_at(deployments: list[Deployment], confirm: timedelta, now: datetime) -> datetime | None:
    """Return when the newest promotion was confirmed; None if none was."""
    undone = [one.created_at for one in deployments if one.action in {"rollback", "switch"}]
    confirmed = [
        one.created_at + confirm
        for one in deployments
        if one.action in {"promote", "approve"}
        and one.created_at + confirm <= now
        and not any(one.created_at <= at <= one.created_at + confirm for at in undone)
    ]
    return max(confirmed, default=None)
