"""Interactions as a person looks at them: without secrets and personal data, and with what they train and why."""

from dataclasses import dataclass, replace
from uuid import UUID

from finetune_pipeline.curation.acceptance import INVALID, accept
from finetune_pipeline.curation.redaction import redact_example, redact_texts
from finetune_pipeline.database import Database
from finetune_pipeline.feedback.content_hash import example_hash
from finetune_pipeline.feedback.rewards import reward_function
from finetune_pipeline.feedback.search import InteractionFilter, search
from finetune_pipeline.feedback.store import StoredInteraction, find_interaction, judged_among
from finetune_pipeline.pipeline import loop_files
from finetune_pipeline.settings import LoopSettings, RedactionSettings


@dataclass(frozen=True)
class Trains:
    """What an interaction trains, and why it does or does not.

    Attributes:
        target: the answer that it trains; None if it trains nothing.
        accepted: whether curation would take it into the next dataset.
        reason: why, in a sentence.
    """

    target: str | None
    accepted: bool
    reason: str


@dataclass(frozen=True)
class InteractionView:
    """One interaction with its feedback and example, redacted.

    Attributes:
        rewards: the reward of each feedback.
        trains: what it trains.
    """

    stored: StoredInteraction
    rewards: tuple[float, ...]
    trains: Trains


def find_interactions(
    loop: LoopSettings, database: Database, wanted: InteractionFilter, limit: int, skip: int = 0
) -> list[StoredInteraction]:
    """Return the interactions that match, redacted, newest first; arguments as for `feedback.search.search`."""
    with database.read() as connection:
        found = search(connection, loop.name, wanted, limit, skip)
    return [redact_stored(one, loop.curation.redaction) for one in found]


def view_interaction(loop: LoopSettings, database: Database, id: UUID) -> InteractionView | None:
    """Return one interaction of a loop with its feedback and what it trains, redacted; None if there is none."""
    reward = reward_function(loop.feedback)
    with database.read() as connection:
        found = find_interaction(connection, id)
    if found is None or found.interaction.loop != loop.name:
        return None
    rewards = tuple(reward(one, found.interaction) for one in found.feedback)
    trains = what_it_trains(loop, database, found)
    return InteractionView(redact_stored(found, loop.curation.redaction), rewards, trains)


def what_it_trains(loop: LoopSettings, database: Database, found: StoredInteraction) -> Trains:
    """Return what an interaction trains by curation's own rules, redacted, and why it does or does not."""
    example = found.example
    if example is None:
        if found.feedback:
            return Trains(None, False, "As much feedback is for the answer as against it. Review it to decide.")
        return Trains(None, False, "The answer has no feedback. Rate or correct it.")
    policy = loop_files.policy(loop)
    redacted, _ = redact_example(example, policy.settings.redaction)
    decision = accept(redacted, policy)
    if not decision.accepted:
        problem = policy.problem(redacted.target) if decision.reason == INVALID else None
        return Trains(None, False, f"Curation leaves it out: {problem or decision.reason}.")
    content = example_hash(example)
    with database.read() as connection:
        judged = content in judged_among(connection, loop.name, [content])
    what = "the correction" if example.corrected else "the answer"
    if judged:
        return Trains(redacted.target, True, f"It trains {what}, and was in a dataset whose model was compared.")
    return Trains(redacted.target, True, f"It trains {what}, and counts as new unless another example has its prompt.")


def redact_stored(found: StoredInteraction, settings: RedactionSettings) -> StoredInteraction:
    """Return an interaction, its feedback and its example without secrets and personal data.

    A value that is found in one of the texts is replaced in all of them, by the same placeholder. The application's own
    metadata, which may hold anything, is left out.
    """
    interaction, example = found.interaction, found.example
    corrections = [one.correction for one in found.feedback if one.correction is not None]
    texts = [turn.content for turn in interaction.history]
    texts += [interaction.prompt, interaction.output, interaction.retrieved_context or "", interaction.provenance or ""]
    texts += [example.target if example else "", *corrections]
    clean, _ = redact_texts(texts, settings)
    contents, rest = clean[: len(interaction.history)], clean[len(interaction.history) :]
    prompt, output, context, provenance, target, *corrected = rest
    history = tuple(
        turn.model_copy(update={"content": content})
        for turn, content in zip(interaction.history, contents, strict=True)
    )
    same = {"history": history, "prompt": prompt, "output": output, "provenance": provenance or None}
    shown = interaction.model_copy(update={**same, "retrieved_context": context or None, "metadata": None})
    left = iter(corrected)
    feedback = tuple(
        one.model_copy(update={"correction": None if one.correction is None else next(left), "metadata": None})
        for one in found.feedback
    )
    changed = example.model_copy(update={**same, "target": target}) if example else None
    return replace(found, interaction=shown, feedback=feedback, example=changed)
