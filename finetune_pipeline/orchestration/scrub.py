"""Remove a person's texts from Dagster's history and the logs of runs.

Earlier versions stored samples of datasets in Dagster's event log. This rewrites whatever row of Dagster's storages has
such a text: event rows, the copies of events in other tables, runs, tags and ticks. Rows are rewritten and not deleted,
so that runs, materializations and checks stay in the history. It works on the connections of the instance's storages,
and so on SQLite and on PostgreSQL.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa

from finetune_pipeline.curation.dataset_card import SAMPLE_HEADING
from finetune_pipeline.curation.found_values import PLACEHOLDER
from finetune_pipeline.curation.redaction import redact
from finetune_pipeline.pipeline.erasure import MIN_TEXT
from finetune_pipeline.settings import RedactionSettings, home

ERASED = "[ERASED]"
_PREFIX = 40  # characters by which a longer text is found, since messages and cards cut texts
_CARD = "# Dataset "


@dataclass(frozen=True)
class Scrubbed:
    """What was rewritten: table -> rows, and the logs."""

    rows: dict[str, int]
    logs: tuple[Path, ...]


def scrub_home(names: Sequence[str], texts: Sequence[str], redactions: Collection[RedactionSettings]) -> Scrubbed:
    """Remove names and texts, and samples in dataset cards, from the Dagster home and the logs of `finetune run`.

    Args:
        names: of persons; they are found as whole words.
        texts: prompts, answers, titles; texts shorter than MIN_TEXT are left out.
        redactions: the kinds that the loops with these texts redact; the texts are found redacted, too.
    """
    clean, folder = cleaner(names, texts, redactions), dagster_home()
    logs = scrub_files((home() / "logs").glob("*.log"), clean)
    if not (folder / "dagster.yaml").is_file():
        return Scrubbed({}, logs)
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        found = scrub(instance, folder, clean)
    return Scrubbed(found.rows, (*logs, *found.logs))


def dagster_home() -> Path:
    """Return the folder of Dagster's history, whether it exists or not."""
    return Path(os.environ.get("DAGSTER_HOME") or home() / "dagster")


def scrub(instance: dg.DagsterInstance, folder: Path, clean: Callable[[str], str]) -> Scrubbed:
    """Rewrite the storages and the compute logs of an instance with a `cleaner`."""
    rows: dict[str, int] = {}
    for connect in _connections(instance):
        with connect() as connection:
            found = scrub_tables(connection, clean)
            rows = {table: rows.get(table, 0) + found.get(table, 0) for table in {**rows, **found}}
        with connect() as connection:
            if connection.dialect.name == "sqlite":  # its write-ahead log still has the old rows
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    return Scrubbed(rows, scrub_files(folder.rglob("compute_logs/*"), clean))


def scrub_files(paths: Iterable[Path], clean: Callable[[str], str]) -> tuple[Path, ...]:
    """Rewrite text files; return those that changed."""
    changed = []
    for path in sorted(path for path in paths if path.is_file()):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        if (cleaned := clean(text)) != text:
            path.write_text(cleaned, encoding="utf-8", errors="surrogateescape")
            changed.append(path)
    return tuple(changed)


def scrub_tables(connection: sa.Connection, clean: Callable[[str], str]) -> dict[str, int]:
    """Rewrite the text columns of all tables of a connection; return table -> rewritten rows."""
    if connection.dialect.name == "sqlite":  # otherwise the old text stays readable in the file
        connection.exec_driver_sql("PRAGMA secure_delete=ON")
    metadata = sa.MetaData()
    metadata.reflect(connection)
    rewritten = {}
    for table in metadata.sorted_tables:
        keys = list(table.primary_key.columns)
        columns = [column for column in table.columns if isinstance(column.type, sa.String) and column not in keys]
        if not (keys and columns):
            continue
        changes = []
        for row in connection.execute(sa.select(*keys, *columns)):
            old = {column.name: getattr(row, column.name) for column in columns}
            new = {name: clean_value(text, clean) for name, text in old.items() if text}
            if changed := {name: text for name, text in new.items() if text != old[name]}:
                changes.append(([column == getattr(row, column.name) for column in keys], changed))
        for where, changed in changes:
            connection.execute(table.update().where(*where).values(changed))
        if changes:
            rewritten[table.name] = len(changes)
    return rewritten


def cleaner(
    names: Sequence[str], texts: Sequence[str], redactions: Collection[RedactionSettings]
) -> Callable[[str], str]:
    """Return the function that removes names and texts, and samples of dataset cards, from a text."""
    logged = {text.strip() for text in texts}
    redacted = {redact(text, kinds).text for text in logged for kinds in redactions}
    redacted |= {PLACEHOLDER.sub(r"[\g<kind>]", text) for text in redacted}  # as earlier versions wrote them
    written = {form for form in logged | redacted if len(form) >= MIN_TEXT}
    # In metadata a text may be part of a JSON text, and messages quote it.
    escaped = (json.dumps(text, ensure_ascii=ascii)[1:-1] for text in written for ascii in (True, False))
    quoted = (repr(text)[1:-1] for text in written)
    longest_first = sorted({*written, *escaped, *quoted}, key=lambda form: (-len(form), form))
    whole = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)") for name in names if name.strip()]

    def clean(text: str) -> str:
        if text.startswith(_CARD):
            text = text.partition(f"\n{SAMPLE_HEADING}\n")[0]
        for form in longest_first:
            if form[:_PREFIX] in text:
                text = _without(text, form)
        for name in whole:
            text = name.sub(ERASED, text)
        return text

    return clean


def clean_value(value: str, clean: Callable[[str], str]) -> str:
    """Return a column's value with each text and key in its JSON cleaned, or itself cleaned if it is not JSON."""
    if value[:1] in {"{", "["}:
        try:
            document = json.loads(value)
        except ValueError:
            return clean(value)
        cleaned = _clean_document(document, clean)
        return value if cleaned == document else json.dumps(cleaned)
    return clean(value)


def _clean_document(value: Any, clean: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        # The keys of Dagster's own objects are names of fields, without which it cannot read them.
        clean_key: Callable[[str], str] = str if "__class__" in value else clean
        return {clean_key(key): _clean_document(inner, clean) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean_document(inner, clean) for inner in value]
    return clean_value(value, clean) if isinstance(value, str) and value else value


def _without(text: str, form: str) -> str:
    """Return a text without a form of a person's text, also where it was cut after its first characters."""
    parts, start = [], 0
    while (at := text.find(form[:_PREFIX], start)) >= 0:
        end = at + min(len(form), _PREFIX)
        while end - at < len(form) and end < len(text) and text[end] == form[end - at]:
            end += 1
        parts += [text[start:at], ERASED]
        start = end
    return "".join([*parts, text[start:]])


def _connections(instance: dg.DagsterInstance) -> Iterator[Callable[[], AbstractContextManager[sa.Connection]]]:
    """Yield the connections of the run storage, the schedule storage and the event log with each of its shards."""
    runs: Any = instance.run_storage
    schedules: Any = instance.schedule_storage
    events: Any = instance.event_log_storage
    yield runs.connect
    if schedules is not None:
        yield schedules.connect
    yield events.index_connection
    if instance.event_log_storage.is_run_sharded:
        for run in instance.get_runs():
            yield partial(events.run_connection, run.run_id)
