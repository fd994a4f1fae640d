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
        series: new examples when the first run of its series started. Runs are of one series until as many examples as
            the trigger needs have arrived in addition.
        ended: None if unknown.
    """

    series: int
    ended: datetime | None


@dataclass(frozen=True)
class Trigger:
    """Whether to start a run now, why, and as which attempt of which series."""

    fire: bool
    reason: str
    series: int = 0
    attempt: int = 0


def decide(new: int, attempts: Sequence[Attempt], settings: TriggerSettings, now: datetime) -> Trigger:
    """Decide whether to start a run.

    Args:
        new: new high-reward examples since the last judged dataset.
        attempts: ended runs since then, oldest first; none of them was judged, or the watermark would have moved.
        settings: the examples needed, the attempts of a series, and the wait between them.
        now: the current time.
    """
    needed, numbers = settings.new_examples, describe(new, settings)
    if new < needed:
        return Trigger(False, numbers)
    series = [attempt for attempt in attempts if attempt.series == attempts[-1].series]
    if not series or new >= series[-1].series + needed:
        return Trigger(True, numbers, series=new, attempt=1)
    rearmed_at = series[-1].series + needed
    if len(series) >= settings.max_attempts:
        return Trigger(
            False,
            f"{numbers}; {counted(len(series), 'run')} on them failed: look at the last one, fix the cause and launch "
            f"the job by hand; the sensor starts one by itself at {rearmed_at} new examples",
        )
    ended = series[-1].ended
    wait_until = ended + timedelta(minutes=settings.retry_after_minutes) if ended else now
    if now < wait_until:
        attempt = f"attempt {len(series) + 1} of {settings.max_attempts}"
        return Trigger(False, f"{numbers}; the last run failed, {attempt} starts at {wait_until:%H:%M}")
    return Trigger(True, numbers, series=series[-1].series, attempt=len(series) + 1)


def describe(new: int, settings: TriggerSettings) -> str:
    """Return the numbers as text: "37 new high-reward examples, 50 needed"."""
    return f"{counted(new, 'new high-reward example')}, {settings.new_examples:,} needed"
