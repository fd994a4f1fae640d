"""Pairs of answers to one prompt of which people prefer one: by a correction, or by their ratings of both."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import sqlalchemy as sa

from finetune_pipeline.database import tables as t
from finetune_pipeline.records import PERSON_KINDS, Turn, conversation_text, same_answer

MIN_DIFFERENCE = 0.3
"""Difference of two rewards from which one answer counts as preferred."""

_READ = 5_000  # newest examples


@dataclass(frozen=True)
class RatedPair:
    """A prompt with the messages before it, the answer that people prefer, and the other one."""

    prompt: str
    better: str
    worse: str


def rated_pairs(connection: sa.Connection, loop: str, limit: int) -> list[RatedPair]:
    """Return the newest pairs of a loop, at most `limit`. Each interaction is in one pair."""
    return list(islice(_pairs(connection, loop), limit))


def _pairs(connection: sa.Connection, loop: str) -> Iterator[RatedPair]:
    e, i, f = t.examples.c, t.interactions.c, t.feedback.c
    by_person = sa.exists().where(f.loop == loop, f.interaction_id == e.interaction_id, f.kind.in_(PERSON_KINDS))
    query = (
        sa.select(i.prompt, i.history, i.output, e.target, e.reward, e.corrected)
        .join(t.interactions, i.id == e.interaction_id)
        .where(e.loop == loop, by_person)
        .order_by(e.ingest_offset.desc())
        .limit(_READ)
    )
    waiting: dict[str, list[tuple[str, float]]] = defaultdict(list)  # prompt -> answers that are in no pair, rewards
    for row in connection.execute(query):
        prompt = conversation_text(row.prompt, [Turn.model_validate(turn) for turn in row.history or ()])
        if row.corrected:
            if not same_answer(row.target, row.output):
                yield RatedPair(prompt, row.target, row.output)
            continue
        for position, (answer, reward) in enumerate(waiting[prompt]):
            if abs(reward - row.reward) >= MIN_DIFFERENCE and not same_answer(answer, row.output):
                better, worse = (answer, row.output) if reward > row.reward else (row.output, answer)
                del waiting[prompt][position]
                yield RatedPair(prompt, better, worse)
                break
        else:
            waiting[prompt].append((row.output, row.reward))
