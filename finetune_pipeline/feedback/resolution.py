"""What an interaction teaches: a pure function of the interaction and all its feedback, in whatever order it came."""

from collections.abc import Sequence

from finetune_pipeline.feedback.rewards import RewardFunction
from finetune_pipeline.records import PERSON_KINDS, Example, Feedback, Interaction, text_hash

_VERDICTS = frozenset({"thumbs_up", "thumbs_down", "rating"})


def resolve(
    interaction: Interaction, feedback: Sequence[Feedback], ingest_offset: int, reward: RewardFunction
) -> Example | None:
    """The example that an interaction gives, or None without feedback: then nothing is assumed.

    A person outranks a validator; later outranks earlier. The newest correction is the target. A thumb belongs to the
    output that it was given on, so one on the old answer does not touch a correction, while one on the correction does.
    """
    by_time = sorted(feedback, key=lambda item: (item.created_at, str(item.id)))
    corrections = [item for item in by_time if item.kind == "correction"]
    if corrections:
        return _corrected(interaction, corrections[-1], by_time, ingest_offset, reward)
    on_output = _about(by_time, interaction, text_hash(interaction.output))
    people = [item for item in on_output if item.kind in PERSON_KINDS]
    deciding = (people or on_output)[-1:]
    if not deciding:
        return None
    worth = reward(deciding[0], interaction)
    return Example.from_interaction(
        interaction,
        ingest_offset=ingest_offset,
        target=interaction.output,
        reward=worth,
        confidence=interaction.confidence,
        confirmed=deciding[0].kind == "thumbs_up" or (deciding[0].kind == "rating" and worth > 0),
        corrected=False,
    )


def _corrected(
    interaction: Interaction, correction: Feedback, by_time: list[Feedback], ingest_offset: int, reward: RewardFunction
) -> Example:
    target = correction.correction or ""
    verdicts = [item for item in _about(by_time, interaction, text_hash(target)) if item.kind in _VERDICTS]
    later = [item for item in verdicts if item.created_at >= correction.created_at]
    refused = bool(later) and reward(later[-1], interaction) < 0
    return Example.from_interaction(
        interaction,
        ingest_offset=ingest_offset,
        target=target,
        reward=reward(later[-1] if refused else correction, interaction),
        confidence=interaction.confidence,
        confirmed=not refused,
        corrected=not refused,
    )


def _about(feedback: list[Feedback], interaction: Interaction, target_hash: str) -> list[Feedback]:
    logged = text_hash(interaction.output)
    return [item for item in feedback if (item.output_hash or logged) == target_hash]
