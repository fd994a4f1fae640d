"""Experiment trackers of Hugging Face's Trainer: TensorBoard, Weights & Biases, MLflow.

Their own environment variables (`WANDB_PROJECT`, `MLFLOW_TRACKING_URI`, ...) say where to report; TensorBoard's files
are beside the adapter.
"""

import importlib.util
import os
from pathlib import Path

from finetune_pipeline.settings import TrainingSettings
from finetune_pipeline.training.job import TrainingError

TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files, beside the adapter."""

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}  # any of them


def check_trackers(settings: TrainingSettings) -> None:
    """Raise TrainingError unless every tracker in `report_to` is installed."""
    for name in settings.report_to:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
            raise TrainingError(
                f"training.report_to names {name}, which is not installed; pip install {name}, or remove it"
            )


def set_tensorboard_folder(output: Path) -> None:
    """Have TensorBoard write beside the adapter, unless its own variable says otherwise."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / TENSORBOARD))
