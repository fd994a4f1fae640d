"""When the retrain trigger starts a run, and what it says otherwise."""

from datetime import UTC, datetime, timedelta

import pytest

from finetune_pipeline.curation.retrain_trigger import Attempt, decide
from finetune_pipeline.settings import TriggerSettings

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
SETTINGS = TriggerSettings(new_examples=50, max_attempts=3, retry_after_minutes=5)
LONG_AGO = NOW - timedelta(hours=1)
JUST_NOW = NOW - timedelta(minutes=1)


def tried(*counts, ended=LONG_AGO):
    return [Attempt(number, ended) for number in counts]


@pytest.mark.parametrize(
    ("new", "attempts", "fires", "said"),
    [
        (0, [], False, "0 new high-reward examples, 50 needed"),
        (49, [], False, "49 new high-reward examples, 50 needed"),
        (50, [], True, "50 new high-reward examples, 50 needed"),
        (53, tried(50, ended=JUST_NOW), False, "attempt 2 of 3 starts at 12:04"),  # not at every tick
        (53, tried(50), True, "53 new high-reward examples, 50 needed"),  # again after the wait
        (53, tried(50, 50, 50), False, "3 runs on them failed"),  # gives up, and says so
        (99, tried(50, 50, 50), False, "starts one by itself at 100"),
        (
            100,
            tried(50, 50, 50),
            True,
            "100 new high-reward examples, 50 needed",
        ),  # another 50 start a first attempt again
        (
            120,
            tried(50, 50, 50, 100),
            True,
            "120 new high-reward examples, 50 needed",
        ),  # the data since then has its own attempts
        (149, tried(50, 50, 50, 100, 100, 100), False, "starts one by itself at 150"),
    ],
)
def test_when_a_run_starts(new, attempts, fires, said):
    trigger = decide(new, attempts, SETTINGS, NOW)
    assert trigger.fire == fires
    assert said in trigger.reason


def test_every_attempt_has_its_own_name():
    keys = set()
    attempts = []
    for new in (50, 51, 52, 110, 111, 160):
        trigger = decide(new, attempts, SETTINGS, NOW)
        if trigger.fire:
            keys.add((trigger.new_at_first_attempt, trigger.attempt))
            attempts = [*attempts, Attempt(trigger.new_at_first_attempt, LONG_AGO)]
    assert keys == {(50, 1), (50, 2), (50, 3), (110, 1), (110, 2), (160, 1)}
