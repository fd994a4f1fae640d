"""The retrain trigger: decide from the new examples and from failed runs whether to start a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_pipeline.settings import TriggerSettings
from finetune_pipeline.wording import counted


@dataclass(frozen=True)
class Attempt:
    """An ended run on the data since the watermark.

    Attributes:
        new_at_first_attempt: number of new examples when the first run on this data started. Runs after it are its
            retries until as many examples as the trigger needs have arrived in addition.
        ended: None if unknown.
    """

    new_at_first_attempt: int
    ended: datetime | None


@dataclass(frozen=True)
class Trigger:
    """The decision to start a run now or not, with the reason and the attempt."""

    fire: bool
    reason: str
    new_at_first_attempt: int = 0
    attempt: int = 0


def decide(
    new: int, attempts: Sequence[Attempt], settings: TriggerSettings, now: datetime, *, at_least: bool = False
) -> Trigger:
    """Decide whether to start a run.

    Args:
        new: new high-reward examples since the last judged dataset.
        attempts: ended runs since then, oldest first; none of them was judged, or the watermark would have moved.
        settings: the examples needed, the attempts on the same data, and the wait between them.
        now: the current time.
        at_least: there may be more new examples than were counted.
    """
    needed, numbers = settings.new_examples, describe(new, settings, at_least=at_least)
    if new < needed:
        return Trigger(False, numbers)
    if not attempts or new >= attempts[-1].new_at_first_attempt + needed:
        return Trigger(True, numbers, new_at_first_attempt=new, attempt=1)
    first = attempts[-1].new_at_first_attempt
    tried = sum(attempt.new_at_first_attempt == first for attempt in attempts)
    if tried >= settings.max_attempts:
        return Trigger(
            False,
            f"{numbers}; {counted(tried, 'run')} on them failed: look at the last one, fix the cause and launch "
            f"the job by hand; the sensor starts one by itself at {first + needed} new examples",
        )
    ended = attempts[-1].ended
    wait_until = ended + timedelta(minutes=settings.retry_after_minutes) if ended else now
    if now < wait_until:
        attempt = f"attempt {tried + 1} of {settings.max_attempts}"
        return Trigger(False, f"{numbers}; the last run failed, {attempt} starts at {wait_until:%H:%M}")
    return Trigger(True, numbers, new_at_first_attempt=first, attempt=tried + 1)


def describe(new: int, settings: TriggerSettings, *, at_least: bool = False) -> str:
    """Return the numbers as text: "37 new high-reward examples, 50 needed".

    Args:
        at_least: there may be more new examples than were counted.
    """
    more = "at least " if at_least else ""
    return f"{more}{counted(new, 'new high-reward example')}, {settings.new_examples:,} needed"
