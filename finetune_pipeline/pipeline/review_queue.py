"""What waits for a person's eye: the store, the newest report and the loop's rules put together. No Dagster here."""

from dataclasses import dataclass, replace

import sqlalchemy as sa

from finetune_pipeline.curation.acceptance import INVALID, Policy, accept, at_a_glance
from finetune_pipeline.curation.redaction import redact_example
from finetune_pipeline.curation.review import Case, Ranked, Slice, Voice, WeakSlices, queue, rank
from finetune_pipeline.database import Database
from finetune_pipeline.evaluation.report import JSON, ReportError, slices_of_report
from finetune_pipeline.feedback.review import ReviewCandidate, load_candidates, review_candidates
from finetune_pipeline.feedback.rewards import RewardFunction, reward_function
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.records import PERSON_KINDS, Example, Feedback, Interaction, text_hash
from finetune_pipeline.registry.comparisons import list_comparisons
from finetune_pipeline.settings import LoopSettings


@dataclass(frozen=True)
class QueuedReview:
    """One example of the queue."""

    candidate: ReviewCandidate
    value: float
    reasons: tuple[str, ...]


def review_queue(loop: LoopSettings, database: Database) -> list[QueuedReview]:
    """What deserves a person's eye and nobody decided on, the most valuable first."""
    policy, weak = loop_files.policy(loop), weak_slices(loop, database)
    taught = loop.review.required or bool(weak)
    reward = reward_function(loop.feedback)
    with database.read() as connection:
        found = review_candidates(
            connection, loop.name, reward, loop.review_below, loop.curation.min_reward, taught=taught
        )
    by_key = {str(one.interaction.id): one for one in found}
    ranked = queue((_case(one, policy) for one in found), policy, weak, loop.review_below)
    return [QueuedReview(by_key[one.key], one.value, one.reasons) for one in ranked]


def requeue(
    loop: LoopSettings, connection: sa.Connection, interaction_id: str, reward: RewardFunction
) -> QueuedReview | None:
    """One interaction as it would stand in the queue now, whatever it is worth; None if it is gone."""
    candidate = next(load_candidates(connection, loop.name, [interaction_id], reward), None)
    if candidate is None:
        return None
    policy = loop_files.policy(loop)
    found: Ranked | None = rank(_case(candidate, policy), policy, WeakSlices([]), loop.review_below)
    return QueuedReview(candidate, found.value if found else 0.0, found.reasons if found else ("taken back",))


def rejection_reason(interaction: Interaction, target: str, policy: Policy) -> str | None:
    """Why an answer would not train though a reviewer approved it; None if it would.

    It is the rule that curation asks, of what redaction leaves.
    """
    approved = Example.from_interaction(
        interaction,
        ingest_offset=0,
        target=target,
        reward=1.0,
        confirmed=True,
        corrected=target.strip() != interaction.output.strip(),
        review="approve",
    )
    redacted = redact_example(approved).example
    decision = accept(redacted, policy)
    if decision.accepted:
        return None
    return (policy.problem(redacted.target) if decision.reason == INVALID else None) or decision.reason


def weak_slices(loop: LoopSettings, database: Database) -> WeakSlices:
    """Where the model that serves since the newest report is weakest; nothing before the first report."""
    newest = next(iter(list_comparisons(database, loop.name)), None)
    if newest is None:
        return WeakSlices([])
    try:
        slices = slices_of_report(newest.report_path.with_name(JSON), "challenger" if newest.promote else "champion")
    except ReportError:  # it was deleted: the queue does without
        return WeakSlices([])
    return WeakSlices(Slice(one.name, one.correct / one.total, one.prompts) for one in slices if one.total)


def _case(candidate: ReviewCandidate, policy: Policy) -> Case:
    interaction, example, earlier = candidate.interaction, candidate.example, candidate.decided
    people = [item for item in candidate.feedback if item.kind in PERSON_KINDS]
    open_policy = replace(policy, review_required=False)
    return Case(
        key=str(interaction.id),
        ingest_offset=candidate.ingest_offset,
        prompt=interaction.prompt,
        answer=candidate.answer,
        history=interaction.history,
        confidence=interaction.confidence,
        flag=interaction.flag,
        kind=interaction.kind,
        domain=interaction.domain,
        voices=_voices(candidate),
        person=bool(people),
        refused=any(
            worth < 0
            for item, worth in zip(candidate.feedback, candidate.rewards, strict=True)
            if item.kind in PERSON_KINDS
        ),
        trains=example is not None and at_a_glance(example, open_policy).accepted,
        since=f"{earlier.reviewer} decided {earlier.kind}" if earlier else "",
    )


def _voices(candidate: ReviewCandidate) -> tuple[Voice, ...]:
    """One voice for each feedback; of one user, the last on each answer."""
    logged = text_hash(candidate.interaction.output)
    said: dict[tuple[str, str], Voice | None] = {}
    for number, (item, worth) in enumerate(zip(candidate.feedback, candidate.rewards, strict=True)):
        answer = text_hash(item.correction) if item.correction else item.output_hash or logged
        right = _right(item, worth)
        said[item.user or f"\n{number}", answer] = None if right is None else Voice(answer, right)
    return tuple(voice for voice in said.values() if voice is not None)


def _right(item: Feedback, worth: float) -> bool | None:
    if item.kind == "correction":
        return True
    return None if worth == 0 else worth > 0
