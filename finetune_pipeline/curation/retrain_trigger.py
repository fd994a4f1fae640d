"""When a run starts by itself: a pure function of what is new and of the runs that already tried."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_pipeline.settings import TriggerSettings


@dataclass(frozen=True)
class Attempt:
    """A run that was started for the data since the watermark."""

    series: int
    """New examples when the first run of its series started; a series ends when as many again have arrived."""
    ended: datetime | None


@dataclass(frozen=True)
class Trigger:
    """Whether to start a run now, why, and as which try of which series."""

    fire: bool
    reason: str
    series: int = 0
    attempt: int = 0


def decide(new: int, attempts: Sequence[Attempt], settings: TriggerSettings, now: datetime) -> Trigger:
    """Decide on a run.

    Args:
        new: new high-reward examples since the last judged dataset.
        attempts: ended runs since then, oldest first; none of them was judged, or the watermark would have moved.
        settings: how many are needed, how many tries there are, and the wait between them.
        now: the present time.
    """
    needed, numbers = settings.new_examples, describe(new, settings)
    if new < needed:
        return Trigger(False, numbers)
    series = [item for item in attempts if item.series == attempts[-1].series] if attempts else []
    if not series or new >= series[-1].series + needed:
        return Trigger(True, numbers, series=new, attempt=1)
    rearmed_at = series[-1].series + needed
    if len(series) >= settings.max_attempts:
        return Trigger(
            False,
            f"{numbers}, but {len(series)} runs on them failed: look at the last one, fix the cause and launch the "
            f"job by hand; the sensor tries again by itself at {rearmed_at}",
        )
    ended = series[-1].ended
    wait_until = ended + timedelta(minutes=settings.retry_after_minutes) if ended else now
    if now < wait_until:
        attempt = f"attempt {len(series) + 1} of {settings.max_attempts}"
        return Trigger(False, f"{numbers}; the last run failed, {attempt} starts at {wait_until:%H:%M}")
    return Trigger(True, numbers, series=series[-1].series, attempt=len(series) + 1)


def describe(new: int, settings: TriggerSettings) -> str:
    """The numbers, as the sensor and the terminal say them: "37 of 50 new high-reward examples"."""
    return f"{new} of {settings.new_examples} new high-reward examples"
