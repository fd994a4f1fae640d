"""Taking event files into the store. No Dagster here: the raw_logs asset and `finetune ingest` both do it this way."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from finetune_pipeline.database import Database
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.store import Recorded, record
from finetune_pipeline.settings import LoopSettings
from finetune_pipeline.sources import ledger
from finetune_pipeline.sources.jsonl import Line, event_files, read_lines

BATCH = 1_000


@dataclass
class Ingested:
    """What one ingest did."""

    files: int = 0
    lines: int = 0
    rejected: int = 0
    recorded: Recorded = field(default_factory=Recorded)


def ingest(loop: LoopSettings, database: Database, tell: Callable[[str], None]) -> Ingested:
    """Take every unread event file of the loop's folders into the store, and say what was found in each.

    Each batch of lines and the file's place in the ledger are one transaction, so a kill loses nothing and nothing
    counts twice.

    Raises:
        SourceError: a folder that the YAML names is not there.
    """
    loop.drop_folder.mkdir(parents=True, exist_ok=True)
    for folder in loop.log_folders:
        event_files(folder)  # a declared folder that is missing is an error, not an empty source
    reward = reward_function(loop.feedback.reward_function)
    with database.read() as connection:
        paths = ledger.unread(connection, loop.name, loop.log_folders)
    total = Ingested()
    for number, path in enumerate(paths, start=1):
        one = ingest_file(loop, database, path, reward)
        total.files += 1
        total.lines += one.lines
        total.rejected += one.rejected
        total.recorded += one.recorded
        tell(
            f"file {number} of {len(paths)}, {path.name}: {one.recorded.interactions} interactions, "
            f"{one.recorded.feedback} feedback, {one.recorded.duplicates} known already, {one.rejected} lines rejected"
        )
    return total


def ingest_file(loop: LoopSettings, database: Database, path: Path, reward: RewardFunction) -> Ingested:
    """Take one file from where the ledger left it."""
    result = Ingested(files=1)
    before = path.stat()
    with database.read() as connection:
        position = ledger.position(connection, loop.name, path)
    lines = read_lines(
        path, loop.name, offset=position.offset, lines=position.lines, max_line_bytes=loop.sources.max_line_bytes
    )
    for batch, last in _batches(lines):
        with database.write() as connection:
            events = [line.event for line in batch if line.event is not None]
            result.recorded += record(connection, loop.name, events, reward)
            position = ledger.advance(connection, loop.name, path, position, batch, _known_as(before, finished=last))
        result.lines += len(batch)
        result.rejected += sum(line.event is None for line in batch)
    return result


def _known_as(stat: os.stat_result, *, finished: bool) -> ledger.Seen:
    # As it was before reading: what is appended meanwhile makes the file unread again.
    return ledger.Seen(stat.st_size, stat.st_mtime_ns, finished)


def _batches(lines: Iterator[Line]) -> Iterator[tuple[list[Line], bool]]:
    batch = list(islice(lines, BATCH))
    while True:
        following = list(islice(lines, BATCH))
        yield batch, not following
        if not following:
            return
        batch = following
