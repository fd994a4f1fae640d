"""Incremental training from the champion's adapter: whether it is possible, and on which examples. Pure functions."""

from collections.abc import Collection, Sequence
from typing import Any

from finetune_pipeline.artifacts import hash_of

_ADAPTER_SETTINGS = (
    "adapter", "lora_r", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora", "lora_config",
    "trainable_token_indices",
)  # fmt: skip
"""Settings that must equal the champion's for a warm start."""


def obstacle_to_warm_start(
    settings: dict[str, Any], base_hash: str, champion: dict[str, Any], champion_base: str
) -> str | None:
    """Return why a run cannot be warm-started from the champion's adapter; None if it can.

    `settings` and `champion` are TrainingSettings as JSON values; the hashes are those of the base models.
    """
    if base_hash != champion_base:
        return "its base model differs"
    if settings["method"] != champion.get("method"):  # the methods learn from different examples
        return f"it was trained by {champion.get('method')}, which learns from other examples than {settings['method']}"
    differing = [name for name in _ADAPTER_SETTINGS if settings[name] != champion.get(name)]
    return f"it was trained with other {', '.join(differing)}" if differing else None


def select_examples(hashes: Sequence[str], known: Collection[str], replay_ratio: float, seed: str) -> list[int]:
    """Select all new examples, and a replay sample of older ones against catastrophic forgetting.

    Args:
        hashes: content hash of each example of the dataset.
        known: hashes of the examples that the champion was trained on.
        replay_ratio: older examples per new one, at most all.
        seed: of the sample.

    Returns:
        Ascending indices into `hashes`; empty if nothing is new.
    """
    new = [index for index, value in enumerate(hashes) if value not in known]
    older = [index for index, value in enumerate(hashes) if value in known]
    return sorted([*new, *_sample(older, hashes, seed)[: round(replay_ratio * len(new))]])


def with_both_labels(
    selected: Sequence[int], hashes: Sequence[str], labels: Sequence[bool], known: Collection[str], seed: str
) -> list[int]:
    """Add an older example of the other label for each new one, if all selected ones have the same label.

    KTO needs both labels. If there are none of the other label, the selected ones are returned unchanged. Arguments are
    as for `select_examples`; a label of True is desirable.
    """
    present = {labels[index] for index in selected}
    if len(present) != 1:
        return list(selected)
    others = [index for index, value in enumerate(hashes) if value in known and labels[index] not in present]
    count = sum(hashes[index] not in known for index in selected)
    return sorted([*selected, *_sample(others, hashes, seed)[:count]])


def _sample(older: Sequence[int], hashes: Sequence[str], seed: str) -> list[int]:
    return sorted(older, key=lambda index: hash_of([seed, hashes[index]]))
