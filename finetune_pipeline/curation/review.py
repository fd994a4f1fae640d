"""What deserves a person's eye, and how much: a pure rule, with its reasons in words.

The value of looking at an example is how likely its answer is wrong or unsettled, times what settling it is worth:

    value = doubt * (1 + weakness)

Doubt (0 to 1) puts independent signs together, 1 - (1 - a)(1 - b)...: PRIOR of what nobody looked at; 1 - confidence of
an answer below the loop's threshold; FLAGGED of one that was flagged; FOUND_BAD of one that a person refused and nobody
wrote anew; where people disagree, the share of those who are not for the answer that most are for. Weakness (0 to 1) is
the share of wrong answers in the weak slice of the benchmark that the question is like, times how like it is.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from finetune_pipeline.curation.acceptance import Policy, near_benchmark
from finetune_pipeline.curation.decontamination import NearIndex
from finetune_pipeline.records import Turn, conversation_text, normalize

PRIOR = 0.05
FLAGGED = 0.5
FOUND_BAD = 0.9
WEAK_SLICES = 3
LIKE = 0.3
"""Jaccard similarity from which a question is like one of a slice."""


@dataclass(frozen=True)
class Voice:
    """What one feedback says: this answer (by its text_hash) is right, or it is not."""

    answer: str
    right: bool


@dataclass(frozen=True)
class Case:
    """An answer that a person might look at.

    Attributes:
        key: its name for who asks.
        ingest_offset: the store's; of two cases of one value, or of the same words, the newest counts.
        voices: what was said of its answers.
        person: whether a person said anything.
        refused: whether a person said that it is wrong.
        trains: whether it would train if no review were required.
        since: who decided what before it was corrected anew; empty if nobody did.
    """

    key: str
    ingest_offset: int
    prompt: str
    answer: str
    history: tuple[Turn, ...] = ()
    confidence: float | None = None
    flag: str | None = None
    kind: str | None = None
    domain: str | None = None
    voices: tuple[Voice, ...] = ()
    person: bool = False
    refused: bool = False
    trains: bool = False
    since: str = ""


@dataclass(frozen=True)
class Ranked:
    """A case of the queue: what looking at it is worth (0 to 2), and why it deserves that."""

    key: str
    ingest_offset: int
    value: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Slice:
    """A part of the benchmark: the share of it that is answered right (0 to 1), and what it asks."""

    name: str
    right: float
    prompts: tuple[str, ...] = ()


class WeakSlices:
    """The slices in which the model is weakest, and which of them a question is like."""

    def __init__(self, slices: Iterable[Slice]) -> None:
        """Of these slices take the up to WEAK_SLICES lowest, of those that are below their mean."""
        every = list(slices)
        mean = sum(one.right for one in every) / len(every) if every else 0.0
        lowest = sorted((one for one in every if one.right < mean), key=lambda one: (one.right, one.name))
        self._slices = {one.name: one for one in lowest[:WEAK_SLICES]}
        self._index = NearIndex(
            {f"{name}\n{n}": text for name, one in self._slices.items() for n, text in enumerate(one.prompts)}
        )

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._slices)

    def like(self, case: Case) -> tuple[Slice, float] | None:
        """The weak slice that a case belongs to by its kind or domain (similarity 1), or is like by its words."""
        named = {normalize(name) for name in (case.kind, case.domain) if name}
        for name, one in self._slices.items():
            if normalize(name) in named:
                return one, 1.0
        nearest = self._index.nearest(case.prompt)
        if nearest is None or nearest[1] < LIKE:
            return None
        return self._slices[nearest[0].partition("\n")[0]], nearest[1]


def queue(cases: Iterable[Case], policy: Policy, weak: WeakSlices, below: float) -> list[Ranked]:
    """The cases that deserve a person's eye, the most valuable first; of the same words one.

    Those that can never train are left out, since no decision would change anything.

    Args:
        below: confidence below this is a reason.
    """
    oldest_first = sorted(cases, key=lambda case: case.ingest_offset)
    distinct = {(normalize(conversation_text(c.prompt, c.history)), c.answer.strip()): c for c in oldest_first}
    found = [ranked for case in distinct.values() if (ranked := rank(case, policy, weak, below)) is not None]
    return sorted(found, key=lambda one: (-one.value, -one.ingest_offset))


def rank(case: Case, policy: Policy, weak: WeakSlices, below: float) -> Ranked | None:
    """What looking at one case is worth, or None where there is no reason to."""
    signs = _signs(case, below)
    slice_ = weak.like(case) if weak else None
    reasons = [reason for _, reason in signs]
    if slice_ is not None:
        reasons.append(
            f"like the weak slice {slice_[0].name} ({slice_[0].right:.0%} right), similarity {slice_[1]:.2f}"
        )
    if policy.review_required and case.trains:
        reasons.append("trains only when a reviewer approves it")
    if not reasons or not _may_ever_train(case, policy):
        return None
    doubt = 1 - prod(1 - sign for sign in (PRIOR, *(sign for sign, _ in signs)))
    weakness = 0.0 if slice_ is None else (1 - slice_[0].right) * slice_[1]
    return Ranked(case.key, case.ingest_offset, doubt * (1 + weakness), tuple(reasons))


def disagreement(voices: Sequence[Voice]) -> float:
    """The share (0 to 1) of the voices that are not for the answer that most are for; 0 where none is for any."""
    right = Counter(voice.answer for voice in voices if voice.right)
    if not right:
        return 0.0
    wrong = Counter(voice.answer for voice in voices if not voice.right)
    leading = max(right, key=lambda answer: (right[answer], -wrong[answer], answer))
    against = right.total() - right[leading] + wrong[leading]
    return against / (right[leading] + against)


def _signs(case: Case, below: float) -> list[tuple[float, str]]:
    """Signs that the answer is wrong or unsettled, each as a likelihood and in words."""
    signs = []
    if case.since:
        signs.append((FOUND_BAD, f"corrected since {case.since}"))
    unsure = case.confidence is not None and case.confidence < below and not case.person
    if unsure and case.confidence is not None:
        signs.append((1 - case.confidence, f"confidence {case.confidence:.2f}, below {below:.2f}"))
    elif case.flag is not None and not case.person:
        signs.append((FLAGGED, f"flagged: {case.flag}"))
    against = disagreement(case.voices)
    if against:
        signs.append((against, f"opinions differ: {against:.0%} are against the answer that most are for"))
    elif case.refused and not any(voice.right for voice in case.voices):
        signs.append((FOUND_BAD, "a person found it wrong, and nobody wrote what is right"))
    return signs


def _may_ever_train(case: Case, policy: Policy) -> bool:
    too_long = len(conversation_text(case.prompt, case.history)) > policy.settings.max_prompt_chars
    return not too_long and not near_benchmark(case.prompt, case.history, policy)
