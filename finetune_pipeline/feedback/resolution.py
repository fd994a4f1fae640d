"""The example that results from an interaction and all its feedback, whatever the ids and the order of arrival."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from finetune_pipeline.feedback.rewards import RewardFunction, as_confirmation
from finetune_pipeline.records import (
    PERSON_KINDS,
    Example,
    Feedback,
    Interaction,
    canonical_answer,
    same_answer,
    text_hash,
)

JUDGMENT_KINDS = frozenset({"thumbs_up", "thumbs_down", "rating"})


def resolve(
    interaction: Interaction, feedback: Sequence[Feedback], ingest_offset: int, reward: RewardFunction
) -> Example | None:
    """Return the example of an interaction, or None if nothing was said about its answer, or as much for it as against.

    A person outranks a validator. The newest correction is the target; of several at the same time, the first in the
    order of their texts. A thumb or rating counts for the answer that it was given on: a thumbs-down on the logged
    output does not affect a correction, while one on the correction does. A correction to the logged output itself
    confirms it, like a thumbs-up, and replaces earlier corrections. `majority_reward` decides between several.
    """
    corrections = [one for one in feedback if one.kind == "correction"]
    given = [as_confirmation(one, interaction) for one in feedback]
    meant = answers_meant(interaction, feedback)

    def about(answer: str) -> list[Feedback]:
        answer = canonical_answer(answer)
        return [one for one, answers in zip(given, meant, strict=True) if answer in answers]

    if corrections:
        newest = max(one.created_at for one in corrections)
        correction = min(
            (one for one in corrections if one.created_at == newest),
            key=lambda one: (one.correction or "", reward(one, interaction)),
        )
        target = correction.correction or ""
        if not same_answer(target, interaction.output):
            judgments = [one for one in about(target) if one.kind in JUDGMENT_KINDS]
            later = [one for one in judgments if one.created_at >= newest]
            # As much against the correction as for it leaves it in place: its author is for it.
            judged = majority_reward(later, interaction, reward)
            rejected = judged is not None and judged < 0
            return Example.from_interaction(
                interaction,
                ingest_offset=ingest_offset,
                target=target,
                reward=judged if rejected else reward(correction, interaction),
                confidence=interaction.confidence,
                confirmed=not rejected,
                corrected=not rejected,
            )
    by_people = [one for one in about(interaction.output) if one.kind in PERSON_KINDS]
    value = majority_reward(by_people or about(interaction.output), interaction, reward)
    if value is None:
        return None
    return Example.from_interaction(
        interaction,
        ingest_offset=ingest_offset,
        target=interaction.output,
        reward=value,
        confidence=interaction.confidence,
        confirmed=bool(by_people) and value > 0,
        corrected=False,
    )


def majority_reward(feedback: Iterable[Feedback], interaction: Interaction, reward: RewardFunction) -> float | None:
    """Return the mean reward of the side that most users are on, or None if there is none or both have as many.

    Only the latest feedback of each user counts. A reward of 0 is on neither side: it decides if nobody is on a side.
    """
    by_user = (
        _majority([reward(one, interaction) for one in latest]) for latest in latest_of_each_user(feedback).values()
    )
    return _majority([value for value in by_user if value is not None])


def latest_of_each_user(feedback: Iterable[Feedback]) -> dict[str | None, list[Feedback]]:
    """Return what each user said last: one feedback, or several that were given at the same time.

    Feedback without a user counts as that of one more user: mostly a person who rates their own answer again.
    """
    by_user: defaultdict[str | None, list[Feedback]] = defaultdict(list)
    for one in feedback:
        by_user[one.user].append(one)
    return {
        user: [one for one in given if one.created_at == max(other.created_at for other in given)]
        for user, given in by_user.items()
    }


def _majority(rewards: Sequence[float]) -> float | None:
    # Sorted, since the last digit of a mean could depend on the order.
    positive = sorted(value for value in rewards if value > 0)
    negative = sorted(value for value in rewards if value < 0)
    if len(positive) == len(negative):
        return 0.0 if rewards and not positive else None
    return fmean(positive if len(positive) > len(negative) else negative)


def answers_meant(interaction: Interaction, feedback: Sequence[Feedback]) -> list[frozenset[str]]:
    """Return the answers that each feedback is about: a correction about its own text, others about the rated answer.

    An answer is named by its canonical form, because the same JSON in another notation is the same answer. A hash
    names an answer as it was written, but for case and white space, so it may be about several; one of an answer that
    is not among the output and the corrections is about an answer with this name.
    """
    by_hash: defaultdict[str, set[str]] = defaultdict(set)
    for text in (interaction.output, *(one.correction for one in feedback if one.correction)):
        by_hash[text_hash(text)].add(canonical_answer(text))

    def meant(one: Feedback) -> frozenset[str]:
        if one.correction or one.output_hash is None:
            return frozenset({canonical_answer(one.correction or interaction.output)})
        return frozenset(by_hash.get(one.output_hash, {one.output_hash}))

    return [meant(one) for one in feedback]
