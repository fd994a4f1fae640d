"""An Obsidian vault: notes and sections that hold a reflection, a decision or something learned. It is only read."""

from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from finetune_pipeline.settings import VaultSource, project_path
from finetune_pipeline.sources.source_record import Reading, SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.sources.vault.folder import File, find, load
from finetune_pipeline.sources.vault.note import Rules, read_note


def read(source: VaultSource, cursor: Any) -> Reading:
    """All that a vault teaches at this moment, note by note in the order of their paths.

    What is private, hidden, a template or an attachment is left out without a word: a list of what somebody wants to
    keep to himself is not something to write down elsewhere. A note that cannot be read is named; why never quotes it.

    Args:
        mark: not used; a vault is read whole, so that a deleted note is noticed.

    Raises:
        SourceError: the folder is not there, or holds no note, or was gone at the end.
    """
    root = project_path(source.path)
    advice = "correct `path` of this source in the loop's YAML, or bring the folder back"
    if not root.is_dir():
        what = "is no folder" if root.exists() else "is not there"
        raise SourceError(f"the vault {root} {what}; {advice}")
    found = list(find(root, set(source.ignore)))
    paths = sorted(one for one in found if isinstance(one, str))
    if not paths:
        # A disk that is not mounted looks like this, and everything it taught would be taken back.
        raise SourceError(f"the vault {root} holds no note (.md) that may be read; {advice}")
    yield from sorted((one for one in found if isinstance(one, SkippedRecord)), key=lambda one: one.provenance)
    names = Counter(_name(path) for path in paths)
    rules = Rules.of(source)
    for path in paths:
        file = load(root, path, source.max_note_bytes)
        yield from [file] if isinstance(file, SkippedRecord) else _taught(file, rules, names)
    if not root.is_dir():
        raise SourceError(f"the vault {root} was gone before it was read to its end; {advice}")


def _taught(file: File, rules: Rules, names: Counter[str]) -> Iterator[SourceRecord | SkippedRecord]:
    folder = PurePosixPath(file.path).parent
    return read_note(file, rules, "" if names[_name(file.path)] == 1 or str(folder) == "." else str(folder))


def _name(path: str) -> str:
    return PurePosixPath(path).stem.casefold()


__all__ = ["read"]
