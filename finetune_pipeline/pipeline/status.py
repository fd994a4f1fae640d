"""The state of a loop at a glance: what is stored, what waits, which new examples do not count, what serves."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from finetune_pipeline.database import Database
from finetune_pipeline.deployment.target_state import TargetState
from finetune_pipeline.feedback.store import count_low_reward, counters, unmatched_feedback
from finetune_pipeline.pipeline.approval import PendingApproval, pending_approval
from finetune_pipeline.pipeline.deploy import deployment_states
from finetune_pipeline.pipeline.implicit_acceptance import is_in_effect, unaccepted
from finetune_pipeline.pipeline.pending import find_new
from finetune_pipeline.pipeline.review_queue import review_queue
from finetune_pipeline.pipeline.source_sync import unread_rows
from finetune_pipeline.registry.champion import champion
from finetune_pipeline.registry.comparisons import judged_watermark
from finetune_pipeline.settings import FilesSource, LoopSettings, project_path
from finetune_pipeline.sources.ingest_ledger import unread


@dataclass(frozen=True)
class LoopStatus:
    """The state of a loop.

    Attributes:
        implicit: answers that nobody objected to and that count as accepted by `feedback.implicit_acceptance`, also
            those that the next ingestion will accept.
        flagged: answers that were flagged for review because of low confidence, reviewed ones included.
        unmatched: feedback whose interaction has not arrived.
        oldest_unmatched: when the oldest of them was given; None if there is none.
        missing_folders: declared log folders that do not exist.
        unread_files: event files that have not been ingested.
        unread_rows: path of each declared file source -> rows of it that the store does not have; 10,000 are looked at.
        new_examples: new examples that count towards the next run.
        new_at_least: there may be more of them than were counted.
        not_counted: reason -> number of new examples that do not count towards the next run.
        champion: name of the model version that serves; None for the base model.
        approval: the challenger that waits for a person; None if none does.
        targets: where the deployment targets stand.
    """

    interactions: int
    feedback: int
    implicit: int
    flagged: int
    to_review: int
    unmatched: int
    oldest_unmatched: datetime | None
    missing_folders: tuple[Path, ...]
    unread_files: int
    unread_rows: Mapping[str, int]
    new_examples: int
    new_at_least: bool
    not_counted: Mapping[str, int]
    champion: str | None
    approval: PendingApproval | None
    targets: tuple[TargetState, ...] = ()


def loop_status(loop: LoopSettings, database: Database) -> LoopStatus:
    """Return the state of a loop, read from the database and its log folders; nothing is written."""
    watermark = judged_watermark(database, loop.name)
    new = find_new(loop, database, watermark)
    with database.read() as connection:
        counts = counters(connection, loop.name)
        oldest = unmatched_feedback(connection, loop.name, 1) if counts.get("unmatched") else []
        minimum, current = loop.curation.min_reward, is_in_effect(loop, connection)
        low = count_low_reward(connection, loop.name, watermark, minimum, implicit=current)
        implicit = counts.get("implicit", 0) if current else 0
        for page in unaccepted(loop, connection, datetime.now(UTC)):
            implicit += sum(one.counts_as_implicit for one in page)
            low += sum(one.example.review is None and not one.example.qualifies(minimum) for one in page)
        unread_files = len(unread(connection, loop.name, loop.log_folders))
    not_counted = dict(new.left_out)
    if low:
        not_counted[f"reward below {loop.curation.min_reward:g}"] = low
    files = (source for source in loop.sources if isinstance(source, FilesSource))
    rows = [(str(project_path(source.path)), unread_rows(loop, source, database)) for source in files]
    serving = champion(database, loop.name)
    return LoopStatus(
        interactions=counts.get("interactions", 0),
        feedback=counts.get("feedback", 0),
        implicit=implicit,
        flagged=counts.get("flagged", 0),
        to_review=len(review_queue(loop, database)),
        unmatched=counts.get("unmatched", 0),
        oldest_unmatched=oldest[0].created_at if oldest else None,
        # The last folder is the drop folder, which ingestion creates.
        missing_folders=tuple(folder for folder in loop.log_folders[:-1] if not folder.is_dir()),
        unread_files=unread_files,
        unread_rows={path: count for path, count in rows if count},
        new_examples=new.count,
        new_at_least=new.at_least,
        not_counted=not_counted,
        champion=serving.name if serving else None,
        approval=pending_approval(loop, database),
        targets=tuple(deployment_states(loop, database)),
    )
