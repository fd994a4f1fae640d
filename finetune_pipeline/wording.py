"""Wording of numbers in messages to people."""


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 event", "2,000 events"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
