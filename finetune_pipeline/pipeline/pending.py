"""Count the new examples, for the sensor, the schedule and `finetune status`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from finetune_pipeline.curation.acceptance import accept, quick_filters
from finetune_pipeline.curation.redaction import redact_example
from finetune_pipeline.curation.retrain_trigger import Attempt
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.store import judged_among, new_examples
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.implicit_acceptance import is_in_effect, unaccepted
from finetune_pipeline.records import Example, conversation_text, text_hash
from finetune_pipeline.settings import LoopSettings

COUNT_LIMIT = 1_000
DUPLICATE = "same prompt as another new example"


@dataclass(frozen=True)
class NewExamples:
    """The new examples of a loop.

    Attributes:
        count: those that curation would accept, without exact duplicates.
        at_least: counting ended at its limit, so there may be more.
        left_out: reason -> number of others that were looked at. Their reward, correction or approval qualifies them.
    """

    count: int
    at_least: bool
    left_out: Mapping[str, int]


def count_new(loop: LoopSettings, database: Database, watermark: int, attempts: Sequence[Attempt] = ()) -> int:
    """Return the number of new examples; see `find_new`."""
    return find_new(loop, database, watermark, attempts).count


def find_new(loop: LoopSettings, database: Database, watermark: int, attempts: Sequence[Attempt] = ()) -> NewExamples:
    """Count the new examples that curation would accept, and the others by reason.

    Nothing is written: answers that nobody objected to count as if they had been accepted now, if the loop's settings
    say so. Counting ends where more examples would change no decision, so it stays fast after a long pause.

    Args:
        watermark: count examples since this ingest offset.
        attempts: ended runs since the watermark.
    """
    next_trigger_at = attempts[-1].new_at_first_attempt + loop.trigger.new_examples if attempts else 0
    limit = max(COUNT_LIMIT, 2 * loop.trigger.new_examples, next_trigger_at)
    policy = loop_files.policy(loop)
    seen: set[str] = set()
    left_out: Counter[str] = Counter()
    with database.read() as connection:
        for original in _new_examples(loop, connection, watermark):
            decision = quick_filters(original, policy)
            if decision.accepted:
                example = redact_example(original, policy.settings.redaction)[0]
                decision = accept(example, policy)
                if decision.accepted:
                    # a dataset has one example of a prompt
                    prompt = text_hash(conversation_text(example.prompt, example.history))
                    if prompt in seen:
                        left_out[DUPLICATE] += 1
                    seen.add(prompt)
                    if len(seen) >= limit:
                        break
            if not decision.accepted:
                left_out[decision.reason] += 1
    return NewExamples(len(seen), len(seen) >= limit, left_out)


def _new_examples(loop: LoopSettings, connection: sa.Connection, watermark: int) -> Iterator[Example]:
    """Yield the new examples that may train by their reward or review, also those that would be accepted now."""
    minimum = loop.curation.min_reward
    stored_rule_holds = is_in_effect(loop, connection)
    yield from new_examples(connection, loop.name, watermark, minimum, implicit=stored_rule_holds)
    for page in unaccepted(loop, connection, datetime.now(UTC)):
        judged = judged_among(connection, loop.name, (one.content_hash for one in page))
        for one in page:
            if one.example.qualifies(minimum) and one.content_hash not in judged:
                yield one.example
