"""The example that results from an interaction and all its feedback, independent of the order of arrival."""

from collections.abc import Sequence

from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.records import PERSON_KINDS, Example, Feedback, Interaction, text_hash

_JUDGMENT_KINDS = frozenset({"thumbs_up", "thumbs_down", "rating"})


def resolve(
    interaction: Interaction, feedback: Sequence[Feedback], ingest_offset: int, reward: RewardFunction
) -> Example | None:
    """Return the example of an interaction, or None without feedback on it: then nothing is assumed.

    A person outranks a validator; later feedback outranks earlier feedback. The newest correction is the target. A
    thumb or rating counts for the answer that it was given on: a thumbs-down on the logged output does not affect a
    correction, while one on the correction does.
    """
    logged = text_hash(interaction.output)

    def about(answer_hash: str, kinds: frozenset[str] | None = None) -> list[Feedback]:
        return [
            one
            for one in by_time
            if (one.output_hash or logged) == answer_hash and (kinds is None or one.kind in kinds)
        ]

    by_time = sorted(feedback, key=lambda one: (one.created_at, str(one.id)))
    corrections = [one for one in by_time if one.kind == "correction"]
    if corrections:
        correction = corrections[-1]
        target = correction.correction or ""
        later = [one for one in about(text_hash(target), _JUDGMENT_KINDS) if one.created_at >= correction.created_at]
        rejected = bool(later) and reward(later[-1], interaction) < 0
        return Example.from_interaction(
            interaction,
            ingest_offset=ingest_offset,
            target=target,
            reward=reward(later[-1] if rejected else correction, interaction),
            confidence=interaction.confidence,
            confirmed=not rejected,
            corrected=not rejected,
        )
    deciding = (about(logged, PERSON_KINDS) or about(logged))[-1:]
    if not deciding:
        return None
    value = reward(deciding[0], interaction)
    return Example.from_interaction(
        interaction,
        ingest_offset=ingest_offset,
        target=interaction.output,
        reward=value,
        confidence=interaction.confidence,
        confirmed=deciding[0].kind == "thumbs_up" or (deciding[0].kind == "rating" and value > 0),
        corrected=False,
    )
