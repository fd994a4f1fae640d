"""Taking event files into the store. No Dagster here: the raw_logs asset and `finetune ingest` both do it this way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from finetune_pipeline.database import Database
from finetune_pipeline.feedback.journal import take_over_orphans
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.store import Recorded, record
from finetune_pipeline.settings import LoopSettings, load_loop
from finetune_pipeline.sources import ledger
from finetune_pipeline.sources.jsonl import Line, event_files, read_lines

BATCH = 1_000


@dataclass
class Ingested:
    """What one ingest did; `unreadable` names the files that could not be opened, and why."""

    files: int = 0
    lines: int = 0
    rejected: int = 0
    recorded: Recorded = field(default_factory=Recorded)
    unreadable: list[str] = field(default_factory=list)

    def add(self, other: "Ingested") -> None:
        """Count another one in."""
        self.files += other.files
        self.lines += other.lines
        self.rejected += other.rejected
        self.recorded += other.recorded
        self.unreadable += other.unreadable


def ingest(loop: LoopSettings, database: Database, tell: Callable[[str], None]) -> Ingested:
    """Take every unread event file of the loop's folders into the store, and say what was found in each.

    Each batch of lines and the file's place in the ledger are one transaction, so a kill loses nothing and nothing
    counts twice. A file that cannot be read is named, and the others go on.

    Raises:
        SourceError: a folder that the YAML names is not there.
    """
    loop.drop_folder.mkdir(parents=True, exist_ok=True)
    for folder in loop.log_folders:
        event_files(folder)  # a declared folder that is missing is an error, not an empty source
    reward = reward_function(loop.feedback)
    left = take_over_orphans(database, lambda task: reward if task == loop.name else _reward_of(task))
    if left:
        tell(f"{left} events that a killed gateway had acknowledged were taken over from its journal")
    with database.read() as connection:
        files = ledger.unread(connection, loop.name, loop.log_folders)
    total = Ingested()
    for number, file in enumerate(files, start=1):
        try:
            one = ingest_file(loop, database, file.path, reward)
        except OSError as error:
            one = Ingested(unreadable=[f"{file.path}: {error.strerror}; mend it or take it away"])
        total.add(one)
        tell(f"file {number} of {len(files)}, {file.path.name}: {_describe(one)}")
    return total


def ingest_file(loop: LoopSettings, database: Database, path: Path, reward: RewardFunction) -> Ingested:
    """Take one file from where the ledger left it.

    Raises:
        OSError: it cannot be read.
    """
    result = Ingested(files=1)
    stat = path.stat()
    file = ledger.UnreadFile(path, stat.st_size, stat.st_mtime_ns)
    with database.read() as connection:
        position = ledger.position(connection, loop.name, path)
    lines = read_lines(
        path, loop.name, offset=position.offset, lines=position.lines, max_line_bytes=loop.sources.max_line_bytes
    )
    for batch, last in _batches(lines):
        with database.write() as connection:
            events = [line.event for line in batch if line.event is not None]
            result.recorded += record(connection, loop.name, events, reward)
            position = ledger.advance(connection, loop.name, file, position, batch, finished=last)
        result.lines += len(batch)
        result.rejected += sum(line.event is None for line in batch)
    return result


def _reward_of(task: str) -> RewardFunction:
    return reward_function(load_loop(task).feedback)


def _describe(one: Ingested) -> str:
    if one.unreadable:
        return one.unreadable[0]
    known = f"{one.recorded.duplicates} known already, {one.rejected} lines rejected"
    return f"{one.recorded.interactions} interactions, {one.recorded.feedback} feedback, {known}"


def _batches(lines: Iterator[Line]) -> Iterator[tuple[list[Line], bool]]:
    """Batches of lines, each with whether it is the last; there is always one, perhaps empty."""
    batch = list(islice(lines, BATCH))
    while True:
        following = list(islice(lines, BATCH))
        yield batch, not following
        if not following:
            return
        batch = following
