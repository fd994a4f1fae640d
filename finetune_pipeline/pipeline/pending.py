"""How much is new: the number behind the sensor, the schedule and `finetune status`. No Dagster here."""

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
    """New examples that curation would accept, distinct after exact deduplication.

    Counting ends where more would change nothing, so that a long silence does not make the question slow.
    """
    rearmed_at = attempts[-1].series + loop.trigger.new_examples if attempts else 0
    limit = max(COUNT_LIMIT, 2 * loop.trigger.new_examples, rearmed_at)
    policy = loop_files.policy(loop)
    seen: set[str] = set()
    with database.read() as connection:
        for original in new_examples(connection, loop.name, watermark, loop.curation.min_reward):
            if not quick_filters(original, policy).accepted:
                continue
            example = redact_example(original).example
            question = text_hash(
                conversation_text(example.prompt, example.history)
            )  # the dataset keeps one example of it
            if question not in seen and accept(example, policy).accepted:
                seen.add(question)
                if len(seen) >= limit:
                    break
    return len(seen)
