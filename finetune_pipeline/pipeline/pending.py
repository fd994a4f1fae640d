"""Count the new examples, for the sensor, the schedule and `finetune status`."""

from collections.abc import Sequence

from finetune_pipeline.curation.acceptance import accept, quick_filters
from finetune_pipeline.curation.redaction import redact_example
from finetune_pipeline.curation.retrain_trigger import Attempt
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.store import new_examples
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.records import conversation_text, text_hash
from finetune_pipeline.settings import LoopSettings

COUNT_LIMIT = 1_000


def count_new(loop: LoopSettings, database: Database, watermark: int, attempts: Sequence[Attempt] = ()) -> int:
    """Return the number of new examples that curation would accept, without exact duplicates.

    Counting ends where more examples would change no decision, so it stays fast after a long pause.

    Args:
        watermark: count examples since this ingest offset.
        attempts: ended runs since the watermark.
    """
    next_trigger_at = attempts[-1].new_at_first_attempt + loop.trigger.new_examples if attempts else 0
    limit = max(COUNT_LIMIT, 2 * loop.trigger.new_examples, next_trigger_at)
    policy = loop_files.policy(loop)
    seen: set[str] = set()
    with database.read() as connection:
        for original in new_examples(connection, loop.name, watermark, loop.curation.min_reward):
            if not quick_filters(original, policy).accepted:
                continue
            example = redact_example(original)[0]
            prompt = text_hash(conversation_text(example.prompt, example.history))  # a dataset has one example of it
            if prompt not in seen and accept(example, policy).accepted:
                seen.add(prompt)
                if len(seen) >= limit:
                    break
    return len(seen)
