"""Erasing a person: what the store holds, what was made with it, the deletion, and what has to be deleted by hand."""

import html
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune_pipeline.artifacts import stage_folder
from finetune_pipeline.database import Database
from finetune_pipeline.evaluation.run import BenchmarkRunManifest
from finetune_pipeline.feedback.erasure import (
    Erased,
    PersonData,
    erase_user,
    loops_with_data,
    overwrite_deleted,
    person_data,
    person_texts,
)
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.write_ahead_log import dead_letter_files, log_files, recover_orphans
from finetune_pipeline.manifests import ReportManifest
from finetune_pipeline.pipeline.lineage import MadeWith, made_with
from finetune_pipeline.pipeline.uploaded_files import list_files
from finetune_pipeline.registry.requested_comparisons import ErasedFromComparisons, erase_in
from finetune_pipeline.settings import INGESTED, FeedbackSettings, LoopSettings, load_loop, load_loops, project_path
from finetune_pipeline.sources.row_readers import files_of, layout_of, read_rows

MIN_TEXT = 8
"""Shorter texts than this are not searched outside the store: they are in other people's texts, too."""


@dataclass(frozen=True)
class HeldData:
    """What a loop holds of a person, and what was made with it.

    Attributes:
        loop: the loop's settings; None if the store knows the loop but no YAML declares it any more.
    """

    name: str
    loop: LoopSettings | None
    data: PersonData
    made_with: MadeWith


@dataclass(frozen=True)
class ErasedLoop:
    """What was erased in a loop, and what still holds the person's data and has to be deleted by hand.

    Attributes:
        artifacts: artifacts and models that were made with the erased data.
        sources: declared sources that the erased data came from.
        files: event files and dead letters that contain the person's name.
        texts: benchmark, replay file, uploaded files and files of evaluation reports and answers -> how many of the
            person's texts they contain.
        comparisons: what was erased in comparisons that programs asked for.
    """

    name: str
    erased: Erased
    artifacts: MadeWith
    sources: tuple[str, ...]
    files: tuple[Path, ...]
    texts: Mapping[Path, int]
    comparisons: ErasedFromComparisons


@dataclass(frozen=True)
class ErasureResult:
    """The result of an erasure. It has to be repeated unless it is `complete`.

    Attributes:
        write_ahead_logs: logs of running servers that contain the person's name; their events may still be stored.
        database_busy: whether SQLite's own log still contains the deleted text, because another program uses it.
    """

    loops: tuple[ErasedLoop, ...]
    write_ahead_logs: tuple[Path, ...]
    database_busy: bool

    @property
    def complete(self) -> bool:
        """Return whether nothing of the person is left in the database, or on its way there."""
        return not self.write_ahead_logs and not self.database_busy


def find_person(database: Database, user: str, loop: str | None = None) -> list[HeldData]:
    """Return what each loop, or only one, holds of a person.

    The logs of killed servers are moved to the store first, so that nothing of them arrives after the erasure.

    Raises:
        SettingsError: there is no such loop.
        ArtifactError: a snapshot or dataset cannot be read, so it is unknown what was made with the data.
    """
    all_loops = load_loops()
    declared = {loop: load_loop(loop)} if loop else all_loops

    def reward_of(name: str) -> RewardFunction:
        return reward_function(all_loops[name].feedback if name in all_loops else FeedbackSettings())

    recover_orphans(database, reward_of)
    with database.read() as connection:
        names = [loop] if loop else sorted({*declared, *loops_with_data(connection)})
        data = {name: person_data(connection, name, user) for name in names}
    return [
        HeldData(
            name,
            declared.get(name),
            held,
            made_with(database, declared[name], held.affected_interactions) if name in declared else MadeWith(),
        )
        for name, held in data.items()
    ]


def texts_of(database: Database, held: Sequence[HeldData]) -> set[str]:
    """Return the texts of a person's data, to find them elsewhere; call it before the erasure."""
    with database.read() as connection:
        return set[str]().union(*(person_texts(connection, one.data) for one in held))


def erase_person(database: Database, user: str, held: Sequence[HeldData]) -> ErasureResult:
    """Delete a person's data from the loops that `find_person` returned.

    It is safe to repeat, and worth it if nothing was found: the name is remembered, so that no source brings in
    anything by this author.
    """
    # Looked up before the deletion: events that reach the store until then are deleted with the rest.
    pending = _files_naming(user, log_files())
    texts = {one.name: _files_with(texts_of(database, [one]), one) for one in held}
    everywhere = _long(texts_of(database, held))  # what was logged in one loop may be asked in another one
    erased, compared = {}, {}
    for one in held:
        reward = reward_function(one.loop.feedback if one.loop else FeedbackSettings())
        with database.write() as connection:
            erased[one.name] = erase_user(connection, one.name, user, reward)
            compared[one.name] = erase_in(connection, one.name, everywhere, user)
    overwritten = overwrite_deleted(database)
    loops = tuple(
        ErasedLoop(
            one.name,
            erased[one.name],
            one.made_with,
            tuple(source for source in one.data.sources if source != INGESTED),
            tuple(_event_files_naming(user, one.loop)) if one.loop else (),
            texts[one.name],
            compared[one.name],
        )
        for one in held
    )
    return ErasureResult(loops, tuple(pending), database_busy=not overwritten)


def _files_with(texts: set[str], held: HeldData) -> dict[Path, int]:
    """Return the files beside the store that contain some of the texts, as text, JSON or HTML, and how many."""
    stages = (ReportManifest.stage, BenchmarkRunManifest.stage)  # models may answer with a person's own words
    found_paths = [path for stage in stages for path in sorted(stage_folder(held.name, stage).rglob("*"))]
    paths = [path for path in found_paths if path.suffix in {".json", ".jsonl", ".html", ".md"}]
    if held.loop:
        evaluation = held.loop.evaluation
        named = (evaluation.benchmark, evaluation.sealed_benchmark, held.loop.curation.replay)
        paths += [project_path(path) for path in named if path]
    paths += [file.path for file in list_files()]
    forms = [
        {text, html.escape(text), *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (True, False))}
        for text in sorted(_long(texts))
    ]
    found = {}
    for path in paths:
        with suppress(OSError):  # a benchmark that is missing, or a report that is deleted now
            if count := _texts_in(path, forms):
                found[path] = count
    return found


def _long(texts: Iterable[str]) -> set[str]:
    """Return the texts that are searched outside the store."""
    return {text for text in (text.strip() for text in texts) if len(text) >= MIN_TEXT}


def _texts_in(path: Path, forms: Sequence[Collection[str]]) -> int:
    """Return how many texts a file contains, each in one of its forms; a large file has lines of JSON."""
    missing = forms
    with path.open(encoding="utf-8", errors="replace") as file:
        for part in file if path.suffix == ".jsonl" else [file.read()]:
            missing = [of_text for of_text in missing if not any(form in part for form in of_text)]
    return len(forms) - len(missing)


def _event_files_naming(user: str, loop: LoopSettings) -> list[Path]:
    """Return the loop's event files, and dead letters, that contain the person's name."""
    paths = [path for folder in loop.log_folders if folder.is_dir() for path in files_of(folder)]
    found = _files_naming(user, [*paths, *dead_letter_files()])
    for path in paths:
        with suppress(FileNotFoundError):  # deleted in the meantime
            if layout_of(path) in {"csv", "parquet"}:  # where a name is not a JSON string
                rows = (row.value for row in read_rows(path, loop.ingest.max_line_bytes))
                if any(isinstance(row, dict) and str(row.get("user")) == user for row in rows):
                    found.append(path)
    return list(dict.fromkeys(found))


def _files_naming(user: str, paths: Sequence[Path]) -> list[Path]:
    """Return the files that contain the person's name as a JSON string."""
    names = [json.dumps(user).encode(), json.dumps(user, ensure_ascii=False).encode()]
    found = []
    for path in paths:
        with suppress(FileNotFoundError), path.open("rb") as file:  # a log may be deleted in the meantime
            if any(name in line for line in file for name in names):
                found.append(path)
    return found
