"""Read an Obsidian vault: notes and sections that contain a decision, a reflection or something learned."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from finetune_pipeline.settings import VaultSource, project_path
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.sources.text_files import TextFile, find_files, read_text
from finetune_pipeline.sources.vault.classify import classify
from finetune_pipeline.sources.vault.inventory import take_inventory
from finetune_pipeline.sources.vault.note import UnselectedSection, read_note
from finetune_pipeline.sources.vault.rules import NoteRules
from finetune_pipeline.wording import count_reason, counted_reasons


def read(
    source: VaultSource, cursor: Any, *, redact: Callable[[str], str] | None = None
) -> Iterator[SourceRecord | SkippedRecord]:
    """Yield the records of a vault, note by note in the order of their paths, and then what a teacher found.

    Private, hidden and ignored notes, templates and attachments are left out without being listed anywhere. A note that
    cannot be read is skipped with a reason that never quotes it.

    Args:
        cursor: not used; the vault is always read completely, so that deleted notes are noticed.
        redact: replaces secrets and personal data in a text. The teacher gets redacted text, and it is the redacted
            text that trains. Without a teacher nothing leaves this machine, and redact is not needed.

    Raises:
        SourceError: the folder does not exist, contains no note or nothing to select, or disappeared while it was read;
            or the teacher cannot be used.
        ValueError: there is a teacher, but no `redact`.
    """
    if source.teacher is not None and redact is None:
        raise ValueError("notes are sent to a teacher only if they are redacted: pass `redact`")
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
    prompts: set[str] = set()
    unselected: list[UnselectedSection] = []
    reasons = Counter(one.reason for one in skipped)
    records = 0
    for path in sorted(paths):
        file = read_text(root, path, max_bytes=source.max_note_bytes, setting="max_note_bytes")
        if isinstance(file, SkippedRecord):
            count_reason(reasons, file.reason)
            yield file
            continue
        unique = names[PurePosixPath(path).stem.casefold()] == 1
        folder = "" if unique else str(PurePosixPath(path).parent).removeprefix(".")
        for one in read_note(file, rules, folder):
            if isinstance(one, UnselectedSection):
                unselected.append(one)
            elif isinstance(one, SkippedRecord):
                count_reason(reasons, one.reason)
                yield one
            else:
                records += 1
                yield _with_own_prompt(one, prompts)
    if not root.is_dir():
        raise SourceError(f"the vault {root} disappeared while it was read; {advice}")
    if source.teacher is not None and redact is not None:
        for answer in classify(unselected, source, source.teacher, redact):
            yield _with_own_prompt(answer, prompts) if isinstance(answer, SourceRecord) else answer
    elif not records:
        files = (read_text(root, path, max_bytes=source.max_note_bytes) for path in sorted(paths))
        inventory = take_inventory((file for file in files if isinstance(file, TextFile)), rules)
        raise SourceError(
            f"the vault {root} gives no record: no note or section with text has one of the tags "
            f"{', '.join(source.tags) or '(none)'} or a heading {', '.join(source.headings) or '(none)'}"
            + (f" (skipped: {counted_reasons(reasons)})" if reasons else "")
            + f"; {inventory}. Map some of them to kinds in `tags`, `headings` or `properties` of this source, set "
            f"`whole_daily_notes`, or write `patterns`; `finetune source preview {source.name}` shows the result"
        )


def _with_own_prompt(record: SourceRecord, prompts: set[str]) -> SourceRecord:
    """Return a record whose prompt no record before it has: two notes may have the same title."""
    if record.prompt in prompts:
        record = replace(record, prompt=f"{record.prompt} ({record.provenance.removesuffix('.md')})")
    prompts.add(record.prompt)
    return record
