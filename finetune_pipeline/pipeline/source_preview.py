"""Show what a declared source would give, without recording anything."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from finetune_pipeline.curation.acceptance import Policy, accept
from finetune_pipeline.curation.redaction import redact, redact_example
from finetune_pipeline.feedback.corrections import correction_problem
from finetune_pipeline.feedback.resolution import resolve
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.feedback.store import source_feedback_id
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.pipeline.source_events import declared_id, source_events, without_own_system_prompt
from finetune_pipeline.pipeline.source_sync import limited, reader_for
from finetune_pipeline.records import conversation_text, text_hash
from finetune_pipeline.settings import IngestedSource, LogsSource, LoopSettings, SettingsError, Source
from finetune_pipeline.sources.source_record import SkippedRecord, SourceError, SourceRecord
from finetune_pipeline.validation_messages import error_message
from finetune_pipeline.wording import count_reason

_MOST_SKIPPED = 1_000  # after so many, a source that gave no record is not read further by a check
_SHOWN_SKIPPED = 3

SAME_PROMPT = "same prompt as a record before it"
"""Why a record is left out whose prompt an earlier one has: a dataset has one example for each prompt."""


@dataclass(frozen=True)
class PreviewedRecord:
    """A record as the dataset would have it: redacted, and without the loop's own system prompt.

    Attributes:
        reward: -1 to 1.
        left_out: why the dataset would not have it as an example; empty if it would.
    """

    provenance: str
    prompt: str
    completion: str
    history: tuple[dict[str, str], ...]
    reward: float
    kind: str | None
    domain: str | None
    user: str | None
    left_out: str


@dataclass
class SourcePreview:
    """What a source gives.

    Attributes:
        records: usable records; `files` of the source that they came from, 0 for a database.
        examples: those that a dataset would have, before its quotas and without near-duplicates.
        left_out: why the other records would not train, with counts.
        skipped: why something in the source is no record, with counts.
        first_skipped: the place of the first one for each of these reasons.
        shown: the first records.
        teacher_not_asked: the source has a teacher, and was read without it.
        error: why the source could not be read to its end; empty if it was.
    """

    source: str
    kind: str
    records: int = 0
    files: int = 0
    examples: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)
    shown: list[PreviewedRecord] = field(default_factory=list)
    teacher_not_asked: bool = False
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the preview as a JSON object. The most frequent reasons come first."""
        by_count = {"left_out": dict(self.left_out.most_common()), "skipped": dict(self.skipped.most_common())}
        return {**asdict(self), **by_count}


def preview_source(loop: LoopSettings, name: str, limit: int, *, ask_teacher: bool = False) -> SourcePreview:
    """Read a source from its beginning, and return its first records with counts of all of them.

    Nothing is recorded: neither records nor the cursor. The store is not read either, so that the decisions of
    reviewers and the erasure of persons have no influence.

    Args:
        limit: how many records to return; all are counted.
        ask_teacher: send requests to the source's teacher, whose replies are cached and cost what they cost in a sync.

    Raises:
        SettingsError: the loop declares no such source.
    """
    source: Any = _declared(loop, name)
    preview = SourcePreview(source.name, source.kind)
    if getattr(source, "teacher", None) is not None and not ask_teacher:
        preview.teacher_not_asked = True
        source = source.model_copy(update={"teacher": None})
    policy, reward, prompts = loop_files.policy(loop), reward_function(loop.feedback), set[str]()
    files = set[str]()
    try:
        for one in limited(reader_for(source, loop.curation.redaction)(source, None), source):
            if isinstance(one, SkippedRecord):
                _skip(preview, one.provenance, one.reason, loop)
            elif isinstance(one, SourceRecord):
                try:
                    record = _previewed(loop, source, one, policy, reward, prompts)
                except ValidationError as error:
                    _skip(preview, one.provenance, error_message(error), loop)
                    continue
                preview.records += 1
                files |= {one.file} - {""}
                if record.left_out:
                    count_reason(preview.left_out, record.left_out)
                else:
                    preview.examples += 1
                if len(preview.shown) < limit:
                    preview.shown.append(record)
    except SourceError as error:
        preview.error = redact(str(error), loop.curation.redaction).text
    preview.files = len(files)
    return preview


def _skip(preview: SourcePreview, provenance: str, reason: str, loop: LoopSettings) -> None:
    place, reason = (redact(text, loop.curation.redaction).text for text in (provenance, reason))
    count_reason(preview.skipped, reason)
    if reason in preview.skipped:
        preview.first_skipped.setdefault(reason, place)


def why_unusable(loop: LoopSettings, source: Source) -> str:
    """Return why a source gives no usable record, with the first places and reasons; empty if it gives one.

    The source is read up to its first usable record, without its teacher.
    """
    kinds = loop.curation.redaction
    skipped: list[str] = []
    error, problem = "", "gives no record"
    try:
        for one in limited(reader_for(source, kinds)(source, None), source):
            if isinstance(one, SkippedRecord):
                reason = one.reason
            elif isinstance(one, SourceRecord):
                if not (reason := _invalid(loop, source, one)):
                    return ""
            else:
                continue
            skipped.append(f"{one.provenance!r}: {reason}")  # quoted: a provenance may be the title of a note
            if len(skipped) == _MOST_SKIPPED:
                problem = f"gives no record among its first {_MOST_SKIPPED:,}; the others were not read"
                break
    except SourceError as found:
        error = str(found)
    except (OSError, RuntimeError, ValueError) as found:  # an unforeseen problem with a path, permission or host
        error = f"cannot be read ({type(found).__name__}: {found})"
    more = f"; and {len(skipped) - _SHOWN_SKIPPED:,} more" if len(skipped) > _SHOWN_SKIPPED else ""
    first = f" ({'; '.join(skipped[:_SHOWN_SKIPPED])}{more})" if skipped else ""
    advice = "correct the source or its settings, or remove it from the loop's YAML"
    return redact(f"{error}{first}" if error else f"{problem}{first}; {advice}", kinds).text


def _invalid(loop: LoopSettings, source: Any, record: SourceRecord) -> str:
    """Return why a sync would skip a record; empty if it would not."""
    if record.model_output is not None and (problem := correction_problem(loop, record.answer)):
        return problem
    try:
        source_events(loop.name, source.name, without_own_system_prompt(record, loop), UUID(int=0), 0.0, UUID(int=0))
    except ValidationError as error:
        return error_message(error)
    return ""


def _declared(loop: LoopSettings, name: str) -> Source:
    declared = {one.name: one for one in loop.sources if not isinstance(one, LogsSource | IngestedSource)}
    if name not in declared:
        known = f"its sources are {', '.join(declared)}" if declared else "it declares none under `sources` in its YAML"
        raise SettingsError(f"loop {loop.name} has no source {name!r}; {known}")
    return declared[name]


def _previewed(
    loop: LoopSettings, source: Any, record: SourceRecord, policy: Policy, reward: RewardFunction, prompts: set[str]
) -> PreviewedRecord:
    """Return a record as a dataset would have it.

    Args:
        prompts: hashes of the prompts of earlier records; this one's is added.

    Raises:
        ValidationError: a sync would skip the record.
    """
    given = source.reward if record.reward is None else record.reward
    record = without_own_system_prompt(record, loop)
    id = declared_id(loop.name, source.name, record, given)
    interaction, feedback = source_events(loop.name, source.name, record, id, given, source_feedback_id(id))
    example = resolve(interaction, [feedback], 0, reward)
    left_out, value = "its reward is neither for nor against it", given
    prompt, completion, history, provenance = record.prompt, record.answer, record.history, record.provenance
    if example is not None:
        example, _ = redact_example(example, policy.settings.redaction)
        decision = accept(example, policy)
        left_out, value = "" if decision.accepted else decision.reason, example.reward
        prompt, completion, history = example.prompt, example.target, example.history
        provenance = example.provenance or provenance
    key = text_hash(conversation_text(prompt, history))
    if not left_out and key in prompts:
        left_out = SAME_PROMPT
    if not left_out:
        prompts.add(key)
    turns = tuple({"role": turn.role, "content": turn.content} for turn in history)
    return PreviewedRecord(
        provenance, prompt, completion, turns, value, record.kind, record.domain, record.user, left_out
    )  # fmt: skip
