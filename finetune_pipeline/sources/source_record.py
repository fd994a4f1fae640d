"""What a source yields when it is read: records, skipped records and cursors."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_pipeline.records import Turn


class SourceError(RuntimeError):
    """A source is missing or cannot be read. The message names it and says what to do."""


@dataclass(frozen=True)
class SourceRecord:
    """A conversation with the answer that the model should give."""

    # Where the record is in its source: a note and heading, a file and line, a function, a row's key. A later record
    # with the same provenance is a newer state of the same thing.
    provenance: str
    prompt: str  # the last message of the user
    answer: str  # the target
    history: tuple[Turn, ...] = ()  # the messages before the prompt
    reward: float | None = None  # -1 to 1; None means the source's `reward` in the YAML
    model_output: str | None = None  # the model's answer, if `answer` is a person's correction of it
    created_at: datetime | None = None  # this and the next three: as in `records.Interaction`
    user: str | None = None
    domain: str | None = None
    kind: str | None = None
    file: str = field(default="", compare=False)  # the file in the source's folder, for the report; empty without one
    keyed: bool = False  # the provenance contains a stable key; other records are recognized by their text


@dataclass(frozen=True)
class SkippedRecord:
    """Something in a source that cannot be used, and why."""

    provenance: str
    reason: str
    # A file or folder could not be opened or read to its end. Earlier records at or below this provenance (followed by
    # `/`, `:`, `#` or ` [`) are not retracted.
    unreadable: bool = False
    # It was not processed this time, for example because a teacher's budget was spent. Its earlier record is not
    # retracted.
    deferred: bool = False


@dataclass(frozen=True)
class Cursor:
    """A position up to which everything was yielded. The next sync resumes from the last cursor.

    A source with cursors yields one at least every 100,000 records, and retracts nothing at its end. What it yielded
    since the last cursor supersedes earlier records with the same provenance, even if it had to be skipped.

    Attributes:
        value: JSON that only the source interprets.
        restarted: the sync started from the beginning because the previous cursor belongs to other settings. At its
            end, what it did not yield is retracted and the last cursor is stored. An interrupted sync starts again.
    """

    value: Any
    restarted: bool = False


SourceOutput = SourceRecord | SkippedRecord | Cursor
"""What `read` of a source yields. Without cursors, a sync yields all that the source has now."""
