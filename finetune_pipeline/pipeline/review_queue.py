"""Review: the queue of examples that a person should review, and a session that decides on them one by one.

Each decision is one transaction, so a session may end at any moment, and several reviewers may work at once.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from finetune_pipeline.curation.acceptance import INVALID, Policy, accept, quick_filters
from finetune_pipeline.curation.redaction import redact_example
from finetune_pipeline.curation.review import ReviewInput, Slice, Vote, WeakSlices, rank, review_priority
from finetune_pipeline.database import Database
from finetune_pipeline.evaluation.report import JSON, ReportError, slices_of_report
from finetune_pipeline.feedback.resolution import answers_meant, latest_of_each_user
from finetune_pipeline.feedback.review import (
    ReviewCandidate,
    effective_decision,
    load_candidates,
    record_decision,
    review_candidates,
    undo_decision,
)
from finetune_pipeline.feedback.rewards import as_confirmation, reward_function
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.records import (
    PERSON_KINDS,
    Example,
    Feedback,
    Interaction,
    ReviewKind,
    same_answer,
)
from finetune_pipeline.registry.comparisons import list_comparisons
from finetune_pipeline.schemas import InvalidJsonError, parse_json
from finetune_pipeline.settings import LoopSettings

_JSON_STYLES: tuple[dict[str, Any], ...] = (
    {"separators": (",", ":")}, {},
    {"separators": (",", ":"), "ensure_ascii": False}, {"ensure_ascii": False}, {"indent": 2, "ensure_ascii": False},
)  # fmt: skip
"""The ways in which models write JSON; an edited answer is written as the model wrote its own."""


@dataclass(frozen=True)
class QueuedReview:
    """One example of the queue, the priority of its review (0 to 2), and the reasons for it."""

    candidate: ReviewCandidate
    priority: float
    reasons: tuple[str, ...]


def review_queue(loop: LoopSettings, database: Database) -> list[QueuedReview]:
    """Return the examples that need a review and have no decision, the highest priority first."""
    policy, weak = loop_files.policy(loop), weak_slices(loop, database)
    reward, min_reward = reward_function(loop.feedback), loop.curation.min_reward
    # An example that may train needs a review if all do, or if its prompt may be similar to a weak slice.
    qualifying = loop.review.required or bool(weak)
    with database.read() as connection:
        candidates = review_candidates(
            connection, loop.name, reward, loop.review_below, min_reward, include_qualifying=qualifying
        )
    by_id = {str(one.interaction.id): one for one in candidates}
    ranked = rank((_review_input(one, policy) for one in candidates), policy, weak, loop.review_below)
    return [QueuedReview(by_id[one.id], one.priority, one.reasons) for one in ranked]


def rejection_reason(interaction: Interaction, target: str, policy: Policy) -> str | None:
    """Return why an answer would not train even if a reviewer approved it; None if it would train.

    This is curation's own rule, applied after redaction.
    """
    approved = Example.from_interaction(
        interaction,
        ingest_offset=0,
        target=target,
        reward=1.0,
        confirmed=True,
        corrected=not same_answer(target, interaction.output),
        review="approve",
    )
    redacted, _ = redact_example(approved, policy.settings.redaction)
    decision = accept(redacted, policy)
    if decision.accepted:
        return None
    return (policy.problem(redacted.target) if decision.reason == INVALID else None) or decision.reason


def editable(answer: str) -> str:
    """Return a JSON answer as people edit it, indented, if `in_style_of` can undo that; any other answer as it is."""
    return answer if _json_style(answer) is None else json.dumps(json.loads(answer), indent=2, ensure_ascii=False)


def in_style_of(answer: str, edited: str) -> str:
    """Return an edited JSON answer with the white space of the model's answer; as it is if it is not valid JSON."""
    style = _json_style(answer)
    if style is None:
        return edited
    try:
        return json.dumps(parse_json(edited), **style)
    except InvalidJsonError:  # the check of the answer reports the error in the text as the reviewer wrote it
        return edited


def _json_style(answer: str) -> dict[str, Any] | None:
    """Return the arguments of `json.dumps` that reproduce a JSON answer; None if there are none."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return next((style for style in _JSON_STYLES if json.dumps(value, **style) == answer), None)


def weak_slices(loop: LoopSettings, database: Database) -> WeakSlices:
    """Return the weak slices of the newest report, for the model that serves since; none before the first report."""
    newest = next(iter(list_comparisons(database, loop.name)), None)
    if newest is None:
        return WeakSlices([])
    try:
        slices = slices_of_report(newest.report_path.with_name(JSON), "challenger" if newest.promote else "champion")
    except ReportError:  # it was deleted, so nothing is known of slices
        return WeakSlices([])
    return WeakSlices(Slice(one.name, one.correct / one.total, one.prompts) for one in slices if one.total)


class ReviewSession:
    """One reviewer's way through the queue.

    Args:
        queue: what `review_queue` returned a while ago; None reads it now. `refresh` finds what has changed since.

    Attributes:
        queue: the examples, in order; at most `limit`.
        position: the index of the current example.
    """

    def __init__(
        self,
        loop: LoopSettings,
        database: Database,
        reviewer: str,
        limit: int | None = None,
        queue: Sequence[QueuedReview] | None = None,
    ) -> None:
        self._loop = loop
        self._database = database
        self._reviewer = reviewer
        self._reward = reward_function(loop.feedback)
        self._policy = loop_files.policy(loop)
        self._weak = weak_slices(loop, database)
        self._limit = limit
        self._undone = 0  # decisions of earlier sessions
        self._steps: list[tuple[int, ReviewKind | None]] = []  # position and decision; None for a skipped example
        self.queue = list(review_queue(loop, database) if queue is None else queue)[:limit]
        self.position = 0

    @property
    def current(self) -> ReviewCandidate:
        """The current example."""
        return self.queue[self.position].candidate

    def refresh(self) -> str | None:
        """Reload the current example; return why it cannot be decided on any more, or None if it can."""
        id = self.current.interaction.id
        with self._database.read() as connection:
            now = next(load_candidates(connection, self._loop.name, [str(id)], self._reward), None)
            decision = effective_decision(connection, self._loop.name, id)
        if now is None:
            return f"interaction {id} was deleted in the meantime"
        previous = self.current.previous_decision
        if decision is not None and decision != previous:
            return f"{decision.reviewer} decided {decision.kind} on interaction {id} in the meantime"
        reloaded = replace(now, previous_decision=previous)
        self.queue[self.position] = replace(self.queue[self.position], candidate=reloaded)
        return None

    def rejection_reason(self, answer: str) -> str | None:
        """Return why this answer to the current prompt would not train even if approved; None if it would train."""
        return rejection_reason(self.current.interaction, answer, self._policy)

    def decide(self, kind: ReviewKind, target: str) -> None:
        """Record a decision on the current example, and go on to the next.

        Raises:
            ReviewError: the example was deleted or has changed, or the text cannot be stored.
        """
        with self._database.write() as connection:
            record_decision(connection, self._loop.name, self.current, kind, target, self._reviewer, self._reward)
        self._steps.append((self.position, kind))
        self.position += 1

    def skip(self) -> None:
        """Go on to the next example without a decision."""
        self._steps.append((self.position, None))
        self.position += 1

    def undo(self) -> bool:
        """Undo the last step, or the reviewer's newest decision of an earlier session; return False if there is none.

        The example becomes the current one.
        """
        if self._steps:
            self.position, kind = self._steps.pop()
            if kind is not None:
                id = self.current.interaction.id
                with self._database.write() as connection:
                    undo_decision(connection, self._loop.name, self._reviewer, self._reward, id)
            return True
        with self._database.write() as connection:
            undone = undo_decision(connection, self._loop.name, self._reviewer, self._reward)
            found = load_candidates(connection, self._loop.name, [undone] if undone else [], self._reward)
            candidate = next(found, None)
        if candidate is None:
            return False
        self._undone += 1
        ranked = review_priority(
            _review_input(candidate, self._policy), self._policy, self._weak, self._loop.review_below
        )
        queued = QueuedReview(
            candidate, ranked.priority if ranked else 0.0, ranked.reasons if ranked else ("its decision was undone",)
        )
        others = [one for one in self.queue[self.position :] if str(one.candidate.interaction.id) != undone]
        self.queue[self.position :] = [queued, *others][: None if self._limit is None else self._limit - self.position]
        return True

    def counts(self) -> Counter[str]:
        """Return how many examples were approved ("approve"), edited, rejected and skipped, by the name of the step.

        "undo" counts decisions of earlier sessions that were undone.
        """
        return Counter([*(kind or "skip" for _, kind in self._steps), *["undo"] * self._undone])


def _review_input(candidate: ReviewCandidate, policy: Policy) -> ReviewInput:
    interaction, example, previous = candidate.interaction, candidate.example, candidate.previous_decision
    given = [as_confirmation(one, interaction) for one in candidate.feedback]
    rewards = {one.id: reward for one, reward in zip(given, candidate.rewards, strict=True)}
    by_people = [rewards[one.id] for one in given if one.kind in PERSON_KINDS]
    without_review = replace(policy, review_required=False)
    return ReviewInput(
        id=str(interaction.id),
        created_at=interaction.created_at,
        prompt=interaction.prompt,
        answer=candidate.answer,
        history=interaction.history,
        confidence=interaction.confidence,
        flag=interaction.flag,
        kind=interaction.kind,
        domain=interaction.domain,
        votes=tuple(_votes(candidate, given, rewards)),
        has_human_feedback=bool(by_people),
        rejected=any(reward < 0 for reward in by_people),
        would_train=example is not None and quick_filters(example, without_review).accepted,
        corrected_since=f"{previous.reviewer} decided {previous.kind}" if previous else "",
    )


def _votes(candidate: ReviewCandidate, given: Sequence[Feedback], rewards: Mapping[UUID, float]) -> Iterator[Vote]:
    """Yield the votes of people and of validators for and against each answer: what each user said last.

    Args:
        given: the candidate's feedback, with corrections that change nothing as confirmations.
    """
    about: defaultdict[tuple[str, bool], list[Feedback]] = defaultdict(list)
    for answers, one in zip(answers_meant(candidate.interaction, candidate.feedback), given, strict=True):
        for answer in answers:
            about[answer, one.kind in PERSON_KINDS].append(one)
    for (answer, _), judgments in about.items():
        for latest in latest_of_each_user(judgments).values():
            # Several at the same time may be of several people without names, so each of them is a vote.
            for one in latest:
                if one.kind == "correction" or rewards[one.id]:
                    yield Vote(answer, one.kind == "correction" or rewards[one.id] > 0)
