"""Which answers a person should review, and in which order: a pure rule that states its reasons.

The priority of a review is how likely the answer is wrong or unsettled, raised where the model is weak:

    priority = uncertainty * (1 + weakness)

Uncertainty (0 to 1) combines independent signals as 1 - (1 - a)(1 - b)...: PRIOR for every answer that nobody has
reviewed; 1 - confidence of an answer below the loop's threshold; FLAGGED for a flagged answer; REJECTED_ANSWER if a
person rejected the answer and nobody corrected it; and where feedback disagrees, the fraction of votes against the
leading answer. Weakness (0 to 1) is the error rate of the weak benchmark slice that the prompt resembles, times the
similarity.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import prod

from finetune_pipeline.curation.acceptance import Policy, benchmark_overlap
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.records import Turn, canonical_answer, conversation_text, normalize

PRIOR = 0.05
FLAGGED = 0.5
REJECTED_ANSWER = 0.9
MAX_WEAK_SLICES = 3
MIN_SIMILARITY = 0.3
"""Jaccard similarity from which a prompt counts as similar to a prompt of a slice."""


@dataclass(frozen=True)
class Vote:
    """One feedback as a vote for or against an answer, which is named by its canonical form."""

    answer: str
    correct: bool


@dataclass(frozen=True)
class ReviewInput:
    """What the priority of a review is computed from.

    Attributes:
        id: the caller's name for it.
        created_at: of equal priorities, or of the same prompt and answer, the newest comes first, whenever it arrived.
        votes: the votes for and against its answers.
        has_human_feedback: whether a person gave feedback.
        rejected: whether a person gave a thumbs-down.
        would_train: whether it would train if no review were required.
        corrected_since: the decision that a person's correction came after, in words; empty if there is none.
    """

    id: str
    created_at: datetime
    prompt: str
    answer: str
    history: tuple[Turn, ...] = ()
    confidence: float | None = None
    flag: str | None = None
    kind: str | None = None
    domain: str | None = None
    votes: tuple[Vote, ...] = ()
    has_human_feedback: bool = False
    rejected: bool = False
    would_train: bool = False
    corrected_since: str = ""


@dataclass(frozen=True)
class ReviewPriority:
    """The priority (0 to 2) of a review, and the reasons for it."""

    id: str
    created_at: datetime
    priority: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Slice:
    """A slice of the benchmark: the fraction of it that is answered correctly, and its prompts."""

    name: str
    accuracy: float
    prompts: tuple[str, ...] = ()


class WeakSlices:
    """The slices in which the model is weakest: up to MAX_WEAK_SLICES, of those below the mean of all slices."""

    def __init__(self, slices: Iterable[Slice]) -> None:
        every = list(slices)
        mean = sum(one.accuracy for one in every) / len(every) if every else 0.0
        lowest = sorted((one for one in every if one.accuracy < mean), key=lambda one: (one.accuracy, one.name))
        self._slices = {one.name: one for one in lowest[:MAX_WEAK_SLICES]}
        self._index = NearIndex(
            {f"{name}\n{n}": text for name, one in self._slices.items() for n, text in enumerate(one.prompts)}
        )

    def __bool__(self) -> bool:
        return bool(self._slices)

    def match(self, given: ReviewInput) -> tuple[Slice, float] | None:
        """Return the weak slice that a kind or domain names (similarity 1) or that the prompt resembles."""
        named = {normalize(name) for name in (given.kind, given.domain) if name}
        for name, one in self._slices.items():
            if normalize(name) in named:
                return one, 1.0
        nearest = self._index.nearest(given.prompt)
        if nearest is None or nearest[1] < MIN_SIMILARITY:
            return None
        return self._slices[nearest[0].partition("\n")[0]], nearest[1]


def rank(inputs: Iterable[ReviewInput], policy: Policy, weak: WeakSlices, below: float) -> list[ReviewPriority]:
    """Return those that need a review, the highest priority first; of the same prompt and answer, the newest.

    Args:
        below: a confidence below this is a reason.
    """
    oldest_first = sorted(inputs, key=lambda one: (one.created_at, one.id))
    distinct = {
        (normalize(conversation_text(one.prompt, one.history)), canonical_answer(one.answer)): one
        for one in oldest_first
    }
    found = [ranked for one in distinct.values() if (ranked := review_priority(one, policy, weak, below)) is not None]
    newest_first = sorted(found, key=lambda one: (one.created_at, one.id), reverse=True)
    return sorted(newest_first, key=lambda one: -one.priority)


def review_priority(given: ReviewInput, policy: Policy, weak: WeakSlices, below: float) -> ReviewPriority | None:
    """Return the priority of a review, or None if there is no reason for it or the example can never train."""
    signals = _uncertainty_signals(given, below)
    match = weak.match(given) if weak else None
    reasons = [reason for _, reason in signals]
    weakness = 0.0
    if match is not None:
        weak_slice, similarity = match
        weakness = (1 - weak_slice.accuracy) * similarity
        reasons.append(
            f"similar to the weak slice {weak_slice.name} ({weak_slice.accuracy:.0%} correct), "
            f"similarity {similarity:.2f}"
        )
    if policy.review_required and given.would_train:
        reasons.append("trains only if a reviewer approves it")
    if not reasons:
        return None
    too_long = len(conversation_text(given.prompt, given.history)) > policy.settings.max_prompt_chars
    if too_long or benchmark_overlap(given.prompt, given.history, policy):
        return None
    uncertainty = 1 - prod(1 - likelihood for likelihood in (PRIOR, *(likelihood for likelihood, _ in signals)))
    return ReviewPriority(given.id, given.created_at, uncertainty * (1 + weakness), tuple(reasons))


def disagreement(votes: Sequence[Vote]) -> float:
    """Return the fraction of the votes that are against the leading answer; 0 if no vote is for any answer."""
    votes_for = Counter(vote.answer for vote in votes if vote.correct)
    if not votes_for:
        return 0.0
    votes_against = Counter(vote.answer for vote in votes if not vote.correct)
    leading = max(votes_for, key=lambda answer: (votes_for[answer], -votes_against[answer], answer))
    against = votes_for.total() - votes_for[leading] + votes_against[leading]
    return against / (votes_for[leading] + against)


def _uncertainty_signals(given: ReviewInput, below: float) -> list[tuple[float, str]]:
    """Return the signals that the answer is wrong or unsettled, each as a likelihood and in words."""
    signals = []
    if given.corrected_since:
        signals.append((REJECTED_ANSWER, f"corrected since {given.corrected_since}"))
    if given.confidence is not None and given.confidence < below and not given.has_human_feedback:
        signals.append((1 - given.confidence, f"confidence {given.confidence:.2f}, below {below:.2f}"))
    elif given.flag is not None and not given.has_human_feedback:
        signals.append((FLAGGED, f"flagged: {given.flag}"))
    against = disagreement(given.votes)
    if against:
        signals.append((against, f"feedback disagrees: {against:.0%} of the votes are against the leading answer"))
    elif given.rejected and not any(vote.correct for vote in given.votes):
        signals.append((REJECTED_ANSWER, "a person gave a thumbs-down, and nobody corrected the answer"))
    return signals
