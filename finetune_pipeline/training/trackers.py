"""Experiment trackers that Hugging Face's Trainer reports to: TensorBoard, Weights & Biases, MLflow.

Where they report to is set by their own environment variables (`WANDB_PROJECT`, `MLFLOW_TRACKING_URI`, ...);
TensorBoard's files lie with the adapter.
"""

import importlib.util
import os
from pathlib import Path

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.job import TrainingError

TENSORBOARD = "tensorboard"
"""The folder of TensorBoard's files, beside the adapter."""

# Either package will do for TensorBoard, as for the Trainer.
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}


def check_trackers(settings: TrainingSettings) -> None:
    """Raise TrainingError unless every tracker in `report_to` is installed."""
    for name in settings.report_to:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
            raise TrainingError(
                f"training.report_to names {name}, which is not installed; pip install {name}, or take it out"
            )


def tracker_variables() -> dict[str, str]:
    """The environment variables that say where and as whom to report, for processes of other machines."""
    return {name: value for name, value in os.environ.items() if name.startswith(("WANDB_", "MLFLOW_"))}


def settle_trackers(output: Path) -> None:
    """Let TensorBoard write where the adapter will lie, unless its own variable says otherwise."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / TENSORBOARD))
