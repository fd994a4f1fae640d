"""What every declared source gives: conversations and where in it they stand, and what of it could not be used."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_pipeline.records import Turn


class SourceError(RuntimeError):
    """A source is not there or cannot be read; the message says which, and what to do."""


@dataclass(frozen=True)
class Item:
    """A conversation: a prompt, and the answer that it should get.

    Attributes:
        provenance: where in its source it stands, so that a person finds it there: a note and heading, a file and
            line, a function, a row's key. What has the same provenance later is the newer state of the same thing.
        prompt, history: what is asked, and what was said before.
        answer: what is to be answered.
        reward: in -1 ... 1; None is the source's own from the YAML.
        model_output: what a model had answered where `answer` is a person's correction of it.
        created_at, user, domain, kind: as in `records.Interaction`.
        keyed: its provenance has a key that stays with it. Other records are recognized by their text.
    """

    provenance: str
    prompt: str
    answer: str
    history: tuple[Turn, ...] = ()
    reward: float | None = None
    model_output: str | None = None
    created_at: datetime | None = None
    user: str | None = None
    domain: str | None = None
    kind: str | None = None
    keyed: bool = False


@dataclass(frozen=True)
class Skipped:
    """Something in a source that cannot be used: where it stands, and why in words a person can act on.

    Attributes:
        unseen: it is a file or folder that could not be looked into, or not to its end, so nobody knows what is left of
            it: what it gave before (its own provenance, and those that go on from it with `/`, `:`, `#` or ` [`) is not
            taken back.
        later: it is there, but what can be made of it was not made this time, as a teacher's budget was spent: what it
            gave before is not taken back.
    """

    provenance: str
    reason: str
    unseen: bool = False
    later: bool = False


@dataclass(frozen=True)
class Cursor:
    """Everything up to here was given: a source that gives cursors goes on from the last one, and takes nothing back.

    It gives one at least every 100,000 items. What was given since the last one supersedes its earlier states, also
    where it had to be skipped.

    Attributes:
        value: JSON, in the source's own terms.
        anew: this reading does not go on from an earlier cursor though there was one, since that was of other settings.
            It is one of the whole source: what it does not give is retracted at its end, and its last cursor kept only
            then, so that one that was broken off begins again.
    """

    value: Any
    anew: bool = False


Reading = Iterator[Item | Skipped | Cursor]
"""One reading of a source. One without a cursor gives all that the source has at this moment, and what it no longer
gives is retracted, but for what lies beneath something `unseen`."""
