"""The state of a loop at a glance: what is stored, what waits, what the retraining trigger counts, what serves."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from finetune_pipeline.curation.retrain_trigger import describe
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.store import counters, unmatched_feedback
from finetune_pipeline.pipeline.pending import count_new
from finetune_pipeline.pipeline.review_queue import review_queue
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.comparisons import judged_watermark
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.sources.ingest_ledger import unread


@dataclass(frozen=True)
class LoopStatus:
    """The state of a loop.

    Attributes:
        flagged: answers that were flagged for review because of low confidence, reviewed ones included.
        unmatched: feedback whose interaction has not arrived.
        oldest_unmatched: when the oldest of them was given; None if there is none.
        missing_folders: declared log folders that do not exist.
        unread_files: event files that have not been ingested.
        trigger: how many new examples the retraining trigger counts, as a sentence.
        champion: name of the model version that serves; None for the base model.
    """

    interactions: int
    feedback: int
    flagged: int
    to_review: int
    unmatched: int
    oldest_unmatched: datetime | None
    missing_folders: tuple[Path, ...]
    unread_files: int
    trigger: str
    champion: str | None


def loop_status(loop: LoopSettings, database: Database) -> LoopStatus:
    """Return the state of a loop, read from the database and its log folders."""
    with database.read() as connection:
        counts = counters(connection, loop.name)
        oldest = unmatched_feedback(connection, loop.name, 1) if counts.get("unmatched") else []
        unread_files = len(unread(connection, loop.name, loop.log_folders))
    serving = champion(database, loop.name)
    return LoopStatus(
        interactions=counts.get("interactions", 0),
        feedback=counts.get("feedback", 0),
        flagged=counts.get("flagged", 0),
        to_review=len(review_queue(loop, database)),
        unmatched=counts.get("unmatched", 0),
        oldest_unmatched=oldest[0].created_at if oldest else None,
        # The last folder is the drop folder, which ingestion creates.
        missing_folders=tuple(folder for folder in loop.log_folders[:-1] if not folder.is_dir()),
        unread_files=unread_files,
        trigger=describe(count_new(loop, database, judged_watermark(database, loop.name)), loop.trigger),
        champion=serving.name if serving else None,
    )
