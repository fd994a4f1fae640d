"""The Dagster config of lora_adapter: training settings that can be set for one run in the launchpad."""

from typing import Any, Literal, get_origin

import dagster as dg
from pydantic import Field, create_model

from finetune_pipeline.pipeline.train import left_to_auto, left_to_preset
from finetune_pipeline.settings import LoopSettings, TrainingSettings

NOT_IN_THE_LAUNCHPAD = {
    "lora_target_modules",
    "trainable_token_indices",
    "loss_type",
    "loss_weights",
    "attn_implementation",
    "trainer_config",
    "lora_config",
    "report_to",
    "preset",
    "auto",
}
"""Settings that Dagster's config has no type for, or that set other settings."""


def training_config(loop: LoopSettings) -> type[dg.Config]:
    """Return the config of the launchpad, with a field for each plain training setting and the loop's defaults.

    A setting that the loop leaves to its preset or to auto is None and is filled when the step runs. So a base model
    that is missing or does not fit fails this loop's training, and not the loading of all loops.
    """
    left = dict.fromkeys(left_to_preset(loop), f"preset {loop.training.preset}")
    left |= dict.fromkeys(left_to_auto(loop), "auto")
    fields: dict[str, Any] = {}
    for name, field in TrainingSettings.model_fields.items():
        if name in left:
            # Dagster's config has no optional Literal.
            kind: Any = str if get_origin(field.annotation) is Literal else field.annotation
            description = f"{field.description} Empty: {left[name]} sets it."
            fields[name] = (kind | None, Field(default=None, description=description))
        elif name not in NOT_IN_THE_LAUNCHPAD:
            default = getattr(loop.training, name)
            fields[name] = (field.annotation, Field(default=default, description=field.description))
    return create_model("TrainingConfig", __base__=dg.Config, **fields)
