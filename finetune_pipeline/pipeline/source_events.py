"""Turn a record of a source into events: an interaction, and the feedback that carries its reward."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from finetune_pipeline.artifacts import hash_of
from finetune_pipeline.feedback.store import source_feedback_id
from finetune_pipeline.records import Feedback, Interaction, is_in_future, without_system_prompt
from finetune_pipeline.settings import INGESTED, LoopSettings
from finetune_pipeline.sources.source_record import SourceRecord

ERASED = "its author was erased"
"""Why a record of an erased person is skipped. The reason does not contain the name."""

_NAMESPACE = uuid.UUID("6a4b1f0e-7c52-4f0b-9d3e-52c8a1f7b9d4")  # UUID namespace of this project (random)


def without_own_system_prompt(record: SourceRecord, loop: LoopSettings) -> SourceRecord:
    """Return the record without the loop's own system prompt."""
    prompt, history = without_system_prompt(record.prompt, record.history, loop.system_prompt)
    return replace(record, prompt=prompt, history=history)


def declared_id(loop: str, source: str, record: SourceRecord, reward: float) -> uuid.UUID:
    """Return the id of a declared source's record, a hash of its text, reward and author, and of its key if it has one.

    The provenance is not part of it: line numbers change with every line before.
    """
    key = record.provenance if record.keyed else ""
    return uuid.uuid5(_NAMESPACE, "\n".join([loop, source, key, _content_hash(record, reward, record.user)]))


def ingested_events(loop: LoopSettings, record: SourceRecord) -> tuple[Interaction, Feedback]:
    """Return the events of a conversation in a dropped file.

    The same conversation in another file has the same id. With another reward it gets another feedback.
    """
    reward = loop.ingest.default_reward if record.reward is None else record.reward
    record = without_own_system_prompt(record, loop)
    id = uuid.uuid5(_NAMESPACE, "\n".join([loop.name, INGESTED, _content_hash(record)]))
    return source_events(loop.name, INGESTED, record, id, reward, source_feedback_id(id, reward))


def source_events(
    loop: str, source: str, record: SourceRecord, id: uuid.UUID, reward: float, feedback_id: uuid.UUID
) -> tuple[Interaction, Feedback]:
    """Return the interaction of a record, and the feedback with its reward or correction."""
    moment = record.created_at
    if moment is None or is_in_future(moment):  # a note may be about a future day
        moment = datetime.now(UTC)
    interaction = Interaction(
        id=id, loop=loop, created_at=moment, prompt=record.prompt, history=record.history,
        output=record.answer if record.model_output is None else record.model_output,
        user=record.user, domain=record.domain, kind=record.kind, source=source, provenance=record.provenance,
    )  # fmt: skip
    kind: dict[str, Any] = {"kind": "reward"}
    if record.model_output is not None:
        kind = {"kind": "correction", "correction": record.answer}
    own = {"id": feedback_id, "loop": loop, "interaction_id": id, "created_at": moment}
    return interaction, Feedback(**own, **kind, reward=reward)


def _content_hash(record: SourceRecord, *more: object) -> str:
    history = [turn.model_dump() for turn in record.history]
    return hash_of([record.prompt, history, record.answer, record.model_output, *more])
