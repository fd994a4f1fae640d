"""Read an Obsidian vault: notes and sections that contain a decision, a reflection or something learned."""

from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from finetune_pipeline.settings import VaultSource, project_path
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.sources.text_files import find_files, read_text
from finetune_pipeline.sources.vault.note import NoteRules, read_note


def read(source: VaultSource, cursor: Any) -> Iterator[SourceRecord | SkippedRecord]:
    """Yield the records of a vault, note by note in the order of their paths.

    Private, hidden and ignored notes, templates and attachments are left out without being listed anywhere. A note that
    cannot be read is skipped with a reason that never quotes it.

    Args:
        cursor: not used; the vault is always read completely, so that deleted notes are noticed.

    Raises:
        SourceError: the folder does not exist, contains no note, or disappeared while it was read.
    """
    root = project_path(source.path)
    advice = "correct `path` of this source in the loop's YAML, or restore the folder"
    if not root.is_dir():
        raise SourceError(f"the vault {root} {'is not a folder' if root.exists() else 'does not exist'}; {advice}")
    ignored = {name.casefold() for name in source.ignore}

    def is_ignored(path: str) -> bool:
        return not ignored.isdisjoint({path.casefold(), path.casefold().rpartition("/")[2]})

    paths, skipped = find_files(root, lambda path: path.lower().endswith(".md"), ignored_folder=is_ignored)
    if not paths:
        # An unmounted disk looks like this, and must not retract everything.
        raise SourceError(f"the vault {root} contains no note (.md) that may be read; {advice}")
    yield from sorted(skipped, key=lambda one: one.provenance)
    names = Counter(PurePosixPath(path).stem.casefold() for path in paths)
    rules = NoteRules(source)
    for path in sorted(paths):
        file = read_text(root, path, max_bytes=source.max_note_bytes, setting="max_note_bytes")
        if isinstance(file, SkippedRecord):
            yield file
            continue
        unique = names[PurePosixPath(path).stem.casefold()] == 1
        folder = "" if unique else str(PurePosixPath(path).parent).removeprefix(".")
        yield from read_note(file, rules, folder)
    if not root.is_dir():
        raise SourceError(f"the vault {root} disappeared while it was read; {advice}")
