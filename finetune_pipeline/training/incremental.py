"""Going on from the champion's adapter: which examples to train on, and whether it can be done at all. Pure."""

from collections.abc import Collection, Sequence
from typing import Any

from finetune_pipeline.artifacts import hash_of

_SHAPE = ("adapter", "lora_r", "lora_alpha", "lora_target_modules", "trainable_token_indices")
"""Settings that an adapter has for good: one of others cannot be gone on with."""


def obstacle(settings: dict[str, Any], base_hash: str, champion: dict[str, Any], champion_base: str) -> str | None:
    """Why an adapter of these settings cannot go on from the champion's; None if it can.

    Args:
        settings, champion: TrainingSettings of both, as JSON values.
        base_hash, champion_base: of the base model now, and of the champion's.
    """
    if base_hash != champion_base:
        return "its base model is another one"
    if settings["method"] != champion.get("method"):  # what the one learnt from is not what the other learns from
        return f"it was trained by {champion.get('method')}, which learns from other answers than {settings['method']}"
    differing = [name for name in _SHAPE if settings[name] != champion.get(name)]
    return f"it was trained with other {', '.join(differing)}" if differing else None


def chosen(hashes: Sequence[str], known: Collection[str], older_for_each: float, seed: str) -> list[int]:
    """Which examples an incremental training takes: all new ones, and a sample of the older ones against forgetting.

    Args:
        hashes: content hash of every example of the dataset.
        known: hashes of what the champion was trained on.
        older_for_each: older examples for each new one, at most all.
        seed: another one samples others.

    Returns:
        Indices into `hashes`, ascending. None are new: empty.
    """
    new = [i for i, value in enumerate(hashes) if value not in known]
    older = [i for i, value in enumerate(hashes) if value in known]
    count = round(older_for_each * len(new))
    return sorted([*new, *_sample(older, hashes, seed)[:count]])


def with_both_labels(
    rows: Sequence[int], hashes: Sequence[str], labels: Sequence[bool], known: Collection[str], seed: str
) -> list[int]:
    """The chosen examples and, if they are all good or all bad, one older example of the other kind for each new one.

    KTO learns from both. At most all; where there is none of the other kind, the chosen ones as they are.

    Args:
        rows: from `chosen`.
        hashes, known, seed: as there.
        labels: of every example of the dataset: whether it was found good.
    """
    kinds = {labels[i] for i in rows}
    if len(kinds) != 1:
        return list(rows)
    others = [i for i, value in enumerate(hashes) if value in known and labels[i] not in kinds]
    count = sum(hashes[i] not in known for i in rows)
    return sorted([*rows, *_sample(others, hashes, seed)[:count]])


def _sample(older: Sequence[int], hashes: Sequence[str], seed: str) -> list[int]:
    return sorted(older, key=lambda i: hash_of([seed, hashes[i]]))
