"""The reward of a feedback, from -1.0 to +1.0."""

import re
from collections.abc import Callable, Mapping
from difflib import SequenceMatcher
from importlib import import_module

from finetune_pipeline.records import Feedback, Interaction, Rating, same_answer
from finetune_pipeline.settings import FeedbackSettings, SettingsError

RewardFunction = Callable[[Feedback, Interaction], float]

_TOKENS = re.compile(r"\w+|[^\w\s]")


SUCCESS_SCORE = 80
"""The lowest validation score of a success."""


def as_confirmation(feedback: Feedback, interaction: Interaction) -> Feedback:
    """Return a correction to the logged output itself as a thumbs-up, since it confirms the output.

    The same JSON in another notation is the same output. Any other feedback is returned unchanged.
    """
    if feedback.kind != "correction" or not same_answer(feedback.correction or "", interaction.output):
        return feedback
    return feedback.model_copy(update={"kind": "thumbs_up", "correction": None, "output_hash": None, "score": None})


def default_reward(
    feedback: Feedback, interaction: Interaction, ratings: Mapping[Rating, float] = FeedbackSettings().ratings
) -> float:
    """Return the reward of one feedback by the project's table of rewards.

    - A feedback with a `reward` has this reward.
    - A validation score has -1.0 at 0, -0.3 at 60, +0.8 at 80 and +1.0 at 100, and is linear in between.
    - A correction has +0.2 to +0.6: the less it changes, the higher. One that changes nothing is a thumbs-up.
    - A thumb has +1.0 or -1.0; with a score of 0 to 100 as its strength, +0.7 to +1.0 or -0.9 to -1.0.
    - A rating has its value in `ratings`.
    """
    if feedback.reward is not None:
        return feedback.reward
    feedback = as_confirmation(feedback, interaction)
    if feedback.rating is not None and feedback.kind == "rating":
        return ratings[feedback.rating]
    strength = 1.0 if feedback.score is None else feedback.score / 100
    match feedback.kind:
        case "correction":
            return 0.2 + 0.4 * similarity(interaction.output, feedback.correction or "")
        case "thumbs_up":
            return 0.7 + 0.3 * strength
        case "thumbs_down":
            return -0.9 - 0.1 * strength
        case _:
            return score_reward(feedback.score or 0.0)


def score_reward(score: float) -> float:
    """Return the reward of a validation score, 0 to 100: continuous, with failures below 60 and successes from 80."""
    if score >= SUCCESS_SCORE:
        return 0.8 + 0.2 * (score - SUCCESS_SCORE) / 20
    if score >= 60:
        return -0.3 + 1.1 * (score - 60) / 20
    return -1.0 + 0.7 * score / 60


def similarity(old: str, new: str) -> float:
    """Return the token-level similarity of two texts (difflib ratio), 0 to 1; tokens are words and punctuation."""
    return SequenceMatcher(None, _TOKENS.findall(old), _TOKENS.findall(new), autojunk=False).ratio()


def reward_function(settings: FeedbackSettings) -> RewardFunction:
    """Return the loop's own reward function, clipped to -1 to 1, or the default with the loop's ratings.

    Raises:
        SettingsError: the loop's own function cannot be imported.
    """
    dotted_path = settings.reward_function
    if dotted_path is None:
        return lambda feedback, interaction: default_reward(feedback, interaction, settings.ratings)
    module, _, name = dotted_path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"feedback.reward_function: {dotted_path!r} cannot be imported ({error}); expected package.module.function"
        ) from error

    def clipped(feedback: Feedback, interaction: Interaction) -> float:
        return max(-1.0, min(1.0, float(function(as_confirmation(feedback, interaction), interaction))))

    return clipped
